// Vectors of floats, work space, and moving tokens in and out of it. GCC/Clang vector extensions only: the compiler lowers them to whatever the machine has.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hf_hybrid {

#if defined(__AVX512F__)
constexpr int W = 16;            // floats per vector
constexpr int TILE_ROWS = 6;     // 6 x 4 accumulators, 4 columns of B and a broadcast fit into 32 registers
constexpr int TILE_VECTORS = 4;
#else
constexpr int W = 8;
constexpr int TILE_ROWS = 4;     // 4 x 2, into 16 registers
constexpr int TILE_VECTORS = 2;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef float unaligned_vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
using index = ptrdiff_t;

static inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<unaligned_vec*>(p) = x; }
static inline vec splat(float x) { return x - vec{}; }  // x - 0 is x, and costs nothing; 0 + x is not, where x is -0
static inline vec max(vec a, vec b) { return a > b ? a : b; }
static inline vec min(vec a, vec b) { return a < b ? a : b; }
static inline index padded(index n) { return (n + W - 1) / W * W; }

// 1 in the first `n` lanes, 0 in the others, as a mask for ?:
static inline ivec first_lanes(index n) {
  ivec lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane < (ivec{} + int32_t(n));
}

template <int... I>
static inline vec swap_halves(vec x, int half, std::integer_sequence<int, I...>) {
  switch (half) {
    case 8: return __builtin_shufflevector(x, x, (I ^ 8) % W...);
    case 4: return __builtin_shufflevector(x, x, (I ^ 4)...);
    case 2: return __builtin_shufflevector(x, x, (I ^ 2)...);
    default: return __builtin_shufflevector(x, x, (I ^ 1)...);
  }
}
template <int... I>
static inline vec take_turns(vec x, vec y, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, y, (I % 2 ? W + I : I)...);
}
static inline float sum(vec x) {
  for (int half = W / 2; half; half /= 2) x += swap_halves(x, half, std::make_integer_sequence<int, W>());
  return x[0];
}
// sums of both, in the first two lanes: half the work of one after the other
static inline vec sums_of(vec x, vec y) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  x += swap_halves(x, 1, lanes), y += swap_halves(y, 1, lanes);
  vec both = take_turns(x, y, lanes);
  for (int half = W / 2; half > 1; half /= 2) both += swap_halves(both, half, lanes);
  return both;
}
static inline vec largest_of(vec x, vec y) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  x = max(x, swap_halves(x, 1, lanes)), y = max(y, swap_halves(y, 1, lanes));
  vec both = take_turns(x, y, lanes);
  for (int half = W / 2; half > 1; half /= 2) both = max(both, swap_halves(both, half, lanes));
  return both;
}
static inline float largest(vec x) {
  for (int half = W / 2; half; half /= 2) x = max(x, swap_halves(x, half, std::make_integer_sequence<int, W>()));
  return x[0];
}

// e^x to about one unit in the last place; 0 below the smallest normal number, NaN for NaN. Not for x above 88.
static inline vec exp(vec x) {
  const vec lowest = splat(-87.3f);
#if defined(__AVX512F__)
  const vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 8);
#else
  const vec magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  vec n = max(lowest, x) * 1.44269504f + magic;  // of two arguments the second is kept where one is NaN
  const ivec exponent = (ivec)n << 23;
  n -= magic;
#endif
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ), (__m512)p, (__m512)n);
#else
  return x < lowest ? vec{} : (vec)((ivec)p + exponent);
#endif
}
static inline float exp(float x) { return exp(splat(x))[0]; }

// ---- work space: one arena per thread, kept between calls, so that no page is touched for the first time twice

