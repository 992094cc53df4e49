// The end of an Euler step of hopper_layer.cu, in clusters whose blocks each take some columns.
#ifndef HOPPER_STEP_END_CUH
#define HOPPER_STEP_END_CUH
#include "hopper_block.cuh"

// A cluster has END_TOKENS tokens. Each of its END_BLOCKS blocks has its columns of both
// projections in place before the wait. What a block has of a sum over all columns it sends to
// every block; they all add the same parts in the order of the ranks.
constexpr int kEndColumns = WIDTH / END_BLOCKS;        // of a block
constexpr int kEndTurns = (kEndColumns + 127) / 128;   // of a warp, whose lanes take 4 columns
constexpr int kQuadTurns = (ACTIONS / 4 + kWarps - 1) / kWarps;  // a warp takes 4 actions
constexpr int kSharers = 32 / END_TOKENS;              // lanes that get the sums of one token
constexpr int kEndGroups = kThreads / kEndColumns;     // of threads that have a column each
constexpr int kEndShare = END_TOKENS / kEndGroups;     // tokens of a group
static_assert(WIDTH % END_BLOCKS == 0 && kThreads % kEndColumns == 0 && kEndColumns % 32 == 0,
              "columns of a block");
static_assert(END_TOKENS <= kWarps && 32 % END_TOKENS == 0 && END_TOKENS % kEndGroups == 0,
              "tokens of a cluster");
static_assert(END_BLOCKS <= 32 && ACTIONS % 4 == 0, "one lane per block, 4 actions per warp");

struct EndMemory {
  float parts[END_BLOCKS][END_TOKENS][ACTIONS];  // of the velocity, sent by the blocks
  float4 squares[END_TOKENS][END_BLOCKS];        // sums of them, likewise; only x is used
  float x_t[END_TOKENS][ACTIONS];
  float w_in[kEndColumns][ACTIONS + 4];  // no bank conflicts
  float b_in[kEndColumns], scale[kEndColumns], shift[kEndColumns], b_out[ACTIONS];
  bf16 normed[END_TOKENS][kEndColumns], x[END_TOKENS][kEndColumns];
};

// 4 actions by 4 columns.
typedef float4 OutWeights[kQuadTurns][kEndTurns][4];

// A block's part: its columns, and the tokens of its cluster. Those behind the last one repeat it
// and are not written.
struct EndPart {
  int rank, column0, token0;
  __device__ __forceinline__ EndPart() {
    rank = cluster_rank(), column0 = rank * kEndColumns;
    token0 = (int)blockIdx.x / END_BLOCKS * END_TOKENS;
  }
  __device__ __forceinline__ size_t source(int i) const { return min(token0 + i, HORIZON - 1); }
  __device__ __forceinline__ bool has(int i) const { return token0 + i < HORIZON; }
};

// Contiguous floats to shared memory.
template <int kCount>
__device__ __forceinline__ void copy_floats(float (&target)[kCount], const float* source) {
  static_assert(kCount <= kThreads * 4, "one turn");
  int i = threadIdx.x * 4;
  if (i < kCount) copy_async(target + i, source + i);
}

__device__ __forceinline__ void load_in_weights(EndMemory& memory, const float* w_in) {
  constexpr int kQuads = ACTIONS / 4;
#pragma unroll
  for (int j = 0; j < kEndColumns * kQuads; j += kThreads) {
    int i = j + threadIdx.x;
    if (i >= kEndColumns * kQuads) break;
    copy_async(&memory.w_in[i / kQuads][i % kQuads * 4], w_in + (size_t)i * 4);
  }
}

__device__ __forceinline__ void load_out_weights(OutWeights& weights, const float* w_out) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < kQuadTurns; q++)
#pragma unroll
    for (int turn = 0; turn < kEndTurns; turn++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int action = (q * kWarps + warp) * 4 + j, column = turn * 128 + lane * 4;
        if (action < ACTIONS && column < kEndColumns)
          weights[q][turn][j] = *(const float4*)(w_out + (size_t)action * WIDTH + column);
      }
}

// What the step begins with, 16 bytes at a time: x_t and, if they are wanted, the normed rows.
struct EndInputs {
  static constexpr int kOfX = END_TOKENS * ACTIONS / 4, kOfRows = END_TOKENS * kEndColumns / 8;
  static constexpr int kItems = (kOfX + kOfRows + kThreads - 1) / kThreads;  // of a thread
  const void* sources[kItems];
  void* targets[kItems];
  bool wanted[kItems];

