// Sums over a whole sequence that keep their digits. In fp32 throughout, roundings would add up over all chunks, and with a fixed decay always to the same
// side. What a block of tokens adds is summed in fp32, the blocks in fp64.
#pragma once

#include <type_traits>

#include "simd.h"

namespace hf_hybrid {

// A gradient that all tokens of a sequence add to.
struct Sum {
  index size = 0;
  float* added = nullptr;  // since the last `close`

  static size_t space(index size) { return Arena::total({size, 2 * size}); }
  void take(Arena& arena, index n) {
    size = n, added = arena.take(n), total_ = reinterpret_cast<double*>(arena.take(2 * n));
    zero(added, n);
    for (index i = 0; i < n; i++) total_[i] = 0.0;
  }
  void close() {
    for (index i = 0; i < size; i++) total_[i] += added[i];
    zero(added, size);
  }
  const float* result() {
    close();
    for (index i = 0; i < size; i++) added[i] = float(total_[i]);
    return added;
  }

 private:
  double* total_ = nullptr;
};

// Whether the state of tokens of this type is summed so: beside the rounding of bf16 nothing of it would be seen.
template <typename T>
constexpr bool splits() { return std::is_same_v<T, float>; }

// A state [rows, ld], or the gradient of one, that chunk after chunk decays and is added to. `split`: whether as above; else all is in `now`.
struct State {
  index rows = 0, ld = 0;
  float *now = nullptr, *added = nullptr;  // the state; where a chunk adds to it

  static size_t space(index rows, index ld, bool split) {
    const index n = rows * ld;
    return split ? Arena::total({n, n, n, rows, 2 * n}) : Arena::total({n});
  }
  void take(Arena& arena, index of_rows, index of_ld, bool split) {
    rows = of_rows, ld = of_ld, split_ = split;
    const index n = rows * ld;
    now = added = arena.take(n);
    if (split) added = arena.take(n), start_ = arena.take(n), kept_ = arena.take(rows), total_ = reinterpret_cast<double*>(arena.take(2 * n));
  }
  // at the start, with the state in `now`
  void open() {
    if (!split_) return;
    for (index i = 0; i < rows * ld; i++) total_[i] = now[i];
    begin_block();
  }
  // between blocks; `kept`, of all rows, is what the block kept of what was there before (if null, all)
  void close(const double* kept = nullptr) {
    if (!split_) return;
    for (index i = 0; i < rows; i++) {
      const double factor = kept ? kept[i] : 1.0;
      for (index j = i * ld; j < (i + 1) * ld; j++) total_[j] = total_[j] * factor + added[j];
    }
    begin_block();
  }
  void decay(index row, float factor) {
    float* x = added + row * ld;
    for (index j = 0; j < ld; j += W) store(x + j, load(x + j) * factor);
    if (split_) kept_[row] *= factor;
  }
  // `now` after decays and additions
  void refresh() {
    if (!split_) return;
    for (index i = 0; i < rows; i++)
      for (index j = i * ld; j < (i + 1) * ld; j += W) store(now + j, load(start_ + j) * kept_[i] + load(added + j));
  }
  // both in one go, of one row, by two factors: their product may be too small for a float where what it multiplies is large
  void decay_and_refresh(index row, float first, float second) {
    const float kept = split_ ? kept_[row] *= first, kept_[row] *= second : 0.0f;
    for (index j = row * ld; j < (row + 1) * ld; j += W) {
      const vec x = load(added + j) * first * second;
      store(added + j, x);
      if (split_) store(now + j, load(start_ + j) * kept + x);
    }
  }

 private:
  void begin_block() {
    for (index i = 0; i < rows * ld; i++) now[i] = start_[i] = float(total_[i]);
    for (index i = 0; i < rows; i++) kept_[i] = 1.0f;
    zero(added, rows * ld);
  }
  bool split_ = false;
  float *start_ = nullptr, *kept_ = nullptr;
  double* total_ = nullptr;
};

}  // namespace hf_hybrid
