// Gated linear attention and the gated delta rule, with one log-decay per head or one per key channel, a chunk at a time.
//
// Axes as in linear.h; one task is one sequence and one state with the query heads that read it. With b the cumulative log-decay, token j reaches
// token i times e^(b_i - b_j), never above 1. Per channel that cannot stand between the factors of a product, so both sides are brought to a token
// in the middle of the chunk: e^(b_i - r) e^(r - b_j). Chunks are so short that neither overflows.
#pragma once

#include "linear.h"

namespace hf_hybrid {

struct GatedArguments {  // mirrored in arguments.py
  int64_t batch, tokens, heads, kv_heads, state_heads, key_dim, value_dim, dtype, threads, per_channel, l2norm;
  float scale, min_decay;
  View query, key, value, output;
  View decay, beta;            // fp32; per head `[B, T, H_s]`, decays per channel `[B, T, H_s, K]`; no beta: no delta rule
  const float* initial_state;  // [B, H_s, K, V] or null
  float* final_state;          // the same or null
};

// Smaller log-decays of a channel forget all that a float can hold, and would overflow the other side.
constexpr float STRONGEST_CHANNEL_DECAY = -16.0f;
// The largest exponent of a rescaled query or key, far from the end of fp32 (88) for huge inputs.
constexpr float LARGEST_EXPONENT = 64.0f;

static inline void l2_normalize(index c, float* x, index ld) {
  for (index i = 0; i < c; i++) {
    float* row = x + i * ld;
    vec factor = splat(1.0f / std::sqrt(dot(row, row, ld) + 1e-6f));
    for (index j = 0; j < ld; j += W) store(row + j, load(row + j) * factor);
  }
}
static inline void multiply_rows(index c, float* x, const float* factors, index ld) {
  for (index j = 0; j < c * ld; j += W) store(x + j, load(x + j) * load(factors + j));
}

// (I - N) u = w in place, N strictly lower triangular: forward substitution, which unlike an inverse stays exact where keys are parallel
static void solve(index c, index n, const float* negative, index ldn, float* u, index ldu) {
  for (index r = 0; r < c; r += W) {
    index end = r + W < c ? r + W : c;
    if (r) multiply(end - r, n, r, rows(negative + r * ldn, ldn), u, ldu, u + r * ldu, ldu, true);
    for (index i = r + 1; i < end; i++)
      for (index j = 0; j < n; j += W) {
        vec sum = load(u + i * ldu + j);
        for (index p = r; p < i; p++) sum += negative[i * ldn + p] * load(u + p * ldu + j);
        store(u + i * ldu + j, sum);
      }
  }
}

template <typename T, class P>
static void gated_forward_task(const GatedArguments& a, index b, index state_head, Arena& arena) {
  const bool channels = a.per_channel, delta = a.beta.data;
  const index kv_head = state_head / (a.state_heads / a.kv_heads), groups = a.heads / a.state_heads;
  const index k = a.key_dim, v = a.value_dim, ldk = padded(k), ldv = padded(v);
  const float floor = std::max(a.min_decay, STRONGEST_CHANNEL_DECAY);
  constexpr index C = P::CHUNK;
  index step = C;  // tokens of a chunk in use
  while (channels && -floor * step / 2 > LARGEST_EXPONENT) step /= 2;
  const index wide = channels ? C * ldk : C * C;  // decays: per token and channel, or per pair of tokens
  const index left_space = std::max(P::left_space(C, k), P::left_space(k, C));
  arena.reset(Arena::total({C * ldk, C * ldk, ldk * C, C * ldk, C * ldv, C * ldv, C * C, C * C, wide, wide, ldk, C, C, k * ldv,
                            P::right_space(k, C), P::right_space(C, ldv), P::right_space(k, ldv), left_space}));
  float *keys = arena.take(C * ldk), *near_keys = arena.take(C * ldk), *keys_t = arena.take(ldk * C), *q = arena.take(C * ldk);
  float *written = arena.take(C * ldv), *out = arena.take(C * ldv), *scores = arena.take(C * C), *lower = arena.take(C * C);
  float *near = arena.take(wide), *far = arena.take(wide), *reference = arena.take(ldk);
  float *from_start = arena.take(C), *to_end = arena.take(C), *s = arena.take(k * ldv);
  float *packed_keys = arena.take(P::right_space(k, C)), *packed_written = arena.take(P::right_space(C, ldv));
  float *packed_s = arena.take(P::right_space(k, ldv)), *rounded = arena.take(left_space);

  const index state_at = (b * a.state_heads + state_head) * k * v;
  for (index i = 0; i < k; i++) {
    if (a.initial_state)
      std::memcpy(s + i * ldv, a.initial_state + state_at + i * v, v * sizeof(float));
    else
      zero(s + i * ldv, v);
    zero(s + i * ldv + v, ldv - v);
  }
  for (index t = 0; t < a.tokens; t += step) {
    const index c = a.tokens - t < step ? a.tokens - t : step, filled = padded(c);
    load_tokens<T>(a.key, b, t, kv_head, c, filled, k, keys, ldk);
    load_tokens<T>(a.value, b, t, kv_head, c, filled, v, written, ldv);
    if (a.l2norm) l2_normalize(c, keys, ldk);

    // decays, and everything of the keys that queries do not enter
    if (channels) {
      for (index i = 0; i < c; i++) {  // cumulative sums, for now in `near`
        const float* decay = a.decay.at<const float>(b, t + i, state_head);
        for (index j = 0; j < k; j++) near[i * ldk + j] = std::max(decay[j], floor) + (i ? near[(i - 1) * ldk + j] : 0.0f);
        for (index j = k; j < ldk; j++) near[i * ldk + j] = 0.0f;
      }
      const float* middle = near + (c / 2) * ldk;
      for (index j = 0; j < ldk; j += W) {
        vec r = load(middle + j), last = load(near + (c - 1) * ldk + j), to_middle = exp(r);
        for (index i = 0; i < c; i++) {
          vec difference = load(near + i * ldk + j) - r;
          store(far + i * ldk + j, exp(-difference));
          store(near + i * ldk + j, exp(difference));
        }
        for (index l = 0; l < W && j + l < k; l++) scale_row(s + (j + l) * ldv, ldv, to_middle[l]);  // the state comes to the middle, too
        store(reference + j, exp(last - r));
      }
      if (delta) {
        std::memcpy(near_keys, keys, c * ldk * sizeof(float));
        multiply_rows(c, near_keys, near, ldk);
      }
      multiply_rows(c, keys, far, ldk);
    } else {
      // e^(b_i - b_j) row by row from the one above: products of numbers below 1 keep their digits, differences of long sums would not
      zero(to_end, C);
      for (index i = 0; i < c; i++) {
        const float decay = std::exp(std::max(*a.decay.at<const float>(b, t + i, state_head), a.min_decay));
        for (index j = 0; j < filled; j += W) {
          store(to_end + j, load(to_end + j) * decay);
          if (j <= i && i < j + W) to_end[i] = 1.0f;
          store(near + i * C + j, load(to_end + j));
        }
        from_start[i] = decay * (i ? from_start[i - 1] : 1.0f);
      }
    }
    transpose(filled, ldk, keys, ldk, keys_t, C);
    const auto right_keys = P::right(k, C, keys_t, C, packed_keys);
    const auto right_s = P::right(k, ldv, s, ldv, packed_s);
    if (delta) {
      const auto left = P::left(c, k, channels ? near_keys : keys, ldk, rounded);
      causal_products<P>(c, k, left, right_keys, lower, C);
      P::multiply(c, ldv, k, left, right_s, out, ldv, false);  // what the state recalls
      for (index i = 0; i < c; i++) {
        const float beta = *a.beta.at<const float>(b, t + i, state_head), decay = channels ? 1.0f : from_start[i];
        for (index j = 0; j < i; j++) lower[i * C + j] *= channels ? -beta : -beta * near[i * C + j];
        for (index j = 0; j < ldv; j += W) store(written + i * ldv + j, beta * (load(written + i * ldv + j) - decay * load(out + i * ldv + j)));
      }
      solve(c, ldv, lower, C, written, ldv);
    }
    const auto right_written = P::right(filled, ldv, written, ldv, packed_written);

    for (index g = 0; g < groups; g++) {
      const index head = state_head * groups + g;
      load_tokens<T>(a.query, b, t, head, c, c, k, q, ldk);
      if (a.l2norm) l2_normalize(c, q, ldk);
      if (channels) multiply_rows(c, q, near, ldk);
      const auto left_q = P::left(c, k, q, ldk, rounded);
      causal_products<P>(c, k, left_q, right_keys, scores, C);
      P::multiply(c, ldv, k, left_q, right_s, out, ldv, false);
      if (!channels)
        for (index i = 0; i < c; i++) {
          scale_row(out + i * ldv, ldv, from_start[i]);
          for (index j = 0; j <= i; j += W) store(scores + i * C + j, load(scores + i * C + j) * load(near + i * C + j));
        }
      lower_multiply<P>(c, ldv, scores, C, right_written, out, ldv, true, rounded);
      for (index i = 0; i < c; i++) store_row(out + i * ldv, a.scale, v, a.output.at<T>(b, t + i, head));
    }

    if (!a.final_state && t + step >= a.tokens) continue;
    if (!channels) {
      for (index i = 0; i < k; i++) scale_row(s + i * ldv, ldv, from_start[c - 1]);
      for (index i = 0; i < k; i++)
        for (index j = 0; j < filled; j += W) store(keys_t + i * C + j, load(keys_t + i * C + j) * load(to_end + j));
    }
    P::multiply(k, ldv, c, P::left(k, c, keys_t, C, rounded), right_written, s, ldv, true);
    if (channels)
      for (index i = 0; i < k; i++) scale_row(s + i * ldv, ldv, reference[i]);
  }
  if (a.final_state)
    for (index i = 0; i < k; i++) std::memcpy(a.final_state + state_at + i * v, s + i * ldv, v * sizeof(float));
}

}  // namespace hf_hybrid
