// Forward divergence of two rows of logits, and its gradient, in three passes over a row that stays in the cache.
#pragma once

#include "simd.h"

namespace hf_hybrid {

struct DivergenceArguments {  // mirrored in arguments.py
  int64_t rows, classes, student_dtype, teacher_dtype, threads;
  float inverse_temperature;
  const void *student, *teacher;  // [rows, classes]
  const float* weights;           // [rows]
  void* grad;                     // [rows, classes] in the student's dtype, or null
  double* losses;                 // [rows], without the weights
};

template <typename T>
static vec load_some(const T* from, index rest, float missing) {
  if (rest >= W) return load(from);
  vec x = splat(missing);
  for (index l = 0; l < rest; l++) x[l] = to_float(from[l]);
  return x;
}

// The largest of a row of logits, and the sum of e^(z - largest) over it.
template <typename T>
static std::pair<float, double> normaliser(const T* logits, index classes, float factor) {
  constexpr float LOWEST = -3e38f;
  vec top = splat(LOWEST);
  for (index j = 0; j < classes; j += W) top = max(top, load_some(logits + j, classes - j, LOWEST) * factor);
  const float peak = largest(top);
  double total = 0.0;
  for (index j = 0; j < classes; j += 64 * W) {
    vec part{};
    for (index i = j; i < classes && i < j + 64 * W; i += W) part += exp(load_some(logits + i, classes - i, LOWEST) * factor - peak);
    total += sum(part);
  }
  return {peak, total};
}

template <typename S, typename T>
static void divergence_row(const DivergenceArguments& a, index row) {
  const index n = a.classes;
  const S* student = static_cast<const S*>(a.student) + row * n;
  const T* teacher = static_cast<const T*>(a.teacher) + row * n;
  S* grad = a.grad ? static_cast<S*>(a.grad) + row * n : nullptr;
  const float f = a.inverse_temperature;
  if (a.weights[row] == 0.0f) {
    if (grad) std::memset(static_cast<void*>(grad), 0, n * sizeof(S));
    a.losses[row] = 0.0;
    return;
  }
  const auto [student_top, student_sum] = normaliser(student, n, f);
  const auto [teacher_top, teacher_sum] = normaliser(teacher, n, f);
  const float student_log = student_top + float(std::log(student_sum)), teacher_log = teacher_top + float(std::log(teacher_sum));
  const float slope = a.weights[row] / f;  // of temperature^2 times the loss
  double loss = 0.0;
  for (index j = 0; j < n; j += 64 * W) {
    vec part{};
    for (index i = j; i < n && i < j + 64 * W; i += W) {
      const vec log_q = load_some(student + i, n - i, -3e38f) * f - student_log, log_p = load_some(teacher + i, n - i, -3e38f) * f - teacher_log;
      const vec p = exp(log_p);
      part += p > vec{} ? p * (log_p - log_q) : vec{};
      if (!grad) continue;
      const vec g = (exp(log_q) - p) * slope;
      if (n - i >= W)
        store(grad + i, g);
      else
        for (index l = 0; l < n - i; l++) from_float(g[l], grad[i + l]);
    }
    loss += sum(part);
  }
  a.losses[row] = loss;
}

}  // namespace hf_hybrid
