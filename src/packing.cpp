// Packed weights: memory in the layout of onnxruntime's matrix product.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "pocketzo/kernels.h"
#include "pocketzo/remap.h"

namespace binding {
namespace {

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

// Copies between packed memory and the tensor's elements from `offset` on.
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
  const py::gil_scoped_release release;  // so that other Python threads run meanwhile
  if (In)
    pz::pack(inside, p, outside, from, n);
  else
    pz::unpack(inside, p, outside, from, n);
}

// Returns rows of the tensor: an array of the shape of `rows`, and one more axis.
py::array take(const pz::Packing& p, py::handle packed, const py::array_t<std::int64_t, py::array::c_style>& rows) {
  auto memory = checked_packed(packed, p);
  const std::uint64_t height = p.transposed ? p.columns : p.rows, width = p.transposed ? p.rows : p.columns;
  std::vector<std::uint64_t> at(static_cast<std::size_t>(rows.size()));
  for (std::size_t i = 0; i < at.size(); ++i) {
    const std::int64_t row = rows.data()[i];
    at[i] = static_cast<std::uint64_t>(row) + (row < 0 ? height : 0);
    if (at[i] >= height)
      throw py::index_error("row " + std::to_string(row) + " of a tensor with " + std::to_string(height) + " rows");
  }
  std::vector<py::ssize_t> shape(rows.shape(), rows.shape() + rows.ndim());
  shape.push_back(static_cast<py::ssize_t>(width));
  py::array_t<float> values(shape);
  float* const out = values.mutable_data();
  const auto* const in = static_cast<const float*>(memory.data());
  const py::gil_scoped_release release;
  pz::take(in, p, at.data(), at.size(), out);
  return values;
}

std::uint64_t hash(const py::array_t<float, py::array::c_style>& data) {
  return pz::packed_hash(data.data(), static_cast<std::size_t>(data.nbytes()));
}

// Returns the new memory as an array that keeps `owner`, the session that made the mapping and will unmap it, alive.
py::array remap(py::handle address, py::handle size, const py::object& owner) {
  const auto n = unsigned_integer<std::uint64_t>(size, "size");
  constexpr auto kMost = std::uint64_t{std::numeric_limits<std::ptrdiff_t>::max()} / sizeof(float);
  if (n > kMost) throw py::value_error("size must be at most " + std::to_string(kMost) + ", got " + shown(size));
  const auto at = unsigned_integer<std::uintptr_t>(address, "address");
  auto* const memory = reinterpret_cast<float*>(at);  // NOLINT: an address that /proc/self/maps named
  const int error = pz::remap(memory, n * sizeof(float));
  if (error == EINVAL)
    throw py::value_error("address must be that of a page, and size not 0, got " + shown(address) + " and " +
                          shown(size));
  if (error != 0) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  return py::array_t<float>({static_cast<py::ssize_t>(n)}, memory, owner);
}

}  // namespace

void add_packing(py::module_& m) {
  py::class_<pz::Packing>(m, "Packing")
      .def(py::init(&packing_of), py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("stride"),
           py::arg("depth"), py::arg("transposed"))
      .def_readonly("rows", &pz::Packing::rows)
      .def_readonly("columns", &pz::Packing::columns)
      .def_readonly("transposed", &pz::Packing::transposed)
      .def_property_readonly("size", &packed_size)
      .def("pack", &copy<true>, py::arg("packed"), py::arg("values"), py::arg("offset"))
      .def("unpack", &copy<false>, py::arg("packed"), py::arg("values"), py::arg("offset"))
      .def("take", &take, py::arg("packed"), py::arg("rows").noconvert());
  m.def("packed_hash", &hash, py::arg("data").noconvert());
  m.def("remap", &remap, py::arg("address"), py::arg("size"), py::arg("owner"));
}

}  // namespace binding
