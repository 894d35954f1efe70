// Linear attention with its feature maps, a chunk of tokens at a time: ops/chunk/linear.py without the dispatch.
//
// Axes: B batch, T tokens, H query heads, K key size, F features, V value size, C tokens per chunk. One task is one sequence and one
// key-value head with the query heads that read it.
#pragma once

#include <algorithm>
#include <vector>

#include "feature_maps.h"
#include "sums.h"

namespace hf_hybrid {

struct LinearArguments {  // mirrored in arguments.py
  int64_t batch, tokens, heads, kv_heads, key_dim, value_dim, feature_dim, projected_dim, map, dtype, weight_dtype, threads, normalize;
  float scale;
  View query, key, value, output;
  const uint8_t* valid;            // [B, T] or null
  const void *weight_q, *weight_k;  // [H, K, projected], [H_kv, K, projected] or null
  const float* initial_state;      // [B, H_kv, F, V + 1] or null
  float* final_state;              // the same or null
  float* block_states;  // of training: the states before every block, [B, H_kv, ceil(T / BLOCK), F, V + 1]; or null
  View grad_output, grad_query, grad_key, grad_value;
  const float* grad_final_state;  // or null
  float* grad_initial_state;      // or null
  float *grad_weight_q, *grad_weight_k;  // [B, H, K, projected], [B, H_kv, K, projected]
};

// Tokens per block: what the backward pass keeps a state for
constexpr index BLOCK = 128;
// Query heads that go through a product together: more rows per product, as long as they stay in cache
constexpr index HEADS_TOGETHER = 4;

// One head's weight [K, projected] as padded fp32: where it lies, if it is that already, else in `space`.
static const float* head_weight(const void* weights, int64_t bfloat16_weights, index head, index k, index p, float* space) {
  const index ld = padded(p);
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

// Floats of work space for the maps of a key-value head and the query heads that read it, as `maps_of` makes them.
template <class P>
static index space_for_maps(const LinearArguments& a, bool gradients) {
  const index size = padded(a.key_dim) * padded(a.projected_dim);
  return (a.heads / a.kv_heads + 1) * (size + P::right_space(a.key_dim, padded(a.projected_dim)) + (gradients ? size : 0));
}
template <class P>
struct Maps {
  FeatureMap<P> key;
  std::vector<FeatureMap<P>> query;  // one per query head
};
template <class P>
static Maps<P> maps_of(const LinearArguments& a, index kv_head, float* space, bool gradients) {
  const index groups = a.heads / a.kv_heads, each = space_for_maps<P>(a, gradients) / (groups + 1);
  const auto map_of = [&](const void* weights, index head, float* own) {
    FeatureMap<P> f{a.map, a.key_dim, a.projected_dim, a.feature_dim, a.scale};
    if (!f.has_weight()) return f;
    const index ldx = f.ld_in(), ldp = f.ld_projected();
    const float* weight = head_weight(weights, a.weight_dtype, head, f.in, f.projected, own);
    own += ldx * ldp;
    f.weight = P::right(f.in, ldp, weight, ldp, own);
    if (!gradients) return f;
    own += P::right_space(f.in, ldp);
    for (index i = 0; i < f.projected; i++)
      for (index j = 0; j < ldx; j++) own[i * ldx + j] = j < f.in ? weight[j * ldp + i] : 0.0f;
    f.weight_t = own;
    return f;
  };
  std::vector<FeatureMap<P>> queries;
  for (index g = 0; g < groups; g++) queries.push_back(map_of(a.weight_q, kv_head * groups + g, space + (g + 1) * each));
  return {map_of(a.weight_k, kv_head, space), queries};
}

// state [F, V + 1] <-> S [F, ld] and z [F]
static void unpack_state(const float* state, index f, index v, float* s, index ld, float* z) {
  for (index i = 0; i < f; i++, state += v + 1) {
    std::memcpy(s + i * ld, state, v * sizeof(float));
    zero(s + i * ld + v, ld - v);
    z[i] = state[v];
  }
}
// state [F, V + 1] -> S^T [V, ld] and z [ld]
static void unpack_transposed(const float* state, index f, index v, float* s_t, index ld, float* z) {
  zero(s_t, v * ld);
  zero(z, ld);
  for (index i = 0; i < f; i++, state += v + 1) {
    for (index j = 0; j < v; j++) s_t[j * ld + i] = state[j];
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

// over `n` numbers, a multiple of W; what is to be added up is left in the lanes
static inline vec products_of(const float* a, const float* b, index n) {
  vec total = vec{};
  for (index j = 0; j < n; j += W) total += load(a + j) * load(b + j);
  return total;
}
static inline float dot(const float* a, const float* b, index n) { return sum(products_of(a, b, n)); }
static inline float row_sum(const float* a, index n) {
  vec total = vec{};
  for (index j = 0; j < n; j += W) total += load(a + j);
  return sum(total);
}
static inline void set_row(float* row, float factor, const float* x, index n) {
  for (index j = 0; j < n; j += W) store(row + j, factor * load(x + j));
}
static inline void add_row(float* row, float factor, const float* x, index n) {
  for (index j = 0; j < n; j += W) store(row + j, load(row + j) + factor * load(x + j));
}
static inline void scale_row(float* row, index n, float factor) {
  for (index j = 0; j < n; j += W) store(row + j, load(row + j) * factor);
}
static void add_column_sums(index m, index n, const float* x, index ld, float* z) {
  for (index j = 0; j < n; j += W) {
    vec total = load(z + j);
    for (index i = 0; i < m; i++) total += load(x + i * ld + j);
    store(z + j, total);
  }
}

// Tokens of one chunk through their map; rows from `c` to `all` are zeros. `x` and `scratch` are used for it.
template <typename T, class P>
static void load_features(const FeatureMap<P>& map, const View& from, index b, index t, index head, index c, index all, float* x, float* scratch,
                          float* rounded, float* to) {
  if (map.kind == NONE) return load_tokens<T>(from, b, t, head, c, all, map.in, to, map.ld_in());
  load_tokens<T>(from, b, t, head, c, c, map.in, x, map.ld_in());
  features(map, c, x, scratch, rounded, to);
  zero(to + c * map.ld_out(), (all - c) * map.ld_out());
}

template <typename T, class P>
static void linear_forward_task(const LinearArguments& a, index b, index kv_head, Arena& arena) {
  constexpr index C = P::CHUNK;
  constexpr bool SPLIT = splits<T>();
  const index groups = a.heads / a.kv_heads, v = a.value_dim, f = a.feature_dim;
  const index ldx = padded(a.key_dim), ldp = padded(a.projected_dim), ldf = padded(f), ldv = padded(v), ldo = padded(v + 1);
  const index together = std::min(groups, HEADS_TOGETHER), R = together * C;  // rows of all products with queries
  const index left_space = std::max({P::left_space(R, std::max(f, C)), P::left_space(C, a.key_dim), P::left_space(f, C)});
  arena.reset(Arena::total({space_for_maps<P>(a, false), C * ldx, C * ldp, R * ldf + W, C * ldf + W, ldf * C, C * ldv, R * C, R * ldo,
                            P::right_space(f, C), P::right_space(C, ldv), P::right_space(f, ldv), left_space}) +
              State::space(f, ldv, SPLIT) + State::space(1, ldf, SPLIT));
  float *weights = arena.take(space_for_maps<P>(a, false)), *x = arena.take(C * ldx), *scratch = arena.take(C * ldp);
  float *q = arena.take(R * ldf + W), *keys = arena.take(C * ldf + W), *keys_t = arena.take(ldf * C), *values = arena.take(C * ldv);
  float *scores = arena.take(R * C), *out = arena.take(R * ldo);
  State state, sums;  // S and z
  state.take(arena, f, ldv, SPLIT), sums.take(arena, 1, ldf, SPLIT);
  float *s = state.now, *z = sums.now;
  float *packed_keys = arena.take(P::right_space(f, C)), *packed_values = arena.take(P::right_space(C, ldv)), *packed_s = arena.take(P::right_space(f, ldv));
  float* rounded = arena.take(left_space);

  const Maps<P> maps = maps_of<P>(a, kv_head, weights, false);
  const index state_at = (b * a.kv_heads + kv_head) * f * (v + 1);
  bool empty = !a.initial_state;
  zero(z, ldf);
  if (empty)
    zero(s, f * ldv);
  else
    unpack_state(a.initial_state + state_at, f, v, s, ldv, z);
  state.open(), sums.open();
  for (index t = 0; t < a.tokens; t += C) {
    const index c = a.tokens - t < C ? a.tokens - t : C;
    if (t && t % BLOCK == 0) state.close(), sums.close();
    if (a.block_states && t % BLOCK == 0) {
      const index block = (b * a.kv_heads + kv_head) * ((a.tokens + BLOCK - 1) / BLOCK) + t / BLOCK;
      pack_state(a.block_states + block * f * (v + 1), f, v, s, ldv, z);
    }
    load_features<T>(maps.key, a.key, b, t, kv_head, c, C, x, scratch, rounded, keys);
    hide_tokens(a.valid ? a.valid + b * a.tokens + t : nullptr, c, keys, ldf);
    transpose(C, ldf, keys, ldf, keys_t, C);
    load_tokens<T>(a.value, b, t, kv_head, c, C, v, values, ldv);
    const auto right_keys = P::right(f, C, keys_t, C, packed_keys), right_values = P::right(C, ldv, values, ldv, packed_values);
    const auto right_s = P::right(f, ldv, s, ldv, packed_s);
    for (index first = 0; first < groups; first += together) {
      const index heads = std::min(together, groups - first), m = heads * C;
      for (index g = 0; g < heads; g++)
        load_features<T>(maps.query[first + g], a.query, b, t, kv_head * groups + first + g, c, C, x, scratch, rounded, q + g * C * ldf);
      const auto left_q = P::left(m, f, q, ldf, rounded);
      P::multiply(m, C, f, left_q, right_keys, scores, C, false);
      if (!empty) P::multiply(m, ldv, f, left_q, right_s, out, ldo, false);
      for (index g = 0; g < heads; g++) hide_later<C>(scores + g * C * C);
      P::multiply(m, ldv, c, P::left(m, c, scores, C, rounded), right_values, out, ldo, !empty);
      for (index g = 0; g < heads; g++)
        for (index i = 0; i < c; i++) {
          const index head = kv_head * groups + first + g, row = g * C + i;
          vec total = products_of(q + row * ldf, z, ldf);
          for (index j = 0; j <= i; j += W) total += load(scores + row * C + j);
          float weight = sum(total);
          if (a.normalize && weight <= TINY) weight = INFINITY;  // a query that sees nothing: 0
          out[row * ldo + v] = weight;
          store_row(out + row * ldo, a.normalize ? 1.0f / weight : 1.0f, a.normalize ? v : v + 1, a.output.at<T>(b, t + i, head));
        }
    }
    if (a.final_state || t + C < a.tokens) {
      P::multiply(f, ldv, c, P::left(f, c, keys_t, C, rounded), right_values, state.added, ldv, true);
      add_column_sums(c, ldf, keys, ldf, sums.added);
      state.refresh(), sums.refresh();
      empty = false;
    }
  }
  if (a.final_state) pack_state(a.final_state + state_at, f, v, s, ldv, z);
}

// Every token sees all: the state of the whole sequence, then the queries.
template <typename T, class P>
static void bidirectional_task(const LinearArguments& a, index b, index kv_head, Arena& arena) {
  constexpr index C = 2 * P::CHUNK;
  const index groups = a.heads / a.kv_heads, v = a.value_dim, f = a.feature_dim;
  const index ldx = padded(a.key_dim), ldp = padded(a.projected_dim), ldf = padded(f), ldv = padded(v);
  const index left_space = std::max({P::left_space(C, f), P::left_space(C, a.key_dim), P::left_space(f, C)});
  arena.reset(Arena::total({space_for_maps<P>(a, false), C * ldx, C * ldp, C * ldf + W, ldf * C, C * ldv, P::right_space(C, ldv), P::right_space(f, ldv), left_space}) +
              Sum::space(f * ldv) + Sum::space(ldf));
  float *weights = arena.take(space_for_maps<P>(a, false)), *x = arena.take(C * ldx), *scratch = arena.take(C * ldp), *rows_f = arena.take(C * ldf + W);
  float *keys_t = arena.take(ldf * C), *values = arena.take(C * ldv);
  float *packed_values = arena.take(P::right_space(C, ldv)), *packed_s = arena.take(P::right_space(f, ldv)), *rounded = arena.take(left_space);
  const Maps<P> maps = maps_of<P>(a, kv_head, weights, false);
  Sum state, sums;  // S and z
  state.take(arena, f * ldv), sums.take(arena, ldf);
  for (index t = 0; t < a.tokens; t += C) {
    const index c = a.tokens - t < C ? a.tokens - t : C;
    load_features<T>(maps.key, a.key, b, t, kv_head, c, C, x, scratch, rounded, rows_f);
    hide_tokens(a.valid ? a.valid + b * a.tokens + t : nullptr, c, rows_f, ldf);
    transpose(C, ldf, rows_f, ldf, keys_t, C);
    load_tokens<T>(a.value, b, t, kv_head, c, C, v, values, ldv);
    P::multiply(f, ldv, c, P::left(f, c, keys_t, C, rounded), P::right(C, ldv, values, ldv, packed_values), state.added, ldv, true);
    add_column_sums(c, ldf, rows_f, ldf, sums.added);
    if ((t + C) % BLOCK == 0) state.close(), sums.close();
  }
  const auto right_s = P::right(f, ldv, state.result(), ldv, packed_s);
  const float* z = sums.result();
  for (index t = 0; t < a.tokens; t += C) {
    const index c = a.tokens - t < C ? a.tokens - t : C;
    for (index g = 0; g < groups; g++) {
      const index head = kv_head * groups + g;
      load_features<T>(maps.query[g], a.query, b, t, head, c, c, x, scratch, rounded, rows_f);
      P::multiply(c, ldv, f, P::left(c, f, rows_f, ldf, rounded), right_s, values, ldv, false);
      for (index i = 0; i < c; i++) {
        const float weight = dot(rows_f + i * ldf, z, ldf);
        store_row(values + i * ldv, weight <= TINY ? 0.0f : 1.0f / weight, v, a.output.at<T>(b, t + i, head));
      }
    }
  }
}

// The gradient of one chunk's outputs before the division, [all, ldv], and of the sums of weights, `sums` [all], in their place. With `normalize` the
// latter is still to be multiplied by the products of all weights with their gradients, added up. That is <output, its gradient> as well, but not
// where the output was rounded to bf16: gradients of scores are small differences of such sums. Rows from `c` on are zeros.
template <typename T>
static void load_grad(const LinearArguments& a, index b, index t, index head, index c, index all, float* grad, index ldv, float* sums) {
  load_tokens<T>(a.grad_output, b, t, head, c, all, a.value_dim, grad, ldv);
  for (index i = 0; i < c; i++) {
    if (a.normalize) {
      const float share = sums[i] <= TINY ? 0.0f : 1.0f / sums[i];
      sums[i] = -share;
      scale_row(grad + i * ldv, ldv, share);
    } else {
      sums[i] = to_float(a.grad_output.at<const T>(b, t + i, head)[a.value_dim]);
    }
  }
  zero(sums + c, all - c);
}

// Gradients of the maps' weights, padded, the key-value head's first: to where each sequence has its own.
static void store_grad_weights(const LinearArguments& a, index b, index kv_head, bool has_weight, Sum& weights) {
  if (!has_weight) return;
  const float* grad_weights = weights.result();
  const index groups = a.heads / a.kv_heads, size = a.key_dim * a.projected_dim, ldp = padded(a.projected_dim), weight = padded(a.key_dim) * ldp;
  for (index g = 0; g <= groups; g++) {
    float* to = g ? a.grad_weight_q + (b * a.heads + kv_head * groups + g - 1) * size : a.grad_weight_k + (b * a.kv_heads + kv_head) * size;
    for (index i = 0; i < a.key_dim; i++) std::memcpy(to + i * a.projected_dim, grad_weights + g * weight + i * ldp, a.projected_dim * sizeof(float));
  }
}

// One pass over the blocks from the back. The forward pass left the state before every block; from there the states before its chunks are made
// again, and features and scores as well: nothing per chunk is kept.
template <typename T>
static void linear_backward_task(const LinearArguments& a, index b, index kv_head, Arena& arena) {
  using P = Exact;
  constexpr index C = P::CHUNK, N = BLOCK / C;
  const index groups = a.heads / a.kv_heads, v = a.value_dim, f = a.feature_dim, together = std::min(groups, HEADS_TOGETHER), R = together * C;
  const index ldx = padded(a.key_dim), ldp = padded(a.projected_dim), ldf = padded(f), ldv = padded(v), weight = ldx * ldp;
  arena.reset(Arena::total({space_for_maps<P>(a, true), R * ldx, C * ldx, C * ldp, R * ldf + W, ldf * C, ldv * C, R * C,
                            R * C, R * ldv, R, R * ldf, C * ldf, C * ldv, N * C * ldx, N * (C * ldf + W), N * C * ldv, N * ldv * ldf, N * ldf,
                            ldv * ldf}) +
              Sum::space(weight * (groups + 1)) + State::space(ldf, ldv, true) + State::space(1, ldf, true));
  float* weights = arena.take(space_for_maps<P>(a, true));
  float *x_q = arena.take(R * ldx), *grad_x = arena.take(C * ldx), *scratch = arena.take(C * ldp), *q = arena.take(R * ldf + W);
  float *keys_t = arena.take(ldf * C), *values_t = arena.take(ldv * C), *scores = arena.take(R * C), *grad_scores = arena.take(R * C);
  float *grad = arena.take(R * ldv), *grad_sum = arena.take(R);  // of the sums before the division
  float *grad_q = arena.take(R * ldf), *grad_k = arena.take(C * ldf), *grad_v = arena.take(C * ldv);
  // of every chunk of the block: keys, their features, values, and the state before, transposed
  float *all_x = arena.take(N * C * ldx), *all_keys = arena.take(N * (C * ldf + W)), *all_values = arena.take(N * C * ldv);
  float *all_s_t = arena.take(N * ldv * ldf), *all_z = arena.take(N * ldf);
  float* grad_s_t = arena.take(ldv * ldf);
  Sum grad_weights;
  State grad_state, grad_sums;  // of S and z after the chunk
  grad_weights.take(arena, a.weight_k ? weight * (groups + 1) : 0), grad_state.take(arena, ldf, ldv, true), grad_sums.take(arena, 1, ldf, true);
  float *grad_s = grad_state.now, *grad_z = grad_sums.now;

  const Maps<P> maps = maps_of<P>(a, kv_head, weights, true);
  const index head_at = b * a.kv_heads + kv_head, state_size = f * (v + 1), num_blocks = (a.tokens + BLOCK - 1) / BLOCK;
  zero(grad_s, ldf * ldv);
  zero(grad_z, ldf);
  if (a.grad_final_state) unpack_state(a.grad_final_state + head_at * state_size, f, v, grad_s, ldv, grad_z);
  grad_state.open(), grad_sums.open();
  for (index block = num_blocks - 1; block >= 0; block--) {
    const index start = block * BLOCK, chunks = (std::min(a.tokens - start, BLOCK) + C - 1) / C;
    unpack_transposed(a.block_states + (head_at * num_blocks + block) * state_size, f, v, all_s_t, ldf, all_z);
    for (index i = 0; i < chunks; i++) {
      const index t = start + i * C, c = std::min(a.tokens - t, C);
      float *x = all_x + i * C * ldx, *keys = all_keys + i * (C * ldf + W), *values = all_values + i * C * ldv;
      load_features<T>(maps.key, a.key, b, t, kv_head, c, C, x, scratch, nullptr, keys);
      hide_tokens(a.valid ? a.valid + b * a.tokens + t : nullptr, c, keys, ldf);
      load_tokens<T>(a.value, b, t, kv_head, c, C, v, values, ldv);
      if (i + 1 == chunks) break;
      float *next = all_s_t + (i + 1) * ldv * ldf, *next_z = all_z + (i + 1) * ldf;
      std::memcpy(next, all_s_t + i * ldv * ldf, v * ldf * sizeof(float));
      std::memcpy(next_z, all_z + i * ldf, ldf * sizeof(float));
      multiply(v, ldf, c, transposed(values, ldv), keys, ldf, next, ldf, true);
      add_column_sums(c, ldf, keys, ldf, next_z);
    }
    for (index i = chunks - 1; i >= 0; i--) {
      const index t = start + i * C, c = std::min(a.tokens - t, C);
      const float *x = all_x + i * C * ldx, *keys = all_keys + i * (C * ldf + W), *values = all_values + i * C * ldv;
      const float *s_t = all_s_t + i * ldv * ldf, *z = all_z + i * ldf;
      transpose(C, ldf, keys, ldf, keys_t, C);
      transpose(C, ldv, values, ldv, values_t, C);
      transpose(ldf, ldv, grad_s, ldv, grad_s_t, ldf);
      multiply(c, ldv, f, rows(keys, ldf), grad_s, ldv, grad_v, ldv, false);
      for (index r = 0; r < c; r++) std::memcpy(grad_k + r * ldf, grad_z, ldf * sizeof(float));
      multiply(c, ldf, v, rows(values, ldv), grad_s_t, ldf, grad_k, ldf, true);
      for (index first = 0; first < groups; first += together) {
        const index heads = std::min(together, groups - first), m = heads * C;
        for (index g = 0; g < heads; g++) {  // rows from c on are zeros throughout
          const index head = kv_head * groups + first + g;
          load_features<T>(maps.query[first + g], a.query, b, t, head, c, C, x_q + g * C * ldx, scratch, nullptr, q + g * C * ldf);
        }
        multiply(m, C, f, rows(q, ldf), keys_t, C, scores, C, false);
        for (index g = 0; g < heads; g++) {
          const index at = g * C;
          hide_later<C>(scores + at * C);
          for (index r = at; r < at + c; r++) grad_sum[r] = dot(q + r * ldf, z, ldf) + row_sum(scores + r * C, C);
          load_grad<T>(a, b, t, kv_head * groups + first + g, c, C, grad + at * ldv, ldv, grad_sum + at);
        }
        multiply(m, C, v, rows(grad, ldv), values_t, C, grad_scores, C, false);
        multiply(m, ldf, v, rows(grad, ldv), s_t, ldf, grad_q, ldf, false);
        for (index r = 0; r < m; r++) {
          if (a.normalize) grad_sum[r] *= dot(scores + r * C, grad_scores + r * C, C) + dot(q + r * ldf, grad_q + r * ldf, ldf);
          for (index j = 0; j < C; j += W) store(grad_scores + r * C + j, load(grad_scores + r * C + j) + grad_sum[r]);
          add_row(grad_q + r * ldf, grad_sum[r], z, ldf);
          add_row(grad_sums.added, grad_sum[r], q + r * ldf, ldf);
        }
        for (index g = 0; g < heads; g++) hide_later<C>(grad_scores + g * C * C);
        multiply(m, ldf, c, rows(grad_scores, C), keys, ldf, grad_q, ldf, true);
        // over all rows of all heads at once
        multiply(c, ldv, m, transposed(scores, C), grad, ldv, grad_v, ldv, true);
        multiply(c, ldf, m, transposed(grad_scores, C), q, ldf, grad_k, ldf, true);
        multiply(f, ldv, m, transposed(q, ldf), grad, ldv, grad_state.added, ldv, true);
        for (index g = 0; g < heads; g++) {
          const index head = kv_head * groups + first + g;
          float* result = grad_q + g * C * ldf;
          if (a.map != NONE) {
            float* own = grad_weights.added + (first + g + 1) * weight;
            features_vjp(maps.query[first + g], c, x_q + g * C * ldx, scratch, q + g * C * ldf, result, grad_x, own);
            result = grad_x;
          }
          store_tokens<T>(a.grad_query, b, t, head, c, a.key_dim, result, ldx);
        }
      }
      store_tokens<T>(a.grad_value, b, t, kv_head, c, v, grad_v, ldv);
      hide_tokens(a.valid ? a.valid + b * a.tokens + t : nullptr, c, grad_k, ldf);
      if (a.map != NONE) features_vjp(maps.key, c, x, scratch, keys, grad_k, grad_x, grad_weights.added);
      store_tokens<T>(a.grad_key, b, t, kv_head, c, a.key_dim, a.map == NONE ? grad_k : grad_x, ldx);
      grad_state.refresh(), grad_sums.refresh();
    }
    grad_state.close(), grad_sums.close(), grad_weights.close();
  }
  if (a.grad_initial_state) pack_state(a.grad_initial_state + head_at * state_size, f, v, grad_s, ldv, grad_z);
  store_grad_weights(a, b, kv_head, maps.key.has_weight(), grad_weights);
}

}  // namespace hf_hybrid
