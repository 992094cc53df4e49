// The attention of hopper_layer.cu, in clusters whose blocks each take a range of keys.
#ifndef HOPPER_ATTENTION_CUH
#define HOPPER_ATTENTION_CUH
#include "hopper_block.cuh"

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
constexpr int kLdWeight = KEYS + 8;  // no bank conflicts
static_assert(KEYS % 16 == 0 && KEYS > kNewRows && QUERY_BLOCK % 16 == 0, "attention tiling");
static_assert(kLdWeight <= HEAD_DIM, "the weights take the place of the queries");
static_assert(kPieces == 32 && kColumns == 32, "a lane has 16 bytes of a row");

// Shared memory: rows of HEAD_DIM, (kKeyRows + KEYS + QUERY_BLOCK) of them.
__device__ __forceinline__ bf16* key_rows() { return (bf16*)shared_memory; }
__device__ __forceinline__ bf16* value_rows() { return key_rows() + kKeyRows * HEAD_DIM; }
__device__ __forceinline__ bf16* query_rows() { return value_rows() + KEYS * HEAD_DIM; }
// (QUERY_BLOCK, kLdWeight), once the queries are used.
__device__ __forceinline__ bf16* weight_rows() { return query_rows(); }
// (RANGES, kShare) rows from all blocks of the cluster, once the keys are used.
__device__ __forceinline__ bf16* part_rows() { return key_rows(); }

// 16 bytes of a row. They are exchanged within 128 bytes, so that neither 8 lanes with two rows nor
// 8 lanes with the same columns of 8 rows meet in a bank.
__device__ __forceinline__ uint4* piece(bf16* rows, int row, int at) {
  return (uint4*)(rows + row * HEAD_DIM) + (at ^ (row % 2 * 4 | row / 2 % 4));
}

// A block's part: its queries, and its keys by their first one and number.
struct Range {
  int rank, query0, first_new, news, first_old, olds;
  __device__ __forceinline__ explicit Range(int prefix) {
    int share = (prefix + RANGES - 1) / RANGES;
    rank = cluster_rank(), query0 = blockIdx.x / RANGES * QUERY_BLOCK;
    first_new = rank * kNew, news = max(min(kNew, HORIZON - first_new), 0);
    first_old = rank * share, olds = max(min(share, prefix - first_old), 0);
  }
  __device__ __forceinline__ bool seen(int row) const {
    return row < kNewRows ? row < news : row < kNewRows + olds;
  }
};

// Four neighbouring lanes hold the rows of a 4 x 4 matrix; after this, its columns.
__device__ __forceinline__ void transpose4(u32 (&v)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      u32 sent = upper ? v[i] : v[i | step];
      u32 got = __shfl_xor_sync(~0u, sent, step);
      if (upper) v[i] = got; else v[i | step] = got;
    }
  }
}

// Ask for the keys and values of the prefix; values of rows that nobody sees are 0.
__device__ __forceinline__ void load_prefix(const Range& range, const bf16* keys,
                                            const bf16* values) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  size_t source = (size_t)range.first_old * HEAD_DIM + lane * 8;
  for (int row = warp; row < range.olds; row += kWarps)
    copy_async(piece(key_rows(), kNewRows + row, lane), keys + source + row * HEAD_DIM);
  end_copy_group();
  for (int row = warp; row < range.olds; row += kWarps)
    copy_async(piece(value_rows(), kNewRows + row, lane), values + source + row * HEAD_DIM);
  end_copy_group();
  for (int row = warp; row < KEYS; row += kWarps)
    if (!range.seen(row)) *piece(value_rows(), row, lane) = make_uint4(0, 0, 0, 0);
}

// Ask for what the kernel before this one wrote: the queries, and this range's new keys and values.
__device__ __forceinline__ void load_new(const Range& range, const bf16* qkv) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < QUERY_BLOCK / kWarps; j++) {
    int row = j * kWarps + warp;
    // Rows behind the last query repeat it and are not written.
    size_t query = min(range.query0 + row, kQueries - 1);
    copy_async(piece(query_rows(), row, lane), qkv + query * HEAD_DIM + lane * 8);
  }
#pragma unroll
  for (int j = 0; j < kNewRows / kWarps; j++) {
    int row = j * kWarps + warp;
    if (row >= range.news) break;
    const bf16* key = qkv + (size_t)(kQueries + range.first_new + row) * HEAD_DIM + lane * 8;
    copy_async(piece(key_rows(), row, lane), key);
    copy_async(piece(value_rows(), row, lane), key + HORIZON * HEAD_DIM);
  }
  end_copy_group();
}

