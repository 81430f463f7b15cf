// Cuts tensors into units of work, units into tiles that stay in the first-level cache, and ragged ends into blocks.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "packing.h"
#include "pocketzo/kernels.h"
#include "pool.h"
#include "sets.h"

#if defined(POCKETZO_X86_64)
#include <immintrin.h>
#endif

namespace pocketzo {
namespace {

constexpr std::uint64_t kBlock = 64;           // elements
constexpr std::uint64_t kTile = 1u << 12;      // 16 KiB: fits the L1 of an in-order core beside the stack
constexpr std::uint64_t kHalfTile = 1u << 11;  // as fp32, with the noise and the random bits of as many: 24 KiB
constexpr std::uint64_t kUnit = 1u << 16;      // 256 KiB: 25 us of a fast core, so a slow one never holds up the end
constexpr std::size_t kKeptKeys = 8;  // a unit keeps the subkeys of so many terms instead of making them a tile
constexpr std::uint64_t kMaxElement = ~std::uint64_t{0};

// A subkey serves 2^34 elements of normals (and of bits to round by) and 2^39 of signs; units are cut at multiples of
// kUnit and straddle neither.
Key key_at(const Term& term, std::uint32_t tensor, std::uint64_t element) noexcept {
  const std::uint32_t window = term.direction == Direction::gaussian
                                   ? static_cast<std::uint32_t>(element >> 34)
                                   : static_cast<std::uint32_t>(element >> 39) | 0x80000000u;
  return subkey(term.seed, tensor, term.draw, window);
}

// Subnormals count and rounding is to nearest, whatever the calling thread has set.
class FloatMode {
 public:
#if defined(POCKETZO_X86_64)
  FloatMode() noexcept : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(POCKETZO_AARCH64) && (defined(__GNUC__) || defined(__clang__))
  FloatMode() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
  }
  ~FloatMode() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  std::uint64_t before_;
#else
  FloatMode() noexcept {}
#endif
 public:
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
};

auto kernel_of(const KernelSet& set, const Term& term) noexcept {
  return term.direction == Direction::gaussian ? set.gaussian : set.rademacher;
}

// n elements from logical element e. A block that is cut is worked on in a copy of the whole.
void apply_term(const KernelSet& set, const Term& term, const Key& key, float* w, std::uint64_t e,
                std::uint64_t n) noexcept {
  const auto kernel = kernel_of(set, term);
  const auto ragged = [&](float* at, std::uint64_t from, std::uint64_t count) {
    alignas(64) float block[kBlock] = {};
    const std::uint64_t lead = from % kBlock;
    std::memcpy(block + lead, at, count * sizeof(float));
    kernel({block, 16, kBlock, from / kBlock, 1, 1}, key, term.scale, term.count);
    std::memcpy(at, block + lead, count * sizeof(float));
  };
  float* const start = w;
  const std::uint64_t size = n;
  if (e % kBlock != 0) {
    const std::uint64_t count = std::min(n, kBlock - e % kBlock);
    ragged(w, e, count);
    w += count;
    e += count;
    n -= count;
  }
  if (n >= kBlock)
    kernel({w, 16, kBlock, e / kBlock, 1, static_cast<std::size_t>(n / kBlock)}, key, term.scale, term.count);
  if (n % kBlock != 0) ragged(w + n - n % kBlock, e + n - n % kBlock, n % kBlock);
  if (term.decay != 0.0f) set.shrink(start, size, term.decay);
}

struct Job {
  const KernelSet* set;
  const Segment* segments;
  std::size_t segment_count;
  const Term* terms;
  std::size_t term_count;
  bool write;  // the single term's z is stored

  bool moves(const Term& term) const noexcept { return write || term.count != 0; }
};

// The subkeys of a job's terms for one unit.
class Keys {
 public:
  Keys(const Job& job, std::uint32_t tensor, std::uint64_t element) noexcept
      : job_(job), tensor_(tensor), element_(element), keep_(job.term_count <= kKeptKeys) {
    for (std::size_t t = 0; keep_ && t < job.term_count; ++t) kept_[t] = key_at(job.terms[t], tensor, element);
  }
  Key operator[](std::size_t t) const noexcept { return keep_ ? kept_[t] : key_at(job_.terms[t], tensor_, element_); }

