// The binding: checks what it is given, lets the interpreter go, makes one call. It refuses and never converts, because
// work on a converted copy would be lost without a word.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "pocketzo/kernels.h"

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

// The array itself: float32, C-contiguous, aligned, writable.
py::array checked(py::handle value, const char* name) {
  const std::string expected = std::string(name) + " must be a writable, C-contiguous float32 array";
  if (!py::isinstance<py::array>(value)) throw py::type_error(expected + ", got " + shown(py::type::handle_of(value)));
  auto array = py::reinterpret_borrow<py::array>(value);
  if (!array.dtype().equal(py::dtype::of<float>()))
    throw py::type_error(expected + ", got dtype " + shown(py::str(array.dtype())));
  if ((array.flags() & py::array::c_style) == 0) throw py::value_error(expected + ", got one that is not contiguous");
  if (!array.writeable()) throw py::value_error(expected + ", got a read-only one");
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(float) != 0)
    throw py::value_error(expected + ", got one whose address is not a multiple of 4");
  return array;
}

pz::Segment segment_of(py::array& array, py::handle tensor, py::handle offset) {
  pz::Segment s{static_cast<float*>(array.mutable_data()), static_cast<std::uint64_t>(array.size()),
                unsigned_integer<std::uint64_t>(offset, "offset"), unsigned_integer<std::uint32_t>(tensor, "tensor")};
  if (s.size > std::numeric_limits<std::uint64_t>::max() - s.offset)
    throw py::value_error("offset + size must not exceed 2**64 - 1, got offset " + shown(offset));
  return s;
}

// The tensors that one program of terms moves. Holds the arrays, so that their memory stays.
class Segments {
 public:
  explicit Segments(const py::list& tensors) {
    for (const py::handle item : tensors) {
      const auto pair = item.cast<py::tuple>();
      if (pair.size() != 2) throw py::value_error("each item must be (array, tensor id), got " + shown(item));
      auto array = checked(pair[0], "weight");
      segments_.push_back(segment_of(array, pair[1], py::int_(0)));
      arrays_.push_back(std::move(array));
    }
  }

  void apply(const py::array_t<pz::Term, py::array::c_style>& terms) const {
    if (terms.ndim() != 1) throw py::value_error("terms must be one-dimensional");
    const pz::Term* data = terms.data();
    const auto count = static_cast<std::size_t>(terms.size());
    for (std::size_t t = 0; t < count; ++t) {
      const auto direction = static_cast<std::uint8_t>(data[t].direction);
      if (data[t].count > 3 || direction > 1)
        throw py::value_error("term " + std::to_string(t) + " has " + std::to_string(data[t].count) +
                              " scales and direction " + std::to_string(direction) + "; at most 3 and 1 are known");
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
  std::vector<pz::Segment> segments_;
};

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
          py::handle direction) {
  auto array = checked(w, "w");
  const auto segment = segment_of(array, tensor, offset);
  const auto s = unsigned_integer<std::uint64_t>(seed, "seed");
  std::vector<pz::Term> terms;
  for (const auto& [draw, scale] : passes)
    terms.push_back({s,
                     unsigned_integer<std::uint64_t>(draw, "draw"),
                     {finite_float(scale, "scale"), 0, 0},
                     0,
                     1,
                     direction_of(direction),
                     {}});
  terms.front().decay = finite_float(decay, "decay");
  const py::gil_scoped_release release;  // a long pass must not stop other Python threads
  pz::apply(&segment, 1, terms.data(), terms.size());
}

void use(const std::string& name) {
  const pz::KernelSet* set = pz::find(name.c_str());
  if (set == nullptr) {
    std::string known;
    const pz::KernelSet* sets[4];
    for (std::size_t i = 0, n = pz::available(sets, 4); i < n; ++i)
      known += (i == 0 ? "" : ", ") + std::string(sets[i]->name);
    throw py::value_error("instruction set '" + name +
                          "' is unknown, or this build or processor lacks it; there is: " + known);
  }
  pz::use(*set);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "PocketZO's kernels. Use pocketzo.kernels.";
  m.attr("SPEC_VERSION") = pz::kSpecVersion;
  m.attr("__version__") = POCKETZO_VERSION;
  PYBIND11_NUMPY_DTYPE(pz::Term, seed, draw, scale, decay, count, direction, unused);
  m.attr("TERM") = py::dtype::of<pz::Term>();

  py::class_<Segments>(m, "Segments")
      .def(py::init<const py::list&>(), py::arg("tensors"))
      .def("apply", &Segments::apply, py::arg("terms").noconvert())
      .def_property_readonly("size", &Segments::size);

  m.def("generate", &generate, py::arg("out"), py::kw_only(), py::arg("seed"), py::arg("tensor"), py::arg("draw"),
        py::arg("offset"), py::arg("direction"));
  m.def("step", &step, py::arg("w"), py::kw_only(), py::arg("seed"), py::arg("tensor"), py::arg("passes"),
        py::arg("decay"), py::arg("offset"), py::arg("direction"));

  m.def("isa", [] { return pz::current().name; });
  m.def("available", [] {
    const pz::KernelSet* sets[4];
    std::vector<std::string> names;
    for (std::size_t i = 0, n = pz::available(sets, 4); i < n; ++i) names.emplace_back(sets[i]->name);
    return names;
  });
  m.def("use", &use, py::arg("name"));
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
