// The attention of hopper_layer.cu, in clusters whose blocks each take a range of keys.
#ifndef HOPPER_ATTENTION_CUH
#define HOPPER_ATTENTION_CUH
#include "hopper_block.cuh"
#include "hopper_lanes.cuh"

// All heads share one K/V head, so the queries of all heads are rows of one matrix; a cluster takes
// QUERY_BLOCK of them. A range has an equal share of the prefix and of the action tokens, whose
// keys come last and are few. Every warp takes all queries: with some of the keys for the logits,
// with some of the columns for the output.
constexpr int kQueries = HEADS * HORIZON, kQueryTiles = QUERY_BLOCK / 16;
constexpr int kNew = (HORIZON + RANGES - 1) / RANGES;  // action tokens of a range
constexpr int kNewRows = (kNew + 7) / 8 * 8;           // their rows, before those of the prefix
constexpr int kTurns = (KEYS / 8 + kWarps - 1) / kWarps;  // tiles of 8 keys of a warp
constexpr int kHeldTurns = kTurns < 2 ? kTurns : 2;       // whose keys wait in registers
constexpr int kChains = kTurns * kQueryTiles < 4 ? 2 : 1;  // sums of one logit, to overlap
constexpr int kHeadSteps = HEAD_DIM / 32, kPieces = HEAD_DIM / 8, kColumns = HEAD_DIM / kWarps;
constexpr int kShare = (QUERY_BLOCK + RANGES - 1) / RANGES;  // queries that a block merges
constexpr int kKeyRows = KEYS < kShare * RANGES ? kShare * RANGES : KEYS;
constexpr int kRowBytes = HEAD_DIM * 2;
constexpr int kLdWeight = KEYS + 8;  // no bank conflicts
// Rows behind the last query are not written; they are keys, or else repeat it.
constexpr bool kInside =
    (kQueries + QUERY_BLOCK - 1) / QUERY_BLOCK * QUERY_BLOCK <= (HEADS + 2) * HORIZON;
static_assert(KEYS % 16 == 0 && KEYS > kNewRows && QUERY_BLOCK % 16 == 0, "attention tiling");
static_assert(RANGES > 1, "a launch without clusters cannot send");
static_assert(kPieces == 32 && kColumns == 32 && kWarps == 8, "a lane has 16 bytes of a row");
static_assert(kTurns * kWarps * 8 <= kKeyRows + KEYS + QUERY_BLOCK, "the last turn stays inside");
static_assert(2 * kLdWeight + 4 * kWarps + 16 * kShare * RANGES / QUERY_BLOCK < kRowBytes,
              "what follows the queries takes their place");

// What a range has of a query beside its output: the largest logit and the sum of the weights.
typedef float4 Scales[kShare][RANGES];
typedef float OfWarps[QUERY_BLOCK][kWarps];

// Shared memory: rows of HEAD_DIM, (kKeyRows + KEYS + QUERY_BLOCK) of them.
__device__ __forceinline__ bf16* key_rows() { return (bf16*)shared_memory; }
__device__ __forceinline__ bf16* value_rows() { return key_rows() + kKeyRows * HEAD_DIM; }
__device__ __forceinline__ bf16* query_rows() { return value_rows() + KEYS * HEAD_DIM; }
// Once the keys and queries are used, their places are taken by (QUERY_BLOCK, kLdWeight) weights
// and their sums per warp, and by what the cluster sends: (RANGES, kShare) rows and their scales.
__device__ __forceinline__ bf16* weight_rows() { return query_rows(); }
__device__ __forceinline__ OfWarps& norms() {
  return *(OfWarps*)(weight_rows() + QUERY_BLOCK * kLdWeight);
}
__device__ __forceinline__ Scales& scales() { return *(Scales*)(&norms() + 1); }
__device__ __forceinline__ bf16* part_rows() { return key_rows(); }

// 16 bytes of a row. They are exchanged within 128 bytes, so that the same columns of 8 rows do
// not meet in a bank.
__device__ __forceinline__ bf16* piece(bf16* rows, u32 row, u32 at) {
  return rows + row * HEAD_DIM + (at ^ row % 8) * 8;
}

// A block's part: its queries, and its keys by their first one and number.
struct Range {
  u32 rank, query0, first_new, first_old, news, olds;
  __device__ __forceinline__ explicit Range(int prefix) {
    int share = (prefix + RANGES - 1) / RANGES;
    rank = cluster_rank(), query0 = blockIdx.x / RANGES * QUERY_BLOCK;
    first_new = rank * kNew, news = max(min(kNew, HORIZON - (int)first_new), 0);
    first_old = rank * share, olds = max(min(share, prefix - (int)first_old), 0);
  }
  // Of a cluster that has no queries: see HopperPlan.spare_clusters.
  __device__ __forceinline__ bool is_spare() const { return query0 >= kQueries; }
  __device__ __forceinline__ bool seen(u32 row) const {
    return row < kNewRows ? row < news : row < kNewRows + olds;
  }
};

