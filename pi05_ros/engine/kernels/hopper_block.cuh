// What all kernels of hopper_layer.cu share.
#ifndef HOPPER_BLOCK_CUH
#define HOPPER_BLOCK_CUH
#include "hopper.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr float kLog2E = 1.4426950408889634f;

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ float rounded(float value) { return low(pack(value, 0.f)); }

#endif
