// The binding: checks what it is given, lets the interpreter go, makes one call. It refuses and never converts, because
// work on a converted copy would be lost without a word.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "pocketzo/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace py = pybind11;
namespace pz = pocketzo;

namespace {

std::string shown(py::handle value) { return py::repr(value).cast<std::string>(); }

py::object integer(py::handle value, const char* name) {
  auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be an integer, got " + shown(value));
  }
  return index;
}

template <typename T>
T unsigned_integer(py::handle value, const char* name) {
  const auto index = integer(value, name);
  const unsigned long long n = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred() != nullptr || n > std::numeric_limits<T>::max()) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must be in 0 .. 2**" + std::to_string(8 * sizeof(T)) + " - 1, got " +
                          shown(value));
  }
  return static_cast<T>(n);
}

float finite_float(py::handle value, const char* name) {
  const double v = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be a number, got " + shown(value));
  }
  if (!(std::fabs(v) <= std::numeric_limits<float>::max()))
    throw py::value_error(std::string(name) + " must be finite in float32, got " + shown(value));
  return static_cast<float>(v);
}

pz::Direction direction_of(py::handle name) {
  if (py::isinstance<py::str>(name)) {
    if (name.equal(py::str("gaussian"))) return pz::Direction::gaussian;
    if (name.equal(py::str("rademacher"))) return pz::Direction::rademacher;
  }
  throw py::value_error("direction must be 'gaussian' or 'rademacher', got " + shown(name));
}

pz::Rounding rounding_of(py::handle name) {
  if (py::isinstance<py::str>(name)) {
    if (name.equal(py::str("nearest"))) return pz::Rounding::nearest;
    if (name.equal(py::str("stochastic"))) return pz::Rounding::stochastic;
  }
  throw py::value_error("rounding must be 'nearest' or 'stochastic', got " + shown(name));
}

// The storage that a dtype is, if it is one. numpy has no bfloat16 of its own; that of ml_dtypes is known by its name.
bool storage_of(const py::dtype& dtype, pz::Storage& storage) {
  const auto name = py::str(dtype.attr("name")).cast<std::string>();
  if (!dtype.attr("isnative").cast<bool>()) return false;
  storage = name == "float16"    ? pz::Storage::float16
            : name == "bfloat16" ? pz::Storage::bfloat16
                                 : pz::Storage::float32;
  return storage != pz::Storage::float32 || name == "float32";
}

// The array itself: C-contiguous, aligned, writable, and float32 or, for weights, of another storage.
py::array checked(py::handle value, const char* name, bool weights = false) {
  const std::string kinds = weights ? "float32, float16 or bfloat16" : "float32";
  const std::string expected = std::string(name) + " must be a writable, C-contiguous " + kinds + " array";
  if (!py::isinstance<py::array>(value)) throw py::type_error(expected + ", got " + shown(py::type::handle_of(value)));
  auto array = py::reinterpret_borrow<py::array>(value);
  pz::Storage storage{};
  if (!storage_of(array.dtype(), storage) || !(weights || storage == pz::Storage::float32))
    throw py::type_error(expected + ", got dtype " + shown(py::str(array.dtype())));
  if ((array.flags() & py::array::c_style) == 0) throw py::value_error(expected + ", got one that is not contiguous");
  if (!array.writeable()) throw py::value_error(expected + ", got a read-only one");
  const auto size = static_cast<std::uintptr_t>(array.itemsize());
  if (reinterpret_cast<std::uintptr_t>(array.data()) % size != 0)
    throw py::value_error(expected + ", got one whose address is not a multiple of " + std::to_string(size));
  return array;
}

pz::Segment segment_of(py::array& array, py::handle tensor, py::handle offset) {
  pz::Segment s{array.mutable_data(), static_cast<std::uint64_t>(array.size()),
                unsigned_integer<std::uint64_t>(offset, "offset"), unsigned_integer<std::uint32_t>(tensor, "tensor")};
  storage_of(array.dtype(), s.storage);
  if (s.size > std::numeric_limits<std::uint64_t>::max() - s.offset)
    throw py::value_error("offset + size must not exceed 2**64 - 1, got offset " + shown(offset));
  return s;
}

std::uint64_t packed_size(const pz::Packing& p) { return p.rows * p.stride; }

pz::Packing packing_of(py::handle rows, py::handle columns, py::handle stride, py::handle depth, bool transposed) {
  const pz::Packing p{
      unsigned_integer<std::uint64_t>(rows, "rows"), unsigned_integer<std::uint64_t>(columns, "columns"),
      unsigned_integer<std::uint64_t>(stride, "stride"), unsigned_integer<std::uint64_t>(depth, "depth"), transposed};
  constexpr std::uint64_t kMost = std::uint64_t{1} << 34;
  if (p.rows == 0 || p.columns == 0 || p.rows > kMost / p.columns)
    throw py::value_error("rows * columns must be in 1 .. 2**34, got " + shown(rows) + " * " + shown(columns));
  if (p.stride < p.columns || p.stride % 16 != 0 || p.stride - p.columns >= kMost)
    throw py::value_error("stride must be a multiple of 16 and at least the columns, got " + shown(stride));
  if (p.depth == 0 || p.depth % 64 != 0 || p.depth >= kMost)
    throw py::value_error("depth must be a multiple of 64, got " + shown(depth));
  return p;
}