// Ask for the keys and values of the prefix; values of rows that nobody sees are 0.
__device__ __forceinline__ void load_prefix(const Range& range, const bf16* keys,
                                            const bf16* values) {
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  size_t source = (size_t)range.first_old * HEAD_DIM + lane * 8;
  for (u32 row = warp; row < range.olds; row += kWarps)
    copy_async(piece(key_rows(), kNewRows + row, lane), keys + source + row * HEAD_DIM);
  end_copy_group();
  for (u32 row = warp; row < range.olds; row += kWarps)
    copy_async(piece(value_rows(), kNewRows + row, lane), values + source + row * HEAD_DIM);
  end_copy_group();
  for (u32 row = warp; row < KEYS; row += kWarps)
    if (!range.seen(row)) *(uint4*)piece(value_rows(), row, lane) = make_uint4(0, 0, 0, 0);
}

// What the kernel before this one writes: the queries, and this range's new keys and values. They
// come in two groups: with the first half of the columns of the queries the logits can begin.
struct NewRows {
  static constexpr int kRows = kThreads / (kPieces / 2);  // of queries in one turn
  const bf16 *queries, *keys;
  bf16 *query_target, *key_target;
  u32 query, news;

  // The addresses, which are there before the wait.
  __device__ __forceinline__ NewRows(const Range& range, const bf16* qkv) : news(range.news) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 row = threadIdx.x / (kPieces / 2), at = threadIdx.x % (kPieces / 2);
    query = range.query0 + row;
    queries = qkv + (kInside ? query : 0) * HEAD_DIM + at * 8;
    keys = qkv + (kQueries + range.first_new + warp) * HEAD_DIM + lane * 8;
    query_target = piece(query_rows(), row, at), key_target = piece(key_rows(), warp, lane);
    settle(queries), settle(keys), settle(query_target), settle(key_target);
  }
  __device__ __forceinline__ void load() const {
    load_queries<0>();
    load_rows(key_target, keys);
    end_copy_group();
    load_queries<1>();
    load_rows(key_target + kKeyRows * HEAD_DIM, keys + HORIZON * HEAD_DIM);
    end_copy_group();
  }
  template <int kHalf>
  __device__ __forceinline__ void load_queries() const {
#pragma unroll
    for (int j = 0; j < QUERY_BLOCK; j += kRows)
      copy_async(query_target + j * HEAD_DIM + kHalf * HEAD_DIM / 2,
                 queries + (kInside ? j : min(query + j, kQueries - 1)) * HEAD_DIM +
                     kHalf * HEAD_DIM / 2);
  }
  // The keys or the values.
  __device__ __forceinline__ void load_rows(bf16* target, const bf16* source) const {
#pragma unroll
    for (int j = 0; j < kNewRows; j += kWarps)
      if (j + threadIdx.x / 32 < news) copy_async(target + j * HEAD_DIM, source + j * HEAD_DIM);
  }
};

// The warp's keys of one turn and 32 columns, as the matrix instruction takes them; a turn behind
// the last key gives anything.
__device__ __forceinline__ void load_keys(u32 (&k)[4], int turn, int step) {
  u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 * 8 + lane % 8;
  load_matrix4(k, piece(key_rows(), row, step % 2 * 4 + lane / 8),
               turn * kWarps * 8 * kRowBytes + step / 2 * 128);
}

typedef u32 HeldKeys[kHeldTurns][kHeadSteps][4];
// 8 keys per turn, in the layout of the matrix instruction.
typedef float Logits[kTurns][kQueryTiles][4];

// A half of the columns' part of the logits.
template <int kHalf>
__device__ __forceinline__ void multiply_keys(const HeldKeys& held, Logits (&sums)[kChains]) {
  u32 lane = threadIdx.x % 32;
#pragma unroll
  for (int s = kHalf * kHeadSteps / 2; s < (kHalf + 1) * kHeadSteps / 2; s++) {
    u32 k[kTurns][4];
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
      if (turn < kHeldTurns)
#pragma unroll
        for (int i = 0; i < 4; i++) k[turn][i] = held[turn][s][i];
      else
        load_keys(k[turn], turn, s);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at = s * 2 + half;  // 16 columns
#pragma unroll
      for (int t = 0; t < kQueryTiles; t++) {
        u32 q[4];
        load_matrix4(q, piece(query_rows(), lane % 16, at % 4 * 2 + lane / 16),
                     t * 16 * kRowBytes + at / 4 * 128);
#pragma unroll
        for (int turn = 0; turn < kTurns; turn++)
          mma(sums[half % kChains][turn][t], q[0], q[1], q[2], q[3], k[turn][half * 2],
              k[turn][half * 2 + 1]);
      }
    }
  }
}

