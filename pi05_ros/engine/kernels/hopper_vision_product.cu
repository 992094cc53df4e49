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
#include "hopper_tile.cuh"

constexpr int kMultiplying = TILE_ROWS * 2, kThreads = kMultiplying + 32;
constexpr int kDepth = 64;  // columns of K per stage
constexpr int kRowBytes = TILE_ROWS * 128, kStageBytes = kRowBytes + TILE_FEATURES * 128;
constexpr int kShare = TILE_FEATURES / CLUSTER;  // features that a block brings of each step
constexpr int kGroups = TILE_FEATURES / 16;
static_assert(TILE_ROWS % 64 == 0 && TILE_FEATURES % 16 == 0, "whole warpgroups and groups");
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

// A warpgroup's sums of 64 rows. A lane has, of each of two rows and each group of 16 features, four
// neighbours: the order of the weight's rows sees to it.
struct Sums {
  float acc[TILE_FEATURES / 2];

  __device__ __forceinline__ static int row(int half) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
  }
  __device__ __forceinline__ static int feature(int group) {
    return group * 16 + threadIdx.x % 4 * 4;
  }
  __device__ __forceinline__ float4 get(int group, int half) const {
    const float* v = acc + group * 8 + half * 2;
    return make_float4(v[0], v[1], v[4], v[5]);
  }
};

// What the epilogue adds or multiplies per feature, in shared memory.
struct Columns {
  float *bias, *sums;

  // By the threads that multiply; features beyond the matrix get zeros.
  __device__ __forceinline__ void fetch(const float* all_bias, const float* all_sums, int feature0,
                                        int features) const {
    for (int i = threadIdx.x; i < TILE_FEATURES; i += kMultiplying) {
      bool there = feature0 + i < features;
      bias[i] = there ? all_bias[feature0 + i] : 0.f;
#ifndef RESIDUAL
      sums[i] = there ? all_sums[feature0 + i] : 0.f;
#endif
    }
    named_barrier(1, kMultiplying);
  }
  __device__ __forceinline__ float4 bias4(int group) const {
    return *(const float4*)(bias + Sums::feature(group));
  }
  __device__ __forceinline__ float4 sums4(int group) const {
    return *(const float4*)(sums + Sums::feature(group));
  }
};

