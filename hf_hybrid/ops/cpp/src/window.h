// Sliding-window attention with sinks, and optionally linear attention over everything older, under one normaliser.
//
// Tokens are taken in blocks of C; a ring of blocks holds what a block of queries can reach: itself and what its window covers. Each query gives
// every key in reach one weight: an exponential one in its window, a product of features beyond it. What left the ring is in the state.
#pragma once

#include "step.h"

namespace hf_hybrid {

struct WindowState {  // batch first, as naive.WindowState; tokens in the dtype of the arguments
  void *key, *value;   // [B, H_kv, S + W, .]
  uint8_t* visible;    // [B, S + W]
  int64_t* counts;     // [B, 3]: place of the oldest position in the ring, sinks found, newest positions in a row that are visible
  float* recurrent;    // [B, H_kv, F, V + 1] or null
};

struct WindowArguments {  // mirrored in arguments.py
  LinearArguments common;  // its states are not used
  int64_t window, sinks;
  float score_scale;
  const float* log_weight;  // [H]; null: no linear part
  WindowState before, after;  // before.key is null at the start of a sequence
  float* grad_log_weight;     // of the backward pass, which takes whole sequences only: [B, H]
};

constexpr float NOTHING = -3e38f;  // score of a key that is not there

// Which of the new tokens are sinks, and which are to be seen in the window, of one sequence. Positions count from the first new token.
struct Sorted {
  const WindowArguments& a;
  index b;
  int64_t cursor = 0, known = 0, found = 0;
  std::vector<index> sink_position;  // per slot: -1 = from before, `tokens` = not found

