// PocketZO kernels: regenerate zeroth-order directions from a counter and apply them to weights in place.
//
// What z is, bit by bit, stands in cpp/SPEC.md; this header says how to call it. The results of `apply` and `generate`
// depend on their arguments alone: the instruction set, the number of threads, the way a tensor is cut and the caller's
// floating-point modes never change a bit. Nothing here throws, prints or allocates, but that threads are started by
// `set_threads`, by the first call, and by the first call in a child of fork().
#pragma once

#include <cstddef>
#include <cstdint>

namespace pocketzo {

inline constexpr int kSpecVersion = 1;

enum class Distribution : std::uint8_t { gaussian = 0, rademacher = 1 };

// How weights lie in memory; arithmetic is in fp32.
enum class Storage : std::uint8_t { float32 = 0, float16 = 1, bfloat16 = 2 };

// How 16-bit weights are rounded after a term; 32-bit ones do not mind.
enum class Rounding : std::uint8_t {
  nearest = 0,
  stochastic = 1,  // up or down at random, so that the mean of many is right where each is less than half a unit
  later = 2,       // not at all: the next term goes on with the fp32 value (the last one rounds to nearest)
};

// One direction and what is done with it. For every element, each line rounded to fp32:
//   w = fma(scale[i], z, w)   for i = 0 .. count-1
//   w = fma(-decay, w, w)     unless decay is 0
// Several scales of one z stand for passes that would follow each other (perturb, perturb back, update): the roundings
// are those of separate passes. 16-bit weights are rounded to nearest after each scale but the last, and as `rounding`
// says after the term, decay included.
struct Term {
  std::uint64_t seed;
  std::uint64_t draw;
  float scale[3];
  float decay;
  std::uint8_t count;  // 0 .. 3
  Distribution distribution;
  Rounding rounding;
  std::uint8_t unused[5];
};
static_assert(sizeof(Term) == 40);

// Where onnxruntime's matrix product keeps element (k, n) of its second factor, which has `rows` and `columns`: in
// blocks of `depth` rows; within a block, which is `height` rows high (the last may be lower), panels of 16 columns;
// within a panel, row after row:
//   block * depth * stride + (n / 16) * 16 * height + (k % depth) * 16 + n % 16,   block = k / depth
// Columns from `columns` to `stride` are padding, which keeps its values.
struct Packing {
  std::uint64_t rows, columns;  // rows * columns must not exceed 2^34
  std::uint64_t stride;         // a multiple of 16
  std::uint64_t depth;          // a multiple of 64
  bool transposed;              // the tensor, whose elements are counted row by row, is the factor's transpose
};

// A run of a tensor: data[i] is logical element offset + i of tensor `tensor`; with a packing, a whole tensor.
struct Segment {
  void* data;
  std::uint64_t size;    // elements
  std::uint64_t offset;  // elements; offset + size must not exceed 2^64 - 1
  std::uint32_t tensor;
  const Packing* packing = nullptr;    // nullptr: contiguous. Otherwise `offset` is 0, `size` is rows * columns, and
  Storage storage = Storage::float32;  // `storage` is float32
};

// Applies all terms, in order, to every segment, in one pass over the memory. Threaded.
void apply(const Segment* segments, std::size_t segment_count, const Term* terms, std::size_t term_count) noexcept;

// Writes z(seed, segment.tensor, draw, e) to the segment, which is float32. Threaded.
void generate(const Segment& segment, std::uint64_t seed, std::uint64_t draw, Distribution distribution) noexcept;

// Copies logical elements offset .. offset + n - 1 of a tensor into packed memory, or out of it. Threaded.
void pack(float* packed, const Packing& packing, const float* values, std::uint64_t offset, std::uint64_t n) noexcept;
void unpack(const float* packed, const Packing& packing, float* values, std::uint64_t offset, std::uint64_t n) noexcept;

// The number by which onnxruntime knows a packed buffer: of its 128-bit MurmurHash3 (x86 variant, seed 0) the first 64
// bits, less the lowest three.
std::uint64_t packed_hash(const void* data, std::size_t bytes) noexcept;

// ---- threads: a pool shared by the process, the caller being one of its threads ----------------------------------

// Returns false, changing nothing, where `count` is not in 1 .. kMaxThreads or the system refuses to start so many.
inline constexpr unsigned kMaxThreads = 256;
bool set_threads(unsigned count) noexcept;
unsigned threads() noexcept;

// ---- instruction sets --------------------------------------------------------------------------------------------

// The names ("scalar", "neon", "avx2", "avx512") of the sets that this build and this processor have, best first;
// writes at most `capacity` of them and returns how many there are.
std::size_t available(const char** names, std::size_t capacity) noexcept;
// The name of the set in use: the best available, until `use` selects another.
const char* instruction_set() noexcept;
// Returns false, changing nothing, if this build or this processor has no set of that name.
bool use(const char* name) noexcept;

// Whether the processor computes in fp16, so that an inference runtime will. The kernels do without.
bool has_fp16_arithmetic() noexcept;

}  // namespace pocketzo
