// The entry points. Everything is in the headers: one translation unit, a few seconds to compile.
#include "kl.h"
#include "memory.h"

using namespace hf_hybrid;

static Arena& own_arena() {
  static thread_local Arena arena;
  return arena;
}

// task(sequence, head, arena) for all of them
template <class Task>
static void for_each(ptrdiff_t batch, ptrdiff_t heads, int64_t threads, Task task) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (ptrdiff_t i = 0; i < batch * heads; i++) task(i / heads, i % heads, own_arena());
}

// The same with a type of number and a kind of products: bf16 tensors are worth the matrix unit where there is one.
template <class Task>
static void for_each_in_kind(ptrdiff_t batch, ptrdiff_t heads, int64_t threads, bool low, bool may_round, Task task) {
#ifdef HF_HYBRID_AMX
  if (low && may_round && Rounded::available())
    return for_each(batch, heads, threads, [&](ptrdiff_t b, ptrdiff_t head, Arena& arena) {
      const Rounded::Scope scope;
      task(bfloat16{}, Rounded{}, b, head, arena);
    });
#endif
  (void)may_round;
  for_each(batch, heads, threads, [&](ptrdiff_t b, ptrdiff_t head, Arena& arena) {
    if (low)
      task(bfloat16{}, Exact{}, b, head, arena);
    else
      task(float{}, Exact{}, b, head, arena);
  });
}

extern "C" {

void hf_hybrid_linear_forward(const LinearArguments* a) {
  for_each_in_kind(a->batch, a->kv_heads, a->threads, a->dtype, true, [a](auto number, auto products, auto b, auto head, Arena& arena) {
    linear_forward_task<decltype(number), decltype(products)>(*a, b, head, arena);
  });
}

void hf_hybrid_bidirectional_forward(const LinearArguments* a) {
  for_each_in_kind(a->batch, a->kv_heads, a->threads, a->dtype, true, [a](auto number, auto products, auto b, auto head, Arena& arena) {
    bidirectional_task<decltype(number), decltype(products)>(*a, b, head, arena);
  });
}

void hf_hybrid_linear_backward(const LinearArguments* a) {
  for_each_in_kind(a->batch, a->kv_heads, a->threads, a->dtype, false, [a](auto number, auto, auto b, auto head, Arena& arena) {
    linear_backward_task<decltype(number)>(*a, b, head, arena);
  });
}

// The delta rule is always exact: the triangular solve of nearly parallel keys multiplies rounding errors.
void hf_hybrid_gated_forward(const GatedArguments* a) {
  for_each_in_kind(a->batch, a->state_heads, a->threads, a->dtype, !a->beta.data, [a](auto number, auto products, auto b, auto head, Arena& arena) {
    gated_forward_task<decltype(number), decltype(products)>(*a, b, head, arena);
  });
}

void hf_hybrid_gated_backward(const GatedArguments* a) {
  for_each_in_kind(a->batch, a->state_heads, a->threads, a->dtype, false, [a](auto number, auto, auto b, auto head, Arena& arena) {
    gated_backward_task<decltype(number)>(*a, b, head, arena);
  });
}

void hf_hybrid_window_forward(const WindowArguments* a) {
  const LinearArguments& c = a->common;
  // the backward pass goes on from states of the forward's: they must have taken in the same keys, whatever the chunks of either
  const bool may_round = !c.block_states || a->window % 32 == 0;
  for_each_in_kind(c.batch, c.kv_heads, c.threads, c.dtype, may_round, [a](auto number, auto products, auto b, auto head, Arena& arena) {
    window_forward_task<decltype(number), decltype(products)>(*a, b, head, arena);
  });
}

void hf_hybrid_window_backward(const WindowArguments* a) {
  const LinearArguments& c = a->common;
  for_each_in_kind(c.batch, c.kv_heads, c.threads, c.dtype, false, [a](auto number, auto, auto b, auto head, Arena& arena) {
    window_backward_task<decltype(number)>(*a, b, head, arena);
  });
}

void hf_hybrid_window_step(const WindowArguments* a) { (a->common.dtype ? window_step<bfloat16> : window_step<float>)(*a, own_arena()); }

void hf_hybrid_memory_forward(const MemoryArguments* a) {
  const ptrdiff_t parts = parts_of(*a);
  for_each_in_kind(a->batch, a->kv_heads * parts, a->threads, a->dtype, false, [a, parts](auto number, auto, auto b, auto task, Arena& arena) {
    memory_forward_task<decltype(number)>(*a, b, task / parts, task % parts, parts, arena);
  });
}

void hf_hybrid_memory_backward(const MemoryArguments* a) {
  for_each_in_kind(a->batch, a->kv_heads, a->threads, a->dtype, false, [a](auto number, auto, auto b, auto head, Arena& arena) {
    memory_backward_task<decltype(number)>(*a, b, head, arena);
  });
}

void hf_hybrid_memory_step(const MemoryArguments* a) { (a->dtype ? memory_step<bfloat16> : memory_step<float>)(*a, own_arena()); }

void hf_hybrid_divergence(const DivergenceArguments* a) {
#pragma omp parallel for schedule(static) num_threads(a->threads)
  for (ptrdiff_t row = 0; row < a->rows; row++) {
    if (a->student_dtype)
      (a->teacher_dtype ? divergence_row<bfloat16, bfloat16> : divergence_row<bfloat16, float>)(*a, row);
    else
      (a->teacher_dtype ? divergence_row<float, bfloat16> : divergence_row<float, float>)(*a, row);
  }
}

void hf_hybrid_linear_step(const LinearStep* a, const void* query, const void* key, const void* value, const uint8_t* valid, const void* weight_q,
                           const void* weight_k, const float* state, float* new_state, void* output) {
  (a->dtype ? linear_step<bfloat16> : linear_step<float>)(*a, query, key, value, valid, weight_q, weight_k, state, new_state, output, own_arena());
}

void hf_hybrid_gated_step(const GatedStep* a, const void* query, const void* key, const void* value, const float* decay, const float* beta,
                          const float* state, float* new_state, void* output) {
  (a->dtype ? gated_step<bfloat16> : gated_step<float>)(*a, query, key, value, decay, beta, state, new_state, output, own_arena());
}
}
