// The attention of hopper_layer.cu: ranges of keys, and the merge of the ranges.
#ifndef HOPPER_ATTENTION_CUH
#define HOPPER_ATTENTION_CUH
#include "hopper_block.cuh"

// All heads share one K/V head, so the queries of all heads are rows of one matrix; a block takes
// 32 of them and one range of keys. Two teams of warps have 16 queries each; the warps of a team
// split the keys for the logits and the head dimension for the outputs.
constexpr int kQueries = HEADS * HORIZON, kQueryBlock = 32, kTeam = kWarps / 2;
constexpr int kLdKey = HEAD_DIM + 32, kLdValue = HEAD_DIM + 8;  // no bank conflicts
constexpr int kLdWeight = KEYS + 8;
constexpr int kTurns = (KEYS / 8 + kTeam - 1) / kTeam, kDims = HEAD_DIM / kTeam;
constexpr int kHeadSteps = HEAD_DIM / 32;
static_assert(KEYS % 16 == 0 && kDims % 32 == 0, "attention tiling");

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

extern "C" __global__ void __launch_bounds__(kThreads, 1) attend(
    const bf16* qkv,                       // (HEADS + 2, H, HEAD_DIM)
    const bf16* keys, const bf16* values,  // (P_max, HEAD_DIM)
    const int* n_prefix,
    bf16* parts,      // (RANGES, HEADS * H, HEAD_DIM), written
    float* log_sums,  // (RANGES, HEADS * H), written, in units of log2
    float log2_scale) {
  bf16* k_rows = (bf16*)shared_memory;
  bf16* v_rows = k_rows + KEYS * kLdKey;
  bf16* q_rows = v_rows + KEYS * kLdValue;
  bf16* weights = q_rows;  // once the queries are used
  __shared__ float tops[kQueryBlock][kTeam], norms[kQueryBlock][kTeam];
  let_next_start();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / kTeam, member = warp % kTeam;
  int row = lane / 4, range = blockIdx.x % RANGES, query0 = blockIdx.x / RANGES * kQueryBlock;
  int prefix = *n_prefix, total = prefix + HORIZON;
  int per_range = ((total + RANGES - 1) / RANGES + 15) / 16 * 16;
  int first = range * per_range, count = min(max(total - first, 0), per_range);
  int from_prefix = min(max(prefix - first, 0), count), padded = (count + 15) / 16 * 16;
  constexpr int kChunks = HEAD_DIM / 8;
  for (int i = threadIdx.x; i < from_prefix * kChunks; i += kThreads) {
    int key = i / kChunks, chunk = i % kChunks * 8;
    size_t source = (size_t)(first + key) * HEAD_DIM + chunk;
    copy_async(k_rows + key * kLdKey + chunk, keys + source);
    copy_async(v_rows + key * kLdValue + chunk, values + source);
  }
  for (int i = count * kChunks + threadIdx.x; i < padded * kChunks; i += kThreads)
    *(uint4*)(v_rows + i / kChunks * kLdValue + i % kChunks * 8) = make_uint4(0, 0, 0, 0);
  wait_for_previous();

  const bf16* suffix = qkv + (ptrdiff_t)(kQueries + first - prefix) * HEAD_DIM;
  for (int i = from_prefix * kChunks + threadIdx.x; i < count * kChunks; i += kThreads) {
    int key = i / kChunks, chunk = i % kChunks * 8;
    const bf16* source = suffix + (ptrdiff_t)key * HEAD_DIM + chunk;
    copy_async(k_rows + key * kLdKey + chunk, source);
    copy_async(v_rows + key * kLdValue + chunk, source + HORIZON * HEAD_DIM);
  }
  for (int i = threadIdx.x; i < kQueryBlock * kChunks; i += kThreads) {
    int mine = i / kChunks, chunk = i % kChunks * 8;
    // Rows behind the last query repeat it and are not written.
    copy_async(q_rows + mine * kLdKey + chunk,
               qkv + (size_t)min(query0 + mine, kQueries - 1) * HEAD_DIM + chunk);
  }
  wait_copies();
  __syncthreads();  // keys and values are in place

  // Logits of 8 keys per turn, in registers until the rows' maxima are known.
  const float kLowest = __int_as_float(0xff800000);
  float logits[kTurns][4] = {}, top[2] = {kLowest, kLowest};
  const bf16* q_at = q_rows + (team * 16 + row) * kLdKey + lane % 4 * 8;
  const bf16* k_at = k_rows + (member * 8 + row) * kLdKey + lane % 4 * 8;
#pragma unroll
  for (int s = 0; s < kHeadSteps; s++) {
    uint4 q0 = *(const uint4*)(q_at + s * 32), q1 = *(const uint4*)(q_at + 8 * kLdKey + s * 32);
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      if ((turn * kTeam + member) * 8 >= padded) break;
      uint4 k = *(const uint4*)(k_at + turn * kTeam * 8 * kLdKey + s * 32);
      mma(logits[turn], q0.x, q1.x, q0.y, q1.y, k.x, k.y);
      mma(logits[turn], q0.z, q1.z, q0.w, q1.w, k.z, k.w);
    }
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bool seen = (turn * kTeam + member) * 8 + lane % 4 * 2 + i % 2 < count;
      logits[turn][i] = seen ? logits[turn][i] * log2_scale : kLowest;
      top[i / 2] = fmaxf(top[i / 2], logits[turn][i]);
    }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    if (lane % 4 == 0) tops[team * 16 + h * 8 + row][member] = top[h];
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int mine = team * 16 + h * 8 + row;
    float norm = 0.f;
