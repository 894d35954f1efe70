// One token: what a decoder runs at every layer. The state is read and written where it lies, once.
//
// Queries, keys, values and outputs are dense, `[B, H, K]`. `state` may be `new_state`. All heads in one thread: this is microseconds.
#pragma once

#include "gated.h"

namespace hf_hybrid {

// new_row = decay * row + factor * x over n numbers, and sums[g] += queries[g] * new_row
static inline void update_row(const float* row, float* new_row, index n, float decay, float factor, const float* x, index groups, const float* queries,
                              index query_stride, float* sums, index sum_stride) {
  index j = 0;
  for (; j + W <= n; j += W) {
    vec y = decay * load(row + j) + factor * load(x + j);
    store(new_row + j, y);
    for (index g = 0; g < groups; g++) store(sums + g * sum_stride + j, load(sums + g * sum_stride + j) + queries[g * query_stride] * y);
  }
  for (; j < n; j++) {
    float y = decay * row[j] + factor * x[j];
    new_row[j] = y;
    for (index g = 0; g < groups; g++) sums[g * sum_stride + j] += queries[g * query_stride] * y;
  }
}

struct LinearStep {  // mirrored in arguments.py; fields as in LinearArguments
  int64_t batch, heads, kv_heads, key_dim, value_dim, feature_dim, projected_dim, map, dtype, weight_dtype, normalize;
  float scale;
};

// The features of one head's only token.
template <typename T>
static void step_features(const LinearStep& a, const void* x, index at, const void* weights, index head, float* row, float* scratch, float* weight,
                          float* out) {
  FeatureMap<Exact> f{a.map, a.key_dim, a.projected_dim, a.feature_dim, a.scale};
  if (f.kind == NONE) return load_row(static_cast<const T*>(x) + at, f.in, out, padded(f.in));
  load_row(static_cast<const T*>(x) + at, f.in, row, padded(f.in));
  if (f.has_weight()) f.weight = {head_weight(weights, a.weight_dtype, head, f.in, f.projected, weight), f.ld_projected()};
  features(f, 1, row, scratch, nullptr, out);
}

template <typename T>
static void linear_step(const LinearStep& a, const void* query, const void* key, const void* value, const uint8_t* valid, const void* weight_q,
                        const void* weight_k, const float* state, float* new_state, void* output, Arena& arena) {
  const index groups = a.heads / a.kv_heads, v = a.value_dim, f = a.feature_dim, columns = v + 1;
  const index ldx = padded(a.key_dim), ldp = padded(a.projected_dim), ldf = padded(f), ldo = padded(columns);
  arena.reset(Arena::total({ldx * ldp, ldx, ldp, ldf + W, groups * (ldf + W), ldo, groups * ldo}));
  float *weight = arena.take(ldx * ldp), *row = arena.take(ldx), *scratch = arena.take(ldp), *keys = arena.take(ldf + W);
  float *queries = arena.take(groups * (ldf + W)), *written = arena.take(ldo), *sums = arena.take(groups * ldo);
  for (index i = 0; i < a.batch * a.kv_heads; i++) {
    const index b = i / a.kv_heads, kv_head = i % a.kv_heads;
    step_features<T>(a, key, i * a.key_dim, weight_k, kv_head, row, scratch, weight, keys);
    if (valid && !valid[b]) zero(keys, ldf);
    load_row(static_cast<const T*>(value) + i * v, v, written, padded(v));
    written[v] = 1.0f;
    for (index g = 0; g < groups; g++) {
      const index head = kv_head * groups + g;
      step_features<T>(a, query, (b * a.heads + head) * a.key_dim, weight_q, head, row, scratch, weight, queries + g * (ldf + W));
    }
    zero(sums, groups * ldo);
    const float* s = state ? state + i * f * columns : nullptr;
    float* to = new_state + i * f * columns;
    for (index j = 0; j < f; j++, to += columns)
      update_row(s ? s + j * columns : written, to, columns, s ? 1.0f : 0.0f, keys[j], written, groups, queries + j, ldf + W, sums, ldo);
    for (index g = 0; g < groups; g++) {
      float* out = sums + g * ldo;
      const index at = (b * a.heads + kv_head * groups + g) * (a.normalize ? v : columns);
      const float factor = !a.normalize ? 1.0f : out[v] <= TINY ? 0.0f : 1.0f / out[v];
      store_row(out, factor, a.normalize ? v : columns, static_cast<T*>(output) + at);
    }
  }
}

struct GatedStep {  // mirrored in arguments.py; fields as in GatedArguments
  int64_t batch, heads, kv_heads, state_heads, key_dim, value_dim, dtype, per_channel, l2norm;
  float scale, min_decay;
};

template <typename T>
static void gated_step(const GatedStep& a, const void* query, const void* key, const void* value, const float* decay, const float* beta,
                       const float* state, float* new_state, void* output, Arena& arena) {
  const index groups = a.heads / a.state_heads, expand = a.state_heads / a.kv_heads, k = a.key_dim, v = a.value_dim;
  const index ldk = padded(k), ldv = padded(v);
  arena.reset(Arena::total({ldk, groups * ldk, ldk, ldv, ldv, groups * ldv, k * v}));
  float *keys = arena.take(ldk), *queries = arena.take(groups * ldk), *decays = arena.take(ldk), *written = arena.take(ldv);
  float *recalled = arena.take(ldv), *sums = arena.take(groups * ldv), *nothing = arena.take(k * v);
  if (!state) zero(nothing, k * v);
  for (index i = 0; i < a.batch * a.state_heads; i++) {
    const index b = i / a.state_heads, state_head = i % a.state_heads, kv = b * a.kv_heads + state_head / expand;
    load_row(static_cast<const T*>(key) + kv * k, k, keys, padded(k));
    load_row(static_cast<const T*>(value) + kv * v, v, written, padded(v));
    for (index g = 0; g < groups; g++) load_row(static_cast<const T*>(query) + (b * a.heads + state_head * groups + g) * k, k, queries + g * ldk, padded(k));
    if (a.l2norm) {
      l2_normalize(1, keys, ldk, nullptr);
      l2_normalize(groups, queries, ldk, nullptr);
    }
    for (index j = 0; j < ldk; j += W) {
      vec g = splat(0.0f);
      for (index l = 0; l < W && j + l < k; l++) g[l] = std::max(decay[a.per_channel ? i * k + j + l : i], a.min_decay);
      store(decays + j, exp(g));
    }
    const float* s = state ? state + i * k * v : nothing;
    if (beta) {
      zero(recalled, ldv);
      for (index j = 0; j < k; j++) {
        const float* row = s + j * v;
        const float weight = keys[j] * decays[j];
        for (index l = 0; l < v; l++) recalled[l] += weight * row[l];
      }
      for (index l = 0; l < v; l++) written[l] = beta[i] * (written[l] - recalled[l]);
    }
    zero(sums, groups * ldv);
    float* to = new_state + i * k * v;
    for (index j = 0; j < k; j++)
      update_row(s + j * v, to + j * v, v, decays[j], keys[j], written, groups, queries + j, ldk, sums, ldv);
    for (index g = 0; g < groups; g++)
      store_row(sums + g * ldv, a.scale, v, static_cast<T*>(output) + (b * a.heads + state_head * groups + g) * v);
  }
}

}  // namespace hf_hybrid
