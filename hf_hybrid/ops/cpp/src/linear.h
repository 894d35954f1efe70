// Linear attention with its feature maps, a chunk of tokens at a time: ops/chunk/linear.py without the dispatch.
//
// Axes: B batch, T tokens, H query heads, K key size, F features, V value size, C tokens per chunk. One task is one sequence and one
// key-value head with the query heads that read it.
#pragma once

#include <vector>

#include "feature_maps.h"

namespace hf_hybrid {

struct LinearArguments {  // mirrored in arguments.py
  int64_t batch, tokens, heads, kv_heads, key_dim, value_dim, feature_dim, projected_dim, map, dtype, weight_dtype, threads, normalize;
  float scale;
  View query, key, value, output;
  const uint8_t* valid;            // [B, T] or null
  const void *weight_q, *weight_k;  // [H, K, projected], [H_kv, K, projected] or null
  const float* initial_state;      // [B, H_kv, F, V + 1] or null
  float* final_state;              // the same or null
  float* denominators;             // [B, T, H] or null
  // of the backward pass
  View grad_output, grad_query, grad_key, grad_value;
  const float* grad_final_state;  // or null
  float* grad_initial_state;      // or null
  float *grad_weight_q, *grad_weight_k;  // [B, H, K, projected], [B, H_kv, K, projected]
};

constexpr index LINEAR_CHUNK = 16;

// One head's weight [K, projected] as padded fp32: where it lies, if it is that already, else in `space`.
static const float* head_weight(const void* weights, int64_t bfloat16_weights, index head, const FeatureMap& f, float* space) {
  const index k = f.in, p = f.projected, ld = f.ld_projected();
  if (!bfloat16_weights && p == ld) return static_cast<const float*>(weights) + head * k * p;
  for (index i = 0; i < k; i++)
    for (index j = 0; j < ld; j++) {
      const index at = (head * k + i) * p + j;
      space[i * ld + j] = j >= p             ? 0.0f
                          : bfloat16_weights ? to_float(static_cast<const bfloat16*>(weights)[at])
                                             : static_cast<const float*>(weights)[at];
    }
  return space;
}

// The map of one head; its weight's transpose is made in `weight_t` if that is given.
static FeatureMap map_of(const LinearArguments& a, const void* weights, index head, float* space, float* weight_t) {
  FeatureMap f{a.map, a.key_dim, a.projected_dim, a.feature_dim, a.scale};
  if (!f.has_weight()) return f;
  f.weight = head_weight(weights, a.weight_dtype, head, f, space);
  if (!weight_t) return f;
  for (index i = 0; i < f.projected; i++)
    for (index j = 0; j < f.ld_in(); j++) weight_t[i * f.ld_in() + j] = j < f.in ? f.weight[j * f.ld_projected() + i] : 0.0f;
  f.weight_t = weight_t;
  return f;
}

// Those of a key-value head and of the query heads that read it.
static std::pair<FeatureMap, std::vector<FeatureMap>> maps_of(const LinearArguments& a, index kv_head, float* space, float* space_t) {
  const index groups = a.heads / a.kv_heads, size = padded(a.key_dim) * padded(a.projected_dim);
  std::vector<FeatureMap> queries;
  for (index g = 0; g < groups; g++)
    queries.push_back(map_of(a, a.weight_q, kv_head * groups + g, space + (g + 1) * size, space_t ? space_t + (g + 1) * size : nullptr));
  return {map_of(a, a.weight_k, kv_head, space, space_t), queries};
}

// state [F, V + 1] <-> S [F, ld] and z [F]
static void unpack_state(const float* state, index f, index v, float* s, index ld, float* z) {
  for (index i = 0; i < f; i++, state += v + 1) {
    std::memcpy(s + i * ld, state, v * sizeof(float));
    zero(s + i * ld + v, ld - v);
    z[i] = state[v];
  }
}
static void pack_state(float* state, index f, index v, const float* s, index ld, const float* z) {
  for (index i = 0; i < f; i++, state += v + 1) {
    std::memcpy(state, s + i * ld, v * sizeof(float));
    state[v] = z[i];
  }
}

static inline void hide_tokens(const uint8_t* valid, index tokens, float* x, index ld) {
  if (!valid) return;
  for (index i = 0; i < tokens; i++)
    if (!valid[i]) zero(x + i * ld, ld);
}

// Products of queries and earlier keys: out [c, C] = q [c, f] . keys_t [f, C] for column <= row, else 0. A few rows at a time, so that
// little is computed that the mask throws away.
static void causal_products(index c, index f, const float* q, index ldq, const float* keys_t, index ldk, float* out, index ldo) {
  for (index r = 0; r < c; r += W) {
    index n = c - r < W ? c - r : W, columns = r + W;
    multiply(n, columns, f, rows(q + r * ldq, ldq), keys_t, ldk, out + r * ldo, ldo, false);
    for (index i = 0; i < n; i++) {
      float* last = out + (r + i) * ldo + r;
      store(last, first_lanes(i + 1) ? load(last) : vec{});
    }
  }
}

// out [c, n] (=|+=) lower [c, C] . b [C, n], of a lower triangular left-hand side
static void lower_multiply(index c, index n, const float* lower, index ldl, const float* b, index ldb, float* out, index ldo, bool add) {
  for (index r = 0; r < c; r += W) {
    index m = c - r < W ? c - r : W;
    multiply(m, n, r + m, rows(lower + r * ldl, ldl), b, ldb, out + r * ldo, ldo, add);
  }
}

// out [c, n] += lower^T . b
static void lower_transposed_multiply(index c, index n, const float* lower, index ldl, const float* b, index ldb, float* out, index ldo) {
  for (index r = 0; r < c; r += W) {
    index m = c - r < W ? c - r : W;
    multiply(m, n, c - r, transposed(lower + r * ldl + r, ldl), b + r * ldb, ldb, out + r * ldo, ldo, true);
  }
}

static inline float dot(const float* a, const float* b, index n) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (index j = 0; j < n; j++) total += a[j] * b[j];
  return total;
}
static inline float row_sum(const float* a, index n) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (index j = 0; j < n; j++) total += a[j];
  return total;
}
static void add_column_sums(index m, index n, const float* x, index ld, float* z) {
  for (index i = 0; i < m; i++)
    for (index j = 0; j < n; j++) z[j] += x[i * ld + j];
}

