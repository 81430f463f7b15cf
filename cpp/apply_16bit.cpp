// Segments of 16-bit weights, in tiles of whole blocks that are converted to fp32, processed and converted back.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "job.h"

namespace pocketzo {
namespace {

constexpr std::uint64_t kTile16 = 1u << 11;  // 24 KiB: weights and noise in fp32, and the words for rounding

}  // namespace

void apply_16bit(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const auto [begin, end] = range_of(s, unit);
  const Keys keys(job, s.tensor, begin);
  const KernelSet& set = *job.set;
  const Format16& format = s.storage == Storage::float16 ? set.fp16 : set.bf16;
  alignas(64) float w[kTile16];
  alignas(64) float z[kTile16];
  alignas(64) std::uint32_t words[kTile16];
  const auto noise = [&](std::size_t t, std::uint64_t first, std::uint64_t blocks) {
    kernel_of(set, job.terms[t].distribution, 0)({z, 16, kBlock, first, 1, blocks}, keys[t], nullptr);
  };
  for (std::uint64_t e = begin; e < end;) {
    const std::uint64_t n = std::min(end - e, kTile16 - e % kTile16);
    const std::uint64_t first = e / kBlock, lead = e % kBlock, blocks = (lead + n + kBlock - 1) / kBlock;
    const std::uint64_t size = blocks * kBlock;
    std::uint16_t* const data = static_cast<std::uint16_t*>(s.data) + (e - s.offset);
    std::uint16_t partial[kTile16];
    std::uint16_t* const stored = size == n ? data : partial;
    if (size != n) {
      std::memset(partial, 0, size * sizeof *partial);
      std::memcpy(partial + lead, data, n * sizeof *partial);
    }
    float* const m = job.momentum_at(s, e);
    bool held = false;  // z is that of the term
    format.widen(w, stored, size);
    for (std::size_t t = 0; t < job.term_count; ++t) {
      const Term& term = job.terms[t];
      const bool repeats = job.momentum && job.repeats(t);
      const bool fused = term.count == 1 && term.role == Role::shift && !held && !repeats;
      if (fused) kernel_of(set, term)({w, 16, kBlock, first, 1, blocks}, keys[t], term.scale);
      if (!fused && !held && job.uses_noise(term)) noise(t, first, blocks);
      held = repeats;
      if (term.role == Role::gather) {
        for (unsigned i = 0; i < term.count; ++i) set.axpy(m, z + lead, term.scale[i], n);
        if (term.decay != 0.0f) set.shrink(m, n, term.decay);
        continue;
      }
      for (unsigned i = 0; i < term.count && !fused; ++i) {
        if (i != 0) format.round_nearest(w, size);
        if (term.role == Role::follow)
          set.axpy(w + lead, m, term.scale[i], n);
        else
          set.axpy(w, z, term.scale[i], size);
      }
      if (term.decay != 0.0f) set.shrink(w, size, term.decay);
      if (term.rounding == Rounding::stochastic) {
        const Key key = subkey(term.seed, s.tensor, term.draw, static_cast<std::uint32_t>(e >> 34));
        set.words(words, first, blocks, key);
        format.round_stochastic(w, words, size);
      } else if (term.rounding == Rounding::nearest && t + 1 != job.term_count) {  // narrow rounds after the last
        format.round_nearest(w, size);
      }
    }
    format.narrow(stored, w, size);
    if (size != n) std::memcpy(data, partial + lead, n * sizeof *partial);
    e += n;
  }
}

}  // namespace pocketzo
