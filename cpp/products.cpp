// `products`: regenerates sums of directions section by section, and reduces them.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "float_mode.h"
#include "job.h"
#include "kernel_set.h"
#include "pocketzo/kernels.h"
#include "pool.h"

namespace pocketzo {
namespace {

struct Products {
  const KernelSet* set;
  Segment segment;  // without memory
  const Term* terms;
  const std::size_t* counts;
  std::size_t vectors;
  double* partial;  // by unit, as `products` writes them
};

// Elements e .. e + n - 1 of a vector, and zeros for the others of their blocks. Returns the number of all.
std::size_t regenerate(float* out, const Job& job, std::uint32_t tensor, std::uint64_t e, std::uint64_t n) noexcept {
  const std::uint64_t lead = e % kBlock, all = (lead + n + kBlock - 1) / kBlock * kBlock;
  std::fill_n(out, all, 0.0f);
  apply_terms(job, Keys(job, tensor, e), out + lead, nullptr, e, n);
  return static_cast<std::size_t>(all);
}

double dot(const KernelSet& set, const float* a, const float* b, std::size_t n) noexcept {
  double sums[16] = {};
  set.dot(sums, a, b, n);
  for (std::size_t half = 8; half != 0; half /= 2)
    for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

void reduce_unit(const Products& p, std::uint64_t unit) noexcept {
  alignas(64) float first[kSection], other[kSection];
  const auto [begin, end] = range_of(p.segment, unit);
  double* const sums = p.partial + unit * 2 * p.vectors;
  std::fill_n(sums, 2 * p.vectors, 0.0);
  for (std::uint64_t e = begin; e < end;) {
    const std::uint64_t n = std::min(end - e, kSection - e % kSection);
    const Term* terms = p.terms;
    for (std::size_t i = 0; i < p.vectors; terms += p.counts[i++]) {
      const Job job = {p.set, nullptr, 0, terms, p.counts[i], false, false, false};
      float* const x = i == 0 ? first : other;
      const std::size_t all = regenerate(x, job, p.segment.tensor, e, n);
      const double square = dot(*p.set, x, x, all);
      sums[2 * i] += i == 0 ? square : dot(*p.set, first, x, all);
      sums[2 * i + 1] += square;
    }
    e += n;
  }
}

void work(Units& units, const void* context) noexcept {
  const FloatMode mode;
  std::uint64_t unit = 0;
  while (units.take(unit)) reduce_unit(*static_cast<const Products*>(context), unit);
}

}  // namespace

std::uint64_t products_room(std::uint64_t offset, std::uint64_t n, std::size_t vectors) noexcept {
  return ranges_of({nullptr, n, offset, 0}) * 2 * vectors;
}

void products(std::uint32_t tensor, std::uint64_t offset, std::uint64_t n, const Term* terms, const std::size_t* counts,
              std::size_t vectors, double* out, double* partial) noexcept {
  const Products p = {&current(), {nullptr, n, offset, tensor}, terms, counts, vectors, partial};
  const std::uint64_t units = ranges_of(p.segment);
  run(units, work, &p);
  const FloatMode mode;
  std::fill_n(out, 2 * vectors, 0.0);
  for (std::uint64_t unit = 0; unit < units; ++unit)
    for (std::size_t i = 0; i < 2 * vectors; ++i) out[i] += partial[unit * 2 * vectors + i];
}

}  // namespace pocketzo
