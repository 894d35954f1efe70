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
  float* block_states;         // of training: the states before every block, [B, H_s, ceil(T / BLOCK), K, V]; or null
  // of the backward pass; those of keys and values per state, `[B, T, H_s, .]`
  View grad_output, grad_query, grad_key, grad_value, grad_decay, grad_beta;
  const float* grad_final_state;  // or null
  float* grad_initial_state;      // or null
};

// Smaller log-decays of a channel forget all that a float can hold, and would overflow the other side.
constexpr float STRONGEST_CHANNEL_DECAY = -16.0f;
// The largest exponent of a rescaled query or key, far from the end of fp32 (88) for huge inputs.
constexpr float LARGEST_EXPONENT = 64.0f;

// Brings rows to length 1; `factors` (if given) keeps what they were multiplied by.
static inline void l2_normalize(index c, float* x, index ld, float* factors) {
  for (index i = 0; i < c; i++) {
    float* row = x + i * ld;
    const float factor = 1.0f / std::sqrt(dot(row, row, ld) + 1e-6f);
    scale_row(row, ld, factor);
    if (factors) factors[i] = factor;
  }
}
// From the gradient of the normalised rows `y` that of the rows, in place.
static inline void l2_normalize_vjp(index c, const float* y, const float* factors, float* grad, index ld) {
  for (index i = 0; i < c; i++) {
    add_row(grad + i * ld, -dot(y + i * ld, grad + i * ld, ld), y + i * ld, ld);
    scale_row(grad + i * ld, ld, factors[i]);
  }
}
static inline void multiply_rows(index c, const float* x, const float* factors, index ld, float* to) {
  for (index j = 0; j < c * ld; j += W) store(to + j, load(x + j) * load(factors + j));
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

// (I - N)^T u = w in place
static void solve_transposed(index c, index n, const float* negative, index ldn, float* u, index ldu) {
  for (index i = c - 2; i >= 0; i--)
    for (index j = 0; j < n; j += W) {
      vec sum = load(u + i * ldu + j);
      for (index p = i + 1; p < c; p++) sum += negative[p * ldn + i] * load(u + p * ldu + j);
      store(u + i * ldu + j, sum);
    }
}

// The keys of one chunk and how they decay. Per head: `pairs`. Per channel: both sides brought to the middle, and the state with them.
struct GatedChunk {
  index tokens, filled;
  float *keys, *norms;           // [C, ldk], and what they were multiplied by to length 1, [C]
  float *near_keys, *far_keys;   // times `near`, times `far`; per head both are `keys`
  float *near, *far;             // per channel e^(b_i - r), e^(r - b_i): [C, ldk]
  float *to_middle, *to_next;    // per channel e^r, e^(b_last - r): [ldk]
  float* pairs;                  // per head e^(b_i - b_j) for j <= i: [C, C]
  float *from_start, *to_end;    // per head e^(b_i), e^(b_last - b_i): [C]

  static size_t space(bool channels, index C, index ldk) {
    return channels ? Arena::total({C * ldk, C, C * ldk, C * ldk, C * ldk, C * ldk, ldk, ldk}) : Arena::total({C * ldk, C, C * C, C, C});
  }
  void take(Arena& arena, bool channels, index C, index ldk) {
    keys = near_keys = far_keys = arena.take(C * ldk), norms = arena.take(C);
    if (channels) {
      near_keys = arena.take(C * ldk), far_keys = arena.take(C * ldk), near = arena.take(C * ldk), far = arena.take(C * ldk);
      to_middle = arena.take(ldk), to_next = arena.take(ldk);
    } else {
      pairs = arena.take(C * C), from_start = arena.take(C), to_end = arena.take(C);
    }
  }
};

// Tokens of a chunk: so few that both sides of a decay per channel stay far from overflow.
template <class P>
static index gated_chunk_size(const GatedArguments& a) {
  index step = P::CHUNK;
  while (a.per_channel && -std::max(a.min_decay, STRONGEST_CHANNEL_DECAY) * step / 2 > LARGEST_EXPONENT) step /= 2;
  return step;
}

template <typename T>
static void load_chunk(const GatedArguments& a, index b, index state_head, index t, index tokens, index C, GatedChunk& chunk) {
  const index k = a.key_dim, ldk = padded(k), c = tokens, filled = padded(c), kv_head = state_head / (a.state_heads / a.kv_heads);
  chunk.tokens = c, chunk.filled = filled;
  load_tokens<T>(a.key, b, t, kv_head, c, filled, k, chunk.keys, ldk);
  if (a.l2norm) l2_normalize(c, chunk.keys, ldk, chunk.norms);
  if (a.per_channel) {
    const float floor = std::max(a.min_decay, STRONGEST_CHANNEL_DECAY);
    for (index i = 0; i < c; i++) {  // cumulative sums, for now in `near`
      const float* decay = a.decay.at<const float>(b, t + i, state_head);
      for (index j = 0; j < k; j++) chunk.near[i * ldk + j] = std::max(decay[j], floor) + (i ? chunk.near[(i - 1) * ldk + j] : 0.0f);
      for (index j = k; j < ldk; j++) chunk.near[i * ldk + j] = 0.0f;
    }
    for (index j = 0; j < ldk; j += W) {
      const vec middle = load(chunk.near + (c / 2) * ldk + j), last = load(chunk.near + (c - 1) * ldk + j);
      store(chunk.to_middle + j, exp(middle));
      store(chunk.to_next + j, exp(last - middle));
      for (index i = 0; i < c; i++) {
        const vec difference = load(chunk.near + i * ldk + j) - middle;
        store(chunk.far + i * ldk + j, exp(-difference));
        store(chunk.near + i * ldk + j, exp(difference));
      }
    }
    multiply_rows(c, chunk.keys, chunk.near, ldk, chunk.near_keys);
    multiply_rows(c, chunk.keys, chunk.far, ldk, chunk.far_keys);
    zero(chunk.far_keys + c * ldk, (filled - c) * ldk);
    return;
  }
  // row by row from the one above: products of numbers below 1 keep their digits, differences of long sums would not
  zero(chunk.to_end, C);
  for (index i = 0; i < c; i++) {
    const float decay = std::exp(std::max(*a.decay.at<const float>(b, t + i, state_head), a.min_decay));
    for (index j = 0; j < filled; j += W) {
      store(chunk.to_end + j, load(chunk.to_end + j) * decay);
      if (j <= i && i < j + W) chunk.to_end[i] = 1.0f;
      store(chunk.pairs + i * C + j, load(chunk.to_end + j));
    }
    chunk.from_start[i] = decay * (i ? chunk.from_start[i - 1] : 1.0f);
  }
}

static void load_state(const float* state, index k, index v, float* s, index ldv) {
  for (index i = 0; i < k; i++)
    if (state)
      load_row(state + i * v, v, s + i * ldv, ldv);
    else
      zero(s + i * ldv, ldv);
}
static void store_state(const float* s, index k, index v, index ldv, float* state) {
  for (index i = 0; i < k; i++) std::memcpy(state + i * v, s + i * ldv, v * sizeof(float));
}

// What is written by the delta rule: from the values in `written` [C, ldv] the solution of u = beta (v - recalled) + N u, in their place.
// `lower` keeps N, below its diagonal; `products` (if given) k_i . k_j with its decay, and `difference` v - recalled, for the backward pass.
template <class P>
static void delta_writes(const GatedArguments& a, index b, index state_head, index t, const GatedChunk& chunk, typename P::Right keys_t,
                         typename P::Right s, float* written, float* lower, float* recalled, float* products, float* rounded) {
  constexpr index C = P::CHUNK;
  const index c = chunk.tokens, k = a.key_dim, ldk = padded(k), ldv = padded(a.value_dim);
  const auto left = P::left(c, k, chunk.near_keys, ldk, rounded);
  causal_products<P>(c, k, left, keys_t, lower, C);
  P::multiply(c, ldv, k, left, s, recalled, ldv, false);
  for (index i = 0; i < c; i++) {
    const float beta = *a.beta.at<const float>(b, t + i, state_head), decay = a.per_channel ? 1.0f : chunk.from_start[i];
    for (index j = 0; j <= i; j += W) {
      vec product = load(lower + i * C + j);
      if (!a.per_channel) product *= load(chunk.pairs + i * C + j);
      if (products) store(products + i * C + j, product);
      store(lower + i * C + j, -beta * product);
    }
    for (index j = 0; j < ldv; j += W) {
      const vec difference = load(written + i * ldv + j) - decay * load(recalled + i * ldv + j);
      store(recalled + i * ldv + j, difference);
      store(written + i * ldv + j, beta * difference);
    }
  }
  solve(c, ldv, lower, C, written, ldv);
}

// How much of a state is left after some tokens, per row.
static void kept_over(const GatedArguments& a, index b, index state_head, index t, index tokens, double* kept) {
  const index n = a.per_channel ? a.key_dim : 1;
  const float floor = a.per_channel ? std::max(a.min_decay, STRONGEST_CHANNEL_DECAY) : a.min_decay;
  std::fill(kept, kept + n, 0.0);
  for (index i = 0; i < tokens; i++) {
    const float* decay = a.decay.at<const float>(b, t + i, state_head);
    for (index j = 0; j < n; j++) kept[j] += std::max(decay[j], floor);
  }
  for (index j = 0; j < n; j++) kept[j] = std::exp(kept[j]);
  std::fill(kept + n, kept + a.key_dim, kept[0]);
}

template <typename T, class P>
static void gated_forward_task(const GatedArguments& a, index b, index state_head, Arena& arena) {
  constexpr index C = P::CHUNK;
  constexpr bool SPLIT = splits<T>();
  const bool channels = a.per_channel, delta = a.beta.data;
  const index kv_head = state_head / (a.state_heads / a.kv_heads), groups = a.heads / a.state_heads;
  const index k = a.key_dim, v = a.value_dim, ldk = padded(k), ldv = padded(v), step = gated_chunk_size<P>(a);
  const index left_space = std::max(P::left_space(C, k), P::left_space(k, C));
  arena.reset(GatedChunk::space(channels, C, ldk) +
              Arena::total({ldk * C, C * ldk, C * ldv, C * ldv, C * C, C * C, P::right_space(k, C), P::right_space(C, ldv), P::right_space(k, ldv),
                            left_space}) +
              State::space(k, ldv, SPLIT));
  GatedChunk chunk;
  chunk.take(arena, channels, C, ldk);
  float *keys_t = arena.take(ldk * C), *q = arena.take(C * ldk), *written = arena.take(C * ldv), *out = arena.take(C * ldv);
  float *scores = arena.take(C * C), *lower = arena.take(C * C), *packed_keys = arena.take(P::right_space(k, C));
  float *packed_written = arena.take(P::right_space(C, ldv)), *packed_s = arena.take(P::right_space(k, ldv)), *rounded = arena.take(left_space);

  State state;
  state.take(arena, k, ldv, SPLIT);
  float* s = state.now;
  std::vector<double> kept(k);
  std::vector<float> pending(k, 1.0f);  // per channel: decays that wait for those of the next chunk

  const index head_at = b * a.state_heads + state_head, state_size = k * v;
  load_state(a.initial_state ? a.initial_state + head_at * state_size : nullptr, k, v, s, ldv);
  state.open();
  for (index t = 0; t < a.tokens; t += step) {
    const index c = std::min(a.tokens - t, step);
    if (t && t % BLOCK == 0) {
      if (channels)
        for (index i = 0; i < k; i++) state.decay(i, std::exchange(pending[i], 1.0f));
      if (SPLIT) kept_over(a, b, state_head, t - BLOCK, BLOCK, kept.data());
      state.close(kept.data());
    }
    if (a.block_states && t % BLOCK == 0)
      store_state(s, k, v, ldv, a.block_states + (head_at * ((a.tokens + BLOCK - 1) / BLOCK) + t / BLOCK) * state_size);
    load_chunk<T>(a, b, state_head, t, c, C, chunk);
    load_tokens<T>(a.value, b, t, kv_head, c, chunk.filled, v, written, ldv);
    if (channels)
      for (index i = 0; i < k; i++) state.decay_and_refresh(i, pending[i], chunk.to_middle[i]);
    transpose(chunk.filled, ldk, chunk.far_keys, ldk, keys_t, C);
    const auto right_keys = P::right(k, C, keys_t, C, packed_keys);
    const auto right_s = P::right(k, ldv, s, ldv, packed_s);
    if (delta) delta_writes<P>(a, b, state_head, t, chunk, right_keys, right_s, written, lower, out, nullptr, rounded);
    const auto right_written = P::right(chunk.filled, ldv, written, ldv, packed_written);

    for (index g = 0; g < groups; g++) {
      const index head = state_head * groups + g;
      load_tokens<T>(a.query, b, t, head, c, c, k, q, ldk);
      if (a.l2norm) l2_normalize(c, q, ldk, nullptr);
      if (channels) multiply_rows(c, q, chunk.near, ldk, q);
      const auto left_q = P::left(c, k, q, ldk, rounded);
      causal_products<P>(c, k, left_q, right_keys, scores, C);
      P::multiply(c, ldv, k, left_q, right_s, out, ldv, false);
      if (!channels)
        for (index i = 0; i < c; i++) {
          scale_row(out + i * ldv, ldv, chunk.from_start[i]);
          for (index j = 0; j <= i; j += W) store(scores + i * C + j, load(scores + i * C + j) * load(chunk.pairs + i * C + j));
        }
      lower_multiply<P>(c, ldv, scores, C, right_written, out, ldv, true, rounded);
      for (index i = 0; i < c; i++) store_row(out + i * ldv, a.scale, v, a.output.at<T>(b, t + i, head));
    }

    if (!a.final_state && t + step >= a.tokens) continue;
    if (!channels)
      for (index i = 0; i < k; i++) {
        state.decay(i, chunk.from_start[c - 1]);
        for (index j = 0; j < chunk.filled; j += W) store(keys_t + i * C + j, load(keys_t + i * C + j) * load(chunk.to_end + j));
      }
    P::multiply(k, ldv, c, P::left(k, c, keys_t, C, rounded), right_written, state.added, ldv, true);
    if (channels)
      std::copy(chunk.to_next, chunk.to_next + k, pending.begin());
    else
      state.refresh();
  }
  if (channels)
    for (index i = 0; i < k; i++) state.decay_and_refresh(i, pending[i], 1.0f);
  if (a.final_state) store_state(s, k, v, ldv, a.final_state + head_at * state_size);
}

// One pass over the blocks from the back, as linear_backward_task: the states before the chunks of a block, and what they write, are made again.
//
// A decay acts on its tokens as readers (queries, and keys that recall) and as writers (keys), so its gradient follows from theirs: with b the
// cumulative log-decay, grad b_i = q_i . grad q_i + k_i . grad k_i as reader - k_i . grad k_i as writer, and at the last token of a chunk
// the product of the state after it with its gradient.
template <typename T>
static void gated_backward_task(const GatedArguments& a, index b, index state_head, Arena& arena) {
  using P = Exact;
  constexpr index C = P::CHUNK;
  const bool channels = a.per_channel, delta = a.beta.data;
  const index kv_head = state_head / (a.state_heads / a.kv_heads), groups = a.heads / a.state_heads;
  const index k = a.key_dim, v = a.value_dim, ldk = padded(k), ldv = padded(v), step = gated_chunk_size<P>(a), N = BLOCK / step;
  arena.reset(N * (GatedChunk::space(channels, C, ldk) + Arena::total({k * ldv, C * ldv, C * ldv, C * C, C * C})) +
              Arena::total({k * ldv, ldk * C, C * ldk, C, C * ldk, C * ldk, C * ldv, C * ldv, C * ldv, C * ldv, C * C, C * C, C * C, C * ldk, C * ldk, C * ldk,
                            ldk * ldv, ldv * ldk, ldv * ldk}) +
              State::space(ldk, ldv, true));
  std::vector<GatedChunk> chunks(N);
  std::vector<float*> states(N + 1), writes(N), differences(N), lowers(N), products(N);  // states[i]: before chunk i
  for (index i = 0; i < N; i++) {
    chunks[i].take(arena, channels, C, ldk);
    states[i] = arena.take(k * ldv);
    writes[i] = arena.take(C * ldv), differences[i] = arena.take(C * ldv), lowers[i] = arena.take(C * C), products[i] = arena.take(C * C);
  }
  states[N] = arena.take(k * ldv);
  float *keys_t = arena.take(ldk * C), *q = arena.take(C * ldk), *norms = arena.take(C), *near_q = arena.take(C * ldk), *grad_q = arena.take(C * ldk);
  float *grad = arena.take(C * ldv), *grad_written = arena.take(C * ldv), *written_t = arena.take(ldv * C), *scratch = arena.take(C * ldv);
  float *scores = arena.take(C * C), *grad_scores = arena.take(C * C), *grad_lower = arena.take(C * C);
  float *grad_reader = arena.take(C * ldk), *grad_writer = arena.take(C * ldk), *grad_sums = arena.take(C * ldk);  // of keys, and of cumulative decays
  float *s = arena.take(ldk * ldv), *s_t = arena.take(ldv * ldk), *grad_s_t = arena.take(ldv * ldk);
  State grad_state;
  grad_state.take(arena, ldk, ldv, true);
  float* grad_s = grad_state.now;
  std::vector<double> kept(ldk, 1.0);

  const index head_at = b * a.state_heads + state_head, state_size = k * v, num_blocks = (a.tokens + BLOCK - 1) / BLOCK;
  zero(grad_s, ldk * ldv);
  if (a.grad_final_state) load_state(a.grad_final_state + head_at * state_size, k, v, grad_s, ldv);
  zero(s, ldk * ldv);
  grad_state.open();
  for (index block = num_blocks - 1; block >= 0; block--) {
    const index start = block * BLOCK, count = (std::min(a.tokens - start, BLOCK) + step - 1) / step;
    load_state(a.block_states + (head_at * num_blocks + block) * state_size, k, v, states[0], ldv);
    for (index i = 0; i < count; i++) {
      const index t = start + i * step, c = std::min(a.tokens - t, step);
      GatedChunk& chunk = chunks[i];
      load_chunk<T>(a, b, state_head, t, c, C, chunk);
      load_tokens<T>(a.value, b, t, kv_head, c, chunk.filled, v, writes[i], ldv);
      std::memcpy(s, states[i], k * ldv * sizeof(float));
      if (channels)
        for (index j = 0; j < k; j++) scale_row(s + j * ldv, ldv, chunk.to_middle[j]);
      transpose(chunk.filled, ldk, chunk.far_keys, ldk, keys_t, C);
      if (delta) delta_writes<P>(a, b, state_head, t, chunk, {keys_t, C}, {s, ldv}, writes[i], lowers[i], differences[i], products[i], nullptr);
      if (!channels)
        for (index j = 0; j < k; j++) {
          scale_row(s + j * ldv, ldv, chunk.from_start[c - 1]);
          for (index l = 0; l < chunk.filled; l += W) store(keys_t + j * C + l, load(keys_t + j * C + l) * load(chunk.to_end + l));
        }
      multiply(k, ldv, c, rows(keys_t, C), writes[i], ldv, s, ldv, true);
      if (channels)
        for (index j = 0; j < k; j++) scale_row(s + j * ldv, ldv, chunk.to_next[j]);
      std::memcpy(states[i + 1], s, k * ldv * sizeof(float));
    }
    for (index i = count - 1; i >= 0; i--) {
      const index t = start + i * step, c = std::min(a.tokens - t, step);
      const GatedChunk& chunk = chunks[i];
      const float* written = writes[i];
      zero(grad_sums, C * ldk);
      for (index j = 0; j < k; j++) grad_sums[(c - 1) * ldk + j] = dot(states[i + 1] + j * ldv, grad_s + j * ldv, ldv);
      std::memcpy(s, states[i], k * ldv * sizeof(float));
      if (channels)
        for (index j = 0; j < k; j++) {
          grad_state.decay(j, chunk.to_next[j]);
          scale_row(s + j * ldv, ldv, chunk.to_middle[j]);
        }
      if (channels) grad_state.refresh();
      transpose(ldk, ldv, s, ldv, s_t, ldk);
      transpose(ldk, ldv, grad_s, ldv, grad_s_t, ldk);
      transpose(chunk.filled, ldk, chunk.far_keys, ldk, keys_t, C);
      transpose(chunk.filled, ldv, written, ldv, written_t, C);
      // through the state after the chunk
      multiply(c, ldv, k, rows(chunk.far_keys, ldk), grad_s, ldv, grad_written, ldv, false);
      multiply(c, ldk, v, rows(written, ldv), grad_s_t, ldk, grad_writer, ldk, false);
      if (!channels) {
        for (index r = 0; r < c; r++) {
          scale_row(grad_written + r * ldv, ldv, chunk.to_end[r]);
          scale_row(grad_writer + r * ldk, ldk, chunk.to_end[r]);
        }
        for (index j = 0; j < k; j++) grad_state.decay(j, chunk.from_start[c - 1]);
      }
      for (index g = 0; g < groups; g++) {
        const index head = state_head * groups + g;
        load_tokens<T>(a.query, b, t, head, c, c, k, q, ldk);
        if (a.l2norm) l2_normalize(c, q, ldk, norms);
        load_tokens<T>(a.grad_output, b, t, head, c, c, v, grad, ldv);
        for (index r = 0; r < c; r++) scale_row(grad + r * ldv, ldv, a.scale);
        const float* reader = q;
        if (channels) multiply_rows(c, q, chunk.near, ldk, near_q), reader = near_q;
        causal_products<P>(c, k, {reader, ldk}, {keys_t, C}, scores, C);
        causal_products<P>(c, v, {grad, ldv}, {written_t, C}, grad_scores, C);
        if (!channels)
          for (index r = 0; r < c; r++)
            for (index j = 0; j <= r; j += W) {
              const vec decay = load(chunk.pairs + r * C + j);
              store(scores + r * C + j, load(scores + r * C + j) * decay);
              store(grad_scores + r * C + j, load(grad_scores + r * C + j) * decay);
            }
        multiply(c, ldv, c, transposed(scores, C), grad, ldv, grad_written, ldv, true);
        multiply(c, ldk, c, transposed(grad_scores, C), reader, ldk, grad_writer, ldk, true);
        // per head, what is read from the state is decayed
        const float* read = grad;
        if (!channels) {
          for (index r = 0; r < c; r++) set_row(scratch + r * ldv, chunk.from_start[r], grad + r * ldv, ldv);
          read = scratch;
        }
        multiply(c, ldk, v, rows(read, ldv), s_t, ldk, grad_q, ldk, false);
        multiply(c, ldk, c, rows(grad_scores, C), chunk.far_keys, ldk, grad_q, ldk, true);
        multiply(k, ldv, c, transposed(reader, ldk), read, ldv, grad_state.added, ldv, true);
        for (index j = 0; j < c * ldk; j += W) store(grad_sums + j, load(grad_sums + j) + load(reader + j) * load(grad_q + j));
        if (channels) multiply_rows(c, grad_q, chunk.near, ldk, grad_q);
        if (a.l2norm) l2_normalize_vjp(c, q, norms, grad_q, ldk);
        store_tokens<T>(a.grad_query, b, t, head, c, k, grad_q, ldk);
      }
      zero(grad_reader, C * ldk);
      if (delta) {
        solve_transposed(c, ldv, lowers[i], C, grad_written, ldv);
        causal_products<P>(c, v, {grad_written, ldv}, {written_t, C}, grad_lower, C);
        for (index r = 0; r < c; r++) {
          const float beta = *a.beta.at<const float>(b, t + r, state_head), decay = channels ? 1.0f : chunk.from_start[r];
          float grad_beta = dot(grad_written + r * ldv, differences[i] + r * ldv, ldv);
          for (index j = 0; j < r; j++) {
            grad_beta -= grad_lower[r * C + j] * products[i][r * C + j];
            grad_lower[r * C + j] *= channels ? -beta : -beta * chunk.pairs[r * C + j];
          }
          for (index j = r; j < C; j++) grad_lower[r * C + j] = 0.0f;
          *a.grad_beta.at<float>(b, t + r, state_head) = grad_beta;
          scale_row(grad_written + r * ldv, ldv, beta);  // now of the value
          set_row(scratch + r * ldv, -decay, grad_written + r * ldv, ldv);
        }
        multiply(c, ldk, v, rows(scratch, ldv), s_t, ldk, grad_reader, ldk, false);
        multiply(c, ldk, c, rows(grad_lower, C), chunk.far_keys, ldk, grad_reader, ldk, true);
        multiply(c, ldk, c, transposed(grad_lower, C), chunk.near_keys, ldk, grad_writer, ldk, true);
        multiply(k, ldv, c, transposed(chunk.near_keys, ldk), scratch, ldv, grad_state.added, ldv, true);
      }
      store_tokens<T>(a.grad_value, b, t, state_head, c, v, grad_written, ldv);
      for (index j = 0; j < c * ldk; j += W) {
        const vec reader = load(chunk.near_keys + j) * load(grad_reader + j), writer = load(chunk.far_keys + j) * load(grad_writer + j);
        store(grad_sums + j, load(grad_sums + j) + reader - writer);
      }
      // decays: of the log-decay of token t, all cumulative sums from there on
      vec sums = vec{};
      for (index r = c - 1; r >= 0; r--) {
        const float* decay = a.decay.at<const float>(b, t + r, state_head);
        float* to = a.grad_decay.at<float>(b, t + r, state_head);
        if (channels) {
          if (r < c - 1) add_row(grad_sums + r * ldk, 1.0f, grad_sums + (r + 1) * ldk, ldk);
          const float floor = std::max(a.min_decay, STRONGEST_CHANNEL_DECAY);
          for (index j = 0; j < k; j++) to[j] = decay[j] >= floor ? grad_sums[r * ldk + j] : 0.0f;
        } else {
          for (index j = 0; j < ldk; j += W) sums += load(grad_sums + r * ldk + j);
          *to = *decay >= a.min_decay ? sum(sums) : 0.0f;
        }
      }
      if (channels) {
        multiply_rows(c, grad_reader, chunk.near, ldk, grad_reader);
        multiply_rows(c, grad_writer, chunk.far, ldk, grad_writer);
        for (index j = 0; j < k; j++) grad_state.decay(j, chunk.to_middle[j]);
      }
      for (index r = 0; r < c; r++) add_row(grad_writer + r * ldk, 1.0f, grad_reader + r * ldk, ldk);
      if (a.l2norm) l2_normalize_vjp(c, chunk.keys, chunk.norms, grad_writer, ldk);
      store_tokens<T>(a.grad_key, b, t, state_head, c, k, grad_writer, ldk);
      grad_state.refresh();
    }
    kept_over(a, b, state_head, start, std::min(a.tokens - start, BLOCK), kept.data());
    grad_state.close(kept.data());
  }
  if (a.grad_initial_state) store_state(grad_s, k, v, ldv, a.grad_initial_state + head_at * state_size);
}

}  // namespace hf_hybrid