#pragma unroll
    for (int m = 0; m < kTeam; m++) top[h] = fmaxf(top[h], tops[mine][m]);
    float origin = count == 0 ? 0.f : top[h];  // a range without keys: weights 0, not NaN
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      int key0 = (turn * kTeam + member) * 8;
      if (key0 < padded) {
        float p0 = exp2_fast(logits[turn][h * 2] - origin);
        float p1 = exp2_fast(logits[turn][h * 2 + 1] - origin);
        norm += p0 + p1;
        *(u32*)(weights + mine * kLdWeight + key0 + lane % 4 * 2) = pack(p0, p1);
      }
    }
    norm += __shfl_xor_sync(~0u, norm, 1);
    norm += __shfl_xor_sync(~0u, norm, 2);
    if (lane % 4 == 0) norms[mine][member] = norm;
  }
  __syncthreads();
  float acc[kDims / 8][4] = {};
  const bf16* a_at = weights + (team * 16 + lane % 16) * kLdWeight + lane / 16 * 8;
  const bf16* b_at = v_rows + lane % 16 * kLdValue + member * kDims + lane / 16 * 8;
#pragma unroll
  for (int g = 0; g < KEYS / 16; g++) {
    if (g * 16 >= padded) break;
    u32 a[4];
    load_matrix4(a, a_at + g * 16);
#pragma unroll
    for (int n = 0; n < kDims / 16; n++) {
      u32 b[4];
      load_matrix4_transposed(b, b_at + g * 16 * kLdValue + n * 16);
      mma(acc[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
      mma(acc[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int mine = team * 16 + h * 8 + row;
    float norm = 0.f;
#pragma unroll
    for (int m = 0; m < kTeam; m++) norm += norms[mine][m];
    int query = query0 + mine;
    float inverse = count == 0 ? 0.f : reciprocal(norm);
    size_t at = (size_t)range * kQueries + query;
    bool written = query < kQueries;
    if (written && member == 0 && lane % 4 == 0)
      log_sums[at] = count == 0 ? kLowest : top[h] + log2_fast(norm);
    bf16* target = parts + at * HEAD_DIM + member * kDims + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < kDims / 32; n++) {
      // A lane has two columns of each of four 8-column tiles; after the exchange, one whole tile.
      u32 own[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        own[i] = pack(acc[4 * n + i][h * 2] * inverse, acc[4 * n + i][h * 2 + 1] * inverse);
      transpose4(own, lane);
      if (written) *(uint4*)(target + n * 32) = make_uint4(own[0], own[1], own[2], own[3]);
    }
  }
}

// One warp per query; a lane has 8 neighbouring columns.
extern "C" __global__ void __launch_bounds__(kThreads, 1) merge(
    const bf16* parts, const float* log_sums,  // as attend writes them
    bf16* attended) {                          // (H, HEADS * HEAD_DIM)
  static_assert(HEAD_DIM == 256, "a lane has 16 bytes");
  let_next_start();
  int query = min((int)(blockIdx.x * kWarps + threadIdx.x / 32), kQueries - 1);
  int column = threadIdx.x % 32 * 8;
  wait_for_previous();
  uint4 part[RANGES];
  float weight[RANGES], top = __int_as_float(0xff800000), norm = 0.f;
#pragma unroll
  for (int r = 0; r < RANGES; r++) {
    size_t at = (size_t)r * kQueries + query;
    weight[r] = __ldcg(log_sums + at);
    part[r] = load_l2(parts + at * HEAD_DIM + column);
  }
#pragma unroll
  for (int r = 0; r < RANGES; r++) top = fmaxf(top, weight[r]);
  float o[8] = {};
#pragma unroll
  for (int r = 0; r < RANGES; r++) {
    float w = exp2_fast(weight[r] - top);
    norm += w;
    u32 pairs[4] = {part[r].x, part[r].y, part[r].z, part[r].w};
#pragma unroll
    for (int j = 0; j < 4; j++) o[2 * j] += w * low(pairs[j]), o[2 * j + 1] += w * high(pairs[j]);
  }
  float inverse = reciprocal(norm);
  u32 out[4];
#pragma unroll
  for (int j = 0; j < 4; j++) out[j] = pack(o[2 * j] * inverse, o[2 * j + 1] * inverse);
  *(uint4*)(attended + ((size_t)(query % HORIZON) * HEADS + query / HORIZON) * HEAD_DIM + column) =
      make_uint4(out[0], out[1], out[2], out[3]);
}

#endif
