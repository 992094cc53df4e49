// Attention within each view of 256 tokens on a Hopper GPU's tensor cores, heads of 72 columns,
// straight from the merged QKV projection. Plain twin: vision_attention_plain.
//
// A block has 64 queries of a head. Two warpgroups multiply, each with half of the keys, and add up
// what they have in the end. All keys and values are in shared memory at once. Neighbouring blocks
// have the same head: each of the CLUSTER blocks of a cluster brings some rows of its keys and
// values, once from L2 into all of them.
//
// The first 64 columns of a head lie in tiles, the last 8 in narrow ones of 16 columns. The other 8
// columns there are foreign: queries have zeros instead, and the sums of such values are left out.
#include "hopper_lanes.cuh"
#include "hopper_tile.cuh"

constexpr int kDim = 72, kTokens = 256, kQueries = 64, kThreads = 256;
constexpr int kStride = HEADS * kDim;  // of the result's rows
constexpr int kHalf = kTokens / 2;  // keys of a warpgroup
constexpr int kWide = 64, kSteps = kDim / 16 + 1;  // columns in tiles; steps of 16 columns
// Keys whose scores become weights before values are multiplied; two blocks of a multiprocessor have
// registers for no more than that, and keep the tensor cores busy for each other.
constexpr int kAtOnce = BLOCKS == 1 ? 16 : kHalf;
constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * (128 + 32);  // brought at a time
constexpr int kSentWide = 128 * 64, kSentBytes = kSentWide + 128 * 8;  // to each warpgroup

DYNAMIC_SHARED(shared_memory);

// Where rows of a head's queries, keys or values lie.
struct Tiles {
  char *wide, *narrow;

  __device__ __forceinline__ Tiles from(int row) const {
    return {wide + row * 128, narrow + row * 32};
  }
};

// The shared memory of a block.
struct Memory {
  char* begin;

  __device__ __forceinline__ Memory() {
    begin = (char*)shared_memory + (0 - (u32)(u64)shared_memory) % 1024;
  }
  __device__ __forceinline__ Tiles at(int row) const {
    return Tiles{begin, begin + (kQueries + 2 * kTokens) * 128}.from(row);
  }
  __device__ __forceinline__ Tiles queries() const { return at(0); }
  __device__ __forceinline__ Tiles keys() const { return at(kQueries); }
  __device__ __forceinline__ Tiles values() const { return at(kQueries + kTokens); }
  __device__ __forceinline__ char* sent(int to) const {
    return begin + (kQueries + 2 * kTokens) * (128 + 32) + to * kSentBytes;
  }
};

struct Barriers {
  u64 queries, keys[2], values[2];  // of each warpgroup's half
};

// What this block has of the whole: rows of the merged projection, and a head.
struct Work {
  int head, first, query0;  // the view's first row, the block's first query

  __device__ __forceinline__ Work() {
    constexpr int kBlocks = kTokens / kQueries;
    head = blockIdx.x / kBlocks % HEADS, first = blockIdx.x / kBlocks / HEADS * kTokens;
    query0 = first + blockIdx.x % kBlocks * kQueries;
  }
  // Of the queries (0), keys (1) or values (2).
  __device__ __forceinline__ int column(int part) const { return (part * HEADS + head) * kDim; }
};

struct Maps {
  const TensorMap &wide, &narrow;

  // 64 rows into this block, or into all blocks of the cluster.
  __device__ __forceinline__ void bring(const Tiles& to, int column, int row, u64* barrier) const {
    load_tile(to.wide, &wide, column, row, barrier);
    load_tile(to.narrow, &narrow, column + kWide, row, barrier);
  }
  __device__ __forceinline__ void share(const Tiles& to, int column, int row, u64* barrier) const {
    if (CLUSTER == 1) return bring(to, column, row, barrier);
    constexpr unsigned short kAll = (1 << CLUSTER) - 1;
    load_tile(to.wide, &wide, column, row, barrier, kAll);
    load_tile(to.narrow, &narrow, column + kWide, row, barrier, kAll);
  }
};

// This block's share of all copies: keys before values, the first warpgroup's half first.
__device__ __forceinline__ void bring_all(const Maps& maps, const Work& work, const Memory& memory,
                                          Barriers& barriers) {
  barrier_expect(&barriers.queries, kBoxBytes);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    barrier_expect(barriers.keys + half, kHalf / kBoxRows * kBoxBytes);
    barrier_expect(barriers.values + half, kHalf / kBoxRows * kBoxBytes);
  }
  int first = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER * kBoxRows;
  wait_for_previous();
  maps.bring(memory.queries(), work.column(0), work.query0, &barriers.queries);
