// The feature maps of mixers/feature_maps.py that are fast here, row by row, with their gradients.
#pragma once

#include "products.h"

namespace hf_hybrid {

enum MapKind : int64_t { NONE, RELU, ELU, SOFTMAX, HEDGEHOG, DPFP, TAYLOR };

// One head's map. Rows are padded with zeros to multiples of W everywhere.
template <class P>
struct FeatureMap {
  int64_t kind;
  index in, projected, out;          // K, width of the projection (K without one), F
  float scale;                       // K^-1/4, on what is exponentiated or squared
  typename P::Right weight{};        // [K, ld_projected]
  const float* weight_t = nullptr;   // [projected, ld_in]; for gradients only

  bool has_weight() const { return kind == HEDGEHOG || kind == TAYLOR; }
  index ld_in() const { return padded(in); }
  index ld_projected() const { return padded(projected); }
  index ld_out() const { return padded(out); }
};

// to = softmax(factor * x) over n numbers, and, if wanted, other = softmax(-factor * x). Up to W - 1 numbers are written past the end. `N`: the
// number of vectors where it is known, which lets them stay in registers; else 0.
template <bool BOTH, int N>
static inline void softmax_vectors(const float* x, float factor, index n, float* to, float* other) {
  constexpr int KEPT = N ? N : 1;
  const index count = N ? N : padded(n) / W;
  vec kept[KEPT], other_kept[KEPT], top = splat(-3.4e38f), bottom = splat(3.4e38f), total = vec{}, other_total = vec{};
  const auto at = [&](index j) { return load(x + j * W) * factor; };
  const ivec rest = N ? ~ivec{} : first_lanes(n - (count - 1) * W);  // of the last vector
#pragma GCC unroll 8
  for (index j = 0; j < count; j++) {
    const vec y = at(j);
    const bool whole = N || j + 1 < count;
    top = whole ? max(top, y) : (rest ? max(top, y) : top);
    bottom = whole ? min(bottom, y) : (rest ? min(bottom, y) : bottom);
    if (N) kept[j % KEPT] = y;
  }
  const vec ends = BOTH ? largest_of(top, -bottom) : splat(largest(top));
  const vec highest = splat(ends[0]), lowest = splat(-ends[1]);
#pragma GCC unroll 8
  for (index j = 0; j < count; j++) {
    const vec y = N ? kept[j % KEPT] : at(j);
    vec a = exp(y - highest), b = BOTH ? exp(lowest - y) : vec{};
    if (!N && j + 1 == count) a = rest ? a : vec{}, b = rest ? b : vec{};
    total += a, other_total += b;
    if (N) {
      kept[j % KEPT] = a, other_kept[j % KEPT] = b;
    } else {
      store(to + j * W, a);
      if (BOTH) store(other + j * W, b);
    }
  }
  const vec totals = BOTH ? sums_of(total, other_total) : splat(sum(total));
  const float share = 1.0f / totals[0], other_share = BOTH ? 1.0f / totals[1] : 0.0f;
#pragma GCC unroll 8
  for (index j = 0; j < count; j++) {
    store(to + j * W, (N ? kept[j % KEPT] : load(to + j * W)) * share);
    if (BOTH) store(other + j * W, (N ? other_kept[j % KEPT] : load(other + j * W)) * other_share);
  }
}
template <bool BOTH>
static inline void softmax_row(const float* x, float factor, index n, float* to, float* other) {
  if (n == 4 * W) return softmax_vectors<BOTH, 4>(x, factor, n, to, other);
  if (n == 8 * W) return softmax_vectors<BOTH, 8>(x, factor, n, to, other);
  softmax_vectors<BOTH, 0>(x, factor, n, to, other);
}

// x [m, ld_in] -> out [m, ld_out] and W numbers of slack; `scratch` holds m * ld_projected numbers, `rounded` P::left_space(m, K)
template <class P>
static void features(const FeatureMap<P>& f, index m, const float* x, float* scratch, float* rounded, float* out) {
  const index ldx = f.ld_in(), ldp = f.ld_projected(), ldo = f.ld_out(), n = f.projected;
  if (f.has_weight()) P::multiply(m, ldp, f.in, P::left(m, f.in, x, ldx, rounded), f.weight, scratch, ldp, false);
  for (index i = 0; i < m; i++) {
    const float* from = f.has_weight() ? scratch + i * ldp : x + i * ldx;
    float* row = out + i * ldo;
    switch (f.kind) {
      case RELU:
        for (index j = 0; j < ldo; j += W) store(row + j, max(load(from + j), vec{}));
        break;
      case ELU:
        for (index j = 0; j < ldo; j += W) {
          vec y = load(from + j);
          y = exp(min(y, vec{})) + max(y, vec{});
          if (f.out - j < W) y = first_lanes(f.out - j) ? y : vec{};
          store(row + j, y);
        }
        break;
      case SOFTMAX:
        softmax_row<false>(from, f.scale, n, row, nullptr);
        break;
      case HEDGEHOG:
        if (n % W == 0) {
          softmax_row<true>(from, f.scale, n, row, row + n);
        } else {  // the halves overlap where one spills over its end, so one after the other; the second spills into the next row, not yet written
          softmax_row<false>(from, f.scale, n, row, nullptr);
          softmax_row<false>(from, -f.scale, n, row + n, nullptr);
          for (index j = 2 * n; j < ldo; j++) row[j] = 0.0f;
        }
        break;
      case DPFP: {
        float before = from[n - 1] < 0.0f ? -from[n - 1] : 0.0f;
        for (index j = 0; j < 2 * n; j++) {
          float here = j < n ? from[j] : -from[j - n];
          here = here > 0.0f ? here : 0.0f;
          row[j] = here * before;
          before = here;
        }
        for (index j = 2 * n; j < ldo; j++) row[j] = 0.0f;
        break;
      }
      case TAYLOR: {
        row[0] = 1.0f;
        float* linear = row + 1;
        for (index j = 0; j < n; j++) linear[j] = f.scale * from[j];
        float* pair = linear + n;
        for (index r = 0; r < n; r++) {
          pair[0] = linear[r] * linear[r] * 0.70710678f;
          for (index c = r + 1; c < n; c++) pair[c - r] = linear[r] * linear[c];
          pair += n - r;
        }
        for (index j = f.out; j < ldo; j++) row[j] = 0.0f;
        break;
      }
    }
  }
}

// softmax gradient times factor: s (g - <g, s>)
template <bool ADD>
static inline void softmax_vjp(const float* s, const float* g, index n, float factor, float* out) {
  float inner = 0.0f;
#pragma omp simd reduction(+ : inner)
  for (index j = 0; j < n; j++) inner += s[j] * g[j];
#pragma omp simd
  for (index j = 0; j < n; j++) {
    const float d = factor * s[j] * (g[j] - inner);
    out[j] = ADD ? out[j] + d : d;
  }
}

// From the gradient of the features [m, ld_out] that of the input [m, ld_in], and of the weight [K, ld_projected], added to.
// `y`: the features; `scratch` holds m * ld_projected numbers.
static void features_vjp(const FeatureMap<Exact>& f, index m, const float* x, float* scratch, const float* y, const float* g, float* dx,
                         float* dweight) {
  const index ldx = f.ld_in(), ldp = f.ld_projected(), ldo = f.ld_out(), n = f.projected;
  for (index i = 0; i < m; i++) {
    const float *gi = g + i * ldo, *yi = y + i * ldo, *xi = x + i * ldx;
    float *di = dx + i * ldx, *pi = scratch + i * ldp;
    switch (f.kind) {
      case RELU:
        for (index j = 0; j < ldx; j += W) store(di + j, load(xi + j) > vec{} ? load(gi + j) : vec{});
        break;
      case ELU:  // the result tells the derivative
        for (index j = 0; j < ldx; j += W) store(di + j, load(gi + j) * min(load(yi + j), splat(1.0f)));
        break;
      case SOFTMAX:
        softmax_vjp<false>(yi, gi, n, f.scale, di);
        break;
      case HEDGEHOG:
        softmax_vjp<false>(yi, gi, n, f.scale, pi);
        softmax_vjp<true>(yi + n, gi + n, n, -f.scale, pi);
        break;
      case DPFP: {
        for (index j = 0; j < n; j++) di[j] = 0.0f;
        for (index j = 0; j < 2 * n; j++) {
          index b = j ? j - 1 : 2 * n - 1;
          float here = j < n ? xi[j] : -xi[j - n], before = b < n ? xi[b] : -xi[b - n];
          if (here <= 0.0f || before <= 0.0f) continue;
          di[j % n] += (j < n ? 1.0f : -1.0f) * gi[j] * before;
          di[b % n] += (b < n ? 1.0f : -1.0f) * gi[j] * here;
        }
        break;
      }
      case TAYLOR: {
        const float *linear = yi + 1, *pair = gi + 1 + n;
        for (index j = 0; j < n; j++) pi[j] = gi[1 + j];
        for (index r = 0; r < n; r++) {
          pi[r] += pair[0] * 1.41421356f * linear[r];
          for (index c = r + 1; c < n; c++) {
            pi[r] += pair[c - r] * linear[c];
            pi[c] += pair[c - r] * linear[r];
          }
          pair += n - r;
        }
        for (index j = 0; j < n; j++) pi[j] *= f.scale;
        break;
      }
    }
  }
  if (!f.has_weight()) return;
  multiply(m, ldx, n, rows(scratch, ldp), f.weight_t, ldx, dx, ldx, false);
  multiply(f.in, ldp, m, transposed(x, ldx), scratch, ldp, dweight, ldp, true);
}

}  // namespace hf_hybrid
