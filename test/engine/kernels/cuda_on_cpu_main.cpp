// The kernels of hopper_layer.cu as functions of a library: name(blocks, threads, arguments).
#include "cuda_on_cpu.h"
//
#include SOURCE

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
  kernel(*(A*)values[I]...);
}
template <class... A>
static void launch(void (*kernel)(A...), int blocks, int threads, void** values) {
  cpu::launch(blocks, threads,
              [=] { call(kernel, values, std::make_index_sequence<sizeof...(A)>()); });
}

#define EXPORT(name)                                                       \
  extern "C" void on_cpu_##name(int blocks, int threads, void** values) { \
    launch(name, blocks, threads, values);                                 \
  }
EXPORT(qkv)
EXPORT(attend)
EXPORT(merge)
EXPORT(attention_out)
EXPORT(gate_up)
EXPORT(down)
EXPORT(residual_attention)
EXPORT(residual_mlp)
EXPORT(step_end)