py::array checked_packed(py::handle value, const pz::Packing& p) {
  auto array = checked(value, "packed");
  if (static_cast<std::uint64_t>(array.size()) != packed_size(p))
    throw py::value_error("packed must have " + std::to_string(packed_size(p)) + " elements, got " +
                          std::to_string(array.size()));
  return array;
}

// Copies between packed memory and elements `offset` and following of the tensor.
template <bool In>
void copy(const pz::Packing& p, py::handle packed, py::handle values, py::handle offset) {
  auto memory = checked_packed(packed, p);
  auto array = checked(values, "values");
  const auto n = static_cast<std::uint64_t>(array.size());
  const auto from = unsigned_integer<std::uint64_t>(offset, "offset");
  if (from > p.rows * p.columns || n > p.rows * p.columns - from)
    throw py::value_error("offset + size must not exceed rows * columns, got offset " + shown(offset));
  auto* const inside = static_cast<float*>(memory.mutable_data());
  auto* const outside = static_cast<float*>(array.mutable_data());
  const py::gil_scoped_release release;  // a long copy must not stop other Python threads
  if (In)
    pz::pack(inside, p, outside, from, n);
  else
    pz::unpack(inside, p, outside, from, n);
}

// The tensors that one program of terms moves. Holds the arrays and packings, so that their memory stays.
class Segments {
 public:
  explicit Segments(const py::sequence& tensors) {
    for (const py::handle item : tensors) {
      const auto parts = item.cast<py::tuple>();
      if (parts.size() != 2 && parts.size() != 3)
        throw py::value_error("each item must be (array, tensor id) or (array, tensor id, packing), got " +
                              shown(item));
      auto array = checked(parts[0], "weight", true);
      segments_.push_back(segment_of(array, parts[1], py::int_(0)));
      if (parts.size() == 3 && !parts[2].is_none()) {
        const auto& packing = parts[2].cast<const pz::Packing&>();
        checked_packed(array, packing);
        segments_.back().size = packing.rows * packing.columns;
        segments_.back().packing = &packing;
        packings_.push_back(py::reinterpret_borrow<py::object>(parts[2]));
      }
      arrays_.push_back(std::move(array));
    }
  }

  void apply(const py::array_t<pz::Term, py::array::c_style>& terms) const {
    if (terms.ndim() != 1) throw py::value_error("terms must be one-dimensional");
    const pz::Term* data = terms.data();
    const auto count = static_cast<std::size_t>(terms.size());
    for (std::size_t t = 0; t < count; ++t) {
      const auto direction = static_cast<std::uint8_t>(data[t].direction);
      const auto rounding = static_cast<std::uint8_t>(data[t].rounding);
      if (data[t].count > 3 || direction > 1 || rounding > 2)
        throw py::value_error("term " + std::to_string(t) + " has " + std::to_string(data[t].count) +
                              " scales, direction " + std::to_string(direction) + " and rounding " +
                              std::to_string(rounding) + "; at most 3, 1 and 2 are known");
    }
    // Other Python threads go on; the arrays are ours and the weights are the caller's to guard.
    const py::gil_scoped_release release;
    pz::apply(segments_.data(), segments_.size(), data, count);
  }

  std::uint64_t size() const {
    std::uint64_t n = 0;
    for (const pz::Segment& s : segments_) n += s.size;
    return n;
  }

 private:
  std::vector<py::array> arrays_;
  std::vector<py::object> packings_;
  std::vector<pz::Segment> segments_;
};

