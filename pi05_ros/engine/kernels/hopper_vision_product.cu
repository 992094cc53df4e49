// out = epilogue(x weight^T) on a Hopper GPU's tensor cores: the products of vision, with the
// LayerNorms between them inside. Plain twins: folded_norm.py.
//
// A block computes a tile of TILE_ROWS x TILE_FEATURES. One warp brings 64 columns of K at a time
// into a ring of STAGES in shared memory, a warpgroup per 64 rows multiplies. The CLUSTER blocks of
// a cluster have different rows and the same features: each brings its share of the features, once
// from L2 into all of them. The ring has as many stages as a multiprocessor has room for.
//
// Where K is long, the SPLIT blocks of a cluster have the same tile instead and share out K: tiles can
// be larger, which saves reads of shared memory. Each finishes some of the rows, of which the others
// send it their sums.
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
static_assert(CLUSTER == 1 || SPLIT == 1, "a cluster shares features or K");

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* stage_memory(int stage) {
  u32 begin = (0 - (u32)(u64)shared_memory) % 1024;
  return (char*)shared_memory + begin + stage * kStageBytes;
}

// The tile of this block and its steps along K. Rows are the faster index: neighbours share their
// weights.
struct Tile {
  int row0, feature0, first, steps;

  __device__ __forceinline__ Tile(int rows, int depth) {
    int row_tiles = (rows + TILE_ROWS * CLUSTER - 1) / (TILE_ROWS * CLUSTER) * CLUSTER;
    int tile = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT;
    row0 = tile % row_tiles * TILE_ROWS, feature0 = tile / row_tiles * TILE_FEATURES;
    int all_steps = (depth + kDepth - 1) / kDepth;
    first = all_steps * rank / SPLIT;
    steps = all_steps * (rank + 1) / SPLIT - first;
  }
  __device__ __forceinline__ int column(int step) const { return (first + step) * kDepth; }
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
    load_tile(target, &weight, tile.column(step), tile.feature0, arrived);
  else
    load_tile(target, &weight, tile.column(step), tile.feature0 + part, arrived,
              (1 << CLUSTER) - 1);
}

__device__ __forceinline__ void bring_rows(const TensorMap& x, const Tile& tile, const Ring& ring,
                                           int stage, int step) {
  load_tile(stage_memory(stage), &x, tile.column(step), tile.row0, ring.full + stage);
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

// What the blocks that share out K send each other: of every warp the sums of its 16 rows, to the block
// that finishes them. They arrive where the ring was.
struct Exchange {
  static constexpr int kWarps = TILE_ROWS / 16 / SPLIT;  // whose rows a block finishes
  static constexpr int kQuads = kGroups * 2;             // of a lane's sums
  static constexpr int kQuadBytes = 32 * 16;             // of a warp's lanes, side by side
  static constexpr int kBlockBytes = kWarps * kQuads * kQuadBytes, kBytes = (SPLIT - 1) * kBlockBytes;
  static_assert(TILE_ROWS / 16 % SPLIT == 0, "every block finishes as many warps' rows");
  static_assert(kBytes <= STAGES * kStageBytes, "what arrives takes the ring's place");

  u64* arrived;
  int warp, owner, rank;  // the owner finishes this warp's rows

  __device__ __forceinline__ explicit Exchange(u64* arrived) : arrived(arrived) {
    // The shuffle tells the compiler that the threads of a warp agree.
    warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    owner = warp / kWarps, rank = blockIdx.x % SPLIT;
  }
  __device__ __forceinline__ static void begin(u64* arrived) {
    barrier_init(arrived, 1);
    barrier_expect(arrived, kBytes);
  }
  __device__ __forceinline__ bool finishes() const { return SPLIT == 1 || owner == rank; }

  // Sends what others finish, and waits for what this warp finishes.
  __device__ __forceinline__ void run(const Sums& sums) const {
    cluster_wait();  // all rings are read, and the barriers of all blocks count
    if (finishes()) return barrier_wait_cluster(arrived);
    ClusterAddress there = address_in_block(room((rank + SPLIT - owner) % SPLIT), owner);
    ClusterAddress barrier = address_in_block(arrived, owner);
#pragma unroll
    for (int i = 0; i < kQuads; i++)
      send(there + i * kQuadBytes, barrier, sums.get(i / 2, i % 2));
  }
  // Where a lane's sums arrive from the block whose rank is so much higher, around the end.
  __device__ __forceinline__ char* room(int distance) const {
    return stage_memory(0) + (distance - 1) * kBlockBytes +
           warp % kWarps * (kQuads * kQuadBytes) + threadIdx.x % 32 * 16;
  }
};

// A lane's sums over the whole of K, added up in an order that does not depend on who came first.
struct Totals {
  const Sums& own;
  const char* sent;  // to this lane

  __device__ __forceinline__ float4 get(int group, int half) const {
    float4 total = own.get(group, half);
#pragma unroll
    for (int i = 0; i < SPLIT - 1; i++) {
      int at = i * Exchange::kBlockBytes + (group * 2 + half) * Exchange::kQuadBytes;
      float4 v = *(const float4*)(sent + at);
      total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
    }
    return total;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) vision_product(
    const __grid_constant__ TensorMap x,       // (rows, depth), boxes of TILE_ROWS rows
    const __grid_constant__ TensorMap weight,  // (features, depth) ordered, boxes of kShare rows
    const float* bias,                         // (features)
    const float* sums,                         // (features); not read with RESIDUAL
    float2* moments,  // (parts, rows) of x, with RESIDUAL (feature tiles, rows) of out
    bf16* out,        // (rows, features)
    int rows, int features, int depth, float eps) {
  __shared__ u64 full[STAGES], empty[STAGES], sums_arrived;
  __shared__ __align__(16) float column_bias[TILE_FEATURES];
  __shared__ __align__(16) float column_sums[TILE_FEATURES];
  let_next_start();
  if (threadIdx.x == 0) {
    fetch_map(&x), fetch_map(&weight);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kMultiplying / 32 * CLUSTER);  // every warp that reads it
    }
    if (SPLIT > 1) Exchange::begin(&sums_arrived);
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
    Exchange exchange(&sums_arrived);
    Finish finish;
    wait_for_previous();
    if (exchange.finishes()) finish.fetch(result, moments, depth, eps);
    Sums own;
    multiply(own, tile.steps, ring);
    if (SPLIT > 1) cluster_arrive_relaxed();  // this warp's copies have arrived and are read
    if (exchange.finishes()) finish.add(own, columns);
    if (SPLIT > 1) exchange.run(own);
    if (exchange.finishes())
      finish.write(Totals{own, exchange.room(1)}, columns, result, moments);
  }
  // Whatever other blocks send to this one has been waited for, so it may leave before them.
}
