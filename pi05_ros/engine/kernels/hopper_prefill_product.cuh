// A product of the prefill on a Hopper GPU's tensor cores: what a block does of it.
//
// The 64 rows of a warpgroup's instructions are features of the weight, their columns are tokens: a
// number of tokens is padded to a multiple of 8, where 64 rows of tokens would be up to a fifth of
// zeros, which take as long as tokens.
//
// A block computes tiles of FEATURES by TOKENS. One warp brings 64 columns of K at a time into a
// ring of STAGES in shared memory, two warpgroups multiply, each with half of the features. The
// CLUSTER blocks of a cluster have different tokens and the same features: each brings its share of
// the features, once from L2 into all of them.
#ifndef HOPPER_PREFILL_PRODUCT_CUH
#define HOPPER_PREFILL_PRODUCT_CUH
#include "hopper_tile.cuh"

constexpr int kMultiplying = 2 * 128, kThreads = kMultiplying + 128;
constexpr int kDepth = 64;               // columns of K per stage
constexpr int kParts = FEATURES / 128;   // a warpgroup's instructions of 64 features
constexpr int kWeightBytes = FEATURES * 128, kStageBytes = kWeightBytes + TOKENS * 128;
constexpr int kBoxRows = FEATURES / CLUSTER;  // of the features, what a block brings for all
static_assert(FEATURES == 128 || FEATURES == 256, "one or two instructions per warpgroup");
static_assert(TOKENS % 8 == 0 && TOKENS <= 256, "columns of an instruction");
static_assert(kBoxRows % 8 == 0 && kBoxRows * CLUSTER == FEATURES, "the swizzle repeats after 8 rows");

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* stage_memory(int stage) {
  u32 begin = (0 - (u32)(u64)shared_memory) % 1024;
  return (char*)shared_memory + begin + stage * kStageBytes;
}

struct Barriers {
  u64 full[STAGES], empty[STAGES];
};

// A place in the ring, and the parity of its phase.
struct Place {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

struct Tile {
  int feature0, token0;
};

// The tiles of a block, in units of CLUSTER neighbours. Tokens are the faster index: blocks that run
// together share their weights.
struct Tiles {
  int token_units, units;

  __device__ __forceinline__ Tiles(int tokens, int features) {
    token_units = (tokens + TOKENS * CLUSTER - 1) / (TOKENS * CLUSTER);
    units = token_units * (features / FEATURES);
  }
  __device__ __forceinline__ int first() const { return blockIdx.x / CLUSTER; }
  __device__ __forceinline__ int stride() const { return gridDim.x / CLUSTER; }
  __device__ __forceinline__ Tile tile(int unit) const {
    int token_tile = unit % token_units * CLUSTER + blockIdx.x % CLUSTER;
    return {unit / token_units * FEATURES, token_tile * TOKENS};
  }
};

// The barriers exist in all blocks of the cluster behind this.
__device__ __forceinline__ void begin_ring(const TensorMap& x, const TensorMap& weight,
                                           Barriers& barriers) {
  if (threadIdx.x == 0) {
    fetch_map(&x), fetch_map(&weight);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(barriers.full + i, 1);
      barrier_init(barriers.empty + i, kMultiplying / 32 * CLUSTER);  // every warp that reads it
    }
    barrier_init_done();
  }
  if (CLUSTER > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

// Nobody leaves while others copy into its shared memory or arrive at its barriers.
__device__ __forceinline__ void end_ring() {
  if (CLUSTER > 1) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

// Whether this is the thread that copies, of those that do not multiply.
__device__ __forceinline__ bool brings() { return threadIdx.x < kMultiplying + 32 && elected(); }

__device__ __forceinline__ void bring_features(const TensorMap& weight, int column, int feature0,
                                               char* target, u64* arrived) {
  int row = blockIdx.x % CLUSTER * kBoxRows;
  if (CLUSTER == 1)
    load_tile(target, &weight, column, feature0, arrived);
  else
    load_tile(target + row * 128, &weight, column, feature0 + row, arrived, (1 << CLUSTER) - 1);
}

__device__ __forceinline__ void bring_tokens(const TensorMap& x, int column, int token0,
                                             char* target, u64* arrived) {
  load_tile(target + kWeightBytes, &x, column, token0, arrived);
}

// Bring the columns of a tile from the step `begin` on. A new ring's place has the parity 1:
// everything is free.
__device__ __forceinline__ void bring_tile(const TensorMap& x, const TensorMap& weight,
                                           const Tile& tile, int begin, int end,
                                           Barriers& barriers, Place& place) {
  for (int step = begin; step < end; step++, place.advance()) {
    u64* arrived = barriers.full + place.stage;
    char* target = stage_memory(place.stage);
    barrier_wait(barriers.empty + place.stage, place.parity);
    barrier_expect(arrived, kStageBytes);
    bring_features(weight, step * kDepth, tile.feature0, target, arrived);
    bring_tokens(x, step * kDepth, tile.token0, target, arrived);
  }
}

// A warpgroup's sums. A part has 64 features: lane l of a warp has rows l / 4 and l / 4 + 8 of its
// 16, and of every 8 tokens those at 2 (l % 4) and behind it: acc[part][4 i + ...] are of tokens
// 8 i ... in the order (row, token), (row, token + 1), (row + 8, token), (row + 8, token + 1).
struct Sums {
  float acc[kParts][TOKENS / 2];
};

// Says that this warp has read a stage.
__device__ __forceinline__ void give_back(Barriers& barriers, int stage) {
  int lane = threadIdx.x % 32;
  if (CLUSTER == 1 && lane == 0) barrier_arrive(barriers.empty + stage);
  if (CLUSTER > 1 && lane < CLUSTER) barrier_arrive(barriers.empty + stage, lane);
}

// Begin the products of a stage that has arrived; those of a tile's first one begin the sums.
template <bool kFirst>
__device__ __forceinline__ void multiply_stage(Sums& sums, const char* stage, int warpgroup) {
  u64 a = tile_operand(stage + warpgroup * (kWeightBytes / 2));
  u64 b = tile_operand(stage + kWeightBytes);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++)
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      u64 features = a + part * (64 * 128 / 16) + k * 2;
      if (kFirst && k == 0)
        wgmma_first<TOKENS>(sums.acc[part], features, b);
      else
        wgmma<TOKENS>(sums.acc[part], features, b + k * 2);
    }
  wgmma_commit();
}

__device__ __forceinline__ void multiply_tile(Sums& sums, int steps, Barriers& barriers,
                                              Place& place) {
  // The shuffle tells the compiler that the threads of a warp agree.
  int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  barrier_wait(barriers.full + place.stage, place.parity);
  multiply_stage<true>(sums, stage_memory(place.stage), warpgroup);
  int last = place.stage;  // whose products may not be complete
  place.advance();
  for (int step = 1; step < steps; step++, place.advance()) {
    barrier_wait(barriers.full + place.stage, place.parity);
    multiply_stage<false>(sums, stage_memory(place.stage), warpgroup);
    wgmma_wait<1>();
    give_back(barriers, last);
    last = place.stage;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int part = 0; part < kParts; part++) keep_order(sums.acc[part]);
  give_back(barriers, last);
}

#endif