// Softmax over the range's keys, without the division. A lane has the queries i * 8 + lane / 4.
// tops: the largest logits of each warp; sums: the weights of a lane.
__device__ __forceinline__ void weigh(const Range& range, Logits (&parts)[kChains],
                                      float log2_scale, OfWarps& tops,
                                      float (&sums)[kQueryTiles * 2]) {
  Logits& logits = parts[0];
  const float kLowest = __int_as_float(0xff800000);
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool seen[kTurns][2];
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      seen[turn][j] = range.seen((turn * kWarps + warp) * 8 + lane % 4 * 2 + j);
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    float top = kLowest;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float& logit = logits[turn][i / 2][i % 2 * 2 + j];
        if (kChains > 1) logit += parts[kChains - 1][turn][i / 2][i % 2 * 2 + j];
        logit = seen[turn][j] ? logit : kLowest;
        top = fmaxf(top, logit);
      }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    if (lane % 4 == 0) tops[i * 8 + lane / 4][warp] = top;
  }
  __syncthreads();  // all maxima are there, all keys and queries are read
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    u32 query = i * 8 + lane / 4;
    float top = kLowest;
    sums[i] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) top = fmaxf(top, tops[query][w]);
    // Without a key the weights are 0, not NaN.
    float origin = range.olds + range.news == 0 ? 0.f : top * log2_scale;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      float* logit = &logits[turn][i / 2][i % 2 * 2];
      float p0 = exp2_fast(logit[0] * log2_scale - origin);
      float p1 = exp2_fast(logit[1] * log2_scale - origin);
      sums[i] += p0 + p1;
      u32 tile = turn * kWarps + warp;
      if (tile < KEYS / 8)
        *(u32*)(weight_rows() + query * kLdWeight + tile * 8 + lane % 4 * 2) = pack(p0, p1);
    }
  }
  __syncthreads();  // all weights are there
}

__device__ __forceinline__ void add_up(float (&sums)[kQueryTiles * 2]) {
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
    sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
    if (lane % 4 == 0) norms()[i * 8 + lane / 4][warp] = sums[i];
  }
}

constexpr int kValueSteps = KEYS / 16, kHeldSteps = kValueSteps < 8 ? kValueSteps : 8;
typedef u32 Values[kColumns / 16][4];  // 16 keys of the warp's columns
typedef float Outputs[kQueryTiles][kColumns / 8][4];

__device__ __forceinline__ void load_values(Values& values, int step) {
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kColumns / 16; n++)
    load_matrix4_transposed(values[n], piece(value_rows(), lane % 16, warp * 4 + n * 2 + lane / 16),
                            step * 16 * kRowBytes);
}

// The warp's columns of the outputs of all queries.
__device__ __forceinline__ void multiply_values(Values (&held)[kValueSteps], Outputs& outputs) {
  u32 lane = threadIdx.x % 32;
  bf16* weights = weight_rows() + lane % 16 * kLdWeight + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < kValueSteps; step++) {
    if (step >= kHeldSteps) load_values(held[step], step);
    u32 a[kQueryTiles][4];
#pragma unroll
    for (int t = 0; t < kQueryTiles; t++)
      load_matrix4(a[t], weights, (t * 16 * kLdWeight + step * 16) * 2);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n++)
#pragma unroll
      for (int t = 0; t < kQueryTiles; t++)
        mma(outputs[t][n], a[t][0], a[t][1], a[t][2], a[t][3], held[step][n / 2][n % 2 * 2],
            held[step][n / 2][n % 2 * 2 + 1]);
  }
}

// Send every block of the cluster what this range has of its queries. A lane has two columns of each
// of four 8-column tiles; they travel as 16 bytes.
__device__ __forceinline__ void hand_out(const Range& range, const Outputs& outputs,
                                         const OfWarps& tops, float log2_scale, u64* arrived) {
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    float own[4];
#pragma unroll
    for (int n = 0; n < 4; n++)
      own[n] = __uint_as_float(
          pack(outputs[i / 2][n][i % 2 * 2], outputs[i / 2][n][i % 2 * 2 + 1]));
    u32 query = i * 8 + lane / 4;
    bf16* target = piece(part_rows(), range.rank * kShare + query % kShare, warp * 4 + lane % 4);
    u32 rank = query / kShare;
    send(address_in_block(target, rank), address_in_block(arrived, rank),
         make_float4(own[0], own[1], own[2], own[3]));
  }
  u32 query = threadIdx.x;
  if (query < QUERY_BLOCK) {
    float top = tops[query][0], norm = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      top = fmaxf(top, tops[query][w]);
      norm += norms()[query][w];
    }
    u32 rank = query / kShare;
    send(address_in_block(&scales()[query % kShare][range.rank], rank),
         address_in_block(arrived, rank), make_float4(top * log2_scale, norm, 0.f, 0.f));
  }
}

