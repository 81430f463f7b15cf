// Products of sums of directions, which work on no array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "pocketzo/kernels.h"

namespace binding {
namespace {

using Vectors = std::vector<std::vector<std::pair<py::object, py::object>>>;

py::array_t<double> products(py::handle n, py::handle seed, py::handle tensor, const Vectors& vectors,
                             py::handle offset, py::handle distribution) {
  const auto size = unsigned_integer<std::uint64_t>(n, "n"), from = unsigned_integer<std::uint64_t>(offset, "offset");
  const auto id = unsigned_integer<std::uint32_t>(tensor, "tensor");
  const auto s = unsigned_integer<std::uint64_t>(seed, "seed");
  const auto kind = distribution_of(distribution);
  if (size == 0 || size > std::numeric_limits<std::uint64_t>::max() - from)
    throw py::value_error("n must be in 1 .. 2**64 - 1 - offset, got " + shown(n) + " with offset " + shown(offset));
  if (vectors.empty()) throw py::value_error("vectors must hold at least one");
  std::vector<pz::Term> terms;
  std::vector<std::size_t> counts;
  for (const auto& vector : vectors) {
    counts.push_back(vector.size());
    for (const auto& [draw, scale] : vector)
      terms.push_back({s,
                       unsigned_integer<std::uint64_t>(draw, "draw"),
                       {finite_float(scale, "scale"), 0, 0},
                       0,
                       1,
                       kind,
                       pz::Rounding::nearest,
                       pz::Role::shift,
                       0,
                       {},
                       0});
  }
  py::array_t<double> found({static_cast<py::ssize_t>(counts.size()), py::ssize_t{2}});
  double* const out = found.mutable_data();
  std::vector<double> partial(static_cast<std::size_t>(pz::products_room(from, size, counts.size())));
  const py::gil_scoped_release release;  // so that other Python threads run meanwhile
  pz::products(id, from, size, terms.data(), counts.data(), counts.size(), out, partial.data());
  return found;
}

}  // namespace

void add_products(py::module_& m) {
  m.def("products", &products, py::arg("n"), py::kw_only(), py::arg("seed"), py::arg("tensor"), py::arg("vectors"),
        py::arg("offset"), py::arg("distribution"));
}

}  // namespace binding
