// A window, sinks and a bounded memory of exact keys; see naive_memory.py, which defines all of it.
//
// Of one key-value head all that a query can see lies in columns: sinks, memory, the ring of the window. A block of tokens of all query heads that
// read it is one product with them. The memory's columns are in no order; the state has them by position.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "window.h"

namespace hf_hybrid {

struct MemoryState {  // batch first, as naive_memory.MemoryState; tokens in the dtype of the arguments
  void *key, *value;  // [B, H_kv, S + M + W + C, .]
  double* key_sum;    // [B, H_kv, K]
  int64_t* count;     // [B]
};

struct MemoryArguments {  // mirrored in arguments.py
  int64_t batch, tokens, heads, kv_heads, key_dim, value_dim, window, sinks, memory, block, dtype, threads;
  float scale;
  View query, key, value, output;
  const uint8_t* valid;
  MemoryState before, after;  // before.key is null at the start of a sequence
  int32_t* chosen;            // [B, H_kv, N, M]: which token, of those that exist, is in each place while a block runs; for the backward pass, or null
  View grad_output, grad_query, grad_key, grad_value;
};

constexpr int32_t NEVER = 1 << 30;  // offset in its block from which a column is seen

// A key of length 1.
static void unit_key(const float* key, index k, double* unit) {
  double square = 0.0;
  for (index d = 0; d < k; d++) square += double(key[d]) * double(key[d]);
  const double length = std::max(std::sqrt(square), 1e-12);
  for (index d = 0; d < k; d++) unit[d] = double(key[d]) / length;
}

static double likeness_of(const double* unit, const double* mean, index k) {
  double parts[8] = {};
  index d = 0;
  for (; d + 8 <= k; d += 8)
    for (int l = 0; l < 8; l++) parts[l] += unit[d + l] * mean[d + l];
  for (; d < k; d++) parts[0] += unit[d] * mean[d];
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// The `size` of `likeness` that are smallest, of equals the first, as indices in order.
static void least_like(const std::vector<float>& likeness, index size, std::vector<int32_t>& kept) {
  kept.resize(likeness.size());
  for (size_t i = 0; i < kept.size(); i++) kept[i] = int32_t(i);
  const auto before = [&](int32_t x, int32_t y) { return likeness[x] < likeness[y] || (likeness[x] == likeness[y] && x < y); };
  std::nth_element(kept.begin(), kept.begin() + size, kept.end(), before);
  kept.resize(size);
  std::sort(kept.begin(), kept.end());
}

// Weights of one row of scores, not yet divided by their sum, which is returned. `from[j]`: the offset from which column j is seen.
static float weights_of(float* row, index width, float scale, const int32_t* from, int32_t offset) {
  vec top = splat(NOTHING);
  const ivec here = ivec{} + offset;
  for (index j = 0; j < width; j += W) {
    ivec first;
    std::memcpy(&first, from + j, sizeof first);
    const vec score = first <= here ? load(row + j) * scale : splat(NOTHING);
    store(row + j, score);
    top = max(top, score);
  }
  const float peak = largest(top);
  vec total{};
  for (index j = 0; j < width; j += W) {
    const vec weight = exp(load(row + j) - peak);
    store(row + j, weight);
    total += weight;
  }
  return sum(total);
}

// Tokens of a row that exist, by their place in the call.
static std::vector<index> existing(const MemoryArguments& a, index b) {
  std::vector<index> tokens;
  tokens.reserve(a.tokens);
  for (index t = 0; t < a.tokens; t++)
    if (!a.valid || a.valid[b * a.tokens + t]) tokens.push_back(t);
  return tokens;
}

struct MemorySizes {
  index k, v, ldx, ldv, ring, lds, ldm, ldr, width, slots;
  explicit MemorySizes(const MemoryArguments& a)
      : k(a.key_dim), v(a.value_dim), ldx(padded(a.key_dim)), ldv(padded(a.value_dim)), ring(a.window + a.block), lds(padded(a.sinks)),
        ldm(padded(a.memory)), ldr(padded(ring)), width(lds + ldm + ldr), slots(a.sinks + a.memory + ring) {}
  index ring_column(index position) const { return lds + ldm + position % ring; }
};

// How many tokens the memory holds once the block that starts at `start` has begun.
static index filled_at(const MemoryArguments& a, index start) { return std::clamp<index>(start - a.window - a.sinks, 0, a.memory); }

// From when on in its block, which starts at `start`, each column is seen.
static void seen_from(const MemoryArguments& a, const MemorySizes& z, index start, int32_t* from) {
  for (index j = 0; j < z.width; j++) from[j] = NEVER;
  for (index j = 0; j < a.sinks; j++)
    if (j < start + a.block) from[j] = int32_t(std::max<index>(j - start, 0));
  const index filled = filled_at(a, start);
  for (index j = 0; j < filled; j++) from[z.lds + j] = 0;
  for (index p = std::max<index>(a.sinks, start - a.window); p < start + a.block; p++)
    from[z.ring_column(p)] = int32_t(std::max<index>(p - start, 0));
}

// The keys and values of a head as its two products want them, kept up to date one column at a time.
struct ExactColumns {
  const MemorySizes& z;
  float *keys_t, *values;
  static index space(const MemorySizes& z, index) { return z.ldx * z.width + z.width * z.ldv; }
  ExactColumns(const MemorySizes& sizes, index most, float* space) : z(sizes), keys_t(space), values(space + z.ldx * z.width) {
    zero(space, ExactColumns::space(z, most));
  }
  void set(index column, const float* key, const float* value) {
    for (index d = 0; d < z.k; d++) keys_t[d * z.width + column] = key[d];
    std::memcpy(values + column * z.ldv, value, z.ldv * sizeof(float));
  }
  void scores(index all, const float* queries, float* share) {
    multiply(all, z.width, z.k, rows(queries, z.ldx), keys_t, z.width, share, z.width, false);
  }
  void mix(index all, const float* share, float* out) { multiply(all, z.ldv, z.width, rows(share, z.width), values, z.ldv, out, z.ldv, false); }
};

#ifdef HF_HYBRID_PAIRS
// Of bf16 tokens: keys, values and queries lose nothing, weights are rounded.
struct PairedColumns {
  const MemorySizes& z;
  uint32_t *keys, *values, *left;
  static index space(const MemorySizes& z, index most) { return (z.ldx * z.width + z.width * z.ldv + most * std::max(z.ldx, z.width)) / 2; }
  PairedColumns(const MemorySizes& sizes, index most, float* space)
      : z(sizes), keys(reinterpret_cast<uint32_t*>(space)), values(keys + z.ldx * z.width / 2), left(values + z.width * z.ldv / 2) {
    zero(space, PairedColumns::space(z, most));
  }
  void set(index column, const float* key, const float* value) {
    const auto bits = [](float x) {  // of a number that is bf16 already
      uint32_t all;
      std::memcpy(&all, &x, 4);
      return all >> 16;
    };
    for (index d = 0; d < z.ldx; d += 2) keys[d / 2 * z.width + column] = bits(key[d]) | bits(key[d + 1]) << 16;
    uint16_t* to = reinterpret_cast<uint16_t*>(values + column / 2 * z.ldv) + column % 2;
    for (index d = 0; d < z.ldv; d++) to[2 * d] = uint16_t(bits(value[d]));
  }
  void scores(index all, const float* queries, float* share) {
    for (index r = 0; r < all; r++) round_row(queries + r * z.ldx, z.ldx, left + r * z.ldx / 2);
    multiply_pairs(all, z.width, z.ldx / 2, left, z.ldx / 2, keys, z.width, share, z.width);
  }
  void mix(index all, const float* share, float* out) {
    for (index r = 0; r < all; r++) round_row(share + r * z.width, z.width, left + r * z.width / 2);
    multiply_pairs(all, z.ldv, z.width / 2, left, z.width / 2, values, z.ldv, out, z.ldv);
  }
};
template <typename T>
using ColumnsOf = std::conditional_t<std::is_same_v<T, bfloat16>, PairedColumns, ExactColumns>;
#else
template <typename T>
using ColumnsOf = ExactColumns;
#endif

// Into how many parts the blocks of a head are divided, so that few heads keep all threads busy. What the memory holds depends on keys alone: a part
// goes through the keys of the blocks before its own, which costs little, and computes its own.
static index parts_of(const MemoryArguments& a) {
  const index blocks = (a.tokens + a.block - 1) / a.block, heads = a.batch * a.kv_heads;
  return heads % a.threads == 0 ? 1 : std::clamp<index>(blocks / 8, 1, a.threads);
}

template <typename T>
static void memory_forward_task(const MemoryArguments& a, index b, index kv_head, index part, index parts, Arena& arena) {
  const MemorySizes z(a);
  const index groups = a.heads / a.kv_heads, most = groups * a.block, head_at = b * a.kv_heads + kv_head;
  const index space = ColumnsOf<T>::space(z, most);
  arena.reset(Arena::total({z.width * z.ldx, z.width * z.ldv, space, most * z.ldx, most * z.width, most * z.ldv, z.width, 2 * z.k, 2 * z.k,
                            2 * a.memory * z.k, 2 * a.block * z.k, most}));
  float *keys = arena.take(z.width * z.ldx), *values = arena.take(z.width * z.ldv);
  ColumnsOf<T> columns(z, most, arena.take(space));
  float *queries = arena.take(most * z.ldx), *share = arena.take(most * z.width), *out = arena.take(most * z.ldv);
  int32_t* from = reinterpret_cast<int32_t*>(arena.take(z.width));
  double *sums = reinterpret_cast<double*>(arena.take(2 * z.k)), *mean = reinterpret_cast<double*>(arena.take(2 * z.k));
  double *units = reinterpret_cast<double*>(arena.take(2 * a.memory * z.k)), *leaving_units = reinterpret_cast<double*>(arena.take(2 * a.block * z.k));
  float* totals = arena.take(most);
  zero(keys, z.width * z.ldx), zero(values, z.width * z.ldv);

  const std::vector<index> tokens = existing(a, b);
  const index before = a.before.key ? a.before.count[b] : 0, total = before + index(tokens.size());
  std::vector<int32_t> source(z.width, -1), order, kept;  // which token a column holds, for the backward pass; memory places by position
  std::vector<float> likeness;
  const auto put = [&](index column, const T* key, const T* value) {
    load_row(key, z.k, keys + column * z.ldx, z.ldx);
    load_row(value, z.v, values + column * z.ldv, z.ldv);
    columns.set(column, keys + column * z.ldx, values + column * z.ldv);
  };
  const auto move = [&](index to, index column) {
    std::memcpy(keys + to * z.ldx, keys + column * z.ldx, z.ldx * sizeof(float));
    std::memcpy(values + to * z.ldv, values + column * z.ldv, z.ldv * sizeof(float));
    columns.set(to, keys + to * z.ldx, values + to * z.ldv);
    source[to] = source[column];
  };
  for (index d = 0; d < z.k; d++) sums[d] = a.before.key ? a.before.key_sum[head_at * z.k + d] : 0.0;
  if (a.before.key) {
    const T *old_keys = static_cast<const T*>(a.before.key) + head_at * z.slots * z.k;
    const T *old_values = static_cast<const T*>(a.before.value) + head_at * z.slots * z.v;
    const auto restore = [&](index column, index slot) { put(column, old_keys + slot * z.k, old_values + slot * z.v); };
    const index filled = before ? filled_at(a, (before - 1) / a.block * a.block) : 0;
    for (index j = 0; j < std::min<index>(a.sinks, before); j++) restore(j, j);
    for (index j = 0; j < filled; j++) {
      restore(z.lds + j, a.sinks + j);
      unit_key(keys + (z.lds + j) * z.ldx, z.k, units + j * z.k);
      order.push_back(int32_t(j));
    }
    for (index j = 0; j < z.ring; j++) restore(z.lds + z.ldm + j, a.sinks + a.memory + j);
  }

  // the block that starts at position n begins: what leaves the window joins the memory, and what is most like the rest leaves it
  const auto begin = [&](index n) {
    for (index p = n - a.block; p < n; p++) {
      unit_key(keys + z.ring_column(p) * z.ldx, z.k, leaving_units);
      for (index d = 0; d < z.k; d++) sums[d] += leaving_units[d];
    }
    const index first = std::max<index>(n - z.ring, a.sinks), joining = n - z.ring + a.block - first;
    if (joining <= 0) return;
    const index held = index(order.size());
    for (index i = 0; i < joining; i++) unit_key(keys + z.ring_column(first + i) * z.ldx, z.k, leaving_units + i * z.k);
    if (held + joining <= a.memory) {
      for (index i = 0; i < joining; i++) {
        move(z.lds + held + i, z.ring_column(first + i));
        std::memcpy(units + (held + i) * z.k, leaving_units + i * z.k, z.k * sizeof(double));
        order.push_back(int32_t(held + i));
      }
      return;
    }
    for (index d = 0; d < z.k; d++) mean[d] = sums[d] / double(n);
    likeness.resize(held + joining);
    for (index i = 0; i < held; i++) likeness[i] = float(likeness_of(units + order[i] * z.k, mean, z.k));
    for (index i = 0; i < joining; i++) likeness[held + i] = float(likeness_of(leaving_units + i * z.k, mean, z.k));
    least_like(likeness, a.memory, kept);
    std::vector<int32_t> free, next;
    size_t at = 0;
    for (index i = 0; i < held; i++) {
      if (at < kept.size() && kept[at] == i)
        next.push_back(order[i]), at++;
      else
        free.push_back(order[i]);
    }
    for (index j = held; j < a.memory; j++) free.push_back(int32_t(j));
    for (size_t i = 0; at < kept.size(); at++, i++) {
      const index which = kept[at] - held, place = free[i];
      move(z.lds + place, z.ring_column(first + which));
      std::memcpy(units + place * z.k, leaving_units + which * z.k, z.k * sizeof(double));
      next.push_back(int32_t(place));
    }
    order.swap(next);
  };

  const index first_block = before / a.block, blocks = (a.tokens + a.block - 1) / a.block;
  const index all_blocks = total ? (total - 1) / a.block + 1 - first_block : 0;
  const index own = first_block + all_blocks * part / parts, next_part = first_block + all_blocks * (part + 1) / parts;
  for (index rank = 0; rank < index(tokens.size());) {
    const index position = before + rank, start = position / a.block * a.block, low = position - start;
    const index count = std::min<index>(a.block - low, index(tokens.size()) - rank);
    const bool is_own = start / a.block >= own;
    if (start / a.block >= next_part) return;  // the last part leaves the state
    if (low == 0 && start > 0) begin(start);
    for (index i = 0; i < count; i++) {
      const index t = tokens[rank + i], column = z.ring_column(position + i);
      put(column, a.key.at<const T>(b, t, kv_head), a.value.at<const T>(b, t, kv_head));
      source[column] = int32_t(rank + i);
      if (position + i < a.sinks) move(position + i, column);
      for (index g = 0; is_own && g < groups; g++)
        load_row(a.query.at<const T>(b, t, kv_head * groups + g), z.k, queries + (g * count + i) * z.ldx, z.ldx);
    }
    rank += count;
    if (!is_own) continue;
    if (a.chosen) {
      int32_t* to = a.chosen + (head_at * blocks + start / a.block - first_block) * a.memory;
      for (index j = 0; j < a.memory; j++) to[j] = source[z.lds + j];
    }
    seen_from(a, z, start, from);
    const index all = groups * count;
    columns.scores(all, queries, share);
    for (index r = 0; r < all; r++) totals[r] = weights_of(share + r * z.width, z.width, a.scale, from, int32_t(low + r % count));
    columns.mix(all, share, out);
    for (index r = 0; r < all; r++)
      store_row(out + r * z.ldv, 1.0f / totals[r], z.v, a.output.at<T>(b, tokens[rank - count + r % count], kv_head * groups + r / count));
  }
  if (part + 1 < parts) return;

  T *new_keys = static_cast<T*>(a.after.key) + head_at * z.slots * z.k, *new_values = static_cast<T*>(a.after.value) + head_at * z.slots * z.v;
  const auto save = [&](index slot, index column) {  // -1: nothing is there
    if (column < 0) {
      std::memset(static_cast<void*>(new_keys + slot * z.k), 0, z.k * sizeof(T));
      std::memset(static_cast<void*>(new_values + slot * z.v), 0, z.v * sizeof(T));
    } else {
      store_row(keys + column * z.ldx, 1.0f, z.k, new_keys + slot * z.k);
      store_row(values + column * z.ldv, 1.0f, z.v, new_values + slot * z.v);
    }
  };
  for (index j = 0; j < a.sinks; j++) save(j, j < total ? j : -1);
  for (index j = 0; j < a.memory; j++) save(a.sinks + j, j < index(order.size()) ? z.lds + order[j] : -1);
  for (index j = 0; j < z.ring; j++) save(a.sinks + a.memory + j, z.lds + z.ldm + j);
  for (index d = 0; d < z.k; d++) a.after.key_sum[head_at * z.k + d] = sums[d];
  if (!kv_head) a.after.count[b] = total;
}

// Whole sequences only. The weights are made again from what the forward pass noted.
template <typename T>
static void memory_backward_task(const MemoryArguments& a, index b, index kv_head, Arena& arena) {
  const MemorySizes z(a);
  const index groups = a.heads / a.kv_heads, most = groups * a.block, head_at = b * a.kv_heads + kv_head;
  const std::vector<index> tokens = existing(a, b);
  const index n = index(tokens.size()), blocks = (a.tokens + a.block - 1) / a.block;
  arena.reset(Arena::total({z.width * z.ldx, z.ldx * z.width, z.width * z.ldv, z.ldv * z.width, most * z.ldx, most * z.width, most * z.width,
                            most * z.ldv, most * z.ldx, z.width * z.ldx, z.width * z.ldv, z.width, n * z.ldx, n * z.ldv}));
  float *keys = arena.take(z.width * z.ldx), *keys_t = arena.take(z.ldx * z.width);
  float *values = arena.take(z.width * z.ldv), *values_t = arena.take(z.ldv * z.width);
  float *queries = arena.take(most * z.ldx), *share = arena.take(most * z.width), *grad_share = arena.take(most * z.width);
  float *grad = arena.take(most * z.ldv), *grad_q = arena.take(most * z.ldx);
  float *grad_k = arena.take(z.width * z.ldx), *grad_v = arena.take(z.width * z.ldv);
  int32_t* from = reinterpret_cast<int32_t*>(arena.take(z.width));
  float *all_grad_k = arena.take(n * z.ldx), *all_grad_v = arena.take(n * z.ldv);
  zero(all_grad_k, n * z.ldx), zero(all_grad_v, n * z.ldv);
  std::vector<index> holds(z.width);  // the token of each column, or -1
  for (index block = 0; block * a.block < n; block++) {
    const index start = block * a.block, count = std::min<index>(a.block, n - start), all = groups * count;
    seen_from(a, z, start, from);
    std::fill(holds.begin(), holds.end(), -1);
    for (index j = 0; j < std::min<index>(a.sinks, start + count); j++) holds[j] = j;
    const int32_t* chosen = a.chosen + (head_at * blocks + block) * a.memory;
    for (index j = 0; j < filled_at(a, start); j++) holds[z.lds + j] = chosen[j];
    for (index p = std::max<index>(a.sinks, start - a.window); p < start + count; p++) holds[z.ring_column(p)] = p;
    for (index j = 0; j < z.width; j++) {
      if (holds[j] < 0) {
        zero(keys + j * z.ldx, z.ldx), zero(values + j * z.ldv, z.ldv);
        continue;
      }
      load_row(a.key.at<const T>(b, tokens[holds[j]], kv_head), z.k, keys + j * z.ldx, z.ldx);
      load_row(a.value.at<const T>(b, tokens[holds[j]], kv_head), z.v, values + j * z.ldv, z.ldv);
    }
    transpose(z.width, z.ldx, keys, z.ldx, keys_t, z.width);
    transpose(z.width, z.ldv, values, z.ldv, values_t, z.width);
    for (index r = 0; r < all; r++) {
      const index t = tokens[start + r % count], head = kv_head * groups + r / count;
      load_row(a.query.at<const T>(b, t, head), z.k, queries + r * z.ldx, z.ldx);
      load_row(a.grad_output.at<const T>(b, t, head), z.v, grad + r * z.ldv, z.ldv);
    }
    multiply(all, z.width, z.k, rows(queries, z.ldx), keys_t, z.width, share, z.width, false);
    multiply(all, z.width, z.v, rows(grad, z.ldv), values_t, z.width, grad_share, z.width, false);
    for (index r = 0; r < all; r++) {
      float *weight = share + r * z.width, *slope = grad_share + r * z.width;
      const float over = 1.0f / weights_of(weight, z.width, a.scale, from, int32_t(r % count));
      vec met{};
      for (index j = 0; j < z.width; j += W) {
        const vec each = load(weight + j) * over;
        store(weight + j, each);
        met += each * load(slope + j);
      }
      const float mean = sum(met);
      for (index j = 0; j < z.width; j += W) store(slope + j, load(weight + j) * (load(slope + j) - mean) * a.scale);
    }
    multiply(all, z.ldx, z.width, rows(grad_share, z.width), keys, z.ldx, grad_q, z.ldx, false);
    multiply(z.width, z.ldx, all, transposed(grad_share, z.width), queries, z.ldx, grad_k, z.ldx, false);
    multiply(z.width, z.ldv, all, transposed(share, z.width), grad, z.ldv, grad_v, z.ldv, false);
    for (index r = 0; r < all; r++)
      store_row(grad_q + r * z.ldx, 1.0f, z.k, a.grad_query.at<T>(b, tokens[start + r % count], kv_head * groups + r / count));
    for (index j = 0; j < z.width; j++) {
      if (holds[j] < 0) continue;
      float *to_k = all_grad_k + holds[j] * z.ldx, *to_v = all_grad_v + holds[j] * z.ldv;
      for (index d = 0; d < z.ldx; d += W) store(to_k + d, load(to_k + d) + load(grad_k + j * z.ldx + d));
      for (index d = 0; d < z.ldv; d += W) store(to_v + d, load(to_v + d) + load(grad_v + j * z.ldv + d));
    }
  }
  for (index r = 0; r < n; r++) {
    store_row(all_grad_k + r * z.ldx, 1.0f, z.k, a.grad_key.at<T>(b, tokens[r], kv_head));
    store_row(all_grad_v + r * z.ldv, 1.0f, z.v, a.grad_value.at<T>(b, tokens[r], kv_head));
  }
}

// One token; the state is changed in place, where it lies. All heads of a sequence in one thread.
template <typename T>
static void memory_step(const MemoryArguments& a, Arena& arena) {
  const MemorySizes z(a);
  const index groups = a.heads / a.kv_heads, most = padded(z.slots);
  arena.reset(Arena::total({W * z.ldx, z.ldx * W, groups * z.ldx, groups * most, groups * z.ldv, z.ldv, z.ldx, 2 * z.k, 2 * z.k}));
  float *tile_rows = arena.take(W * z.ldx), *tile_t = arena.take(z.ldx * W), *queries = arena.take(groups * z.ldx), *share = arena.take(groups * most);
  float *out = arena.take(groups * z.ldv), *value = arena.take(z.ldv), *row = arena.take(z.ldx);
  double *unit = reinterpret_cast<double*>(arena.take(2 * z.k)), *mean = reinterpret_cast<double*>(arena.take(2 * z.k));
  std::vector<index> seen;
  std::vector<float> likeness;
  std::vector<int32_t> kept;
  for (index b = 0; b < a.batch; b++) {
    if (a.valid && !a.valid[b]) {
      for (index head = 0; head < a.heads; head++) std::memset(static_cast<void*>(a.output.at<T>(b, 0, head)), 0, z.v * sizeof(T));
      continue;
    }
    const index n = a.after.count[b], start = n / a.block * a.block, first = a.sinks + a.memory;
    const index filled = filled_at(a, start);
    seen.clear();
    for (index j = 0; j < std::min<index>(a.sinks, n + 1); j++) seen.push_back(j);
    for (index j = 0; j < filled; j++) seen.push_back(a.sinks + j);
    for (index p = std::max<index>(a.sinks, start - a.window); p <= n; p++) seen.push_back(first + p % z.ring);
    for (index kv_head = 0; kv_head < a.kv_heads; kv_head++) {
      const index head_at = b * a.kv_heads + kv_head;
      T *keys = static_cast<T*>(a.after.key) + head_at * z.slots * z.k, *values = static_cast<T*>(a.after.value) + head_at * z.slots * z.v;
      const auto unit_of = [&](index slot) {
        load_row(keys + slot * z.k, z.k, row, z.ldx);
        unit_key(row, z.k, unit);
      };
      const auto move = [&](index to, index slot) {
        if (to == slot) return;
        copy_row(keys + slot * z.k, keys + to * z.k, z.k);
        copy_row(values + slot * z.v, values + to * z.v, z.v);
      };
      if (n == start && n > 0) {
        double* sums = a.after.key_sum + head_at * z.k;
        for (index p = n - a.block; p < n; p++) {
          unit_of(first + p % z.ring);
          for (index d = 0; d < z.k; d++) sums[d] += unit[d];
        }
        const index from = std::max<index>(n - z.ring, a.sinks), joining = n - z.ring + a.block - from, held = filled_at(a, n - a.block);
        const auto slot_of = [&](index i) { return i < held ? a.sinks + i : first + (from + i - held) % z.ring; };
        if (joining > 0 && held + joining <= a.memory) {
          for (index i = 0; i < joining; i++) move(a.sinks + held + i, slot_of(held + i));
        } else if (joining > 0) {
          for (index d = 0; d < z.k; d++) mean[d] = sums[d] / double(n);
          likeness.resize(held + joining);
          for (index i = 0; i < held + joining; i++) {
            unit_of(slot_of(i));
            likeness[i] = float(likeness_of(unit, mean, z.k));
          }
          least_like(likeness, a.memory, kept);
          for (index j = 0; j < a.memory; j++) move(a.sinks + j, slot_of(kept[j]));  // never to a place that is still to be read
        }
      }
      const T *new_key = a.key.at<const T>(b, 0, kv_head), *new_value = a.value.at<const T>(b, 0, kv_head);
      copy_row(new_key, keys + (first + n % z.ring) * z.k, z.k);
      copy_row(new_value, values + (first + n % z.ring) * z.v, z.v);
      if (n < a.sinks) copy_row(new_key, keys + n * z.k, z.k), copy_row(new_value, values + n * z.v, z.v);
      for (index g = 0; g < groups; g++) load_row(a.query.at<const T>(b, 0, kv_head * groups + g), z.k, queries + g * z.ldx, z.ldx);
      const index number = index(seen.size());
      for (index j = 0; j < number; j += W) {  // W keys at a time, turned round: sums along a vector would cost more than products
        for (index i = 0; i < W; i++) load_row(keys + seen[std::min(j + i, number - 1)] * z.k, z.k, tile_rows + i * z.ldx, z.ldx);
        transpose(W, z.ldx, tile_rows, z.ldx, tile_t, W);
        for (index g = 0; g < groups; g++) {
          vec score{};
          for (index d = 0; d < z.k; d++) score += queries[g * z.ldx + d] * load(tile_t + d * W);
          store(share + g * most + j, first_lanes(number - j) ? score * a.scale : splat(NOTHING));
        }
      }
      zero(out, groups * z.ldv);
      for (index g = 0; g < groups; g++) {
        float* weight = share + g * most;
        vec top = splat(NOTHING), total{};
        for (index j = 0; j < number; j += W) top = max(top, load(weight + j));
        const float peak = largest(top);
        for (index j = 0; j < number; j += W) {
          const vec each = exp(load(weight + j) - peak);
          store(weight + j, each);
          total += each;
        }
        const vec over = splat(1.0f / sum(total));
        for (index j = 0; j < number; j += W) store(weight + j, load(weight + j) * over);
      }
      for (index j = 0; j < number; j++) {
        load_row(values + seen[j] * z.v, z.v, value, z.ldv);
        for (index g = 0; g < groups; g++) {
          const float weight = share[g * most + j];
          float* to = out + g * z.ldv;
          for (index d = 0; d < z.ldv; d += W) store(to + d, load(to + d) + weight * load(value + d));
        }
      }
      for (index g = 0; g < groups; g++) store_row(out + g * z.ldv, 1.0f, z.v, a.output.at<T>(b, 0, kv_head * groups + g));
    }
    a.after.count[b] = n + 1;
  }
}

}  // namespace hf_hybrid