  // The addresses, which are there before the wait.
  __device__ __forceinline__ EndInputs(EndMemory& memory, const EndPart& part, const float* from,
                                       const bf16* normed, bool leave) {
#pragma unroll
    for (int j = 0; j < kItems; j++) {
      int i = j * kThreads + threadIdx.x, of_rows = i - kOfX;
      int token = i / (ACTIONS / 4), action = i % (ACTIONS / 4) * 4;
      sources[j] = from + part.source(token) * ACTIONS + action;
      targets[j] = &memory.x_t[0][0] + i * 4;
      wanted[j] = i < kOfX || (leave && of_rows < kOfRows);
      if (of_rows >= 0) {
        int row = of_rows / (kEndColumns / 8), column = of_rows % (kEndColumns / 8) * 8;
        sources[j] = normed + part.source(row) * WIDTH + part.column0 + column;
        targets[j] = &memory.normed[0][0] + of_rows * 8;
      }
      settle(sources[j]), settle(targets[j]);
    }
  }
  __device__ __forceinline__ void load() const {
#pragma unroll
    for (int j = 0; j < kItems; j++)
      if (wanted[j]) copy_async(targets[j], sources[j]);
    end_copy_group();
  }
};

// Adds four values per token over the lanes of a warp; each token's sums end in v[0] of kSharers
// neighbouring lanes. Lanes first halve the tokens that they add among each other.
__device__ __forceinline__ void add_lanes(float (&v)[END_TOKENS][4]) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    bool upper = threadIdx.x & step;
    if (step < kSharers) {
#pragma unroll
      for (int k = 0; k < 4; k++) v[0][k] += __shfl_xor_sync(~0u, v[0][k], step);
      continue;
    }
    int left = step / kSharers;  // tokens
#pragma unroll
    for (int i = 0; i < END_TOKENS / 2; i++) {
      if (i >= left) break;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        float sent = upper ? v[i][k] : v[i + left][k];
        float kept = upper ? v[i + left][k] : v[i][k];
        v[i][k] = kept + __shfl_xor_sync(~0u, sent, step);
      }
    }
  }
}

// Send every block what these columns add to the velocities.
__device__ __forceinline__ void send_velocities(EndMemory& memory, const EndPart& part,
                                                const OutWeights& weights, u64* arrived) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < kQuadTurns; q++) {
    int action = (q * kWarps + warp) * 4;
    if (action >= ACTIONS) break;
    float sums[END_TOKENS][4] = {};
#pragma unroll
    for (int turn = 0; turn < kEndTurns; turn++) {
      int column = turn * 128 + lane * 4;
      if (column >= kEndColumns) break;
#pragma unroll
      for (int token = 0; token < END_TOKENS; token++) {
        uint2 y = *(const uint2*)&memory.normed[token][column];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float4 w = weights[q][turn][j];
          sums[token][j] += w.x * low(y.x);
          sums[token][j] += w.y * high(y.x);
          sums[token][j] += w.z * low(y.y);
          sums[token][j] += w.w * high(y.y);
        }
      }
    }
    add_lanes(sums);
    float4 v = make_float4(sums[0][0], sums[0][1], sums[0][2], sums[0][3]);
    float* target = &memory.parts[part.rank][lane / kSharers][action];
#pragma unroll
    for (int rank = lane % kSharers; rank < END_BLOCKS; rank += kSharers)
      send(address_in_block(target, rank), address_in_block(arrived, rank), v);
  }
}

// The Euler update, by every block; the first one writes it.
__device__ __forceinline__ void update(EndMemory& memory, const EndPart& part, float* to, float dt) {
#pragma unroll
  for (int j = 0; j < END_TOKENS * ACTIONS; j += kThreads) {
    int i = j + threadIdx.x, token = i / ACTIONS, action = i % ACTIONS;
    if (i >= END_TOKENS * ACTIONS) break;
    float v = 0.f;
#pragma unroll
    for (int rank = 0; rank < END_BLOCKS; rank++) v += memory.parts[rank][token][action];
    float moved = memory.x_t[token][action] + dt * (v + memory.b_out[action]);
    memory.x_t[token][action] = moved;
    if (part.rank == 0 && part.has(token)) to[part.token0 * ACTIONS + i] = moved;
  }
}

typedef float4 InWeights[ACTIONS / 4];  // of one column

__device__ __forceinline__ void project_in(EndMemory& memory, const InWeights& weights) {
  int column = threadIdx.x % kEndColumns, token0 = threadIdx.x / kEndColumns * kEndShare;
  float h[kEndShare] = {};
#pragma unroll
  for (int i = 0; i < ACTIONS / 4; i++)
#pragma unroll
    for (int j = 0; j < kEndShare; j++) {
      float4 v = *(const float4*)&memory.x_t[token0 + j][i * 4];
      h[j] += weights[i].x * v.x;
      h[j] += weights[i].y * v.y;
      h[j] += weights[i].z * v.z;
      h[j] += weights[i].w * v.w;
    }
#pragma unroll
  for (int j = 0; j < kEndShare; j++)
    memory.x[token0 + j][column] = (bf16)pack(h[j] + memory.b_in[column], 0.f);
}