// Puts fresh memory, in huge pages where the system has them, in the place of a private mapping of a file, and returns
// it. Whoever made the mapping goes on using the addresses, and unmaps them; `owner` keeps it from that.
py::array remap(py::handle address, py::handle size, const py::object& owner) {
#if defined(__linux__)
  const auto bytes = unsigned_integer<std::uint64_t>(size, "size") * sizeof(float);
  const auto at = unsigned_integer<std::uint64_t>(address, "address");
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  const auto place = reinterpret_cast<void*>(at);  // NOLINT: an address that /proc/self/maps told
  if (at % page != 0) throw py::value_error("address must be that of a page, got " + shown(address));
  const std::uint64_t length = (bytes + page - 1) / page * page;
  if (mmap(place, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != place) {
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
#if defined(MADV_HUGEPAGE)
  madvise(place, length, MADV_HUGEPAGE);  // a kernel without them goes on with small pages
#endif
  return py::array_t<float>({static_cast<py::ssize_t>(bytes / sizeof(float))}, static_cast<float*>(place), owner);
#else
  throw std::runtime_error("this system has no such mapping");
#endif
}

void generate(py::handle out, py::handle seed, py::handle tensor, py::handle draw, py::handle offset,
              py::handle direction) {
  auto array = checked(out, "out");
  const auto segment = segment_of(array, tensor, offset);
  const auto s = unsigned_integer<std::uint64_t>(seed, "seed");
  const auto d = unsigned_integer<std::uint64_t>(draw, "draw");
  const auto kind = direction_of(direction);
  const py::gil_scoped_release release;  // a long pass must not stop other Python threads
  pz::generate(segment, s, d, kind);
}

void step(py::handle w, py::handle seed, py::handle tensor,
          const std::vector<std::pair<py::object, py::object>>& passes, py::handle decay, py::handle offset,
          py::handle direction, py::handle rounding) {
  auto array = checked(w, "w", true);
  const auto segment = segment_of(array, tensor, offset);
  const auto s = unsigned_integer<std::uint64_t>(seed, "seed");
  if (passes.empty()) throw py::value_error("passes must hold at least one (draw, scale)");
  std::vector<pz::Term> terms;
  for (const auto& [draw, scale] : passes)
    terms.push_back({s,
                     unsigned_integer<std::uint64_t>(draw, "draw"),
                     {finite_float(scale, "scale"), 0, 0},
                     0,
                     1,
                     direction_of(direction),
                     pz::Rounding::nearest,
                     {}});
  terms.front().decay = finite_float(decay, "decay");
  terms.front().rounding = rounding_of(rounding);
  const py::gil_scoped_release release;  // a long pass must not stop other Python threads
  pz::apply(&segment, 1, terms.data(), terms.size());
}

std::vector<std::string> available() {
  const char* names[4];
  return {names, names + pz::available(names, std::size(names))};
}

void use(const std::string& name) {
  if (pz::use(name.c_str())) return;
  std::string known;
  for (const std::string& set : available()) known += (known.empty() ? "" : ", ") + set;
  throw py::value_error("instruction set '" + name +
                        "' is unknown, or this build or processor lacks it; there is: " + known);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "PocketZO's kernels. Use pocketzo.kernels.";
  m.attr("SPEC_VERSION") = pz::kSpecVersion;
  m.attr("__version__") = POCKETZO_VERSION;
  m.attr("MAX_THREADS") = pz::kMaxThreads;
  PYBIND11_NUMPY_DTYPE(pz::Term, seed, draw, scale, decay, count, direction, rounding, unused);
  m.attr("TERM") = py::dtype::of<pz::Term>();

  py::class_<pz::Packing>(m, "Packing")
      .def(py::init(&packing_of), py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("stride"),
           py::arg("depth"), py::arg("transposed"))
      .def_readonly("rows", &pz::Packing::rows)
      .def_readonly("columns", &pz::Packing::columns)
      .def_readonly("transposed", &pz::Packing::transposed)
      .def_property_readonly("size", &packed_size)
      .def("pack", &copy<true>, py::arg("packed"), py::arg("values"), py::arg("offset"))
      .def("unpack", &copy<false>, py::arg("packed"), py::arg("values"), py::arg("offset"));
  m.def(
      "packed_hash",
      [](const py::array_t<float, py::array::c_style>& data) {
        return pz::packed_hash(data.data(), static_cast<std::size_t>(data.nbytes()));
      },
      py::arg("data").noconvert());
  m.def("remap", &remap, py::arg("address"), py::arg("size"), py::arg("owner"));

  py::class_<Segments>(m, "Segments")
      .def(py::init<const py::sequence&>(), py::arg("tensors"))
      .def("apply", &Segments::apply, py::arg("terms").noconvert())
      .def_property_readonly("size", &Segments::size);

  m.def("generate", &generate, py::arg("out"), py::kw_only(), py::arg("seed"), py::arg("tensor"), py::arg("draw"),
        py::arg("offset"), py::arg("direction"));
  m.def("step", &step, py::arg("w"), py::kw_only(), py::arg("seed"), py::arg("tensor"), py::arg("passes"),
        py::arg("decay"), py::arg("offset"), py::arg("direction"), py::arg("rounding"));

  m.def("isa", &pz::instruction_set);
  m.def("available", &available);
  m.def("use", &use, py::arg("name"));
  m.def("has_half_arithmetic", &pz::has_half_arithmetic);
  m.def("threads", &pz::threads);
  m.def("set_threads", [](py::handle count) {
    const long n = PyLong_AsLong(integer(count, "threads").ptr());
    PyErr_Clear();  // where it is too large for a long, n is -1
    if (n < 1 || n > static_cast<long>(pz::kMaxThreads))
      throw py::value_error("threads must be in 1 .. " + std::to_string(pz::kMaxThreads) + ", got " + shown(count));
    bool done = false;
    {
      const py::gil_scoped_release release;  // joining threads must not hold up Python
      done = pz::set_threads(static_cast<unsigned>(n));
    }
    if (!done) throw std::runtime_error("the system refuses to start " + std::to_string(n - 1) + " threads");
  });
}
