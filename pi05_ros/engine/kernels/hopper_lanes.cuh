// What neighbouring lanes of a warp do together.
#ifndef HOPPER_LANES_CUH
#define HOPPER_LANES_CUH
#include "hopper.cuh"

// Four neighbouring lanes hold the rows of a 4 x 4 matrix; after this, its columns.
__device__ __forceinline__ void transpose4(u32 (&v)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      u32 got = __shfl_xor_sync(~0u, upper ? v[i] : v[i | step], step);
      if (upper) v[i] = got; else v[i | step] = got;
    }
  }
}

#endif
