// `generate` and `step`, which work on one array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "pocketzo/kernels.h"

namespace binding {
namespace {

void generate(py::handle out, py::handle seed, py::handle tensor, py::handle draw, py::handle offset,
              py::handle distribution) {
  auto array = checked(out, "out");
  const auto segment = segment_of(array, tensor, offset);
  const auto s = unsigned_integer<std::uint64_t>(seed, "seed");
  const auto d = unsigned_integer<std::uint64_t>(draw, "draw");
  const auto kind = distribution_of(distribution);
  const py::gil_scoped_release release;  // so that other Python threads run meanwhile
  pz::generate(segment, s, d, kind);
}

void step(py::handle w, py::handle seed, py::handle tensor,
          const std::vector<std::pair<py::object, py::object>>& passes, py::handle decay, py::handle offset,
          py::handle distribution, py::handle rounding) {
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
                     distribution_of(distribution),
                     pz::Rounding::nearest,
                     pz::Role::shift,
                     0,
                     {},
                     0});
  terms.front().decay = finite_float(decay, "decay");
  terms.front().rounding = rounding_of(rounding);
  const py::gil_scoped_release release;  // so that other Python threads run meanwhile
  pz::apply(&segment, 1, terms.data(), terms.size());
}

}  // namespace

void add_arrays(py::module_& m) {
  m.def("generate", &generate, py::arg("out"), py::kw_only(), py::arg("seed"), py::arg("tensor"), py::arg("draw"),
        py::arg("offset"), py::arg("distribution"));
  m.def("step", &step, py::arg("w"), py::kw_only(), py::arg("seed"), py::arg("tensor"), py::arg("passes"),
        py::arg("decay"), py::arg("offset"), py::arg("distribution"), py::arg("rounding"));
}

}  // namespace binding
