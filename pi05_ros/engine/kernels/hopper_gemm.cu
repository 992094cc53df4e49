// out = epilogue(x weight^T) on a Hopper GPU's tensor cores: one product of vision or prefill.
//
// A block computes tiles of TILE_ROWS x TILE_FEATURES. One warp brings 64 columns of K at a time
// into a ring of STAGES in shared memory; a warpgroup per 64 rows multiplies. Blocks of a cluster
// (CLUSTER_ROWS x CLUSTER_FEATURES neighbouring tiles) need the same rows or features: each brings
// its share, once from L2 into all of them. What bounds such products on this chip is how fast L2
// delivers operands, so that a product is fastest where each byte is delivered once to many.
//
// Weights do not depend on the kernel before this one: the first ones are on their way before the
// block waits for it.
//
// Epilogues: BIAS, GELU (tanh) and RESIDUAL are added in float32 before the result is rounded;
// GEGLU takes gate and up features in an order of its own and halves them. Storage is bfloat16.
// Plain twins: linear_plain (cublaslt.py), gate_up_plain (gate_up.py).
#include "hopper_tile.cuh"

// Two warpgroups multiply, or one for 64 rows. Of 192 rows each has 64 and half the features of the
// last 64: three warpgroups would have too few registers for instructions of 256 features, and
// narrower ones read shared memory faster than it delivers.
constexpr int kConsumers = TILE_ROWS == 64 ? 1 : 2, kCopying = BLOCKS == 1 ? 128 : 32;
constexpr int kThreads = 128 * kConsumers + kCopying;
constexpr bool kMoveRegisters = BLOCKS == 1 && kConsumers == 2;  // from the copying warpgroup
constexpr bool kThird = TILE_ROWS == 192;
constexpr int kCluster = CLUSTER_ROWS * CLUSTER_FEATURES;
constexpr int kDepth = 64;  // columns of K per stage
constexpr int kRowBytes = TILE_ROWS * 128, kFeatureBytes = TILE_FEATURES * 128;
constexpr int kStageBytes = kRowBytes + kFeatureBytes;
constexpr int kRowShare = TILE_ROWS / CLUSTER_FEATURES;  // what a block brings of each tile
constexpr int kFeatureShare = TILE_FEATURES / CLUSTER_ROWS;
constexpr int kHalf = kThird ? TILE_FEATURES / 2 : 64;
static_assert(kRowShare % 8 == 0 && kFeatureShare % 8 == 0, "shares keep the swizzle's period");

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* stage_memory(int stage) {
  u32 misaligned = shared_address(shared_memory) % 1024;
  return (char*)shared_memory + (1024 - misaligned) % 1024 + stage * kStageBytes;
}

struct Work {  // the tile of this block
  int row0, feature0;
};

// Rows are the faster index: blocks at work at the same time share their weights.
__device__ __forceinline__ Work work_of(int unit, int row_units) {
  int rank = kCluster > 1 ? cluster_rank() : 0;
  Work work;
  work.row0 = (unit % row_units * CLUSTER_ROWS + rank % CLUSTER_ROWS) * TILE_ROWS;
  work.feature0 = (unit / row_units * CLUSTER_FEATURES + rank / CLUSTER_ROWS) * TILE_FEATURES;
  return work;
}

struct Producer {
  const TensorMap *x, *weight;
  u64 *full, *empty;
  int rank;

