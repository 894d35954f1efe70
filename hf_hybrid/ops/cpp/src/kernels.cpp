// The entry points. Everything is in the headers: one translation unit, a few seconds to compile.
#include "window.h"

using namespace hf_hybrid;

static Arena& own_arena() {
  static thread_local Arena arena;
  return arena;
}

template <typename Task>
static void run(ptrdiff_t tasks, int64_t threads, Task task) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (ptrdiff_t i = 0; i < tasks; i++) task(i, own_arena());
}

extern "C" {

void hf_hybrid_linear_forward(const LinearArguments* a) {
  run(a->batch * a->kv_heads, a->threads, [a](ptrdiff_t i, Arena& arena) {
    (a->dtype ? linear_forward_task<bfloat16> : linear_forward_task<float>)(*a, i / a->kv_heads, i % a->kv_heads, arena);
  });
}

void hf_hybrid_linear_backward(const LinearArguments* a) {
  run(a->batch * a->kv_heads, a->threads, [a](ptrdiff_t i, Arena& arena) {
    (a->dtype ? linear_backward_task<bfloat16> : linear_backward_task<float>)(*a, i / a->kv_heads, i % a->kv_heads, arena);
  });
}

void hf_hybrid_gated_forward(const GatedArguments* a) {
  run(a->batch * a->state_heads, a->threads, [a](ptrdiff_t i, Arena& arena) {
    (a->dtype ? gated_forward_task<bfloat16> : gated_forward_task<float>)(*a, i / a->state_heads, i % a->state_heads, arena);
  });
}

void hf_hybrid_window_forward(const WindowArguments* a) {
  const LinearArguments& c = a->common;
  run(c.batch * c.kv_heads, c.threads, [a, &c](ptrdiff_t i, Arena& arena) {
    (c.dtype ? window_forward_task<bfloat16> : window_forward_task<float>)(*a, i / c.kv_heads, i % c.kv_heads, arena);
  });
}

void hf_hybrid_window_step(const WindowArguments* a) { (a->common.dtype ? window_step<bfloat16> : window_step<float>)(*a, own_arena()); }

void hf_hybrid_linear_step(const LinearStep* a, const void* query, const void* key, const void* value, const uint8_t* valid, const void* weight_q,
                           const void* weight_k, const float* state, float* new_state, void* output) {
  (a->dtype ? linear_step<bfloat16> : linear_step<float>)(*a, query, key, value, valid, weight_q, weight_k, state, new_state, output, own_arena());
}

void hf_hybrid_gated_step(const GatedStep* a, const void* query, const void* key, const void* value, const float* decay, const float* beta,
                          const float* state, float* new_state, void* output) {
  (a->dtype ? gated_step<bfloat16> : gated_step<float>)(*a, query, key, value, decay, beta, state, new_state, output, own_arena());
}
}