// Keys of one chunk through their map, filled up with zeros; `x` and `scratch` are used for it.
template <typename T>
static void load_features(const LinearArguments& a, const FeatureMap& map, const View& from, index b, index t, index head, index c, index all,
                          float* x, float* scratch, float* to) {
  if (map.kind == NONE) return load_tokens<T>(from, b, t, head, c, all, a.key_dim, to, map.ld_in());
  load_tokens<T>(from, b, t, head, c, all, a.key_dim, x, map.ld_in());
  features(map, c, x, scratch, to);
  zero(to + c * map.ld_out(), (all - c) * map.ld_out());
}

template <typename T>
static void linear_forward_task(const LinearArguments& a, index b, index kv_head, Arena& arena) {
  constexpr index C = LINEAR_CHUNK;
  const index groups = a.heads / a.kv_heads, v = a.value_dim, f = a.feature_dim;
  const index ldx = padded(a.key_dim), ldp = padded(a.projected_dim), ldf = padded(f), ldv = padded(v), ldo = padded(v + 1);
  const index weight = ldx * ldp;
  arena.reset(Arena::total({weight * (groups + 1), C * ldx, C * ldp, C * ldf + W, C * ldf + W, ldf * C, C * ldv, C * C, C * ldo, f * ldv, ldf}));
  float *weights = arena.take(weight * (groups + 1)), *x = arena.take(C * ldx), *scratch = arena.take(C * ldp);
  float *q = arena.take(C * ldf + W), *keys = arena.take(C * ldf + W), *keys_t = arena.take(ldf * C), *values = arena.take(C * ldv);
  float *scores = arena.take(C * C), *out = arena.take(C * ldo), *s = arena.take(f * ldv), *z = arena.take(ldf);

  const auto [map_k, maps_q] = maps_of(a, kv_head, weights, nullptr);
  const index state_at = (b * a.kv_heads + kv_head) * f * (v + 1);
  bool empty = !a.initial_state;
  zero(z, ldf);
  if (empty)
    zero(s, f * ldv);
  else
    unpack_state(a.initial_state + state_at, f, v, s, ldv, z);
  for (index t = 0; t < a.tokens; t += C) {
    const index c = a.tokens - t < C ? a.tokens - t : C;
    load_features<T>(a, map_k, a.key, b, t, kv_head, c, C, x, scratch, keys);
    hide_tokens(a.valid ? a.valid + b * a.tokens + t : nullptr, c, keys, ldf);
    transpose(C, ldf, keys, ldf, keys_t, C);
    load_tokens<T>(a.value, b, t, kv_head, c, C, v, values, ldv);
    for (index g = 0; g < groups; g++) {
      const index head = kv_head * groups + g;
      load_features<T>(a, maps_q[g], a.query, b, t, head, c, c, x, scratch, q);
      causal_products(c, f, q, ldf, keys_t, C, scores, C);
      lower_multiply(c, ldv, scores, C, values, ldv, out, ldo, false);
      if (!empty) multiply(c, ldv, f, rows(q, ldf), s, ldv, out, ldo, true);
      for (index i = 0; i < c; i++) {
        float* row = out + i * ldo;
        float weight_sum = row_sum(scores + i * C, padded(i + 1)) + (empty ? 0.0f : dot(q + i * ldf, z, ldf));
        if (a.normalize) {
          if (weight_sum <= TINY) weight_sum = INFINITY;  // a query that sees nothing: 0
          vec share = splat(1.0f / weight_sum);
          for (index j = 0; j < ldv; j += W) store(row + j, load(row + j) * share);
        } else {
          row[v] = weight_sum;
        }
        if (a.denominators) a.denominators[(b * a.tokens + t + i) * a.heads + head] = weight_sum;
      }
      store_tokens<T>(a.output, b, t, head, c, a.normalize ? v : v + 1, out, ldo);
    }
    if (a.final_state || t + C < a.tokens) {
      multiply(f, ldv, c, transposed(keys, ldf), values, ldv, s, ldv, true);
      add_column_sums(c, ldf, keys, ldf, z);
      empty = false;
    }
  }
  if (a.final_state) pack_state(a.final_state + state_at, f, v, s, ldv, z);
}