  Sorted(const WindowArguments& arguments, index row) : a(arguments), b(row), sink_position(arguments.sinks, arguments.common.tokens) {
    if (a.before.key) cursor = a.before.counts[b * 3], known = found = a.before.counts[b * 3 + 1];
    for (index slot = 0; slot < found; slot++) sink_position[slot] = -1;
    for (index p = 0; p < a.common.tokens && found < a.sinks; p++)
      if (exists(p)) sink_position[found++] = p;
  }
  bool exists(index p) const { return !a.common.valid || a.common.valid[b * a.common.tokens + p]; }
  index ring_slot(index p) const { return a.sinks + (cursor + a.window + p) % a.window; }  // p in [-W, -1]
  bool visible(index p) const {
    if (p < 0) return p >= -a.window && a.before.key && a.before.visible[b * (a.sinks + a.window) + ring_slot(p)];
    for (index slot = known; slot < found; slot++)
      if (sink_position[slot] == p) return false;
    return exists(p);
  }
};

template <typename T>
static void copy_row(const T* from, T* to, index size) { std::memcpy(to, from, size * sizeof(T)); }

// The state after the call, all but its recurrent part: one head's keys and values, and for the first head what all share.
template <typename T>
static void advance(const WindowArguments& a, const Sorted& sorted, index kv_head) {
  const LinearArguments& c = a.common;
  const index b = sorted.b, slots = a.sinks + a.window, head = b * c.kv_heads + kv_head;
  const auto each = [&](index slot, index p) {  // position p goes to the slot; -1: what was there
    for (int part = 0; part < 2; part++) {
      const index size = part ? c.value_dim : c.key_dim;
      T* to = static_cast<T*>(part ? a.after.value : a.after.key) + (head * slots + slot) * size;
      const T* old = static_cast<const T*>(part ? a.before.value : a.before.key);
      if (p >= 0 && p < c.tokens)
        copy_row((part ? c.value : c.key).at<const T>(b, p, kv_head), to, size);
      else if (p < 0 && old)
        copy_row(old + (head * slots + (slot < a.sinks ? slot : sorted.ring_slot(p))) * size, to, size);
      else
        std::memset(static_cast<void*>(to), 0, size * sizeof(T));
    }
  };
  for (index slot = 0; slot < a.sinks; slot++) each(slot, sorted.sink_position[slot]);
  for (index j = 0; j < a.window; j++) each(a.sinks + j, c.tokens - a.window + j);
  if (kv_head) return;
  uint8_t* visible = a.after.visible + b * slots;
  for (index slot = 0; slot < a.sinks; slot++) visible[slot] = slot < sorted.found;
  int64_t run = 0;
  for (index j = a.window - 1; j >= 0; j--) {
    visible[a.sinks + j] = sorted.visible(c.tokens - a.window + j);
    if (visible[a.sinks + j] && run == a.window - 1 - j) run++;
  }
  int64_t* counts = a.after.counts + b * 3;
  counts[0] = 0, counts[1] = sorted.found, counts[2] = run;
}

struct Lanes {
  ivec lane;
  Lanes() {
    for (int l = 0; l < W; l++) lane[l] = l;
  }
  ivec before(index first, index end) const { return lane + int32_t(first) < ivec{} + int32_t(end); }
};

// Exponential weights of one row of scores: `lds` sinks, then C keys each of `blocks` blocks, `block(n)` telling where the n-th begins and which of its
// keys are to be seen. `query` is the row's position.
template <index C, class Block>
static void exact_weights(const WindowArguments& a, const Sorted& sorted, index query, index lds, index blocks, Block block, float* row) {
  static const Lanes lanes;
  vec top = splat(NOTHING);
  for (index j = 0; j < lds; j += W) {
    vec score = load(row + j) * a.score_scale;
    for (index l = 0; l < W; l++)
      if (j + l >= sorted.found || sorted.sink_position[j + l] > query) score[l] = NOTHING;
    store(row + j, score);
    top = max(top, score);
  }
  for (index n = 0; n < blocks; n++) {
    const auto& from = block(n);
    for (index j = 0; j < C; j += W) {
      float* here = row + lds + n * C + j;
      const index first = from.first + j;
      vec score = load(here) * a.score_scale;
      if (!from.whole || first <= query - a.window || first + W - 1 > query) {
        const ivec inside = ~lanes.before(first, query - a.window + 1) & lanes.before(first, query + 1) & (load(from.seen + j) > vec{});
        score = inside ? score : splat(NOTHING);
      }
      store(here, score);
      top = max(top, score);
    }
  }
  float peak = largest(top);
  if (peak <= NOTHING) peak = 0.0f;  // nothing but what is older
  for (index j = 0; j < lds + blocks * C; j += W) store(row + j, exp(load(row + j) - peak));
}

template <typename T, class P>
static void window_forward_task(const WindowArguments& a, index b, index kv_head, Arena& arena) {
  constexpr index C = P::CHUNK;
  constexpr bool SPLIT = splits<T>();
  const LinearArguments& c = a.common;
  const bool linear = a.log_weight;
  const index groups = c.heads / c.kv_heads, k = c.key_dim, v = c.value_dim, f = c.feature_dim, slots = a.sinks + a.window;
  const index ldx = padded(k), ldp = padded(c.projected_dim), ldf = padded(f), ldv = padded(v), lds = padded(a.sinks);
  const index back = (a.window + C - 1) / C, reach = lds + (back + 1) * C;
  const auto if_linear = [&](index n) { return linear ? n : 0; };
  const size_t block = Arena::total({ldx * C, C * ldv, C, if_linear(C * ldf + W), if_linear(ldf * C), P::right_space(k, C), P::right_space(C, ldv),
                                     if_linear(P::right_space(f, C))});
  const index left_space = std::max({P::left_space(C, k), if_linear(P::left_space(C, f)), if_linear(P::left_space(f, C)), P::left_space(C, std::max(lds, C))});
  arena.reset(Arena::total({if_linear(space_for_maps<P>(c, false)), C * ldx, C * ldp, C * ldx, C * ldf + W, lds * ldx, ldx * lds, lds * ldv, C * reach,
                            C * C, C * ldv, P::right_space(k, lds), P::right_space(lds, ldv), if_linear(P::right_space(f, ldv)), left_space, left_space}) +
              (back + 1) * block + State::space(if_linear(f), ldv, SPLIT) + State::space(1, ldf, SPLIT));
  float *weights = arena.take(if_linear(space_for_maps<P>(c, false))), *x = arena.take(C * ldx), *scratch = arena.take(C * ldp);
  float *q = arena.take(C * ldx), *features_q = arena.take(C * ldf + W), *sink_keys = arena.take(lds * ldx), *sink_keys_t = arena.take(ldx * lds);
  float *sink_values = arena.take(lds * ldv), *share = arena.take(C * reach), *products = arena.take(C * C), *out = arena.take(C * ldv);
  State state, sums;  // S and z
  state.take(arena, if_linear(f), ldv, SPLIT), sums.take(arena, 1, ldf, SPLIT);
  float *s = state.now, *z = sums.now;
  float *packed_sink_keys = arena.take(P::right_space(k, lds)), *packed_sink_values = arena.take(P::right_space(lds, ldv));
  float *packed_s = arena.take(if_linear(P::right_space(f, ldv))), *rounded = arena.take(left_space), *rounded_q = arena.take(left_space);

  struct Block {
    index first;  // position of its first token
    float *keys_t, *values, *seen, *features, *features_t;
    float *packed_keys, *packed_values, *packed_features;
    typename P::Right right_keys, right_values, right_features;
    bool whole, mapped;  // all seen; features made
  };
  std::vector<Block> ring(back + 1);
  for (Block& each : ring) {
    each.keys_t = arena.take(ldx * C), each.values = arena.take(C * ldv), each.seen = arena.take(C);
    each.features = arena.take(if_linear(C * ldf + W)), each.features_t = arena.take(if_linear(ldf * C));
    each.packed_keys = arena.take(P::right_space(k, C)), each.packed_values = arena.take(P::right_space(C, ldv));
    each.packed_features = arena.take(if_linear(P::right_space(f, C)));
  }

  const Sorted sorted(a, b);
  const index head_at = b * c.kv_heads + kv_head;
  const auto load_position = [&](index p, index slot, float* key, float* value) {  // those before the first new token come out of the state
    const index at = head_at * slots + slot;
    load_row(p < 0 ? static_cast<const T*>(a.before.key) + at * k : c.key.at<const T>(b, p, kv_head), k, key, ldx);
    load_row(p < 0 ? static_cast<const T*>(a.before.value) + at * v : c.value.at<const T>(b, p, kv_head), v, value, ldv);
  };
  const auto fill = [&](Block& to, index first) {
    to.first = first, to.mapped = false, to.whole = true;
    zero(x, C * ldx);
    zero(to.values, C * ldv);
    for (index i = 0; i < C; i++) {
      const index p = first + i;
      const bool seen = p < c.tokens && sorted.visible(p);
      to.seen[i] = seen, to.whole &= seen;
      if (seen) load_position(p, p < 0 ? sorted.ring_slot(p) : 0, x + i * ldx, to.values + i * ldv);
    }
    transpose(C, ldx, x, ldx, to.keys_t, C);
    to.right_keys = P::right(k, C, to.keys_t, C, to.packed_keys);
    to.right_values = P::right(C, ldv, to.values, ldv, to.packed_values);
  };
  const Maps<P> maps = linear ? maps_of<P>(c, kv_head, weights, false) : Maps<P>();
  const auto map_block = [&](Block& to) {
    if (to.mapped) return;
    float* keys = maps.key.kind == NONE ? to.features : x;
    transpose(ldx, C, to.keys_t, C, keys, ldx);
    if (maps.key.kind != NONE) features(maps.key, C, keys, scratch, rounded, to.features);
    for (index i = 0; i < C; i++)
      if (to.seen[i] == 0.0f) zero(to.features + i * ldf, ldf);
    transpose(C, ldf, to.features, ldf, to.features_t, C);
    to.right_features = P::right(f, C, to.features_t, C, to.packed_features);
    to.mapped = true;
  };
  bool empty = true;
  if (linear) {
    zero(s, f * ldv);
    zero(z, ldf);
    if (a.before.key && a.before.recurrent) unpack_state(a.before.recurrent + head_at * f * (v + 1), f, v, s, ldv, z), empty = false;
    state.open(), sums.open();
  }
  const auto absorb = [&](Block& from, index tokens) {
    map_block(from);
    P::multiply(f, ldv, tokens, P::left(f, tokens, from.features_t, C, rounded), from.right_values, state.added, ldv, true);
    add_column_sums(tokens, ldf, from.features, ldf, sums.added);
    state.refresh(), sums.refresh();
    empty = false;
  };

  zero(sink_keys, lds * ldx);
  zero(sink_values, lds * ldv);
  for (index slot = 0; slot < sorted.found; slot++)
    load_position(sorted.sink_position[slot], slot, sink_keys + slot * ldx, sink_values + slot * ldv);
  transpose(lds, ldx, sink_keys, ldx, sink_keys_t, lds);
  const auto right_sink_keys = P::right(k, lds, sink_keys_t, lds, packed_sink_keys);
  const auto right_sink_values = P::right(lds, ldv, sink_values, ldv, packed_sink_values);
  for (index n = 0; n < back; n++) fill(ring[n], (n - back) * C);

  const Lanes lanes;
  for (index t = 0; t < c.tokens; t += C) {
    const index count = c.tokens - t < C ? c.tokens - t : C;
    const index oldest = (t / C) % (back + 1);
    const auto nth = [&](index n) -> Block& { return ring[(oldest + n) % (back + 1)]; };
    fill(nth(back), t);
    if (linear && t && t % BLOCK == 0) state.close(), sums.close();
    if (c.block_states && t % BLOCK == 0)
      pack_state(c.block_states + (head_at * ((c.tokens + BLOCK - 1) / BLOCK) + t / BLOCK) * f * (v + 1), f, v, s, ldv, z);
    // blocks some of whose keys have left the window of some query of this block
    index leaving = 0;
    while (linear && leaving <= back && nth(leaving).first - t <= count - 1 - a.window) map_block(nth(leaving++));
    typename P::Right right_s{};
    if (linear && !empty) right_s = P::right(f, ldv, s, ldv, packed_s);
    for (index g = 0; g < groups; g++) {
      const index head = kv_head * groups + g;
      load_tokens<T>(c.query, b, t, head, count, count, k, q, ldx);
      const auto left_q = P::left(count, k, q, ldx, rounded_q);
      if (a.sinks) P::multiply(count, lds, k, left_q, right_sink_keys, share, reach, false);
      for (index n = 0; n <= back; n++) P::multiply(count, C, k, left_q, nth(n).right_keys, share + lds + n * C, reach, false);
      for (index i = 0; i < count; i++) exact_weights<C>(a, sorted, t + i, lds, back + 1, nth, share + i * reach);
      typename P::Left left_features{};
      if (linear) {
        if (maps.query[g].kind == NONE)
          std::memcpy(features_q, q, count * ldf * sizeof(float));
        else
          features(maps.query[g], count, q, scratch, rounded, features_q);
        scale_row(features_q, count * ldf, std::exp(a.log_weight[head]));
        left_features = P::left(count, f, features_q, ldf, rounded_q);
        for (index n = 0; n < leaving; n++) {
          const Block& from = nth(n);
          P::multiply(count, C, f, left_features, from.right_features, products, C, false);
          for (index i = 0; i < count; i++)
            for (index j = 0; j < C; j += W) {
              float* here = share + i * reach + lds + n * C + j;
              store(here, lanes.before(from.first + j, t + i - a.window + 1) ? load(products + i * C + j) : load(here));
            }
        }
      }
      const bool older = linear && !empty;
      if (older) P::multiply(count, ldv, f, left_features, right_s, out, ldv, false);
      if (a.sinks) P::multiply(count, ldv, a.sinks, P::left(count, a.sinks, share, reach, rounded), right_sink_values, out, ldv, older);
      for (index n = 0; n <= back; n++)
        P::multiply(count, ldv, C, P::left(count, C, share + lds + n * C, reach, rounded), nth(n).right_values, out, ldv, older || a.sinks || n);
      for (index i = 0; i < count; i++) {
        vec all = older ? products_of(features_q + i * ldf, z, ldf) : vec{};
        for (index j = 0; j < reach; j += W) all += load(share + i * reach + j);
        const float total = sum(all);
        store_row(out + i * ldv, total <= TINY ? 0.0f : 1.0f / total, v, c.output.at<T>(b, t + i, head));
      }
    }
    if (!linear) continue;
    if (t + C < c.tokens)
      absorb(nth(0), C);
    else
      for (index n = 0; n <= back; n++) {
        const index gone = std::min(C, count - a.window - (nth(n).first - t));
        if (gone > 0) absorb(nth(n), gone);
      }
  }
  if (linear) pack_state(a.after.recurrent + head_at * f * (v + 1), f, v, s, ldv, z);
  if (a.after.key) advance<T>(a, sorted, kv_head);
}

// One pass from the back, block of chunks by block, as linear_backward_task. A key gathers its gradient from the chunks that reach it, which is complete
// once its own chunk has been; as part of the state it has got it before.
template <typename T>
static void window_backward_task(const WindowArguments& a, index b, index kv_head, Arena& arena) {
  using P = Exact;
  constexpr index C = P::CHUNK, N = BLOCK / C;
  const LinearArguments& c = a.common;
  const bool linear = a.log_weight;
  const index groups = c.heads / c.kv_heads, k = c.key_dim, v = c.value_dim, f = linear ? c.feature_dim : 0;
  const index ldx = padded(k), ldp = padded(c.projected_dim), ldf = padded(f), ldv = padded(v), lds = padded(a.sinks), weight = ldx * ldp;
  const index back = (a.window + C - 1) / C, reach = lds + (back + 1) * C, slots = N + back;
  const auto if_linear = [&](index n) { return linear ? n : 0; };
  const size_t block_space = Arena::total({C * ldx, ldx * C, C * ldv, ldv * C, C, if_linear(C * ldf + W), ldf * C, C * ldx, C * ldv, C * ldf});
  arena.reset(slots * block_space +
              Arena::total({if_linear(space_for_maps<P>(c, true)), C * ldx, C * ldx, C * ldx, C * ldp, C * ldf + W,
                            C * ldf, C * ldf, C * ldv, C, C, C * reach, C * reach, if_linear(C * reach), lds * ldx, ldx * lds, lds * ldv, ldv * lds,
                            N * ldv * ldf, N * ldf, ldv * ldf}) +
              Sum::space(weight * (groups + 1)) + Sum::space(lds * ldx) + Sum::space(lds * ldv) + State::space(ldf, ldv, true) + State::space(1, ldf, true));
  struct Block {
    index number, first;
    float *keys, *keys_t, *values, *values_t, *seen, *features, *features_t, *grad_keys, *grad_values, *grad_features;
    bool whole;
  };
  std::vector<Block> ring(slots);
  for (Block& each : ring) {
    each.keys = arena.take(C * ldx), each.keys_t = arena.take(ldx * C), each.values = arena.take(C * ldv), each.values_t = arena.take(ldv * C);
    each.seen = arena.take(C), each.features = arena.take(if_linear(C * ldf + W)), each.features_t = arena.take(ldf * C);
    each.grad_keys = arena.take(C * ldx), each.grad_values = arena.take(C * ldv), each.grad_features = arena.take(C * ldf);
  }
  float* weights = arena.take(if_linear(space_for_maps<P>(c, true)));
  float *q = arena.take(C * ldx), *grad_q = arena.take(C * ldx), *grad_x = arena.take(C * ldx), *scratch = arena.take(C * ldp);
  float *features_q = arena.take(C * ldf + W), *scaled_q = arena.take(C * ldf), *grad_scaled_q = arena.take(C * ldf);
  float *grad = arena.take(C * ldv), *grad_sum = arena.take(C), *weighed = arena.take(C), *share = arena.take(C * reach), *grad_share = arena.take(C * reach);
  float *products = arena.take(if_linear(C * reach)), *sink_keys = arena.take(lds * ldx), *sink_keys_t = arena.take(ldx * lds), *sink_values = arena.take(lds * ldv);
  float* sink_values_t = arena.take(ldv * lds);
  float *all_s_t = arena.take(N * ldv * ldf), *all_z = arena.take(N * ldf);
  float* grad_s_t = arena.take(ldv * ldf);
  Sum grad_weights, grad_sink_keys, grad_sink_values;
  grad_weights.take(arena, linear && c.weight_k ? weight * (groups + 1) : 0), grad_sink_keys.take(arena, lds * ldx), grad_sink_values.take(arena, lds * ldv);
  std::vector<double> grad_log_weight(groups, 0.0);
  State grad_state, grad_sums;  // of S and z
  grad_state.take(arena, ldf, ldv, true), grad_sums.take(arena, 1, ldf, true);
  float *grad_s = grad_state.now, *grad_z = grad_sums.now;

  const Sorted sorted(a, b);
  const Lanes lanes;
  const index head_at = b * c.kv_heads + kv_head, state_size = f * (v + 1);
  const Maps<P> maps = linear ? maps_of<P>(c, kv_head, weights, true) : Maps<P>();
  const auto block_of = [&](index number) -> Block& { return ring[(number % slots + slots) % slots]; };
  const auto fill = [&](index number) {
    Block& to = block_of(number);
    to.number = number, to.first = number * C, to.whole = true;
    for (float* x : {to.grad_keys, to.keys}) zero(x, C * ldx);
    for (float* x : {to.grad_values, to.values}) zero(x, C * ldv);
    zero(to.grad_features, C * ldf);
    for (index i = 0; i < C; i++) {
      const index p = to.first + i;
      const bool seen = p >= 0 && p < c.tokens && sorted.visible(p);
      to.seen[i] = seen, to.whole &= seen;
      if (!seen) continue;
      load_row(c.key.at<const T>(b, p, kv_head), k, to.keys + i * ldx, ldx);
      load_row(c.value.at<const T>(b, p, kv_head), v, to.values + i * ldv, ldv);
    }
    transpose(C, ldx, to.keys, ldx, to.keys_t, C);
    transpose(C, ldv, to.values, ldv, to.values_t, C);
    if (!linear) return;
    if (maps.key.kind == NONE)
      std::memcpy(to.features, to.keys, C * ldx * sizeof(float));
    else
      features(maps.key, C, to.keys, scratch, nullptr, to.features);
    for (index i = 0; i < C; i++)
      if (to.seen[i] == 0.0f) zero(to.features + i * ldf, ldf);
    transpose(C, ldf, to.features, ldf, to.features_t, C);
  };
  // the first `tokens` keys of a block are in a state whose gradient is grad_s, grad_z
  const auto absorbed = [&](Block& block, index tokens) {
    transpose(ldf, ldv, grad_s, ldv, grad_s_t, ldf);
    multiply(tokens, ldf, v, rows(block.values, ldv), grad_s_t, ldf, block.grad_features, ldf, true);
    for (index i = 0; i < tokens; i++) add_row(block.grad_features + i * ldf, 1.0f, grad_z, ldf);
    multiply(tokens, ldv, f, rows(block.features, ldf), grad_s, ldv, block.grad_values, ldv, true);
  };

  zero(sink_keys, lds * ldx);
  zero(sink_values, lds * ldv);
  for (index slot = 0; slot < sorted.found; slot++) {
    load_row(c.key.at<const T>(b, sorted.sink_position[slot], kv_head), k, sink_keys + slot * ldx, ldx);
    load_row(c.value.at<const T>(b, sorted.sink_position[slot], kv_head), v, sink_values + slot * ldv, ldv);
  }
  transpose(lds, ldx, sink_keys, ldx, sink_keys_t, lds);
  transpose(lds, ldv, sink_values, ldv, sink_values_t, lds);
  if (linear) {
    zero(grad_s, ldf * ldv);
    zero(grad_z, ldf);
    if (c.grad_final_state) unpack_state(c.grad_final_state + head_at * state_size, f, v, grad_s, ldv, grad_z);
    grad_state.open(), grad_sums.open();
  }

  const index num_chunks = (c.tokens + C - 1) / C, num_blocks = (num_chunks + N - 1) / N;
  for (index number = num_chunks - 1; number >= (num_blocks - 1) * N - back; number--) fill(number);
  for (index block = num_blocks - 1; block >= 0; block--) {
    const index start = block * N, chunks = std::min(num_chunks - start, N);
    if (block < num_blocks - 1)
      for (index number = start - back; number < start - back + N; number++) fill(number);
    if (linear) {
      unpack_transposed(c.block_states + (head_at * num_blocks + block) * state_size, f, v, all_s_t, ldf, all_z);
      for (index i = 0; i + 1 < chunks; i++) {
        const Block& leaves = block_of(start + i - back);
        float *next = all_s_t + (i + 1) * ldv * ldf, *next_z = all_z + (i + 1) * ldf;
        std::memcpy(next, all_s_t + i * ldv * ldf, v * ldf * sizeof(float));
        std::memcpy(next_z, all_z + i * ldf, ldf * sizeof(float));
        multiply(v, ldf, C, transposed(leaves.values, ldv), leaves.features, ldf, next, ldf, true);
        add_column_sums(C, ldf, leaves.features, ldf, next_z);
      }
    }
    for (index i = chunks - 1; i >= 0; i--) {
      const index number = start + i, t = number * C, count = std::min(c.tokens - t, C);
      const float *s_t = all_s_t + i * ldv * ldf, *z = all_z + i * ldf;
      const auto nth = [&](index n) -> Block& { return block_of(number - back + n); };
      index leaving = 0;
      while (linear && leaving <= back && nth(leaving).first - t <= count - 1 - a.window) leaving++;
      if (linear && number + 1 < num_chunks) {
        absorbed(nth(0), C);
      } else if (linear) {
        for (index n = 0; n <= back; n++) {
          const index gone = std::min(C, count - a.window - (nth(n).first - t));
          if (gone > 0) absorbed(nth(n), gone);
        }
      }
      for (index g = 0; g < groups; g++) {
        const index head = kv_head * groups + g;
        load_tokens<T>(c.query, b, t, head, count, count, k, q, ldx);
        if (a.sinks) multiply(count, lds, k, rows(q, ldx), sink_keys_t, lds, share, reach, false);
        for (index n = 0; n <= back; n++) multiply(count, C, k, rows(q, ldx), nth(n).keys_t, C, share + lds + n * C, reach, false);
        for (index r = 0; r < count; r++) {
          exact_weights<C>(a, sorted, t + r, lds, back + 1, nth, share + r * reach);
          grad_sum[r] = row_sum(share + r * reach, reach);  // so far of the weights
        }
        const auto has_left = [&](index n, index j, index r) { return lanes.before(nth(n).first + j, t + r - a.window + 1); };
        if (linear) {
          if (maps.query[g].kind == NONE)
            std::memcpy(features_q, q, count * ldf * sizeof(float));
          else
            features(maps.query[g], count, q, scratch, nullptr, features_q);
          for (index r = 0; r < count; r++) {
            set_row(scaled_q + r * ldf, std::exp(a.log_weight[head]), features_q + r * ldf, ldf);
            grad_sum[r] += dot(scaled_q + r * ldf, z, ldf);
          }
          for (index n = 0; n < leaving; n++) {
            float* from = products + lds + n * C;
            multiply(count, C, f, rows(scaled_q, ldf), nth(n).features_t, C, from, reach, false);
            for (index r = 0; r < count; r++, from += reach) {
              for (index j = 0; j < C; j += W) store(from + j, has_left(n, j, r) ? load(from + j) : vec{});
              grad_sum[r] += row_sum(from, C);
            }
          }
        }
        load_grad<T>(c, b, t, head, count, count, grad, ldv, grad_sum);
        if (a.sinks) multiply(count, lds, v, rows(grad, ldv), sink_values_t, lds, grad_share, reach, false);
        for (index n = 0; n <= back; n++) multiply(count, C, v, rows(grad, ldv), nth(n).values_t, C, grad_share + lds + n * C, reach, false);
        if (linear) multiply(count, ldf, v, rows(grad, ldv), s_t, ldf, grad_scaled_q, ldf, false);
        for (index r = 0; r < count; r++) {
          const float* grad_row = grad_share + r * reach;
          weighed[r] = dot(share + r * reach, grad_row, reach);
          if (linear) weighed[r] += dot(scaled_q + r * ldf, grad_scaled_q + r * ldf, ldf) + dot(products + r * reach + lds, grad_row + lds, leaving * C);
        }
        for (index r = 0; r < count; r++) {
          grad_sum[r] *= weighed[r];
          // exponential weights: the gradient of their scores takes the place of their own, of which the largest score moves all
          float *row = share + r * reach, *grad_row = grad_share + r * reach, *product_row = products + r * reach;
          vec moved = vec{}, ties = vec{};
          for (index j = 0; j < reach; j += W) {
            const vec each = load(grad_row + j) + grad_sum[r], weight_here = load(row + j), product = weight_here * each;
            const bool may_have_left = linear && j >= lds && j < lds + leaving * C;
            const ivec left = may_have_left ? has_left((j - lds) / C, (j - lds) % C, r) : ivec{};
            moved += product, ties += weight_here == splat(1.0f) ? splat(1.0f) : vec{};
            store(grad_row + j, product);
            if (!may_have_left) continue;
            // of products it stays, apart from these
            store(row + j, left ? load(product_row + j) : weight_here);
            store(product_row + j, left ? each : vec{});
          }
          const float count_of_ties = linear ? sum(ties) : 0.0f;
          if (count_of_ties == 0.0f) continue;
          const vec back_to_top = splat(sum(moved) / count_of_ties);
          for (index j = 0; j < reach; j += W) {
            const ivec left = j >= lds && j < lds + leaving * C ? has_left((j - lds) / C, (j - lds) % C, r) : ivec{};
            const vec here = load(grad_row + j);
            store(grad_row + j, ~left & (load(row + j) == splat(1.0f)) ? here - back_to_top : here);
          }
        }
        if (linear) {
          for (index r = 0; r < count; r++) add_row(grad_scaled_q + r * ldf, grad_sum[r], z, ldf);
          for (index n = 0; n < leaving; n++) {
            Block& from = nth(n);
            multiply(count, ldf, C, rows(products + lds + n * C, reach), from.features, ldf, grad_scaled_q, ldf, true);
            multiply(C, ldf, count, transposed(products + lds + n * C, reach), scaled_q, ldf, from.grad_features, ldf, true);
          }
          multiply(f, ldv, count, transposed(scaled_q, ldf), grad, ldv, grad_state.added, ldv, true);
          for (index r = 0; r < count; r++) add_row(grad_sums.added, grad_sum[r], scaled_q + r * ldf, ldf);
          grad_log_weight[g] += dot(scaled_q, grad_scaled_q, count * ldf);
          scale_row(grad_scaled_q, count * ldf, std::exp(a.log_weight[head]));
        }
        // values
        if (a.sinks) multiply(lds, ldv, count, transposed(share, reach), grad, ldv, grad_sink_values.added, ldv, true);
        for (index n = 0; n <= back; n++)
          multiply(C, ldv, count, transposed(share + lds + n * C, reach), grad, ldv, nth(n).grad_values, ldv, true);
        // keys and queries through the scores
        scale_row(grad_share, count * reach, a.score_scale);
        if (a.sinks) {
          multiply(count, ldx, lds, rows(grad_share, reach), sink_keys, ldx, grad_q, ldx, false);
          multiply(lds, ldx, count, transposed(grad_share, reach), q, ldx, grad_sink_keys.added, ldx, true);
        } else {
          zero(grad_q, C * ldx);
        }
        for (index n = 0; n <= back; n++) {
          multiply(count, ldx, C, rows(grad_share + lds + n * C, reach), nth(n).keys, ldx, grad_q, ldx, true);
          multiply(C, ldx, count, transposed(grad_share + lds + n * C, reach), q, ldx, nth(n).grad_keys, ldx, true);
        }
        if (linear) {
          const float* through = grad_scaled_q;
          if (maps.query[g].kind != NONE) {
            features_vjp(maps.query[g], count, q, scratch, features_q, grad_scaled_q, grad_x, grad_weights.added + (g + 1) * weight);
            through = grad_x;
          }
          for (index r = 0; r < count; r++) add_row(grad_q + r * ldx, 1.0f, through + r * ldx, ldx);
        }
        store_tokens<T>(c.grad_query, b, t, head, count, k, grad_q, ldx);
      }
      Block& done = block_of(number);
      if (linear) {
        for (index r = 0; r < C; r++)
          if (done.seen[r] == 0.0f) zero(done.grad_features + r * ldf, ldf);
        const float* through = done.grad_features;
        if (maps.key.kind != NONE) {
          features_vjp(maps.key, count, done.keys, scratch, done.features, done.grad_features, grad_x, grad_weights.added);
          through = grad_x;
        }
        for (index r = 0; r < count; r++) add_row(done.grad_keys + r * ldx, 1.0f, through + r * ldx, ldx);
        grad_state.refresh(), grad_sums.refresh();
      }
      store_tokens<T>(c.grad_key, b, t, kv_head, count, k, done.grad_keys, ldx);
      store_tokens<T>(c.grad_value, b, t, kv_head, count, v, done.grad_values, ldv);
    }
    if (linear) grad_state.close(), grad_sums.close(), grad_weights.close();
    grad_sink_keys.close(), grad_sink_values.close();
  }
  const float *sink_k = grad_sink_keys.result(), *sink_v = grad_sink_values.result();
  for (index slot = 0; slot < sorted.found; slot++) {
    store_row(sink_k + slot * ldx, 1.0f, k, c.grad_key.at<T>(b, sorted.sink_position[slot], kv_head));
    store_row(sink_v + slot * ldv, 1.0f, v, c.grad_value.at<T>(b, sorted.sink_position[slot], kv_head));
  }
  if (!linear) return;
  for (index g = 0; g < groups; g++) a.grad_log_weight[b * c.heads + kv_head * groups + g] = float(grad_log_weight[g]);
  store_grad_weights(c, b, kv_head, maps.key.has_weight(), grad_weights);
}

// One token; the state is changed in place. All heads of a sequence in one thread.
template <typename T>
static void window_step(const WindowArguments& a, Arena& arena) {
  const LinearArguments& c = a.common;
  const bool linear = a.log_weight;
  const index groups = c.heads / c.kv_heads, k = c.key_dim, v = c.value_dim, f = c.feature_dim, slots = a.sinks + a.window, columns = v + 1;
  const index ldx = padded(k), ldp = padded(c.projected_dim), ldf = padded(f), ldo = padded(columns), lds = padded(slots);
  arena.reset(Arena::total({ldx * ldp, ldx, ldp, ldf + W, groups * (ldf + W), groups * ldx, ldo, groups * ldo, groups * lds}));
  float *weight = arena.take(ldx * ldp), *row = arena.take(ldx), *scratch = arena.take(ldp), *keys = arena.take(ldf + W);
  float *features_q = arena.take(groups * (ldf + W)), *queries = arena.take(groups * ldx), *values = arena.take(ldo);
  float *sums = arena.take(groups * ldo), *share = arena.take(groups * lds);
  const LinearStep step{c.batch, c.heads, c.kv_heads, k, v, f, c.projected_dim, c.map, c.dtype, c.weight_dtype, 1, c.scale};
  const WindowState& state = a.after;
  for (index b = 0; b < c.batch; b++) {
    uint8_t* visible = state.visible + b * slots;
    int64_t* counts = state.counts + b * 3;
    const bool exists = !c.valid || c.valid[b], is_sink = exists && counts[1] < a.sinks;
    const index ring = a.sinks + counts[0];
    const bool leaves = visible[ring];
    visible[ring] = exists && !is_sink;
    if (is_sink) visible[counts[1]] = 1;
    for (index kv_head = 0; kv_head < c.kv_heads; kv_head++) {
      const index i = b * c.kv_heads + kv_head;
      T *all_keys = static_cast<T*>(state.key) + i * slots * k, *all_values = static_cast<T*>(state.value) + i * slots * v;
      zero(sums, groups * ldo);
      for (index g = 0; g < groups; g++) load_row(c.query.at<const T>(b, 0, kv_head * groups + g), k, queries + g * ldx, padded(k));
      if (linear) {
        zero(keys, ldf);
        if (leaves) step_features<T>(step, all_keys + ring * k, 0, c.weight_k, kv_head, row, scratch, weight, keys);
        load_row(all_values + ring * v, v, values, padded(v));
        values[v] = 1.0f;
        for (index g = 0; g < groups; g++) {
          const index head = kv_head * groups + g;
          step_features<T>(step, c.query.at<const T>(b, 0, head), 0, c.weight_q, head, row, scratch, weight, features_q + g * (ldf + W));
        }
        float* s = state.recurrent + i * f * columns;
        for (index j = 0; j < f; j++, s += columns)
          update_row(s, s, columns, 1.0f, leaves ? keys[j] : 0.0f, values, groups, features_q + j, ldf + W, sums, ldo);
        for (index g = 0; g < groups; g++) scale_row(sums + g * ldo, ldo, std::exp(a.log_weight[kv_head * groups + g]));
      }
      const T *new_key = c.key.at<const T>(b, 0, kv_head), *new_value = c.value.at<const T>(b, 0, kv_head);
      copy_row(new_key, all_keys + ring * k, k);
      copy_row(new_value, all_values + ring * v, v);
      if (is_sink) {
        copy_row(new_key, all_keys + counts[1] * k, k);
        copy_row(new_value, all_values + counts[1] * v, v);
      }
      for (index slot = 0; slot < lds; slot++) {
        const bool there = slot < slots && visible[slot];
        if (there) load_row(all_keys + slot * k, k, row, padded(k));
        for (index g = 0; g < groups; g++) share[g * lds + slot] = there ? a.score_scale * dot(row, queries + g * ldx, ldx) : NOTHING;
      }
      for (index g = 0; g < groups; g++) {
        vec top = splat(NOTHING);
        for (index j = 0; j < lds; j += W) top = max(top, load(share + g * lds + j));
        float peak = largest(top);
        if (peak <= NOTHING) peak = 0.0f;
        for (index j = 0; j < lds; j += W) store(share + g * lds + j, exp(load(share + g * lds + j) - peak));
      }
      for (index slot = 0; slot < slots; slot++) {
        if (!visible[slot]) continue;
        load_row(all_values + slot * v, v, values, padded(v));
        values[v] = 1.0f;
        for (index g = 0; g < groups; g++) {
          const float each = share[g * lds + slot];
          for (index j = 0; j < columns; j++) sums[g * ldo + j] += each * values[j];
        }
      }
      for (index g = 0; g < groups; g++) {
        float* out = sums + g * ldo;
        store_row(out, out[v] <= TINY ? 0.0f : 1.0f / out[v], v, c.output.at<T>(b, 0, kv_head * groups + g));
      }
    }
    counts[2] = visible[ring] ? std::min<int64_t>(counts[2] + 1, a.window) : 0;
    counts[1] += is_sink;
    counts[0] = (counts[0] + 1) % a.window;
  }
}

}  // namespace hf_hybrid