#pragma unroll
  for (int i = 0; i < kTokens; i += CLUSTER * kBoxRows) {
    int row = first + i;
    maps.share(memory.keys().from(row), work.column(1), work.first + row,
               barriers.keys + row / kHalf);
  }
#pragma unroll
  for (int i = 0; i < kTokens; i += CLUSTER * kBoxRows) {
    int row = first + i;
    maps.share(memory.values().from(row), work.column(2), work.first + row,
               barriers.values + row / kHalf);
  }
}

// The queries as an operand in registers; zeros in the 8 columns that are foreign.
__device__ __forceinline__ void hold_queries(u32 (&held)[kSteps][4], const Tiles& queries) {
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int step = 0; step < kSteps - 1; step++) {
    int chunk = (step * 2 + lane / 16) ^ row % 8;
    load_matrix4(held[step], queries.wide + row * 128 + chunk * 16);
  }
  u32(&last)[4] = held[kSteps - 1];
  int chunk = lane / 16 ^ row / 4 % 2;
  load_matrix4(last, queries.narrow + row * 32 + chunk * 16);
  last[2] = last[3] = 0;
}

// scores (64 x 128) = queries keys^T
__device__ __forceinline__ void multiply_keys(float (&scores)[kHalf / 2],
                                              const u32 (&queries)[kSteps][4], const Tiles& keys) {
#pragma unroll
  for (int i = 0; i < kHalf / 2; i++) scores[i] = 0.f;
  u64 wide = tile_operand(keys.wide);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < kSteps - 1; step++)
    wgmma<kHalf>(scores, queries[step], wide + step * 2);
  wgmma<kHalf>(scores, queries[kSteps - 1], narrow_operand(keys.narrow));
  wgmma_commit();
  wgmma_wait<0>(scores);
}

// A warpgroup's sums over its keys. Elements i of a thread are of its row i / 2 % 2: lane / 4 of the
// warp's, and 8 below.
struct Sums {
  float wide[kWide / 2], narrow[16 / 2];  // columns 0 to 63; 64 to 71, and 8 of no use
  float most[2], total[2];                // the greatest score, and of this lane's weights

  __device__ __forceinline__ void find_most(const float (&scores)[kHalf / 2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top[2] = {scores[r * 2], scores[r * 2 + 1]};
#pragma unroll
      for (int i = 2; i < kHalf / 4; i++)
        top[i % 2] = fmaxf(top[i % 2], scores[i / 2 * 4 + r * 2 + i % 2]);
      most[r] = fmaxf(top[0], top[1]);
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWide / 2; i++) wide[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 16 / 2; i++) narrow[i] = 0.f;
    keep_order(wide), keep_order(narrow);
  }
  // Scores become weights, kAtOnce keys at a time: values are multiplied while the next ones do.
  __device__ __forceinline__ void add_values(const float (&scores)[kHalf / 2], float scale,
                                             const Tiles& values) {
    u64 of_wide = rows_operand(values.wide, 1024), of_narrow = narrow_operand(values.narrow);
    u32 weights[kHalf / 16][4];
    float offset[2] = {most[0] * scale, most[1] * scale};
    total[0] = total[1] = 0.f;
#pragma unroll
    for (int key = 0; key < kHalf; key += kAtOnce) {
#pragma unroll
      for (int i = key / 4; i < (key + kAtOnce) / 4; i++) {
        const float* pair = scores + i * 2;
        float first = exp2_fast(pair[0] * scale - offset[i % 2]);
        float second = exp2_fast(pair[1] * scale - offset[i % 2]);
        total[i % 2] += first + second;
        weights[i / 4][i % 4] = pack(first, second);
      }
      if (key == 0) clear();
      wgmma_begin();
#pragma unroll
      for (int k = key / 16; k < (key + kAtOnce) / 16; k++) {
        wgmma_rows<kWide>(wide, weights[k], of_wide + k * 128);
        wgmma_rows<16>(narrow, weights[k], of_narrow + k * 32);
      }
      wgmma_commit();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
    }
    wgmma_wait<0>(wide);
    keep_order(narrow);
  }
};

// What each warpgroup's thread gives that of the other one of the same rows and columns. The first
// one finishes columns 0 to 31, and 64 to 71 of the upper row; the other one the rest.
struct Exchange {
  const Memory& memory;
  uint4 (*stats)[kQueries / 2];  // to each warpgroup: the greatest score and the total of two rows
  int warpgroup;

