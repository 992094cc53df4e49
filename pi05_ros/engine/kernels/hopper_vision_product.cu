// out = epilogue(x weight^T) on a Hopper GPU's tensor cores: the products of vision, with the
// LayerNorms between them inside. Plain twins: folded_norm.py.
//
// A block computes a tile of TILE_ROWS x TILE_FEATURES. One warp brings 64 columns of K at a time
// into a ring of STAGES in shared memory, a warpgroup per 64 rows multiplies. The CLUSTER blocks of
// a cluster have different rows and the same features: each brings its share of the features, once
// from L2 into all of them. The ring has as many stages as a multiprocessor has room for.
//
// x enters as LayerNorm(x). With the norm's weight multiplied into `weight`, and what its bias adds to
// the product in `bias`, that is
//     LayerNorm(x) w^T + b = r (x weight^T - mean * sums) + bias     r = 1 / deviation
// where `sums` adds up each row of `weight` as it was rounded. GELU (tanh form) may follow.
//
// With RESIDUAL x enters as it is, the product is added to what `out` holds, and the moments of the
// result's rows are left for the norm behind it: of each row and tile of features the mean and the
// sum of squared distances from it, which does not lose digits where rows lie far from 0.
//
// The rows of `weight` are in an order that gives a thread neighbouring features to write at once
// (hopper_vision_product.order_features).
#include "hopper_vision_epilogue.cuh"

constexpr int kThreads = kMultiplying + 32;
constexpr int kDepth = 64;  // columns of K per stage
constexpr int kRowBytes = TILE_ROWS * 128, kStageBytes = kRowBytes + TILE_FEATURES * 128;
constexpr int kShare = TILE_FEATURES / CLUSTER;  // features that a block brings of each step
static_assert(kShare % 8 == 0, "shares keep the swizzle's period");

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* stage_memory(int stage) {
  u32 begin = (0 - (u32)(u64)shared_memory) % 1024;
  return (char*)shared_memory + begin + stage * kStageBytes;
}

// The tile of this block. Rows are the faster index: neighbours share their weights.
struct Tile {
  int row0, feature0, steps;

  __device__ __forceinline__ Tile(int rows, int depth) {
    int row_tiles = (rows + TILE_ROWS * CLUSTER - 1) / (TILE_ROWS * CLUSTER) * CLUSTER;
    row0 = blockIdx.x % row_tiles * TILE_ROWS;
    feature0 = blockIdx.x / row_tiles * TILE_FEATURES;
    steps = (depth + kDepth - 1) / kDepth;
  }
};

struct Ring {
  u64 *full, *empty;
};

__device__ __forceinline__ void bring_features(const TensorMap& weight, const Tile& tile,
                                               const Ring& ring, int stage, int step) {
  u64* arrived = ring.full + stage;
  barrier_expect(arrived, kStageBytes);
  int part = blockIdx.x % CLUSTER * kShare;
  char* target = stage_memory(stage) + kRowBytes + part * 128;
  if (CLUSTER == 1)
    load_tile(target, &weight, step * kDepth, tile.feature0, arrived);
  else
    load_tile(target, &weight, step * kDepth, tile.feature0 + part, arrived, (1 << CLUSTER) - 1);
}

__device__ __forceinline__ void bring_rows(const TensorMap& x, const Tile& tile, const Ring& ring,
                                           int stage, int step) {
  load_tile(stage_memory(stage), &x, step * kDepth, tile.row0, ring.full + stage);
}

// Weights do not depend on the kernel before: the first ones travel before the wait for it.
__device__ __forceinline__ void bring(const TensorMap& x, const TensorMap& weight, const Tile& tile,
                                      const Ring& ring) {
  int ahead = min(STAGES, tile.steps);
  for (int step = 0; step < ahead; step++) bring_features(weight, tile, ring, step, step);
  wait_for_previous();
  for (int step = 0; step < ahead; step++) bring_rows(x, tile, ring, step, step);
  for (int step = ahead; step < tile.steps; step++) {
    int stage = step % STAGES;
    barrier_wait(ring.empty + stage, step / STAGES % 2 ^ 1);
    bring_features(weight, tile, ring, stage, step);
    bring_rows(x, tile, ring, stage, step);
  }
}

__device__ __forceinline__ void multiply(Sums& sums, int steps, const Ring& ring) {
  // The shuffle tells the compiler that the threads of a warp agree.
  int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  int stage = 0, parity = 0, last = 0;  // the stage whose products may not be complete
#pragma unroll
  for (int i = 0; i < TILE_FEATURES / 2; i++) sums.acc[i] = 0.f;
  for (int step = 0; step < steps; step++) {
    barrier_wait(ring.full + stage, parity);
    const char* rows = stage_memory(stage);
    u64 a = tile_operand(rows + warpgroup * 64 * 128), b = tile_operand(rows + kRowBytes);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) wgmma<TILE_FEATURES>(sums.acc, a + k * 2, b + k * 2);
    wgmma_commit();
    wgmma_wait<1>();
    // Only where somebody waits for it: what arrives after that may find its block gone.
    bool awaited = step > 0 && step - 1 + STAGES < steps;
    if (awaited && CLUSTER == 1 && lane == 0) barrier_arrive(ring.empty + last);
    if (awaited && CLUSTER > 1 && lane < CLUSTER) barrier_arrive(ring.empty + last, lane);
    last = stage;
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  wgmma_wait<0>(sums.acc);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) vision_product(
    const __grid_constant__ TensorMap x,       // (rows, depth), boxes of TILE_ROWS rows
    const __grid_constant__ TensorMap weight,  // (features, depth) ordered, boxes of kShare rows
    const float* bias,                         // (features)
    const float* sums,                         // (features); not read with RESIDUAL
    float2* moments,  // (parts, rows) of x, with RESIDUAL (feature tiles, rows) of out
    bf16* out,        // (rows, features)
    int rows, int features, int depth, float eps) {
  __shared__ u64 full[STAGES], empty[STAGES];
  __shared__ __align__(16) float column_bias[TILE_FEATURES];
  __shared__ __align__(16) float column_sums[TILE_FEATURES];
  let_next_start();
  if (threadIdx.x == 0) {
    fetch_map(&x), fetch_map(&weight);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kMultiplying / 32 * CLUSTER);  // every warp that reads it
    }
    barrier_init_done();
  }
  if (CLUSTER > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else {
    __syncthreads();
  }
  Tile tile(rows, depth);
  Ring ring = {full, empty};
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) bring(x, weight, tile, ring);
  } else {
    Columns columns = {column_bias, column_sums};
    columns.fetch(bias, sums, tile.feature0, features);
    Result result = {out, tile.row0, tile.feature0, rows, features};
    Finish finish;
    wait_for_previous();
    finish.fetch(result, moments, depth, eps);
    Sums products;
    multiply(products, tile.steps, ring);
    finish.write(products, columns, result, moments);
  }
  // Whatever other blocks send to this one has been waited for, so it may leave before them.
}
