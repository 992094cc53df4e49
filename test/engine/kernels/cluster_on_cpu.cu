// Kernels that show whether blocks_on_cpu.h runs clusters as a GPU does.
#include "hopper.cuh"

DYNAMIC_SHARED(shared_memory);

// The same variable in another block of the cluster, to look at what memory a block has.
template <class T>
__device__ __forceinline__ T* in_block(T* variable, u32 rank) {
  return (T*)cpu::reached_in((void*)variable, rank);
}

__device__ __forceinline__ void cluster_barrier(bool wanted) {
  if (!wanted) return;
  cluster_arrive();
  cluster_wait();
}

// sums[round][block] of the whole cluster's values, one value per thread.
extern "C" __global__ void __launch_bounds__(64) cluster_sum(
    const float* values,  // (rounds, blocks, threads)
    float* sums,          // (rounds, blocks)
    int rounds, int blocks_of_cluster, int before_reading, int after_reading) {
  __shared__ float of_warp[2];
  float* of_thread = (float*)shared_memory;
  for (int round = 0; round < rounds; round++) {
    int block = round * gridDim.x + blockIdx.x;
    of_thread[threadIdx.x] = values[block * 64 + threadIdx.x];
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      of_warp[threadIdx.x / 32] = 0.f;
      for (int i = 0; i < 32; i++) of_warp[threadIdx.x / 32] += of_thread[threadIdx.x + i];
    }
    cluster_barrier(before_reading);
    // Half of it through the block's variable, half through its dynamic shared memory.
    float sum = 0.f;
    for (int rank = 0; rank < blocks_of_cluster; rank++) {
      sum += *in_block(of_warp, rank);
      for (int i = 32; i < 64; i++) sum += *in_block(of_thread + i, rank);
    }
    if (threadIdx.x == 0) sums[block] = sum;
    cluster_barrier(after_reading);
  }
}

// The warps of a block meet between arriving at the cluster's barrier and waiting there.
extern "C" __global__ void __launch_bounds__(64) split_barrier(int* ranks) {
  if (threadIdx.x < 32) cluster_arrive();
  __syncthreads();
  if (threadIdx.x >= 32) cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) ranks[blockIdx.x] = cluster_rank();
}

// A matrix of 8 x 8 transposed, and what the first half of the lanes have.
extern "C" __global__ void __launch_bounds__(32) matrix_transposed(const u32* matrix, u32* transposed,
                                                                   float* of_lane) {
  transposed[threadIdx.x] = transpose8(matrix[threadIdx.x]);
  of_lane[threadIdx.x] = __shfl_sync(~0u, threadIdx.x + 0.5f, threadIdx.x % 16);
}

extern "C" __global__ void fresh_memory(float* found) {
  __shared__ float variable;
  found[blockIdx.x * 2] = variable;
  found[blockIdx.x * 2 + 1] = *(float*)shared_memory;
  __syncthreads();
  variable = *(float*)shared_memory = 1.f;
}

extern "C" __global__ void half_a_barrier() {
  if (threadIdx.x >= 32) __syncthreads();
}

extern "C" __global__ void arrive_twice() {
  cluster_arrive();
  cluster_arrive();
}

extern "C" __global__ void settle_nothing() { settle((const void*)nullptr); }
