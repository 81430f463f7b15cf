// The weights of a model, to which lists of terms are applied.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "pocketzo/kernels.h"

namespace binding {
namespace {

// Tensors to which terms are applied together. Keeps the arrays and packings alive.
class Segments {
 public:
  explicit Segments(const py::sequence& tensors) {
    for (const py::handle item : tensors) {
      const auto parts = item.cast<py::tuple>();
      if (parts.size() < 2 || parts.size() > 4)
        throw py::value_error("each item must be (array, tensor id[, packing[, momentum]]), got " + shown(item));
      auto array = checked(parts[0], "weight", true);
      segments_.push_back(segment_of(array, parts[1], py::int_(0)));
      if (array.ndim() > 1 && array.size() != 0)
        segments_.back().columns = segments_.back().size / static_cast<std::uint64_t>(array.shape(0));
      if (parts.size() > 2 && !parts[2].is_none()) {
        const auto& packing = parts[2].cast<const pz::Packing&>();
        checked_packed(array, packing);
        segments_.back().size = packing.rows * packing.columns;
        segments_.back().packing = &packing;
        packings_.push_back(py::reinterpret_borrow<py::object>(parts[2]));
      }
      if (parts.size() > 3 && !parts[3].is_none()) {
        auto momentum = checked(parts[3], "momentum");
        if (static_cast<std::uint64_t>(momentum.size()) != segments_.back().size)
          throw py::value_error("momentum must have as many elements as the weight, " +
                                std::to_string(segments_.back().size) + ", got " + std::to_string(momentum.size()));
        segments_.back().momentum = static_cast<float*>(momentum.mutable_data());
        arrays_.push_back(std::move(momentum));
      }
      arrays_.push_back(std::move(array));
    }
  }

  void apply(const py::array_t<pz::Term, py::array::c_style>& terms) const {
    if (terms.ndim() != 1) throw py::value_error("terms must be one-dimensional");
    const pz::Term* data = terms.data();
    const auto count = static_cast<std::size_t>(terms.size());
    const auto lacks = [](const pz::Segment& s) { return s.momentum == nullptr; };
    const bool lacking = std::any_of(segments_.begin(), segments_.end(), lacks);
    for (std::size_t t = 0; t < count; ++t) {
      const auto role = static_cast<std::uint8_t>(data[t].role);
      const auto distribution = static_cast<std::uint8_t>(data[t].distribution);
      const auto rounding = static_cast<std::uint8_t>(data[t].rounding);
      if (data[t].count > 3 || distribution > 1 || rounding > 2 || role > 2)
        throw py::value_error("term " + std::to_string(t) + " has " + std::to_string(data[t].count) +
                              " scales, distribution " + std::to_string(distribution) + ", rounding " +
                              std::to_string(rounding) + " and role " + std::to_string(role) +
                              "; at most 3, 1, 2 and 2 are known");
      if (data[t].rank > pz::kMaxRank || data[t].rank != data[0].rank || (data[t].rank != 0 && role != 0))
        throw py::value_error("term " + std::to_string(t) + " has rank " + std::to_string(data[t].rank) + " and role " +
                              std::to_string(role) + "; all terms must have the rank of the first, " +
                              std::to_string(data[0].rank) + ", which is at most " + std::to_string(pz::kMaxRank) +
                              ", and role 0 unless it is 0");
      if (role != 0 && lacking)
        throw py::value_error("term " + std::to_string(t) + " has role " + std::to_string(role) +
                              ", which needs the momentum of every tensor; one was given without");
    }
    // A factor's elements for all k have one subkey.
    for (const pz::Segment& s : segments_) {
      const std::uint64_t columns = s.packing != nullptr ? s.packing->columns : s.columns;
      const std::uint64_t longer = columns == 0 ? 0 : std::max(columns, s.size / columns);
      if (count != 0 && data[0].rank * ((longer + 63) / 64) > std::uint64_t{1} << 28)
        throw py::value_error("a matrix with " + std::to_string(longer) +
                              " rows or columns is too long for terms of rank " + std::to_string(data[0].rank) +
                              ": at most 2**34 / rank are possible");
    }
    // Other Python threads run meanwhile. The arrays stay alive; guarding the weights is up to the caller.
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

}  // namespace

void add_segments(py::module_& m) {
  using pz::Term;
  PYBIND11_NUMPY_DTYPE(Term, seed, draw, scale, decay, count, distribution, rounding, role, rank, unused, basis);
  m.attr("MAX_RANK") = pz::kMaxRank;
  m.attr("TERM") = py::dtype::of<Term>();
  py::class_<Segments>(m, "Segments")
      .def(py::init<const py::sequence&>(), py::arg("tensors"))
      .def("apply", &Segments::apply, py::arg("terms").noconvert())
      .def_property_readonly("size", &Segments::size);
}

}  // namespace binding
