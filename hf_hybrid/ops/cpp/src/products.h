// Small matrix products, C = A B, in two precisions with one interface: `Exact`, fp32 throughout, and `Rounded`, whose factors are rounded
// to bf16 for the matrix unit of the processors that have one (AMX), with sums in fp32. What is bf16 already loses nothing.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HF_HYBRID_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hf_hybrid {


template <int M, int N>
static inline void tile(index k, const float* a, index a_row, index a_column, const float* __restrict b, index ldb,
                        float* __restrict c, index ldc, bool add) {
  vec r[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) r[i][j] = add ? load(c + i * ldc + j * W) : vec{};
  for (index p = 0; p < k; p++) {
    vec columns[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) columns[j] = load(b + p * ldb + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vec x = splat(a[i * a_row + p * a_column]);
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) r[i][j] += x * columns[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(c + i * ldc + j * W, r[i][j]);
}

template <int N>
static void column_panel(index m, index k, const float* a, index a_row, index a_column, const float* b, index ldb, float* c,
                         index ldc, bool add) {
  for (; m >= TILE_ROWS; m -= TILE_ROWS, a += TILE_ROWS * a_row, c += TILE_ROWS * ldc)
    tile<TILE_ROWS, N>(k, a, a_row, a_column, b, ldb, c, ldc, add);
  switch (m) {
    case 5: return tile<5, N>(k, a, a_row, a_column, b, ldb, c, ldc, add);
    case 4: return tile<4, N>(k, a, a_row, a_column, b, ldb, c, ldc, add);
    case 3: return tile<3, N>(k, a, a_row, a_column, b, ldb, c, ldc, add);
    case 2: return tile<2, N>(k, a, a_row, a_column, b, ldb, c, ldc, add);
    case 1: return tile<1, N>(k, a, a_row, a_column, b, ldb, c, ldc, add);
  }
}

struct Matrix {  // of the left-hand side: element (i, p) is at data[i * row + p * column]
  const float* data;
  index row, column;
};
static inline Matrix rows(const float* data, index ld) { return {data, ld, 1}; }
static inline Matrix transposed(const float* data, index ld) { return {data, 1, ld}; }

// C[m, n] = (or +=) A[m, k] B[k, n]; n a multiple of W. A is read one number at a time, so both its strides are free.
static void multiply(index m, index n, index k, Matrix a, const float* b, index ldb, float* c, index ldc, bool add) {
  index j = 0;
  for (; j + TILE_VECTORS * W <= n; j += TILE_VECTORS * W)
    column_panel<TILE_VECTORS>(m, k, a.data, a.row, a.column, b + j, ldb, c + j, ldc, add);
  switch ((n - j) / W) {
    case 3: return column_panel<3>(m, k, a.data, a.row, a.column, b + j, ldb, c + j, ldc, add);
    case 2: return column_panel<2>(m, k, a.data, a.row, a.column, b + j, ldb, c + j, ldc, add);
    case 1: return column_panel<1>(m, k, a.data, a.row, a.column, b + j, ldb, c + j, ldc, add);
  }
}

struct Exact {
  static constexpr index CHUNK = 16;  // tokens at a time: fewer, and the state is read too often; more, and too much is computed above the diagonal
  struct Right {                     // a right-hand side [k, n] as `multiply` wants it
    const float* data;
    index ld;
  };
  struct Left {  // a left-hand side, rows
    const float* data;
    index ld;
    Left from(index row) const { return {data + row * ld, ld}; }
  };
  static constexpr index right_space(index, index) { return 0; }  // floats that `right` needs
  static constexpr index left_space(index, index) { return 0; }
  static Right right(index, index, const float* b, index ldb, float*) { return {b, ldb}; }
  static Left left(index, index, const float* a, index lda, float*) { return {a, lda}; }
  static void multiply(index m, index n, index k, Left a, Right b, float* c, index ldc, bool add) {
    hf_hybrid::multiply(m, n, k, rows(a.data, a.ld), b.data, b.ld, c, ldc, add);
  }
};

#ifdef HF_HYBRID_AMX
// A tile is 16 rows of 64 bytes: of A 16 x 32 bf16; of B 32 x 16, two rows of the matrix side by side; of C 16 x 16 fp32.
struct Rounded {
  static constexpr index CHUNK = 32;
  struct Right {
    const uint16_t* data;  // tiles, row by row of tiles
    index tiles;           // per row
  };
  struct Left {
    const uint16_t* data;
    index ld;  // a multiple of 32
    Left from(index row) const { return {data + row * ld, ld}; }
  };

  static bool available() {  // the operating system has to be asked for the tile registers, once per process
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
  }
  // The tile registers of this thread are configured while one of these lives.
  struct Scope {
    Scope() {
      struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Scope() { _tile_release(); }
  };

  static constexpr index right_space(index k, index n) { return (k + 31) / 32 * 16 * n; }
  static Right right(index k, index n, const float* b, index ldb, float* space) {
    uint16_t* to = reinterpret_cast<uint16_t*>(space);
    for (index p = 0; p < k; p += 32)
      for (index j = 0; j < n; j += 16, to += 512)
        for (index r = 0; r < 32; r += 2) {
          const index row = p + r;
          const __m512 first = row < k ? _mm512_loadu_ps(b + row * ldb + j) : _mm512_setzero_ps();
          const __m512 second = row + 1 < k ? _mm512_loadu_ps(b + (row + 1) * ldb + j) : _mm512_setzero_ps();
          const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
          const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
          _mm512_store_si512(to + r * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    return {reinterpret_cast<const uint16_t*>(space), n / 16};
  }

  static constexpr index left_space(index m, index k) { return (m + 15) / 16 * 16 * ((k + 31) / 32 * 16); }
  static Left left(index m, index k, const float* a, index lda, float* space) {
    const index ld = (k + 31) / 32 * 32;
    uint16_t* to = reinterpret_cast<uint16_t*>(space);
    for (index r = 0; r < (m + 15) / 16 * 16; r++, to += ld)
      for (index j = 0; j < ld; j += 32) {
        const index rest = r < m ? k - j : 0;
        const __mmask16 low = rest >= 16 ? 0xffff : (1u << rest) - 1;
        const __mmask16 high = rest >= 32 ? 0xffff : rest <= 16 ? 0 : (1u << (rest - 16)) - 1;
        const __m512 first = _mm512_maskz_loadu_ps(low, a + r * lda + j), second = _mm512_maskz_loadu_ps(high, a + r * lda + j + 16);
        _mm512_store_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(second, first));
      }
    return {reinterpret_cast<const uint16_t*>(space), ld};
  }

  static void multiply(index m, index n, index k, Left a, Right b, float* c, index ldc, bool add) {
    alignas(64) float few[16 * 64];  // results of less than 16 rows
    for (index i = 0; i < m; i += 16, c += 16 * ldc) {
      const index count = m - i < 16 ? m - i : 16;
      for (index j = 0; j < b.tiles; j += 4) {
        const index tiles = b.tiles - j < 4 ? b.tiles - j : 4;
        float* out = c + j * 16;
        index ldo = ldc;
        if (j * 16 >= n) break;
        if (count < 16) {
          if (add)
            for (index r = 0; r < count; r++) std::memcpy(few + r * 64, out + r * ldc, tiles * 64);
          out = few, ldo = 64;
        }
        const uint16_t* left = a.data + i * a.ld;
        const uint16_t* right = b.data + j * 512;
        switch (tiles) {
          case 4: tiles_of<4>(k, left, a.ld, right, b.tiles, out, ldo, add); break;
          case 3: tiles_of<3>(k, left, a.ld, right, b.tiles, out, ldo, add); break;
          case 2: tiles_of<2>(k, left, a.ld, right, b.tiles, out, ldo, add); break;
          default: tiles_of<1>(k, left, a.ld, right, b.tiles, out, ldo, add);
        }
        if (count < 16)
          for (index r = 0; r < count; r++) std::memcpy(c + j * 16 + r * ldc, few + r * 64, tiles * 64);
      }
    }
  }

 private:
  template <int N>
  static inline void tiles_of(index k, const uint16_t* left, index ld, const uint16_t* right, index right_tiles, float* c, index ldc, bool add) {
    // tile numbers are part of the instruction: 0 to 3 hold sums, 4 the left-hand side, 5 the right
    if (add) {
      _tile_loadd(0, c, ldc * 4);
      if constexpr (N > 1) _tile_loadd(1, c + 16, ldc * 4);
      if constexpr (N > 2) _tile_loadd(2, c + 32, ldc * 4);
      if constexpr (N > 3) _tile_loadd(3, c + 48, ldc * 4);
    } else {
      _tile_zero(0);
      if constexpr (N > 1) _tile_zero(1);
      if constexpr (N > 2) _tile_zero(2);
      if constexpr (N > 3) _tile_zero(3);
    }
    for (index p = 0; p < k; p += 32, right += right_tiles * 512) {
      _tile_loadd(4, left + p, ld * 2);
      _tile_loadd(5, right, 64);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (N > 1) {
        _tile_loadd(6, right + 512, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (N > 2) {
        _tile_loadd(5, right + 1024, 64);
        _tile_dpbf16ps(2, 4, 5);
      }
      if constexpr (N > 3) {
        _tile_loadd(6, right + 1536, 64);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
    _tile_stored(0, c, ldc * 4);
    if constexpr (N > 1) _tile_stored(1, c + 16, ldc * 4);
    if constexpr (N > 2) _tile_stored(2, c + 32, ldc * 4);
    if constexpr (N > 3) _tile_stored(3, c + 48, ldc * 4);
  }
};
#endif

#if defined(__AVX512BF16__)
#define HF_HYBRID_PAIRS 1
// ---- products of pairs of bf16, without a matrix unit: twice the numbers per instruction, sums in fp32. Two neighbours of a row of A, and of a
// column of B, lie side by side in 32 bits.

template <int M, int N>
static inline void pair_tile(index pairs, const uint32_t* a, index lda, const uint32_t* __restrict b, index ldb, float* __restrict c, index ldc) {
  __m512 r[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) r[i][j] = _mm512_setzero_ps();
  for (index p = 0; p < pairs; p++) {
    __m512bh columns[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) columns[j] = (__m512bh)_mm512_loadu_si512(b + p * ldb + j * 16);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(a[i * lda + p]));
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) r[i][j] = _mm512_dpbf16_ps(r[i][j], x, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) _mm512_storeu_ps(c + i * ldc + j * 16, r[i][j]);
}

template <int N>
static void pair_panel(index m, index pairs, const uint32_t* a, index lda, const uint32_t* b, index ldb, float* c, index ldc) {
  for (; m >= TILE_ROWS; m -= TILE_ROWS, a += TILE_ROWS * lda, c += TILE_ROWS * ldc) pair_tile<TILE_ROWS, N>(pairs, a, lda, b, ldb, c, ldc);
  switch (m) {
    case 5: return pair_tile<5, N>(pairs, a, lda, b, ldb, c, ldc);
    case 4: return pair_tile<4, N>(pairs, a, lda, b, ldb, c, ldc);
    case 3: return pair_tile<3, N>(pairs, a, lda, b, ldb, c, ldc);
    case 2: return pair_tile<2, N>(pairs, a, lda, b, ldb, c, ldc);
    case 1: return pair_tile<1, N>(pairs, a, lda, b, ldb, c, ldc);
  }
}

// C[m, n] = A[m, 2 pairs] B[2 pairs, n]; n a multiple of 16
static void multiply_pairs(index m, index n, index pairs, const uint32_t* a, index lda, const uint32_t* b, index ldb, float* c, index ldc) {
  index j = 0;
  for (; j + TILE_VECTORS * W <= n; j += TILE_VECTORS * W) pair_panel<TILE_VECTORS>(m, pairs, a, lda, b + j, ldb, c + j, ldc);
  switch ((n - j) / W) {
    case 3: return pair_panel<3>(m, pairs, a, lda, b + j, ldb, c + j, ldc);
    case 2: return pair_panel<2>(m, pairs, a, lda, b + j, ldb, c + j, ldc);
    case 1: return pair_panel<1>(m, pairs, a, lda, b + j, ldb, c + j, ldc);
  }
}

// `size` numbers of a row, a multiple of 32 or of 16, rounded to bf16
static inline void round_row(const float* from, index size, uint32_t* to) {
  for (index j = 0; j < size; j += 16) store(reinterpret_cast<bfloat16*>(to) + j, load(from + j));
}
#endif

// ---- products with a triangle

// Zeros above the diagonal of [C, C].
template <index C>
static void hide_later(float* scores) {
  for (index i = 0; i < C; i++)
    for (index j = i / W * W; j < C; j += W) {
      float* here = scores + i * C + j;
      store(here, j > i ? vec{} : first_lanes(i + 1 - j) ? load(here) : vec{});
    }
}

// out [c, C] = q [c, f] . keys_t [f, C] for column <= row, else 0. A chunk of rows at a time, so that little is computed that the mask throws away.
template <class P>
static void causal_products(index c, index f, typename P::Left q, typename P::Right keys_t, float* out, index ldo) {
  constexpr index R = P::CHUNK;
  for (index r = 0; r < c; r += R) {
    const index n = c - r < R ? c - r : R, columns = r + R;
    P::multiply(n, columns, f, q.from(r), keys_t, out + r * ldo, ldo, false);
    for (index i = r; i < r + n; i++)
      for (index j = i / W * W; j < columns; j += W)
        store(out + i * ldo + j, j > i ? vec{} : first_lanes(i + 1 - j) ? load(out + i * ldo + j) : vec{});
  }
}

// out [c, n] (=|+=) lower [c, C] . b [C, n], of a lower triangular left-hand side; `space` for P::left
template <class P>
static void lower_multiply(index c, index n, const float* lower, index ldl, typename P::Right b, float* out, index ldo, bool add, float* space) {
  constexpr index R = P::CHUNK;
  for (index r = 0; r < c; r += R) {
    const index m = c - r < R ? c - r : R;
    P::multiply(m, n, r + m, P::left(m, r + m, lower + r * ldl, ldl, space), b, out + r * ldo, ldo, add);
  }
}

}  // namespace hf_hybrid
