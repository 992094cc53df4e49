// out = gelu_tanh(s gate(x)) * (s up(x)), s per row: the largest product of the prefill, on a Hopper
// GPU's tensor cores. Plain twin: gate_up_plain (gate_up.py).
//
// A block works on tiles of TILE_ROWS rows and 256 features, one after the other. A warp brings 64
// columns of K at a time into a ring of STAGES in shared memory, two warpgroups multiply. The
// CLUSTER blocks of a cluster have different rows and the same features: each brings its share of
// the features, once from L2 into all of them.
//
// Gate and up features alternate, so that a pair ends in neighbouring registers of a thread, in an
// order of units that gives a thread eight neighbours to write at once (hopper_gate_up.interleave).
// x is older than the kernel before this one, which computes s: only who uses s waits for it.
#include "hopper_tile.cuh"

// Of 192 rows each warpgroup has 64 and half the features of the last 64: three warpgroups would
// have too few registers for instructions of 256 features, and narrower ones read shared memory
// faster than it delivers.
constexpr int kThreads = 3 * 128, kMultiplying = 2 * 128, kDepth = 64, kFeatures = 256;
constexpr bool kThird = TILE_ROWS == 192;
constexpr int kHalf = kFeatures / 2;
constexpr int kRowBytes = TILE_ROWS * 128, kStageBytes = kRowBytes + kFeatures * 128;
constexpr int kShare = kFeatures / CLUSTER;  // features that a block brings of each step

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* stage_memory(int stage) {
  u64 first = ((u64)shared_memory + 1023) / 1024 * 1024;
  return (char*)first + stage * kStageBytes;
}

// A place in the ring, and the parity of its phase.
struct Place {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// The tiles of a block. Rows are the faster index: blocks that run together share their weights.
struct Tiles {
  int row_units, units;

  __device__ __forceinline__ Tiles(int rows, int features) {
    row_units = (rows + TILE_ROWS * CLUSTER - 1) / (TILE_ROWS * CLUSTER);
    units = row_units * (features / kFeatures);
  }
  __device__ __forceinline__ int first() const { return blockIdx.x / CLUSTER; }
  __device__ __forceinline__ int stride() const { return gridDim.x / CLUSTER; }
  __device__ __forceinline__ int row0(int unit) const {
    return (unit % row_units * CLUSTER + blockIdx.x % CLUSTER) * TILE_ROWS;
  }
  __device__ __forceinline__ int feature0(int unit) const { return unit / row_units * kFeatures; }
};

__device__ __forceinline__ void bring(const TensorMap& x, const TensorMap& weight,
                                      const Tiles& tiles, int steps, u64* full, u64* empty) {
  int rank = blockIdx.x % CLUSTER;
  Place place;
  place.parity = 1;  // all places are free
  for (int unit = tiles.first(); unit < tiles.units; unit += tiles.stride()) {
    for (int step = 0; step < steps; step++, place.advance()) {
      u64* arrived = full + place.stage;
      char* target = stage_memory(place.stage);
      barrier_wait(empty + place.stage, place.parity);
      barrier_expect(arrived, kStageBytes);
      load_tile(target, &x, step * kDepth, tiles.row0(unit), arrived);
      target += kRowBytes + rank * kShare * 128;
      int feature = tiles.feature0(unit) + rank * kShare;
      if (CLUSTER == 1)
        load_tile(target, &weight, step * kDepth, feature, arrived);
      else
        load_tile(target, &weight, step * kDepth, feature, arrived, (1 << CLUSTER) - 1);
    }
  }
}

// gelu_tanh(a gate) * (a up) of two pairs, with one reciprocal: 1 / x = y / (x y). Where the
// exponential is cut off, the result is 0 in bfloat16 as well.
// gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3), in powers of two.
__device__ __forceinline__ u32 geglu2(float a, float gate0, float up0, float gate1, float up1) {
  float g0 = gate0 * a, g1 = gate1 * a;
  float x = 1.f + exp2_fast(fminf(g0 * (-2.3022082f - 0.10294324f * g0 * g0), 60.f));
  float y = 1.f + exp2_fast(fminf(g1 * (-2.3022082f - 0.10294324f * g1 * g1), 60.f));
  float r = reciprocal(x * y);
  return pack(g0 * (up0 * a) * (y * r), g1 * (up1 * a) * (x * r));
}

// A warpgroup's sums of 64 rows by N features: lane l of a warp has rows l / 4 and l / 4 + 8, and
// of 64 features the pairs 4 j + l % 4, which are units 8 (l % 4) + j: the weight's order sees to it.
template <int N>
struct Sums {
  float acc[N / 2];
  float scale[2];