  __device__ __forceinline__ void bring_rows(int index, const Work& work, int step) {
    int part = rank / CLUSTER_ROWS;
    void* target = stage_memory(index) + part * kRowShare * 128;
    int column = step * kDepth, row = work.row0 + part * kRowShare;
    if (CLUSTER_FEATURES == 1) {
      load_tile(target, x, column, row, full + index);
    } else {
      unsigned short blocks = 0;
      for (int i = 0; i < CLUSTER_FEATURES; i++)
        blocks |= 1 << (rank % CLUSTER_ROWS + i * CLUSTER_ROWS);
      load_tile(target, x, column, row, full + index, blocks);
    }
  }
  __device__ __forceinline__ void bring_features(int index, const Work& work, int step) {
    int part = rank % CLUSTER_ROWS;
    void* target = stage_memory(index) + kRowBytes + part * kFeatureShare * 128;
    int column = step * kDepth, row = work.feature0 + part * kFeatureShare;
    if (CLUSTER_ROWS == 1) {
      load_tile(target, weight, column, row, full + index);
    } else {
      unsigned short blocks = ((1 << CLUSTER_ROWS) - 1) << (rank / CLUSTER_ROWS * CLUSTER_ROWS);
      load_tile(target, weight, column, row, full + index, blocks);
    }
  }
};

// Four neighbouring lanes hold the rows of a 4 x 4 matrix; after this, its columns.
__device__ __forceinline__ void transpose4(float (&v)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      float sent = upper ? v[i] : v[i | step];
      float got = __shfl_xor_sync(~0u, sent, step);
      if (upper) v[i] = got; else v[i | step] = got;
    }
  }
}

// A warpgroup's sums of 64 rows by N features, in chunks of 8 rows and 32 features per warp.
template <int N>
struct Sums {
  static constexpr int kChunks = (N + 31) / 32 * 2;
  float acc[N / 2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0.f;
  }
  // Lane l gets eight neighbouring features of one row.
  __device__ __forceinline__ void chunk(int index, float (&sums)[8]) const {
    int lane = threadIdx.x % 32;
    float even[4], odd[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int column = index / 2 * 4 + i, at = column * 4 + index % 2 * 2;
      even[i] = column < N / 8 ? acc[at] : 0.f;
      odd[i] = column < N / 8 ? acc[at + 1] : 0.f;
    }
    transpose4(even, lane), transpose4(odd, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) sums[2 * i] = even[i], sums[2 * i + 1] = odd[i];
  }
  static __device__ __forceinline__ int row(int index) {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + index % 2 * 8;
  }
  static __device__ __forceinline__ int feature(int index) {
    return index / 2 * 32 + threadIdx.x % 4 * 8;
  }
};

// gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3).
__device__ __forceinline__ float gelu(float v) {
  float twice_z = 1.5957691216057308f * v * (1.f + 0.044715f * v * v);
  return v * reciprocal(1.f + exp2_fast(-1.4426950408889634f * twice_z));
}

__device__ __forceinline__ void add8(float (&sums)[8], uint4 v) {
  u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) sums[2 * i] += low(words[i]), sums[2 * i + 1] += high(words[i]);
}

struct Epilogue {
  const bf16 *bias, *residual;
  const float* row_scale;
  bf16* out;
  int rows, features;

  // Finish and write eight neighbouring features of a row.
  __device__ __forceinline__ void write(float (&sums)[8], uint4 bias8, uint4 residual8, int row,
                                        int feature) const {
    size_t at = (size_t)row * features + feature;
#ifdef BIAS
    add8(sums, bias8);
#endif
#ifdef GELU
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = gelu(sums[i]);
#endif
#ifdef RESIDUAL
    add8(sums, residual8);
#endif
    *(uint4*)(out + at) = make_uint4(pack(sums[0], sums[1]), pack(sums[2], sums[3]),
                                     pack(sums[4], sums[5]), pack(sums[6], sums[7]));
  }
  __device__ __forceinline__ float scale_of(int row) const {
    return row < rows ? row_scale[row] : 0.f;
  }
};

