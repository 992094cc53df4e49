// A matrix product with a few dozen rows: what a block of hopper_layer.cu does of it.
#ifndef HOPPER_PRODUCT_CUH
#define HOPPER_PRODUCT_CUH
#include "hopper_block.cuh"

constexpr int kTokenTiles = (HORIZON + 7) / 8;  // 8-token columns of the matrix instruction
constexpr int kTokens = kTokenTiles * 8;
constexpr int kMaxSteps = 16;
constexpr int kInFlight = 4;   // steps of a product whose weights are on their way at once
constexpr int kLoadAhead = 2;  // steps whose activations are asked for ahead

// The product of a block: kTiles * 16 features, kDepth of K, all tokens. Warps split K into
// kGroups and the tokens into kParts.
template <int kTiles_, int kDepth_, int kStride_, int kRows>
struct Product {
  static constexpr int kTiles = kTiles_, kDepth = kDepth_, kFeatures = kTiles * 16;
  static constexpr int kStride = kStride_;  // all of K
  static constexpr int kRanges = kStride / kDepth, kBlocks = kRows / kFeatures * kRanges;
  static constexpr int kParts = kTokenTiles > 4 ? 2 : 1, kGroups = kWarps / kParts;
  static constexpr int kShare = (kTokenTiles + kParts - 1) / kParts;  // token tiles of a warp
  static constexpr int kSteps = kDepth / 32 / kGroups;  // of 32 K each, per warp
  static constexpr int kAhead = kSteps < kLoadAhead ? kSteps : kLoadAhead;
  static constexpr int kWeightBytes = kFeatures * kDepth * 2;
  static constexpr int kLdSum = kFeatures + 4;  // no bank conflicts
  static_assert(kDepth % (32 * kGroups) == 0 && kSteps <= kMaxSteps && kRows % kFeatures == 0,
                "tiling");

  // The block's part of the product. A grid may be larger than the product, to have a block on
  // every multiprocessor: those of the next kernel, which start early, then spread evenly.
  // Surplus blocks repeat the work of others and write nothing.
  static __device__ __forceinline__ int block() { return blockIdx.x % kBlocks; }
  static __device__ __forceinline__ bool surplus() { return blockIdx.x >= kBlocks; }
  static __device__ __forceinline__ int range() { return block() % kRanges; }
  static __device__ __forceinline__ int feature0() { return block() / kRanges * kFeatures; }

  // Bring the block's weights, a step of all groups at a time and few at once: what other kernels
  // wait for would queue behind them.
  static __device__ __forceinline__ void load_weights(const bf16* packed, u64* arrived) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kSteps; s++) barrier_init(arrived + s);
      barrier_init_done();
    }
    __syncthreads();  // the barriers exist
    if (threadIdx.x == 0) {
      constexpr u32 kBytes = kWeightBytes / kSteps;
      const char* source = (const char*)packed + (size_t)block() * kWeightBytes;
      for (int s = 0; s < kSteps; s++) {
        if (s >= kInFlight) barrier_wait(arrived + s - kInFlight);
        barrier_expect(arrived + s, kBytes);
        copy_bulk(shared_memory + s * kBytes, source + s * kBytes, kBytes, arrived + s);
      }
    }
  }

  // Multiply with tokens (HORIZON, kStride); leave sums[group][token][feature] in shared memory,
  // over the weights.
  static __device__ __forceinline__ void multiply(const bf16* tokens, u64* arrived) {
    int warp = threadIdx.x / 32, group = warp % kGroups;
    const bf16* source = tokens + range() * kDepth + group * 32 + threadIdx.x % 4 * 8;
    if (kParts == 1 || warp < kGroups)
      part<kShare, 0>(source, group, arrived);
    else
      part<kTokenTiles - kShare, kShare>(source, group, arrived);
    __syncthreads();
  }

  template <int kCount, int kFirst>
  static __device__ __forceinline__ void part(const bf16* source, int group, u64* arrived) {
    constexpr int kColumns = kCount < 1 ? 1 : kCount;
    int lane = threadIdx.x % 32, row = lane / 4;
    const bf16* first = source + (size_t)(kFirst * 8 + row) * kStride;
    // Rows behind the last token repeat it: their sums are never read.
    const bf16* last =
        source + (size_t)min((kFirst + kCount - 1) * 8 + row, HORIZON - 1) * kStride;
    uint4 b[kAhead][kColumns];
#pragma unroll
    for (int s = 0; s < kAhead; s++)
#pragma unroll
      for (int t = 0; t < kCount; t++)
        b[s][t] = load_l2((t + 1 < kCount ? first + t * 8 * kStride : last) + s * kGroups * 32);
    float acc[kTiles][kColumns][4] = {};
    const uint4* weights = (const uint4*)shared_memory + group * kTiles * 64 + lane;
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      barrier_wait(arrived + s);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const uint4* a = weights + (s * kGroups * kTiles + n) * 64;
        uint4 a0 = a[0], a1 = a[32];
#pragma unroll
        for (int t = 0; t < kCount; t++) {
          uint4 v = b[s % kAhead][t];
          mma(acc[n][t], a0.x, a0.y, a0.z, a0.w, v.x, v.y);
          mma(acc[n][t], a1.x, a1.y, a1.z, a1.w, v.z, v.w);
        }
      }
      if (s + kAhead < kSteps) {
#pragma unroll
        for (int t = 0; t < kCount; t++)
          b[s % kAhead][t] = load_l2((t + 1 < kCount ? first + t * 8 * kStride : last) +
                                     (s + kAhead) * kGroups * 32);
      }
    }
    __syncthreads();  // the weights are read; the sums take their place
    float* sums = (float*)shared_memory + group * kTokens * kLdSum;
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int t = 0; t < kCount; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          sums[((kFirst + t) * 8 + lane % 4 * 2 + i % 2) * kLdSum + n * 16 + row + i / 2 * 8] =
              acc[n][t][i];
  }

  // Four neighbouring features of a token, summed over the groups in order.
  static __device__ __forceinline__ float4 sum(int token, int feature) {
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      float4 v = *(const float4*)((const float*)shared_memory +
                                  (group * kTokens + token) * kLdSum + feature);
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    return total;
  }
};

#endif