  __device__ __forceinline__ static int row() {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ void begin(const float* scales, int row0, int rows) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0.f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = row0 + Sums::row() + half * 8;
      scale[half] = row < rows ? scales[row] : 0.f;
    }
  }
  __device__ __forceinline__ void write(bf16* out, int row0, int rows, int unit0, int width) const {
#pragma unroll
    for (int part = 0; part < N / 64 * 2; part++) {
      int half = part % 2, row = row0 + Sums::row() + half * 8;
      const float* v = acc + part / 2 * 32 + half * 2;
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        words[i] = geglu2(scale[half], v[i * 8], v[i * 8 + 1], v[i * 8 + 4], v[i * 8 + 5]);
      if (row < rows)
        *(uint4*)(out + (size_t)row * width + unit0 + part / 2 * 32 + threadIdx.x % 4 * 8) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

__device__ __forceinline__ void multiply(const Tiles& tiles, int steps, u64* full, u64* empty,
                                         const float* scales, bf16* out, int rows, int width) {
  // The shuffle tells the compiler that the threads of a warp agree.
  int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  Place place;
  for (int unit = tiles.first(); unit < tiles.units; unit += tiles.stride()) {
    int row0 = tiles.row0(unit) + warpgroup * 64, third0 = tiles.row0(unit) + 128;
    Sums<kFeatures> own;
    Sums<kHalf> third;
    own.begin(scales, row0, rows);
    if (kThird) third.begin(scales, third0, rows);
    int last = -1;  // the stage whose products may not be complete
    for (int step = 0; step < steps; step++, place.advance()) {
      barrier_wait(full + place.stage, place.parity);
      const char* x = stage_memory(place.stage);
      const char* weight = x + kRowBytes;
      u64 a = tile_operand(x + warpgroup * 64 * 128), b = tile_operand(weight);
      u64 a_third = tile_operand(x + 128 * 128);
      u64 b_third = tile_operand(weight + warpgroup * kHalf * 128);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kDepth / 16; k++) {
        wgmma<kFeatures>(own.acc, a + k * 2, b + k * 2);
        if (kThird) wgmma<kHalf>(third.acc, a_third + k * 2, b_third + k * 2);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (last >= 0 && lane < CLUSTER) barrier_arrive(empty + last, lane);
      last = place.stage;
    }
    wgmma_wait<0>();
    if (lane < CLUSTER) barrier_arrive(empty + last, lane);
    int unit0 = tiles.feature0(unit) / 2;
    own.write(out, row0, rows, unit0, width);
    if (kThird) third.write(out, third0, rows, unit0 + warpgroup * (kHalf / 2), width);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) gate_up(
    const __grid_constant__ TensorMap x,       // (rows, depth), boxes of TILE_ROWS rows
    const __grid_constant__ TensorMap weight,  // (features, depth), boxes of kShare rows
    const float* scales,                       // (rows)
    bf16* out,                                 // (rows, features / 2)
    int rows, int features, int depth) {
  __shared__ u64 full[STAGES], empty[STAGES];
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
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  Tiles tiles(rows, features);
  int steps = depth / kDepth;
  if (threadIdx.x >= kMultiplying) {
    fewer_registers<40>();
    if (threadIdx.x == kMultiplying) bring(x, weight, tiles, steps, full, empty);
  } else {
    more_registers<232>();
    wait_for_previous();
    multiply(tiles, steps, full, empty, scales, out, rows, features / 2);
  }
  __syncwarp();
  if (CLUSTER > 1) {  // nobody leaves while others copy into its shared memory
    cluster_arrive();
    cluster_wait();
  }
}