// The gradient of one chunk's outputs before the division: [c, ldv], and of the sum of weights, [c].
template <typename T>
static void grad_of_sums(const LinearArguments& a, index b, index t, index head, index c, index all, float* grad, index ldv, float* grad_weight,
                         float* scratch) {
  const index v = a.value_dim;
  load_tokens<T>(a.grad_output, b, t, head, c, all, v, grad, ldv);
  zero(grad_weight, all);
  if (!a.normalize) {
    for (index i = 0; i < c; i++) grad_weight[i] = to_float(a.grad_output.at<const T>(b, t + i, head)[v]);
    return;
  }
  load_tokens<T>(a.output, b, t, head, c, c, v, scratch, ldv);
  for (index i = 0; i < c; i++) {
    float share = 1.0f / a.denominators[(b * a.tokens + t + i) * a.heads + head];
    grad_weight[i] = -share * dot(grad + i * ldv, scratch + i * ldv, ldv);
    for (index j = 0; j < ldv; j++) grad[i * ldv + j] *= share;
  }
}

static inline void add_to_rows(index c, float* x, index ld, index n, const float* column) {
  for (index i = 0; i < c; i++)
    for (index j = 0; j < n; j++) x[i * ld + j] += column[i];
}
static inline void add_outer(index c, index n, float* x, index ld, const float* column, const float* row) {
  for (index i = 0; i < c; i++)
    for (index j = 0; j < n; j++) x[i * ld + j] += column[i] * row[j];
}

