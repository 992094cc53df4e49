// What all kernels of hopper_layer.cu share.
#ifndef HOPPER_BLOCK_CUH
#define HOPPER_BLOCK_CUH
#include "hopper.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr float kLog2E = 1.4426950408889634f;

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ float rounded(float value) { return low(pack(value, 0.f)); }

// The sum of squares of a token's x comes in SQUARES parts, from those that wrote its columns; the
// parts that nobody writes are 0.
static_assert(SQUARES % 4 == 0 && (SQUARES & (SQUARES - 1)) == 0, "as many lanes as quads");

__device__ __forceinline__ float sum_of_quad(float4 v) { return (v.x + v.y) + (v.z + v.w); }
__device__ __forceinline__ float inverse_rms(float squares) {
  return rsqrtf(squares / WIDTH + EPS);
}

#endif
