// `apply` and `generate`: shares the units of a job among threads, and does those of contiguous fp32 segments.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "float_mode.h"
#include "job.h"
#include "kernel_set.h"
#include "pocketzo/kernels.h"
#include "pool.h"

namespace pocketzo {
namespace {

// Kernels take whole blocks: a partial block at either end is processed in a copy.
void apply_term(const KernelSet& set, const Term& term, const Key& key, float* w, std::uint64_t e,
                std::uint64_t n) noexcept {
  const auto kernel = kernel_of(set, term);
  const auto partial = [&](float* at, std::uint64_t from, std::uint64_t count) {
    alignas(64) float block[kBlock] = {};
    const std::uint64_t lead = from % kBlock;
    std::memcpy(block + lead, at, count * sizeof(float));
    kernel({block, 16, kBlock, from / kBlock, 1, 1}, key, term.scale);
    std::memcpy(at, block + lead, count * sizeof(float));
  };
  float* const start = w;
  const std::uint64_t size = n;
  if (e % kBlock != 0) {
    const std::uint64_t count = std::min(n, kBlock - e % kBlock);
    partial(w, e, count);
    w += count;
    e += count;
    n -= count;
  }
  if (n >= kBlock) kernel({w, 16, kBlock, e / kBlock, 1, static_cast<std::size_t>(n / kBlock)}, key, term.scale);
  if (n % kBlock != 0) partial(w + n - n % kBlock, e + n - n % kBlock, n % kBlock);
  if (term.decay != 0.0f) set.shrink(start, size, term.decay);
}

// As several calls of `apply_term`, with one z: the terms from t on that apply it, to the weights or to their momentum.
// Returns the number of the last of them.
std::size_t apply_repeated(const Job& job, std::size_t t, const Key& key, float* w, float* m, std::uint64_t e,
                           std::uint64_t n) noexcept {
  alignas(64) float z[kTileMomentum];
  const std::uint64_t first = e / kBlock, lead = e % kBlock, blocks = (lead + n + kBlock - 1) / kBlock;
  kernel_of(*job.set, job.terms[t].distribution, 0)({z, 16, kBlock, first, 1, static_cast<std::size_t>(blocks)}, key,
                                                    nullptr);
  for (;; ++t) {
    const Term& term = job.terms[t];
    float* const target = term.role == Role::gather ? m : w;
    for (unsigned i = 0; i < term.count; ++i) job.set->axpy(target, z + lead, term.scale[i], n);
    if (term.decay != 0.0f) job.set->shrink(target, n, term.decay);
    if (!job.repeats(t)) return t;
  }
}

void apply_contiguous(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const auto [begin, end] = range_of(s, unit);
  const Keys keys(job, s.tensor, begin);
  const std::uint64_t tile = job.momentum ? kTileMomentum : job.term_count == 1 ? kUnit : kTile;
  for (std::uint64_t e = begin; e < end;) {
    const std::uint64_t n = std::min(end - e, tile - e % tile);
    apply_terms(job, keys, static_cast<float*>(s.data) + (e - s.offset), job.momentum_at(s, e), e, n);
    e += n;
  }
}

std::uint64_t units_of(const Job& job, const Segment& s) noexcept {
  if (s.size == 0) return 0;
  if (is_low_rank(job, s)) return low_rank_units_of(s);
  return s.packing != nullptr ? packed_units_of(job, s) : ranges_of(s);
}

void apply_unit(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  if (is_low_rank(job, s)) return apply_low_rank(job, s, unit);
  if (s.storage != Storage::float32) return apply_16bit(job, s, unit);
  if (s.packing != nullptr) return apply_packed(job, s, unit);
  apply_contiguous(job, s, unit);
}

void work(Units& units, const void* context) noexcept {
  const Job& job = *static_cast<const Job*>(context);
  const FloatMode mode;
  std::size_t at = 0;
  std::uint64_t before = 0, unit = 0;  // before: units of the segments before `at`
  while (units.take(unit)) {
    std::uint64_t here = units_of(job, job.segments[at]);
    while (unit - before >= here) {
      before += here;
      here = units_of(job, job.segments[++at]);
    }
    apply_unit(job, job.segments[at], unit - before);
  }
}

void run_job(const Job& job) noexcept {
  std::uint64_t units = 0;
  for (std::size_t i = 0; i < job.segment_count; ++i) units += units_of(job, job.segments[i]);
  if (units != 0 && job.term_count != 0) run(units, work, &job);
}

}  // namespace

void apply_terms(const Job& job, const Keys& keys, float* w, float* m, std::uint64_t e, std::uint64_t n) noexcept {
  for (std::size_t t = 0; t < job.term_count; ++t) {
    const Term& term = job.terms[t];
    float* const target = term.role == Role::gather ? m : w;
    if (job.momentum && job.repeats(t)) {
      t = apply_repeated(job, t, keys[t], w, m, e, n);
    } else if (job.uses_noise(term)) {
      apply_term(*job.set, term, keys[t], target, e, n);
    } else {
      for (unsigned i = 0; i < term.count; ++i) job.set->axpy(target, m, term.scale[i], n);
      if (term.decay != 0.0f) job.set->shrink(target, n, term.decay);
    }
  }
}

void apply(const Segment* segments, std::size_t segment_count, const Term* terms, std::size_t term_count) noexcept {
  const bool momentum = std::any_of(terms, terms + term_count, [](const Term& t) { return t.role != Role::shift; });
  const bool low_rank = term_count != 0 && terms[0].rank != 0;
  run_job({&current(), segments, segment_count, terms, term_count, false, momentum, low_rank});
}

void generate(const Segment& segment, std::uint64_t seed, std::uint64_t draw, Distribution distribution) noexcept {
  const Term term = {seed, draw, {}, 0.0f, 0, distribution, Rounding::nearest, Role::shift, 0, {}, 0};
  run_job({&current(), &segment, 1, &term, 1, true, false, false});
}

}  // namespace pocketzo