// Write the columns of x and of its norm, a token per warp.
__device__ __forceinline__ void write_rows(EndMemory& memory, const EndPart& part, bf16* x,
                                           bf16* normed, u64* arrived) {
  int token = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= END_TOKENS) return;
  size_t at = (size_t)(part.token0 + token) * WIDTH + part.column0;
  uint2 rows[kEndTurns];
  float square = 0.f;
#pragma unroll
  for (int turn = 0; turn < kEndTurns; turn++) {
    int column = turn * 128 + lane * 4;
    if (column >= kEndColumns) break;
    rows[turn] = *(const uint2*)&memory.x[token][column];
    float h[4] = {low(rows[turn].x), high(rows[turn].x), low(rows[turn].y), high(rows[turn].y)};
#pragma unroll
    for (int j = 0; j < 4; j++) square += h[j] * h[j];
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) square += __shfl_xor_sync(~0u, square, step);
  if (lane < END_BLOCKS)
    send(address_in_block(&memory.squares[token][part.rank], lane),
         address_in_block(arrived, lane), make_float4(square, 0.f, 0.f, 0.f));
  float4 scale[kEndTurns], shift[kEndTurns];
#pragma unroll
  for (int turn = 0; turn < kEndTurns; turn++) {
    int column = turn * 128 + lane * 4;
    if (column >= kEndColumns) break;
    if (part.has(token)) *(uint2*)(x + at + column) = rows[turn];
    scale[turn] = *(const float4*)(memory.scale + column);
    shift[turn] = *(const float4*)(memory.shift + column);
  }
  barrier_wait_cluster(arrived);
  float total = 0.f;
#pragma unroll
  for (int rank = 0; rank < END_BLOCKS; rank++) total += memory.squares[token][rank].x;
  float r = rsqrtf(total / WIDTH + EPS);
#pragma unroll
  for (int turn = 0; turn < kEndTurns; turn++) {
    int column = turn * 128 + lane * 4;
    if (column >= kEndColumns || !part.has(token)) break;
    float4 a = scale[turn], b = shift[turn];
    *(uint2*)(normed + at + column) =
        make_uint2(pack(low(rows[turn].x) * r * (1.f + a.x) + b.x,
                        high(rows[turn].x) * r * (1.f + a.y) + b.y),
                   pack(low(rows[turn].y) * r * (1.f + a.z) + b.z,
                        high(rows[turn].y) * r * (1.f + a.w) + b.w));
  }
}

// A cluster has END_BLOCKS blocks.
extern "C" __global__ void __launch_bounds__(kThreads, 3) step_end(
    bf16* normed,                            // (H, WIDTH): read if leave, written if enter
    const float* w_out, const float* b_out,  // (ACTIONS, WIDTH), (ACTIONS,)
    const float* w_in, const float* b_in,    // (WIDTH, ACTIONS), (WIDTH,)
    const float* modulation,                 // (2, WIDTH) of the next step's first norm
    const float* from, float* to,            // (H, ACTIONS) before and, if leave, after the step
    bf16* x,                                 // (H, WIDTH), written if enter
    float dt, int leave, int enter) {
  __shared__ __align__(16) EndMemory memory;
  __shared__ u64 velocities_arrived, squares_arrived;
  let_next_start();
  EndPart part;
  if (threadIdx.x == 0) {
    barrier_init(&velocities_arrived);
    barrier_init(&squares_arrived);
    barrier_init_done();
    barrier_expect(&velocities_arrived, sizeof(memory.parts));
    barrier_expect(&squares_arrived, sizeof(memory.squares));
  }
  OutWeights out_weights;
  if (leave) {
    load_out_weights(out_weights, w_out + part.column0);
    copy_floats(memory.b_out, b_out);
  }
  if (enter) {
    load_in_weights(memory, w_in + (size_t)part.column0 * ACTIONS);
    copy_floats(memory.b_in, b_in + part.column0);
    copy_floats(memory.scale, modulation + part.column0);
    copy_floats(memory.shift, modulation + WIDTH + part.column0);
  }
  EndInputs inputs(memory, part, from, normed, leave);
  cluster_arrive_relaxed();
  cluster_wait();  // all blocks of the cluster have their barriers
  wait_for_previous();
  inputs.load();
  wait_copies_but<0>();
  __syncthreads();  // everything is in place
  InWeights in_weights;
  if (leave) send_velocities(memory, part, out_weights, &velocities_arrived);
  if (enter) {
#pragma unroll
    for (int i = 0; i < ACTIONS / 4; i++)
      in_weights[i] = *(const float4*)&memory.w_in[threadIdx.x % kEndColumns][i * 4];
  }
  if (leave) {
    barrier_wait_cluster(&velocities_arrived);
    update(memory, part, to, dt);
    __syncthreads();  // x_t has moved
  }
  if (!enter) return;
  project_in(memory, in_weights);
  __syncthreads();  // the rows of x are complete
  write_rows(memory, part, x, normed, &squares_arrived);
}

#endif