// gelu_tanh(a gate) * (a up) of two pairs, with one reciprocal: 1 / x = y / (x y). Where the
// exponential is cut off, the result is 0 in bfloat16 as well.
__device__ __forceinline__ u32 geglu2(float a, float gate0, float up0, float gate1, float up1) {
  float g0 = gate0 * a, g1 = gate1 * a;
  float x = 1.f + exp2_fast(fminf(g0 * (-2.3022082f - 0.10294324f * g0 * g0), 60.f));
  float y = 1.f + exp2_fast(fminf(g1 * (-2.3022082f - 0.10294324f * g1 * g1), 60.f));
  float r = reciprocal(x * y);
  return pack(g0 * (up0 * a) * (y * r), g1 * (up1 * a) * (x * r));
}

// Gate and up in neighbouring registers, eight pairs of a row in the lane that writes them: the
// order of the weight's rows (interleave_for_hopper) sees to that.
template <int N>
__device__ __forceinline__ void write_geglu(const Sums<N>& own, float scale0, float scale1, int row0,
                                            int feature0, const Epilogue& epilogue) {
#pragma unroll
  for (int i = 0; i < N / 64 * 2; i++) {
    float a = i % 2 ? scale1 : scale0;
    const float* v = own.acc + i / 2 * 32 + i % 2 * 2;
    int row = row0 + own.row(i), feature = feature0 / 2 + i / 2 * 32 + threadIdx.x % 4 * 8;
    uint4 y = make_uint4(geglu2(a, v[0], v[1], v[4], v[5]), geglu2(a, v[8], v[9], v[12], v[13]),
                         geglu2(a, v[16], v[17], v[20], v[21]),
                         geglu2(a, v[24], v[25], v[28], v[29]));
    if (row < epilogue.rows)
      *(uint4*)(epilogue.out + (size_t)row * (epilogue.features / 2) + feature) = y;
  }
}

// What a warpgroup adds to its sums, asked for before the product so that it is there behind it.
template <int N>
struct Added {
  static constexpr int kChunks = Sums<N>::kChunks;
  uint4 bias[kChunks / 2], residual[kChunks];

  __device__ __forceinline__ void fetch(int row0, int feature0, const Epilogue& epilogue) {
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
      int row = row0 + Sums<N>::row(i), feature = feature0 + Sums<N>::feature(i);
      bool there = row < epilogue.rows && Sums<N>::feature(i) < N && feature < epilogue.features;
#ifdef BIAS
      if (i % 2 == 0 && there) bias[i / 2] = load_l2(epilogue.bias + feature);
#endif
#ifdef RESIDUAL
      if (there) residual[i] = load_l2(epilogue.residual + (size_t)row * epilogue.features + feature);
#endif
    }
  }
};