  static __device__ __forceinline__ int thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ float4* wide(int to) const {
    return (float4*)memory.sent(to) + thread();
  }
  __device__ __forceinline__ float2* narrow(int to) const {
    return (float2*)(memory.sent(to) + kSentWide) + thread();
  }
  __device__ __forceinline__ void give(const Sums& sums) const {
    int to = 1 - warpgroup;
    if (thread() % 4 == 0)
      stats[to][thread() / 4] =
          make_uint4(__float_as_uint(sums.most[0]), __float_as_uint(sums.total[0]),
                     __float_as_uint(sums.most[1]), __float_as_uint(sums.total[1]));
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (part == warpgroup) continue;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* v = sums.wide + part * 16 + i * 4;
        wide(to)[i * 128] = make_float4(v[0], v[1], v[2], v[3]);
      }
      *narrow(to) = make_float2(sums.narrow[part * 2], sums.narrow[part * 2 + 1]);
    }
  }
  // What both warpgroups' sums of two rows are multiplied with: first those of this one.
  __device__ __forceinline__ void factors(float (&own)[2], float (&other)[2], const Sums& sums,
                                          float scale) const {
    uint4 got = stats[warpgroup][thread() / 4];
    float most[2] = {__uint_as_float(got.x), __uint_as_float(got.z)};
    float total[2] = {__uint_as_float(got.y), __uint_as_float(got.w)};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = fmaxf(sums.most[r], most[r]);
      own[r] = exp2_fast((sums.most[r] - highest) * scale);
      other[r] = exp2_fast((most[r] - highest) * scale);
      float inverse = reciprocal(own[r] * sums.total[r] + other[r] * total[r]);
      own[r] *= inverse, other[r] *= inverse;
    }
  }
};

// 32 columns of this thread's two rows, eight neighbours per lane.
__device__ __forceinline__ void write_wide(bf16* out, const float (&sums)[16]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = pack(sums[i * 4 + r * 2], sums[i * 4 + r * 2 + 1]);
    transpose4(words);
    *(uint4*)(out + r * 8 * kStride + threadIdx.x % 4 * 8) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ void finish(const Exchange& exchange, const Sums& sums, float scale,
                                       const Work& work, bf16* out) {
  float own[2], other[2];
  exchange.factors(own, other, sums, scale);
  int row = work.query0 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  out += row * kStride + work.head * kDim;
#pragma unroll
  for (int part = 0; part < 2; part++) {
    if (part != exchange.warpgroup) continue;
    float added[16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float4 got = exchange.wide(part)[i * 128];
      const float* v = sums.wide + part * 16 + i * 4;
      added[i * 4] = v[0] * own[0] + got.x * other[0];
      added[i * 4 + 1] = v[1] * own[0] + got.y * other[0];
      added[i * 4 + 2] = v[2] * own[1] + got.z * other[1];
      added[i * 4 + 3] = v[3] * own[1] + got.w * other[1];
    }
    write_wide(out + part * kWide / 2, added);
    float2 got = *exchange.narrow(part);
    const float* v = sums.narrow + part * 2;
    *(u32*)(out + part * 8 * kStride + kWide + threadIdx.x % 4 * 2) =
        pack(v[0] * own[part] + got.x * other[part], v[1] * own[part] + got.y * other[part]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) vision_attention(
    const __grid_constant__ TensorMap wide,    // (views * 256, 3 * HEADS * 72): q | k | v, 64 x 64
    const __grid_constant__ TensorMap narrow,  // the same in boxes of 64 rows and 16 columns
    float scale,                               // of the scores, times log2(e)
    bf16* out) {                               // (views * 256, HEADS * 72)
  __shared__ Barriers barriers;
  __shared__ uint4 stats[2][kQueries / 2];
  let_next_start();
  if (threadIdx.x == 0) {
    fetch_map(&wide), fetch_map(&narrow);
    barrier_init(&barriers.queries, 1);
    for (int half = 0; half < 2; half++) {
      barrier_init(barriers.keys + half, 1);
      barrier_init(barriers.values + half, 1);
    }
    barrier_init_done();
  }
  if (CLUSTER > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else {
    __syncthreads();
  }
  Memory memory;
  Work work;
  // The shuffle tells the compiler that a warp's threads agree.
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), half = warp / 4;
  if (warp == 0 && elected()) bring_all({wide, narrow}, work, memory, barriers);
  wait_for_previous();
  __syncwarp();
  u32 queries[kSteps][4];
  float scores[kHalf / 2];
  Sums sums;
  barrier_wait(&barriers.queries, 0);
  hold_queries(queries, memory.queries());
  barrier_wait(barriers.keys + half, 0);
  multiply_keys(scores, queries, memory.keys().from(half * kHalf));
  sums.find_most(scores);
  barrier_wait(barriers.values + half, 0);
  sums.add_values(scores, scale, memory.values().from(half * kHalf));
  Exchange exchange = {memory, stats, half};
  exchange.give(sums);
  __syncthreads();
  finish(exchange, sums, scale, work, out);
  // Whatever other blocks send to this one has been waited for, so it may leave before them.
}
