// The kernels of a source as functions of a library: they return what went wrong, or null.
#include "cuda_on_cpu.h"
#include "tile_on_cpu.h"
//
#include SOURCE

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
  kernel(*(A*)values[I]...);
}
template <class... A>
static const char* launch(void (*kernel)(A...), int blocks, int threads, int cluster,
                          void** values) {
  return cpu::launch(blocks, threads, cluster,
                     [=] { call(kernel, values, std::make_index_sequence<sizeof...(A)>()); });
}

#define EXPORT(name)                                                                          \
  extern "C" const char* on_cpu_##name(int blocks, int threads, int cluster, void** values) { \
    return launch(name, blocks, threads, cluster, values);                                    \
  }
KERNELS
