// PocketZO kernels: regenerate zeroth-order directions from a counter and apply them to weights in place.
//
// cpp/SPEC.md defines the direction z, bit by bit. The results of `apply` and `generate` depend on their arguments
// alone: the instruction set, the number of threads, the segments that a tensor is cut into and the caller's
// floating-point modes never change a bit. No function throws or prints. None allocates, except that threads are
// started by `set_threads`, by the first call, and by the first call in a child of fork().
#pragma once

#include <cstddef>
#include <cstdint>

namespace pocketzo {

inline constexpr int kSpecVersion = 1;

enum class Distribution : std::uint8_t { gaussian = 0, rademacher = 1 };

// The data type of weights in memory. Arithmetic is in fp32.
enum class Storage : std::uint8_t { float32 = 0, float16 = 1, bfloat16 = 2 };

// How 16-bit weights are rounded after a term. Ignored for float32.
enum class Rounding : std::uint8_t {
  nearest = 0,
  stochastic = 1,  // up or down at random: unbiased, so that updates of less than half a unit add up
  later = 2,       // not at all: the next term takes the fp32 value (the last term rounds to nearest)
};

// What a term moves, and along what.
enum class Role : std::uint8_t {
  shift = 0,   // the weights, along z
  gather = 1,  // the momentum m, along z
  follow = 2,  // the weights, along m
};

// One direction and its use. For every element, each line rounded to fp32:
//   w = fma(scale[i], z, w)   for i = 0 .. count-1
//   w = fma(-decay, w, w)     unless decay is 0
// with m for w if the role is `gather`, and m for z if it is `follow`; m is never rounded to 16 bits.
// Several scales of one z merge consecutive passes (perturb, perturb back, update) and round as separate passes do.
// 16-bit weights are rounded to nearest after each scale but the last, and according to `rounding` after the term,
// decay included.
struct Term {
  std::uint64_t seed;
  std::uint64_t draw;
  float scale[3];
  float decay;
  std::uint8_t count;  // 0 .. 3
  Distribution distribution;
  Rounding rounding;
  Role role;
  std::uint8_t rank;  // 0: z of a matrix is as that of a vector. Otherwise it has this rank, at most kMaxRank: SPEC.md,
  std::uint8_t unused[3];  // section 7. Then the role is `shift`, and all terms of a call have the same rank.
  std::uint64_t basis;     // with a rank: the draw of the columns' factor V; `draw` is that of the rows' factor U
};
static_assert(sizeof(Term) == 48);
inline constexpr unsigned kMaxRank = 16;

// The layout of the second factor (rows x columns) of onnxruntime's matrix product: blocks of `depth` rows; within a
// block of `height` rows (the last block may have fewer), panels of 16 columns; within a panel, row after row. The
// index of element (k, n) is
//   block * depth * stride + (n / 16) * 16 * height + (k % depth) * 16 + n % 16,   block = k / depth
// Columns from `columns` to `stride` are padding, which is never written.
struct Packing {
  std::uint64_t rows, columns;  // rows * columns must not exceed 2^34
  std::uint64_t stride;         // a multiple of 16
  std::uint64_t depth;          // a multiple of 64
  bool transposed;              // the tensor is the factor's transpose; elements are numbered in the tensor's row order
};

// Part of a tensor: data[i] is logical element offset + i of tensor `tensor`. With a packing: a whole tensor.
// momentum[i] is m of element offset + i whatever the packing. Terms of role `gather` and `follow` need it.
struct Segment {
  void* data;
  std::uint64_t size;    // elements
  std::uint64_t offset;  // elements; offset + size must not exceed 2^64 - 1
  std::uint32_t tensor;
  const Packing* packing = nullptr;    // nullptr: contiguous. Otherwise `offset` is 0, `size` is rows * columns, and
  Storage storage = Storage::float32;  // `storage` is float32
  float* momentum = nullptr;
  std::uint64_t columns = 0;  // of a contiguous segment that is a whole matrix, for terms with a rank; otherwise 0, and
};  // their z is as that of rank 0

// Applies all terms, in order, to every segment, in one pass over the memory. Threaded.
void apply(const Segment* segments, std::size_t segment_count, const Term* terms, std::size_t term_count) noexcept;

// Writes z(seed, segment.tensor, draw, e) to the elements e of the segment, which is float32. Threaded.
void generate(const Segment& segment, std::uint64_t seed, std::uint64_t draw, Distribution distribution) noexcept;

// The products of sums of directions, over elements offset .. offset + n - 1 of a tensor, with n > 0. Vector i is what
// the next counts[i] terms, all of role `shift`, make of zeros. Writes <vector 0, vector i> to out[2 i] and <vector i,
// vector i> to out[2 i + 1]; SPEC.md, section 6, has the order of summation. `partial` has products_room(..) elements.
// Threaded.
void products(std::uint32_t tensor, std::uint64_t offset, std::uint64_t n, const Term* terms, const std::size_t* counts,
              std::size_t vectors, double* out, double* partial) noexcept;
std::uint64_t products_room(std::uint64_t offset, std::uint64_t n, std::size_t vectors) noexcept;

// Copy logical elements offset .. offset + n - 1 of a tensor into packed memory, and out of it. Threaded.
void pack(float* packed, const Packing& packing, const float* values, std::uint64_t offset, std::uint64_t n) noexcept;
void unpack(const float* packed, const Packing& packing, float* values, std::uint64_t offset, std::uint64_t n) noexcept;

// Copies `count` rows of a tensor out of packed memory, one after the other.
void take(const float* packed, const Packing& packing, const std::uint64_t* rows, std::uint64_t count,
          float* values) noexcept;

// The hash by which onnxruntime identifies a packed buffer: the first 64 bits of its 128-bit MurmurHash3 (x86 variant,
// seed 0), the lowest three cleared. `bytes` is a multiple of 16.
std::uint64_t packed_hash(const void* data, std::size_t bytes) noexcept;

// ---- threads: one pool for the process; the caller is one of its threads ------------------------------------------

inline constexpr unsigned kMaxThreads = 256;
// Returns false and changes nothing if `count` is not in 1 .. kMaxThreads or the system refuses to start that many.
bool set_threads(unsigned count) noexcept;
unsigned threads() noexcept;

// ---- instruction sets --------------------------------------------------------------------------------------------

// The names ("scalar", "neon", "avx2", "avx512") of the sets that this build has and this CPU can run, best first.
// Writes at most `capacity` names and returns how many there are.
std::size_t available(const char** names, std::size_t capacity) noexcept;
// The name of the set in use: the best available, until `use` selects another.
const char* instruction_set() noexcept;
// Returns false and changes nothing if this build or this CPU has no set of that name.
bool use(const char* name) noexcept;

// Whether the CPU has fp16 arithmetic, which an inference runtime then uses. The kernels do not.
bool has_fp16_arithmetic() noexcept;

}  // namespace pocketzo