template <int N>
__device__ __forceinline__ void write_sums(const Sums<N>& own, const Added<N>& added, int row0,
                                           int feature0, const Epilogue& epilogue) {
#pragma unroll
  for (int i = 0; i < Sums<N>::kChunks; i++) {
    float sums[8];
    own.chunk(i, sums);
    int row = row0 + own.row(i), feature = feature0 + own.feature(i);
    if (row < epilogue.rows && own.feature(i) < N && feature < epilogue.features)
      epilogue.write(sums, added.bias[i / 2], added.residual[i], row, feature);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) gemm(
    const __grid_constant__ TensorMap x,       // (rows, depth), boxes of kRowShare rows
    const __grid_constant__ TensorMap weight,  // (features, depth), boxes of kFeatureShare rows
    const bf16* bias,        // (features)
    const bf16* residual,    // (rows, features), may be out
    const float* row_scale,  // (rows)
    bf16* out,               // (rows, features), with GEGLU (rows, features / 2)
    int rows, int features, int depth) {
  __shared__ u64 full[STAGES], empty[STAGES];
  int rank = kCluster > 1 ? cluster_rank() : 0;
  int row_units = (rows + TILE_ROWS * CLUSTER_ROWS - 1) / (TILE_ROWS * CLUSTER_ROWS);
  int feature_units =
      (features + TILE_FEATURES * CLUSTER_FEATURES - 1) / (TILE_FEATURES * CLUSTER_FEATURES);
  int units = row_units * feature_units, steps = (depth + kDepth - 1) / kDepth;
  int first_unit = blockIdx.x / kCluster, stride = gridDim.x / kCluster;
  let_next_start();
  if (threadIdx.x == 0) {
    fetch_map(&x), fetch_map(&weight);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kConsumers * 4 * kCluster);  // every consumer warp of the cluster
    }
    barrier_init_done();
  }
  if (kCluster > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (threadIdx.x >= 128 * kConsumers) {
    if (kMoveRegisters) fewer_registers<40>();
    if (threadIdx.x == 128 * kConsumers) {
      Producer producer = {&x, &weight, full, empty, rank};
      Work work = work_of(first_unit, row_units);
      int ahead = min(STAGES, steps);
      for (int step = 0; step < ahead; step++) {
        barrier_expect(full + step, kStageBytes);
        producer.bring_features(step, work, step);
      }
      wait_for_previous();
      for (int step = 0; step < ahead; step++) producer.bring_rows(step, work, step);
      int stage = ahead % STAGES, parity = ahead == STAGES ? 0 : 1, step = ahead;
      for (int unit = first_unit; unit < units; unit += stride, step = 0) {
        work = work_of(unit, row_units);
        for (; step < steps; step++) {
          barrier_wait(empty + stage, parity);
          barrier_expect(full + stage, kStageBytes);
          producer.bring_features(stage, work, step);
          producer.bring_rows(stage, work, step);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    if (kMoveRegisters) more_registers<232>();
    // The shuffle tells the compiler that a warp's threads agree.
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, consumer = warp / 4;
    Epilogue epilogue = {bias, residual, row_scale, out, rows, features};
    int stage = 0, parity = 0;
    wait_for_previous();
    for (int unit = first_unit; unit < units; unit += stride) {
      Work work = work_of(unit, row_units);
      int row0 = work.row0 + consumer * 64, third0 = work.row0 + 128;
      int half0 = work.feature0 + consumer * kHalf;
      Sums<TILE_FEATURES> own;
      Sums<kHalf> third;
      own.clear();
      if (kThird) third.clear();
#ifdef GEGLU
      float scale[4];
#pragma unroll
      for (int i = 0; i < (kThird ? 4 : 2); i++)
        scale[i] = epilogue.scale_of((i < 2 ? row0 : third0) + own.row(i));
#else
      Added<TILE_FEATURES> added;
      Added<kHalf> third_added;
      added.fetch(row0, work.feature0, epilogue);
      if (kThird) third_added.fetch(third0, half0, epilogue);
#endif
      int done = -1;  // the stage whose products are not known to be complete
      for (int step = 0; step < steps; step++) {
        barrier_wait(full + stage, parity);
        const char* tiles = stage_memory(stage);
        u64 a = tile_operand(tiles + consumer * 64 * 128), b = tile_operand(tiles + kRowBytes);
        u64 a2 = tile_operand(tiles + 128 * 128);
        u64 b2 = tile_operand(tiles + kRowBytes + consumer * kHalf * 128);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kDepth / 16; k++) {
          wgmma<TILE_FEATURES>(own.acc, a + k * 2, b + k * 2);
          if (kThird) wgmma<kHalf>(third.acc, a2 + k * 2, b2 + k * 2);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (done >= 0 && lane < kCluster) barrier_arrive(empty + done, lane);
        done = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      if (lane < kCluster) barrier_arrive(empty + done, lane);
#ifdef GEGLU
      write_geglu(own, scale[0], scale[1], row0, work.feature0, epilogue);
      if (kThird) write_geglu(third, scale[2], scale[3], third0, half0, epilogue);
#else
      write_sums(own, added, row0, work.feature0, epilogue);
      if (kThird) write_sums(third, third_added, third0, half0, epilogue);
#endif
    }
  }
  __syncwarp();
  if (kCluster > 1) {  // nobody leaves while others copy into its shared memory
    cluster_arrive();
    cluster_wait();
  }
}