// Two passes over the chunks: from the front, with the state, for the queries; from the back, with the state's gradient, for keys and
// values. Features and scores are made again; nothing per chunk is kept.
template <typename T>
static void linear_backward_task(const LinearArguments& a, index b, index kv_head, Arena& arena) {
  constexpr index C = LINEAR_CHUNK;
  const index groups = a.heads / a.kv_heads, v = a.value_dim, f = a.feature_dim;
  const index ldx = padded(a.key_dim), ldp = padded(a.projected_dim), ldf = padded(f), ldv = padded(v), weight = ldx * ldp;
  arena.reset(Arena::total({weight * (groups + 1), weight * (groups + 1), weight * (groups + 1), C * ldx, C * ldx, C * (ldv + ldp), C * ldf + W, C * ldf + W,
                            ldf * C, C * ldv, ldv * C, C * C, C * C, C * ldv, C, C * ldf, C * ldv, ldf * ldv, ldv * ldf, ldf}));
  float *weights = arena.take(weight * (groups + 1)), *weights_t = arena.take(weight * (groups + 1)), *grad_weights = arena.take(weight * (groups + 1));
  float *x = arena.take(C * ldx), *grad_x = arena.take(C * ldx), *scratch = arena.take(C * (ldv + ldp));
  float *q = arena.take(C * ldf + W), *keys = arena.take(C * ldf + W), *keys_t = arena.take(ldf * C);
  float *values = arena.take(C * ldv), *values_t = arena.take(ldv * C), *scores = arena.take(C * C), *grad_scores = arena.take(C * C);
  float *grad = arena.take(C * ldv), *grad_sum = arena.take(C);
  float *grad_features = arena.take(C * ldf), *grad_values = arena.take(C * ldv);
  float *s = arena.take(ldf * ldv), *s_t = arena.take(ldv * ldf), *z = arena.take(ldf);

  const auto [map_k, maps_q] = maps_of(a, kv_head, weights, weights_t);
  zero(grad_weights, weight * (groups + 1));
  const index state_at = (b * a.kv_heads + kv_head) * f * (v + 1);

  // gradients of the queries; the state is kept transposed, [V, F]
  zero(s, ldf * ldv);
  zero(s_t, ldv * ldf);
  zero(z, ldf);
  if (a.initial_state) {
    unpack_state(a.initial_state + state_at, f, v, s, ldv, z);
    transpose(ldf, ldv, s, ldv, s_t, ldf);
  }
  for (index t = 0; t < a.tokens; t += C) {
    const index c = a.tokens - t < C ? a.tokens - t : C;
    load_features<T>(a, map_k, a.key, b, t, kv_head, c, C, x, scratch, keys);
    hide_tokens(a.valid ? a.valid + b * a.tokens + t : nullptr, c, keys, ldf);
    load_tokens<T>(a.value, b, t, kv_head, c, C, v, values, ldv);
    transpose(C, ldv, values, ldv, values_t, C);
    for (index g = 0; g < groups; g++) {
      const index head = kv_head * groups + g;
      load_features<T>(a, maps_q[g], a.query, b, t, head, c, c, x, scratch, q);
      grad_of_sums<T>(a, b, t, head, c, C, grad, ldv, grad_sum, scratch);
      causal_products(c, v, grad, ldv, values_t, C, grad_scores, C);
      for (index i = 0; i < c; i++)
        for (index j = 0; j <= i; j++) grad_scores[i * C + j] += grad_sum[i];
      lower_multiply(c, ldf, grad_scores, C, keys, ldf, grad_features, ldf, false);
      multiply(c, ldf, v, rows(grad, ldv), s_t, ldf, grad_features, ldf, true);
      add_outer(c, ldf, grad_features, ldf, grad_sum, z);
      float* result = grad_features;
      if (a.map != NONE) {
        features_vjp(maps_q[g], c, x, scratch, q, grad_features, grad_x, grad_weights + (g + 1) * weight);
        result = grad_x;
      }
      store_tokens<T>(a.grad_query, b, t, head, c, a.key_dim, result, ldx);
    }
    multiply(v, ldf, c, transposed(values, ldv), keys, ldf, s_t, ldf, true);
    add_column_sums(c, ldf, keys, ldf, z);
  }

  // gradients of keys and values; s, s_t and z now hold the gradient of the state after the chunk
  zero(s, ldf * ldv);
  zero(s_t, ldv * ldf);
  zero(z, ldf);
  if (a.grad_final_state) {
    unpack_state(a.grad_final_state + state_at, f, v, s, ldv, z);
    transpose(ldf, ldv, s, ldv, s_t, ldf);
  }
  for (index t = (a.tokens - 1) / C * C; t >= 0; t -= C) {
    const index c = a.tokens - t < C ? a.tokens - t : C;
    const uint8_t* valid = a.valid ? a.valid + b * a.tokens + t : nullptr;
    load_features<T>(a, map_k, a.key, b, t, kv_head, c, C, x, scratch, keys);
    hide_tokens(valid, c, keys, ldf);
    transpose(C, ldf, keys, ldf, keys_t, C);
    load_tokens<T>(a.value, b, t, kv_head, c, C, v, values, ldv);
    transpose(C, ldv, values, ldv, values_t, C);
    multiply(c, ldv, f, rows(keys, ldf), s, ldv, grad_values, ldv, false);
    multiply(c, ldf, v, rows(values, ldv), s_t, ldf, grad_features, ldf, false);
    for (index i = 0; i < c; i++)
      for (index j = 0; j < ldf; j++) grad_features[i * ldf + j] += z[j];
    for (index g = 0; g < groups; g++) {
      const index head = kv_head * groups + g;
      load_features<T>(a, maps_q[g], a.query, b, t, head, c, C, grad_x, scratch, q);
      grad_of_sums<T>(a, b, t, head, c, C, grad, ldv, grad_sum, scratch);
      causal_products(c, f, q, ldf, keys_t, C, scores, C);
      causal_products(c, v, grad, ldv, values_t, C, grad_scores, C);
      for (index i = 0; i < c; i++)
        for (index j = 0; j <= i; j++) grad_scores[i * C + j] += grad_sum[i];
      lower_transposed_multiply(c, ldv, scores, C, grad, ldv, grad_values, ldv);
      lower_transposed_multiply(c, ldf, grad_scores, C, q, ldf, grad_features, ldf);
      multiply(f, ldv, c, transposed(q, ldf), grad, ldv, s, ldv, true);
      for (index i = 0; i < c; i++)
        for (index j = 0; j < ldf; j++) z[j] += grad_sum[i] * q[i * ldf + j];
    }
    transpose(ldf, ldv, s, ldv, s_t, ldf);
    store_tokens<T>(a.grad_value, b, t, kv_head, c, v, grad_values, ldv);
    hide_tokens(valid, c, grad_features, ldf);
    float* result = grad_features;
    if (a.map != NONE) {
      features_vjp(map_k, c, x, scratch, keys, grad_features, grad_x, grad_weights);
      result = grad_x;
    }
    store_tokens<T>(a.grad_key, b, t, kv_head, c, a.key_dim, result, ldx);
  }
  if (a.grad_initial_state) pack_state(a.grad_initial_state + state_at, f, v, s, ldv, z);
  if (!map_k.has_weight()) return;
  const index size = a.key_dim * a.projected_dim;
  for (index g = 0; g <= groups; g++) {
    float* to = g ? a.grad_weight_q + (b * a.heads + kv_head * groups + g - 1) * size : a.grad_weight_k + (b * a.kv_heads + kv_head) * size;
    for (index i = 0; i < a.key_dim; i++)
      for (index j = 0; j < a.projected_dim; j++) to[i * a.projected_dim + j] = grad_weights[g * weight + i * ldp + j];
  }
}

}  // namespace hf_hybrid