// The warp's keys of one turn; a turn behind the last key repeats it.
__device__ __forceinline__ uint4 key_piece(int turn, int step) {
  int lane = threadIdx.x % 32, tile = min(turn * kWarps + (int)threadIdx.x / 32, KEYS / 8 - 1);
  return *piece(key_rows(), tile * 8 + lane / 4, step * 4 + lane % 4);
}

// Logits of 8 keys per turn: [turn][query tile] in the layout of the matrix instruction.
__device__ __forceinline__ void multiply_keys(const uint4 (&held)[kHeldTurns][kHeadSteps],
                                              float (&logits)[kTurns][kQueryTiles][4]) {
  int lane = threadIdx.x % 32;
  float sums[kChains][kTurns][kQueryTiles][4] = {};
#pragma unroll
  for (int s = 0; s < kHeadSteps; s++) {
    uint4 q[kQueryTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kQueryTiles; i++)
      q[i / 2][i % 2] = *piece(query_rows(), i * 8 + lane / 4, s * 4 + lane % 4);
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      uint4 k = turn < kHeldTurns ? held[turn % kHeldTurns][s] : key_piece(turn, s);
#pragma unroll
      for (int t = 0; t < kQueryTiles; t++) {
        uint4 q0 = q[t][0], q1 = q[t][1];
        mma(sums[0][turn][t], q0.x, q1.x, q0.y, q1.y, k.x, k.y);
        mma(sums[kChains - 1][turn][t], q0.z, q1.z, q0.w, q1.w, k.z, k.w);
      }
    }
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++)
#pragma unroll
    for (int t = 0; t < kQueryTiles; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        logits[turn][t][i] = sums[0][turn][t][i] + (kChains > 1 ? sums[kChains - 1][turn][t][i] : 0.f);
}

// A lane has the queries t * 16 + h * 8 + lane / 4.
typedef float OfQueries[kQueryTiles][2];

// Softmax over the range's keys, without the division: weights into shared memory, the range's
// maxima into `top`. of_warp: what each warp has of each query, at the end the sum of its weights.
__device__ __forceinline__ void weigh(const Range& range, float (&logits)[kTurns][kQueryTiles][4],
                                      float log2_scale, float (*of_warp)[kWarps], OfQueries& top) {
  const float kLowest = __int_as_float(0xff800000);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    float highest = kLowest;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int row = (turn * kWarps + warp) * 8 + lane % 4 * 2 + j;
        float& logit = logits[turn][i / 2][i % 2 * 2 + j];
        logit = range.seen(row) ? logit * log2_scale : kLowest;
        highest = fmaxf(highest, logit);
      }
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    if (lane % 4 == 0) of_warp[i * 8 + lane / 4][warp] = highest;
  }
  __syncthreads();  // all maxima are there, all keys and queries are read
  OfQueries norm = {};
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    int query = i * 8 + lane / 4;
    float highest = kLowest;
#pragma unroll
    for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, of_warp[query][w]);
    top[i / 2][i % 2] = highest;
    float origin = range.olds + range.news == 0 ? 0.f : highest;  // no keys: weights 0, not NaN
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      int tile = turn * kWarps + warp;
      float p0 = exp2_fast(logits[turn][i / 2][i % 2 * 2] - origin);
      float p1 = exp2_fast(logits[turn][i / 2][i % 2 * 2 + 1] - origin);
      norm[i / 2][i % 2] += p0 + p1;
      if (tile < KEYS / 8)
        *(u32*)(weight_rows() + query * kLdWeight + tile * 8 + lane % 4 * 2) = pack(p0, p1);
    }
  }
  __syncthreads();  // all weights are there, all maxima are read
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    float sum = norm[i / 2][i % 2];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (lane % 4 == 0) of_warp[i * 8 + lane / 4][warp] = sum;
  }
}

// The warp's columns of the outputs of all queries.
__device__ __forceinline__ void multiply_values(float (&acc)[kQueryTiles][kColumns / 8][4]) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
    u32 a[kQueryTiles][4];
#pragma unroll
    for (int t = 0; t < kQueryTiles; t++)
      load_matrix4(a[t], weight_rows() + (t * 16 + lane % 16) * kLdWeight + step * 16 + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kColumns / 16; n++) {
      u32 b[4];
      int row = step * 16 + lane % 16, at = warp * (kColumns / 8) + n * 2 + lane / 16;
      load_matrix4_transposed(b, piece(value_rows(), row, at));
#pragma unroll
      for (int t = 0; t < kQueryTiles; t++) {
        mma(acc[t][2 * n], a[t][0], a[t][1], a[t][2], a[t][3], b[0], b[1]);
        mma(acc[t][2 * n + 1], a[t][0], a[t][1], a[t][2], a[t][3], b[2], b[3]);
      }
    }
  }
}