 private:
  const Job& job_;
  std::uint32_t tensor_;
  std::uint64_t element_;
  bool keep_;
  Key kept_[kKeptKeys];
};

// Whole blocks of a packed matrix are worked on where they lie if each is four panels of one row, or, of a transposed
// one, in a tile that is turned round. Else elements are gathered: small matrices, and a vocabulary of odd size.
bool in_rows(const Packing& p) noexcept { return !p.transposed && p.columns % kBlock == 0; }
bool in_turned_rows(const Packing& p) noexcept { return p.transposed && p.rows % kBlock == 0; }

constexpr std::uint64_t kGroup = 256;  // columns of a unit: with blocks of 256 rows, as many elements as kUnit
constexpr std::uint64_t kHeight = kUnit / kPanel;  // rows of a unit that is part of one panel

std::uint64_t units_of(const Segment& s) noexcept {
  if (s.size == 0) return 0;
  if (s.packing != nullptr && in_rows(*s.packing)) {
    const Packing& p = *s.packing;
    return ((p.rows + p.depth - 1) / p.depth) * ((p.columns + kGroup - 1) / kGroup);
  }
  if (s.packing != nullptr && in_turned_rows(*s.packing)) {
    const Packing& p = *s.packing;
    return ((p.columns + kPanel - 1) / kPanel) * ((p.rows + kHeight - 1) / kHeight);
  }
  return (s.offset + s.size - 1) / kUnit - s.offset / kUnit + 1;
}

// Up to 256 columns of one block of rows.
void apply_rows(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  const Packing& p = *s.packing;
  const std::uint64_t across = (p.columns + kGroup - 1) / kGroup;
  const std::uint64_t top = number / across * p.depth, left = number % across * kGroup;
  const std::uint64_t height = std::min(p.depth, p.rows - top);
  const Keys keys(job, s.tensor, 0);
  const std::uint64_t tile = job.term_count == 1 ? p.depth : kTile / kBlock;
  for (std::uint64_t n = left; n < std::min(left + kGroup, p.columns); n += kBlock)
    for (std::uint64_t k = 0; k < height; k += tile) {
      const auto count = static_cast<std::size_t>(std::min(tile, height - k));
      const auto apart = static_cast<std::ptrdiff_t>(kPanel * height);
      const Walk walk = {static_cast<float*>(s.data) + place(p, top + k, n),
                         apart,
                         static_cast<std::ptrdiff_t>(kPanel),
                         ((top + k) * p.columns + n) / kBlock,
                         p.columns / kBlock,
                         count};
      for (std::size_t t = 0; t < job.term_count; ++t) {
        const Term& term = job.terms[t];
        if (job.moves(term)) kernel_of(*job.set, term)(walk, keys[t], term.scale, term.count);
        for (std::ptrdiff_t run = 0; run < 4 && term.decay != 0.0f; ++run)
          job.set->shrink(walk.base + run * apart, count * kPanel, term.decay);
      }
    }
}

// Up to 4096 elements of 16 rows of the transposed tensor, in tiles of 64 elements each.
void apply_turned_rows(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  const Packing& p = *s.packing;
  const std::uint64_t along = (p.rows + kHeight - 1) / kHeight;
  const std::uint64_t first = number / along * kPanel, lanes = std::min(kPanel, p.columns - first);
  const std::uint64_t begin = number % along * kHeight, end = std::min(begin + kHeight, p.rows);
  const Keys keys(job, s.tensor, 0);
  alignas(64) float tile[kPanel * kBlock];
  for (std::uint64_t k = begin; k < end; k += kBlock) {
    float* const w = static_cast<float*>(s.data) + place(p, k, first);
    for (std::uint64_t n = 0; n < kPanel; ++n)
      for (std::uint64_t i = 0; i < kBlock; ++i) tile[n * kBlock + i] = w[i * kPanel + n];
    const Walk walk = {
        tile, kPanel, kBlock, (first * p.rows + k) / kBlock, p.rows / kBlock, static_cast<std::size_t>(lanes)};
    for (std::size_t t = 0; t < job.term_count; ++t) {
      const Term& term = job.terms[t];
      if (job.moves(term)) kernel_of(*job.set, term)(walk, keys[t], term.scale, term.count);
      if (term.decay != 0.0f) job.set->shrink(tile, lanes * kBlock, term.decay);
    }
    for (std::uint64_t i = 0; i < kBlock; ++i)
      for (std::uint64_t n = 0; n < kPanel; ++n) w[i * kPanel + n] = tile[n * kBlock + i];
  }
}

// The elements of a unit of neighbours.
struct Range {
  std::uint64_t begin, end;
};

Range range_of(const Segment& s, std::uint64_t number) noexcept {
  const std::uint64_t grid = (s.offset / kUnit + number) * kUnit, last = s.offset + s.size;
  return {std::max(s.offset, grid), grid > kMaxElement - kUnit ? last : std::min(last, grid + kUnit)};
}

// Elements that are neighbours in memory, or are made so.
void apply_run(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  const auto [begin, end] = range_of(s, number);
  const Keys keys(job, s.tensor, begin);
  const std::uint64_t tile = job.term_count == 1 && s.packing == nullptr ? kUnit : kTile;
  auto* const data = static_cast<float*>(s.data);
  alignas(64) float gathered[kTile];
  for (std::uint64_t e = begin; e < end;) {
    const std::uint64_t n = std::min(end - e, tile - e % tile);
    float* w = s.packing == nullptr ? data + (e - s.offset) : gathered;
    if (s.packing != nullptr) gather(data, *s.packing, gathered, e, n);
    for (std::size_t t = 0; t < job.term_count; ++t) {
      const Term& term = job.terms[t];
      if (job.moves(term))
        apply_term(*job.set, term, keys[t], w, e, n);
      else if (term.decay != 0.0f)
        job.set->shrink(w, n, term.decay);
    }
    if (s.packing != nullptr) scatter(data, *s.packing, gathered, e, n);
    e += n;
  }
}

// 16-bit weights, in tiles of whole blocks that are computed on in fp32.
void apply_halves(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  const auto [begin, end] = range_of(s, number);
  const Keys keys(job, s.tensor, begin);
  const KernelSet& set = *job.set;
  alignas(64) float w[kHalfTile];
  alignas(64) float z[kHalfTile];
  alignas(64) std::uint32_t words[kHalfTile];
  for (std::uint64_t e = begin; e < end;) {
    const std::uint64_t n = std::min(end - e, kHalfTile - e % kHalfTile);
    const std::uint64_t first = e / kBlock, lead = e % kBlock, blocks = (lead + n + kBlock - 1) / kBlock;
    const std::uint64_t size = blocks * kBlock;
    std::uint16_t* const data = static_cast<std::uint16_t*>(s.data) + (e - s.offset);
    std::uint16_t ragged[kHalfTile];
    std::uint16_t* const stored = size == n ? data : ragged;
    if (size != n) {
      std::memset(ragged, 0, size * sizeof *ragged);
      std::memcpy(ragged + lead, data, n * sizeof *ragged);
    }
    set.widen(w, stored, size, s.storage);
    for (std::size_t t = 0; t < job.term_count; ++t) {
      const Term& term = job.terms[t];
      const auto kernel = kernel_of(set, term);
      if (term.count == 1) kernel({w, 16, kBlock, first, 1, blocks}, keys[t], term.scale, 1);
      if (term.count > 1) kernel({z, 16, kBlock, first, 1, blocks}, keys[t], nullptr, 0);
      for (unsigned i = 0; i < term.count && term.count > 1; ++i) {
        if (i != 0) set.round(w, nullptr, size, s.storage);
        set.axpy(w, z, term.scale[i], size);
      }
      if (term.decay != 0.0f) set.shrink(w, size, term.decay);
      if (term.rounding == Rounding::stochastic) {
        const Key key = subkey(term.seed, s.tensor, term.draw, static_cast<std::uint32_t>(e >> 34));
        set.words(words, first, blocks, key);
        set.round(w, words, size, s.storage);
      } else if (term.rounding == Rounding::nearest && t + 1 != job.term_count) {  // the last one is in narrow
        set.round(w, nullptr, size, s.storage);
      }
    }
    set.narrow(stored, w, size, s.storage);
    if (size != n) std::memcpy(data, ragged + lead, n * sizeof *ragged);
    e += n;
  }
}

void apply_unit(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  if (s.storage != Storage::float32) return apply_halves(job, s, number);
  if (s.packing != nullptr && in_rows(*s.packing)) return apply_rows(job, s, number);
  if (s.packing != nullptr && in_turned_rows(*s.packing)) return apply_turned_rows(job, s, number);
  apply_run(job, s, number);
}

void work(Units& units, const void* context) noexcept {
  const Job& job = *static_cast<const Job*>(context);
  const FloatMode mode;
  std::size_t at = 0;
  std::uint64_t before = 0, unit = 0;  // units of the segments before `at`
  while (units.take(unit)) {
    std::uint64_t here = units_of(job.segments[at]);
    while (unit - before >= here) {
      before += here;
      here = units_of(job.segments[++at]);
    }
    apply_unit(job, job.segments[at], unit - before);
  }
}

void run_job(const Job& job) noexcept {
  std::uint64_t units = 0;
  for (std::size_t i = 0; i < job.segment_count; ++i) units += units_of(job.segments[i]);
  if (units != 0 && job.term_count != 0) run(units, work, &job);
}

}  // namespace

void apply(const Segment* segments, std::size_t segment_count, const Term* terms, std::size_t term_count) noexcept {
  run_job({&current(), segments, segment_count, terms, term_count, false});
}

void generate(const Segment& segment, std::uint64_t seed, std::uint64_t draw, Direction direction) noexcept {
  const Term term = {seed, draw, {}, 0.0f, 0, direction, Rounding::nearest, {}};
  run_job({&current(), &segment, 1, &term, 1, true});
}

}  // namespace pocketzo