class Arena {
 public:
  ~Arena() { release(); }
  void reset(size_t floats) {
    used_ = 0;
    if (floats <= size_) return;
    release();
    data_ = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
    size_ = floats;
  }
  float* take(index n) {
    float* p = data_ + used_;
    used_ += (n + 15) / 16 * 16;
    return p;
  }
  // what `take` needs for blocks of the given sizes
  static size_t total(std::initializer_list<index> sizes) {
    size_t n = 0;
    for (index s : sizes) n += (s + 15) / 16 * 16;
    return n;
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr;
  }
  float* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

static inline void zero(float* p, index n) { std::memset(p, 0, n * sizeof(float)); }

// ---- transposition, W x W at a time: at every step the off-diagonal halves of pairs of rows change places

template <int H, int... I>
static inline void exchange(vec& a, vec& b, std::integer_sequence<int, I...>) {
  vec low = __builtin_shufflevector(a, b, ((I & H) ? W + (I ^ H) : I)...);
  b = __builtin_shufflevector(a, b, ((I & H) ? W + I : (I ^ H))...);
  a = low;
}
template <int H>
static inline void exchange_rows(vec (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & H)) exchange<H>(x[i], x[i + H], std::make_integer_sequence<int, W>());
}

// [m, n] -> [n, m]; both padded to multiples of W in both directions, and everything read is defined
static void transpose(index m, index n, const float* from, index ldf, float* to, index ldt) {
  for (index i = 0; i < m; i += W)
    for (index j = 0; j < n; j += W) {
      vec x[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) x[r] = load(from + (i + r) * ldf + j);
      if constexpr (W == 16) exchange_rows<W / 2>(x);
      exchange_rows<4>(x);
      exchange_rows<2>(x);
      exchange_rows<1>(x);
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) store(to + (j + r) * ldt + i, x[r]);
    }
}

// ---- tokens

struct bfloat16 {
  uint16_t bits;
};
typedef uint16_t half_width __attribute__((vector_size(2 * W), aligned(2)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));

static inline float to_float(float x) { return x; }
static inline float to_float(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline uvec rounded_bits(vec x) {  // to nearest, ties to even; NaN stays NaN
  const uvec bits = (uvec)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40;
}
#if defined(__AVX512BF16__)  // converts in one instruction
static inline vec load(const bfloat16* p) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}
static inline void store(bfloat16* p, vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
static inline vec load(const bfloat16* p) {
  return (vec)(__builtin_convertvector(*reinterpret_cast<const half_width*>(p), uvec) << 16);
}
static inline void store(bfloat16* p, vec x) { *reinterpret_cast<half_width*>(p) = __builtin_convertvector(rounded_bits(x), half_width); }
#endif
static inline void from_float(float x, float& y) { y = x; }
static inline void from_float(float x, bfloat16& y) { y.bits = uint16_t(rounded_bits(splat(x))[0]); }

// [B, T, H, K] in memory, last axis dense
struct View {
  void* data;
  int64_t batch, token, head;  // strides, in elements
  template <typename T>
  T* at(index b, index t, index h) const { return static_cast<T*>(data) + b * batch + t * token + h * head; }
};

// `size` numbers, filled up with zeros to `ld`
template <typename T>
static inline void load_row(const T* from, index size, float* to, index ld) {
  index j = 0;
  for (; j + W <= size; j += W) store(to + j, load(from + j));
  for (; j < size; j++) to[j] = to_float(from[j]);
  for (; j < ld; j++) to[j] = 0.0f;
}
template <typename T>
static inline void store_row(const float* from, float factor, index size, T* to) {
  index j = 0;
  for (; j + W <= size; j += W) store(to + j, load(from + j) * factor);
  for (; j < size; j++) from_float(from[j] * factor, to[j]);
}
// `tokens` rows; rows from there to `all` are zeros
template <typename T>
static void load_tokens(const View& x, index b, index t, index h, index tokens, index all, index size, float* to, index ld) {
  for (index i = 0; i < tokens; i++) load_row(x.at<const T>(b, t + i, h), size, to + i * ld, ld);
  if (all > tokens) zero(to + tokens * ld, (all - tokens) * ld);
}
template <typename T>
static void store_tokens(const View& x, index b, index t, index h, index tokens, index size, const float* from, index ld) {
  for (index i = 0; i < tokens; i++) store_row(from + i * ld, 1.0f, size, x.at<T>(b, t + i, h));
}

// a weight below this is none; see `naive.TINY`
constexpr float TINY = 1e-30f;

}  // namespace hf_hybrid