// What a range has of a query beside its output: the largest logit and the sum of the weights.
typedef float2 Scales[kShare][RANGES];

// Give every block of the cluster what this range has of its queries.
__device__ __forceinline__ void hand_out(const Range& range, const OfQueries& top,
                                         const float (*of_warp)[kWarps],
                                         float (&acc)[kQueryTiles][kColumns / 8][4],
                                         Scales& scales) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kQueryTiles * 2; i++) {
    // A lane has two columns of each of four 8-column tiles; after the exchange, one whole tile.
    int query = i * 8 + lane / 4, block = query / kShare, mine = query % kShare;
    u32 own[4];
#pragma unroll
    for (int n = 0; n < 4; n++)
      own[n] = pack(acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]);
    transpose4(own, lane);
    uint4* target = piece(part_rows(), range.rank * kShare + mine, warp * 4 + lane % 4);
    *in_block(target, block) = make_uint4(own[0], own[1], own[2], own[3]);
    if (warp == 0 && lane % 4 == 0) {
      float2 scale = {top[i / 2][i % 2], 0.f};
#pragma unroll
      for (int w = 0; w < kWarps; w++) scale.y += of_warp[query][w];
      *in_block(&scales[mine][range.rank], block) = scale;
    }
  }
}

// Put together the ranges of this block's queries, one per warp; a lane has 8 columns.
__device__ __forceinline__ void merge(const Range& range, const Scales& scales, bf16* attended) {
  int lane = threadIdx.x % 32;
  for (int mine = threadIdx.x / 32; mine < kShare; mine += kWarps) {
    int row = range.rank * kShare + mine, query = range.query0 + row;
    if (row >= QUERY_BLOCK || query >= kQueries) break;
    float top = __int_as_float(0xff800000), norm = 0.f, o[8] = {};
#pragma unroll
    for (int r = 0; r < RANGES; r++) top = fmaxf(top, scales[mine][r].x);
#pragma unroll
    for (int r = 0; r < RANGES; r++) {
      float2 scale = scales[mine][r];
      float weight = exp2_fast(scale.x - top);
      norm += weight * scale.y;
      uint4 part = *piece(part_rows(), r * kShare + mine, lane);
      u32 pairs[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        o[2 * j] += weight * low(pairs[j]), o[2 * j + 1] += weight * high(pairs[j]);
    }
    float inverse = reciprocal(norm);
    u32 out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) out[j] = pack(o[2 * j] * inverse, o[2 * j + 1] * inverse);
    int token = query % HORIZON, head = query / HORIZON;
    *(uint4*)(attended + ((size_t)token * HEADS + head) * HEAD_DIM + lane * 8) =
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
  __shared__ __align__(16) float of_warp[QUERY_BLOCK][kWarps];
  __shared__ __align__(16) Scales scales;
  let_next_start();
  Range range(*n_prefix);
  load_prefix(range, keys, values);
  wait_for_previous();
  load_new(range, qkv);
  wait_copies_but<2>();
  __syncthreads();  // the keys of the prefix are in place
  uint4 held[kHeldTurns][kHeadSteps];
#pragma unroll
  for (int turn = 0; turn < kHeldTurns; turn++)
#pragma unroll
    for (int s = 0; s < kHeadSteps; s++) held[turn][s] = key_piece(turn, s);
  wait_copies_but<0>();
  __syncthreads();  // everything is in place
#pragma unroll
  for (int turn = 0; turn < kHeldTurns; turn++)
    if ((turn * kWarps + (int)threadIdx.x / 32) * 8 < kNewRows)
#pragma unroll
      for (int s = 0; s < kHeadSteps; s++) held[turn][s] = key_piece(turn, s);
  float logits[kTurns][kQueryTiles][4], acc[kQueryTiles][kColumns / 8][4] = {};
  multiply_keys(held, logits);
  OfQueries top;
  weigh(range, logits, log2_scale, of_warp, top);
  cluster_arrive();  // this block's keys are read and its norms are there
  multiply_values(acc);
  cluster_wait();
  hand_out(range, top, of_warp, acc, scales);
  cluster_arrive();
  cluster_wait();  // all parts of this block's queries are there
  merge(range, scales, attended);
}

#endif