// Four neighbouring lanes have the same rows.
__device__ __forceinline__ float sum_of_four(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

__device__ __forceinline__ uint2 packed(float4 v) {
  return make_uint2(pack(v.x, v.y), pack(v.z, v.w));
}
__device__ __forceinline__ float4 unpacked(uint2 v) {
  return make_float4(low(v.x), high(v.x), low(v.y), high(v.y));
}

// gelu_tanh of two values, with one reciprocal: 1 / x = y / (x y). Where the exponential is cut off,
// the result is 0 in bfloat16 as well.
// gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3), in powers of two.
__device__ __forceinline__ void gelu2(float& v, float& w) {
  float x = 1.f + exp2_fast(fminf(v * (-2.3022082f - 0.10294324f * v * v), 60.f));
  float y = 1.f + exp2_fast(fminf(w * (-2.3022082f - 0.10294324f * w * w), 60.f));
  float r = reciprocal(x * y);
  v *= y * r, w *= x * r;
}

// Where a lane's part of the result goes.
struct Result {
  bf16* out;
  int row0, feature0, rows, features;

  __device__ __forceinline__ int row(int half) const { return row0 + Sums::row(half); }
  __device__ __forceinline__ bool has(int group, int half) const {
    return row(half) < rows && feature0 + Sums::feature(group) < features;
  }
  __device__ __forceinline__ uint2* at(int group, int half) const {
    return (uint2*)(out + (size_t)row(half) * features + feature0 + Sums::feature(group));
  }
};

#ifdef RESIDUAL
// What the sums are added to, asked for before the product, so that it is there behind it.
struct Finish {
  uint2 words[kGroups][2];

  __device__ __forceinline__ void fetch(const Result& result, const float2*, int, float) {
#pragma unroll
    for (int group = 0; group < kGroups; group++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (result.has(group, half)) words[group][half] = __ldcg(result.at(group, half));
  }
  __device__ __forceinline__ void write(const Sums& sums, const Columns& columns,
                                        const Result& result, float2* moments) {
    int width = min(TILE_FEATURES, result.features - result.feature0);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float mean = sum_of_four(add(sums, columns, result, half)) / width;
      float squares = sum_of_four(distances(result, half, mean));
      int tile = result.feature0 / TILE_FEATURES;
      if (threadIdx.x % 4 == 0 && result.row(half) < result.rows)
        moments[(size_t)tile * result.rows + result.row(half)] = {mean, squares};
    }
  }

 private:
  // Writes a row's result and returns what this lane's part of it, rounded, adds up to.
  __device__ __forceinline__ float add(const Sums& sums, const Columns& columns,
                                       const Result& result, int half) {
    float total = 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      if (!result.has(group, half)) continue;
      float4 v = sums.get(group, half), bias = columns.bias4(group);
      float4 old = unpacked(words[group][half]);
      v = make_float4(v.x + bias.x + old.x, v.y + bias.y + old.y, v.z + bias.z + old.z,
                      v.w + bias.w + old.w);
      words[group][half] = packed(v);
      *result.at(group, half) = words[group][half];
      v = unpacked(words[group][half]);
      total += v.x + v.y + (v.z + v.w);
    }
    return total;
  }
  __device__ __forceinline__ float distances(const Result& result, int half, float mean) const {
    float total = 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      if (!result.has(group, half)) continue;
      float4 v = unpacked(words[group][half]);
      v = make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean);
      total += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    return total;
  }
};
#else
// Mean and 1 / deviation of a lane's two rows, from their PARTS moments of PART_FEATURES each, which
// four lanes read and add up.
struct Finish {
  float mean[2], scale[2];

  __device__ __forceinline__ void fetch(const Result& result, const float2* moments, int width,
                                        float eps) {
    constexpr int kPerLane = (PARTS + 3) / 4;
    float2 part[2][kPerLane];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        int index = i * 4 + threadIdx.x % 4, row = result.row(half);
        part[half][i] = {0.f, 0.f};
        if (index < PARTS && row < result.rows)
          part[half][i] = __ldcg(moments + (size_t)index * result.rows + row);
      }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) sum += part[half][i].x * count(i, width);
      mean[half] = sum_of_four(sum) / width;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        float distance = part[half][i].x - mean[half];
        squares += part[half][i].y + distance * distance * count(i, width);
      }
      scale[half] = rsqrtf(sum_of_four(squares) / width + eps);
    }
  }
  __device__ __forceinline__ void write(const Sums& sums, const Columns& columns,
                                        const Result& result, const float2*) const {
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      float4 bias = columns.bias4(group), total = columns.sums4(group);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float4 v = sums.get(group, half);
        float r = scale[half], centre = mean[half];
        v = make_float4(r * (v.x - centre * total.x) + bias.x, r * (v.y - centre * total.y) + bias.y,
                        r * (v.z - centre * total.z) + bias.z,
                        r * (v.w - centre * total.w) + bias.w);
#ifdef GELU
        gelu2(v.x, v.y), gelu2(v.z, v.w);
#endif
        if (result.has(group, half)) *result.at(group, half) = packed(v);
      }
    }
  }

 private:
  // The features in a lane's i-th part.
  __device__ __forceinline__ static float count(int i, int width) {
    int left = width - (i * 4 + (int)(threadIdx.x % 4)) * PART_FEATURES;
    return max(min(left, PART_FEATURES), 0);
  }
};
#endif

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
    if (awaited && lane < CLUSTER) barrier_arrive(ring.empty + last, lane);
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
    Sums own;
    multiply(own, tile.steps, ring);
    finish.write(own, columns, result, moments);
  }
  // Whatever other blocks send to this one has been waited for, so it may leave before them.
}
