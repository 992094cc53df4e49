// The end of an Euler step of hopper_layer.cu, in clusters whose blocks each take some columns.
#ifndef HOPPER_STEP_END_CUH
#define HOPPER_STEP_END_CUH
#include "hopper_block.cuh"

// A cluster has END_TOKENS tokens. Each of its END_BLOCKS blocks has its columns of both
// projections in place before the wait. What a block has of a sum over all columns it sends to
// every block; they all add the same parts in the order of the ranks. The norm before the way out
// is in the rows that are read, 1 / rms in the sums and shift W_out^T in the bias.
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
static_assert(END_BLOCKS > 1, "a launch without clusters cannot send");
static_assert(END_BLOCKS <= SQUARES && ACTIONS % 4 == 0, "a part per block, 4 actions per warp");

struct EndMemory {
  float parts[END_BLOCKS][END_TOKENS][ACTIONS];  // of the velocity, sent by the blocks
  float x_t[END_TOKENS][ACTIONS];
  float squares[END_TOKENS][SQUARES];  // of x before the way out
  float w_in[kEndColumns][ACTIONS + 4];  // no bank conflicts
  float b_in[kEndColumns], scale[kEndColumns], b_out[ACTIONS];
  bf16 scaled[END_TOKENS][kEndColumns], x[END_TOKENS][kEndColumns];
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

// What the step begins with, 16 bytes at a time: x_t and, if they are wanted, the scaled rows and
// their sums of squares.
struct EndInputs {
  static constexpr int kOfX = END_TOKENS * ACTIONS / 4, kOfRows = END_TOKENS * kEndColumns / 8;
  static constexpr int kOfSquares = END_TOKENS * SQUARES / 4;
  static constexpr int kAll = kOfX + kOfRows + kOfSquares;
  static constexpr int kItems = (kAll + kThreads - 1) / kThreads;  // of a thread
  const void* sources[kItems];
  void* targets[kItems];
  bool wanted[kItems];

  // The addresses, which are there before the wait.
  __device__ __forceinline__ EndInputs(EndMemory& memory, const EndPart& part, const float* from,
                                       const bf16* scaled, const float* squares, bool leave) {
#pragma unroll
    for (int j = 0; j < kItems; j++) {
      int i = j * kThreads + threadIdx.x, of_rows = i - kOfX, of_squares = of_rows - kOfRows;
      int token = i / (ACTIONS / 4), action = i % (ACTIONS / 4) * 4;
      sources[j] = from + part.source(token) * ACTIONS + action;
      targets[j] = &memory.x_t[0][0] + i * 4;
      wanted[j] = i < kOfX || (leave && i < kAll);
      if (of_rows >= 0) {
        int row = of_rows / (kEndColumns / 8), column = of_rows % (kEndColumns / 8) * 8;
        sources[j] = scaled + part.source(row) * WIDTH + part.column0 + column;
        targets[j] = &memory.scaled[0][0] + of_rows * 8;
      }
      if (of_squares >= 0) {
        int row = of_squares / (SQUARES / 4), at = of_squares % (SQUARES / 4) * 4;
        sources[j] = squares + part.source(row) * SQUARES + at;
        targets[j] = &memory.squares[0][0] + of_squares * 4;
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
        uint2 y = *(const uint2*)&memory.scaled[token][column];
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

// The Euler update when all parts of the velocities are there, by every block; the first one
// writes it.
__device__ __forceinline__ void update(EndMemory& memory, const EndPart& part, float* to, float dt,
                                       u64* arrived) {
  constexpr int kItems = (END_TOKENS * ACTIONS + kThreads - 1) / kThreads;
  float inverse[kItems];
#pragma unroll
  for (int j = 0; j < kItems; j++) {
    int token = min((j * kThreads + (int)threadIdx.x) / ACTIONS, END_TOKENS - 1);
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < SQUARES; k += 4)
      squares += sum_of_quad(*(const float4*)&memory.squares[token][k]);
    inverse[j] = inverse_rms(squares);
  }
  barrier_wait_cluster(arrived);
#pragma unroll
  for (int j = 0; j < kItems; j++) {
    int i = j * kThreads + threadIdx.x, token = i / ACTIONS, action = i % ACTIONS;
    if (i >= END_TOKENS * ACTIONS) break;
    float v = 0.f;
#pragma unroll
    for (int rank = 0; rank < END_BLOCKS; rank++) v += memory.parts[rank][token][action];
    float moved = memory.x_t[token][action] + dt * (v * inverse[j] + memory.b_out[action]);
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

// Write the columns of x and what the next norm needs of them, a token per warp.
__device__ __forceinline__ void write_rows(const EndMemory& memory, const EndPart& part, bf16* x,
                                           bf16* scaled, float* squares) {
  int token = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= END_TOKENS || !part.has(token)) return;
  size_t row = part.token0 + token, at = row * WIDTH + part.column0;
  float square = 0.f;
#pragma unroll
  for (int turn = 0; turn < kEndTurns; turn++) {
    int column = turn * 128 + lane * 4;
    if (column >= kEndColumns) break;
    uint2 of_x = *(const uint2*)&memory.x[token][column];
    float4 scale = *(const float4*)(memory.scale + column);
    float h[4] = {low(of_x.x), high(of_x.x), low(of_x.y), high(of_x.y)};
    *(uint2*)(x + at + column) = of_x;
    *(uint2*)(scaled + at + column) =
        make_uint2(pack(h[0] * (1.f + scale.x), h[1] * (1.f + scale.y)),
                   pack(h[2] * (1.f + scale.z), h[3] * (1.f + scale.w)));
#pragma unroll
    for (int j = 0; j < 4; j++) square += h[j] * h[j];
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) square += __shfl_xor_sync(~0u, square, step);
  if (lane == 0) squares[row * SQUARES + part.rank] = square;
}

// A cluster has END_BLOCKS blocks.
extern "C" __global__ void __launch_bounds__(kThreads, 3) step_end(
    bf16* scaled,                            // (H, WIDTH): read if leave, written if enter
    const float* squares,                    // (H, SQUARES), read if leave
    const float* w_out, const float* b_out,  // (ACTIONS, WIDTH), (ACTIONS,): b + shift W_out^T
    const float* w_in, const float* b_in,    // (WIDTH, ACTIONS), (WIDTH,)
    const float* next_scale,                 // (WIDTH,) of the next step's first norm
    const float* from, float* to,            // (H, ACTIONS) before and, if leave, after the step
    bf16* x, float* next_squares,            // (H, WIDTH), (H, SQUARES), written if enter
    float dt, int leave, int enter) {
  __shared__ __align__(16) EndMemory memory;
  __shared__ u64 velocities_arrived;
  let_next_start();
  EndPart part;
  if (threadIdx.x == 0) {
    barrier_init(&velocities_arrived);
    barrier_init_done();
    barrier_expect(&velocities_arrived, sizeof(memory.parts));
  }
  OutWeights out_weights;
  if (leave) {
    load_out_weights(out_weights, w_out + part.column0);
    copy_floats(memory.b_out, b_out);
  }
  if (enter) {
    load_in_weights(memory, w_in + (size_t)part.column0 * ACTIONS);
    copy_floats(memory.b_in, b_in + part.column0);
    copy_floats(memory.scale, next_scale + part.column0);
  }
  EndInputs inputs(memory, part, from, scaled, squares, leave);
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
    update(memory, part, to, dt, &velocities_arrived);
    __syncthreads();  // x_t has moved
  }
  if (!enter) return;
  project_in(memory, in_weights);
  __syncthreads();  // the rows of x are complete
  write_rows(memory, part, x, scaled, next_squares);
}

#endif