// Put together the ranges of this block's queries, one per warp.
__device__ __forceinline__ void merge(const Range& range, bf16* attended) {
  u32 lane = threadIdx.x % 32;
  for (u32 mine = threadIdx.x / 32; mine < kShare; mine += kWarps) {
    u32 row = range.rank * kShare + mine, query = range.query0 + row;
    if (row >= QUERY_BLOCK || query >= kQueries) break;
    uint4 parts[RANGES];
    float weights[RANGES], top = __int_as_float(0xff800000), norm = 0.f, o[8] = {};
#pragma unroll
    for (int r = 0; r < RANGES; r++) {
      weights[r] = scales()[mine][r].x;
      parts[r] = *(uint4*)piece(part_rows(), r * kShare + mine, lane);
    }
#pragma unroll
    for (int r = 0; r < RANGES; r++) top = fmaxf(top, weights[r]);
#pragma unroll
    for (int r = 0; r < RANGES; r++) {
      float w = exp2_fast(weights[r] - top);
      norm += w * scales()[mine][r].y;
      u32 pairs[4] = {parts[r].x, parts[r].y, parts[r].z, parts[r].w};
#pragma unroll
      for (int n = 0; n < 4; n++) o[2 * n] += w * low(pairs[n]), o[2 * n + 1] += w * high(pairs[n]);
    }
    float inverse = reciprocal(norm);
    u32 out[4];
#pragma unroll
    for (int n = 0; n < 4; n++) out[n] = pack(o[2 * n] * inverse, o[2 * n + 1] * inverse);
    transpose4(out);  // one whole tile
    u32 token = query % HORIZON, head = query / HORIZON;
    *(uint4*)(attended + (token * HEADS + head) * HEAD_DIM + lane * 8) =
        make_uint4(out[0], out[1], out[2], out[3]);
  }
}

// A cluster has RANGES blocks.
extern "C" __global__ void __launch_bounds__(kThreads, 2) attend(
    const bf16* qkv,                       // (HEADS + 2, H, HEAD_DIM)
    const bf16* keys, const bf16* values,  // (P_max, HEAD_DIM)
    const int* n_prefix,
    bf16* attended,  // (H, HEADS * HEAD_DIM), written
    float log2_scale) {
  __shared__ __align__(16) OfWarps tops;
  __shared__ u64 arrived;
  let_next_start();
  Range range(*n_prefix);
  if (range.is_spare()) return wait_for_previous();
  if (threadIdx.x == 0) {
    int rows = max(min(kShare, QUERY_BLOCK - (int)range.rank * kShare), 0);
    barrier_init(&arrived);
    barrier_init_done();
    barrier_expect(&arrived, rows * RANGES * (kRowBytes + 16));
  }
  load_prefix(range, keys, values);
  NewRows rows(range, qkv);
  wait_for_previous();
  rows.load();
  wait_copies_but<3>();
  __syncthreads();  // the keys of the prefix are in place
  HeldKeys held;
#pragma unroll
  for (int turn = 0; turn < kHeldTurns; turn++)
#pragma unroll
    for (int s = 0; s < kHeadSteps; s++) load_keys(held[turn][s], turn, s);
  wait_copies_but<1>();
  __syncthreads();  // all keys and half of the queries are in place
#pragma unroll
  for (int turn = 0; turn < kHeldTurns; turn++)
    if (turn * kWarps * 8 < kNewRows && (turn * kWarps + threadIdx.x / 32) * 8 < kNewRows)
#pragma unroll
      for (int s = 0; s < kHeadSteps; s++) load_keys(held[turn][s], turn, s);
  Logits logits[kChains] = {};
  float sums[kQueryTiles * 2];
  multiply_keys<0>(held, logits);
  wait_copies_but<0>();
  __syncthreads();  // everything is in place
  multiply_keys<1>(held, logits);
  Values held_values[kValueSteps];
#pragma unroll
  for (int step = 0; step < kHeldSteps; step++) load_values(held_values[step], step);
  weigh(range, logits, log2_scale, tops, sums);
  cluster_arrive_relaxed();  // this block's keys and queries are read, its barrier counts
  add_up(sums);
  Outputs outputs = {};
  multiply_values(held_values, outputs);
  cluster_wait();
  __syncthreads();  // all norms are there
  hand_out(range, outputs, tops, log2_scale, &arrived);
  barrier_wait_cluster(&arrived);
  merge(range, attended);
}

#endif
