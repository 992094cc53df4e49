// A matrix product with a few dozen rows: what a block of hopper_layer.cu does of it.
#ifndef HOPPER_PRODUCT_CUH
#define HOPPER_PRODUCT_CUH
#include "hopper_block.cuh"
#include "hopper_tile.cuh"

constexpr int kTokens = (HORIZON + 7) / 8 * 8;  // columns of the warpgroup instruction
constexpr int kProductThreads = kThreads + 32;  // two warpgroups multiply, a warp brings weights
constexpr int kStepColumns = 64;                // of K: one tile of weights and one of tokens
constexpr int kMaxSteps = 16;
constexpr int kTokenTileBytes = kTokens * kStepColumns * 2;
constexpr int kWeightTileBytes = 64 * kStepColumns * 2;
static_assert(kTokenTileBytes <= kWeightTileBytes, "tokens take the place of weights");

struct Arrivals {  // barriers, each used once
  u64 weights[kMaxSteps], tokens[kMaxSteps];  // of a step
  u64 used[kMaxSteps];                        // a step's weights and tokens have been read
  u64 held[2];                                // a group has its first weights in registers
  u64 sums;                                   // what the other blocks of the cluster send
};

// The product of a block: kFeatures by kDepth of K, all tokens. The two warpgroups share out the
// features if there are 128, and the steps along K if there are 64. The kSplit blocks of a cluster
// have the same features and neighbouring parts of K, together all of it; each adds up and finishes
// some tokens. Tokens of kStages steps have room of their own; those of later steps take the place
// of the first weights, which wait in registers, and of weights and tokens that have been used. Few
// weights are on their way at once: what other kernels wait for would queue behind them.
template <int kFeatures_, int kDepth_, int kSplit_, int kStages_, int kInFlightBytes, int kStride,
          int kRows>
struct Product {
  static constexpr int kFeatures = kFeatures_, kDepth = kDepth_, kSplit = kSplit_;
  static constexpr int kStages = kStages_, kSteps = kDepth / kStepColumns;
  static constexpr int kUnits = kRows / kFeatures, kBlocks = kUnits * kSplit;
  static constexpr int kGroups = kFeatures == 64 ? 2 : 1;  // of warps, which split the steps
  static constexpr int kTilesOfStep = kFeatures / 64, kStepBytes = kTilesOfStep * kWeightTileBytes;
  static constexpr int kTurns = kSteps / kGroups, kOwnTurns = kStages / kGroups;  // of a group
  static constexpr int kRoomOfTurn = kTilesOfStep + 1;  // for tokens, once it is over
  static constexpr int kGivenBack = (kTurns - kOwnTurns + kRoomOfTurn - 1) / kRoomOfTurn;  // turns
  // Whether the first weights wait in registers: where not all tokens have room of their own. With
  // 64 tokens there are too few registers.
  static constexpr bool kHolds = kGivenBack > 0 && kTokens < 64;
  static constexpr int kInFlight = kInFlightBytes / kStepBytes;
  static constexpr int kLdSum = kFeatures + 4;  // no bank conflicts
  static constexpr int kQuads = kFeatures / 4;
  static constexpr int kShare = (HORIZON + kSplit - 1) / kSplit;  // tokens that a block finishes
  static_assert(kFeatures == 64 || kFeatures == 128, "a tile or two of 64 features");
  static_assert(kRows % kFeatures == 0 && kDepth % (kStepColumns * kGroups) == 0, "tiling");
  static_assert(kInFlight > 0, "a step of weights at least");
  static_assert(kSteps <= kMaxSteps && kStages <= kSteps && kStages % kGroups == 0, "steps");
  static_assert(kStride == kDepth * kSplit && (kSplit & (kSplit - 1)) == 0, "all of K");
  static_assert(kSplit * kShare <= kTokens, "there are sums of all that a cluster finishes");

  // The block's part of the product. A grid may be larger than the product, to have a block on
  // every multiprocessor: those of the next kernel, which start early, then spread evenly.
  // Surplus blocks repeat the work of others and write nothing.
  static __device__ __forceinline__ int block() { return blockIdx.x % kBlocks; }
  static __device__ __forceinline__ bool surplus() { return blockIdx.x >= kBlocks; }
  static __device__ __forceinline__ int rank() { return blockIdx.x % kSplit; }  // in the cluster
  static __device__ __forceinline__ int unit() { return block() / kSplit; }     // of features
  static __device__ __forceinline__ int feature0() { return unit() * kFeatures; }
  // The tokens that the block finishes; the last blocks of a cluster may have fewer or none.
  static __device__ __forceinline__ int token0() { return rank() * kShare; }
  static __device__ __forceinline__ int tokens() {
    return max(min(kShare, HORIZON - token0()), 0);
  }

  static __device__ __forceinline__ int column_at(int step) {
    return rank() * kDepth + step * kStepColumns;
  }

  // Shared memory: weights in the order of their steps, then tokens. Once everything is read, the
  // block's sums[group][token][feature] take their place, and behind them what the others send.
  static __device__ __forceinline__ char* weight_tiles() {
    return (char*)shared_memory + (0 - (u32)(u64)shared_memory) % 1024;  // seen to be shared
  }
  // The tokens of a step that have room of their own.
  static __device__ __forceinline__ char* first_tokens(int step) {
    return weight_tiles() + kSteps * kStepBytes + step * kTokenTileBytes;
  }
  // The tokens of a group's turn, which may take the place of what the group is done with.
  static __device__ __forceinline__ char* tokens_of(int turn, int group) {
    while (turn >= kOwnTurns) {
      int tile = (turn - kOwnTurns) % kRoomOfTurn;
      turn = room_of(turn);
      if (tile < kTilesOfStep)
        return weight_tiles() + (turn * kGroups + group) * kStepBytes + tile * kWeightTileBytes;
    }
    return first_tokens(turn * kGroups + group);
  }
  // The turn that gives another one room, and the barrier that says so.
  static __device__ __forceinline__ int room_of(int turn) {
    return (turn - kOwnTurns) / kRoomOfTurn;
  }
  static __device__ __forceinline__ u64* has_room(Arrivals& arrived, int turn, int group) {
    bool of_held = kHolds && turn - kOwnTurns < kTilesOfStep;  // of the first weights
    return of_held ? arrived.held + group : arrived.used + room_of(turn) * kGroups + group;
  }
  static __device__ __forceinline__ float* own(int group, int token) {
    return (float*)weight_tiles() + (group * kTokens + token) * kLdSum;
  }
  // From the block whose rank is so much higher, around the end.
  static __device__ __forceinline__ float* sent(int distance, int token) {
    return own(kGroups, 0) + ((distance - 1) * kShare + token) * kFeatures;
  }

  static __device__ __forceinline__ void begin(const TensorMap& map, Arrivals& arrived) {
    if (threadIdx.x == kThreads) {
      fetch_map(&map);
      for (int i = 0; i < kSteps; i++) {
        barrier_init(arrived.weights + i);
        barrier_init(arrived.tokens + i);
        barrier_init(arrived.used + i, kThreads / 32 / kGroups);
        barrier_expect(arrived.weights + i, kStepBytes);
        barrier_expect(arrived.tokens + i, kTokenTileBytes);
      }
      for (int i = 0; i < kGroups; i++) barrier_init(arrived.held + i, kThreads / 32 / kGroups);
      barrier_init(&arrived.sums);
      if (kSplit > 1) barrier_expect(&arrived.sums, (kSplit - 1) * kShare * kFeatures * 4);
      barrier_init_done();
    }
    __syncthreads();  // the barriers exist
  }

  static __device__ __forceinline__ bool brings() { return threadIdx.x >= kThreads; }

  // Bring the block's weights, then the tokens that take the place of others.
  static __device__ __forceinline__ void bring(const bf16* packed, const TensorMap& map,
                                               Arrivals& arrived) {
    if (!elected()) return;
    const char* source = (const char*)packed + (size_t)block() * kSteps * kStepBytes;
    for (int i = 0; i < kSteps; i++) {
      if (i >= kInFlight) barrier_wait(arrived.weights + i - kInFlight);
      copy_bulk(weight_tiles() + i * kStepBytes, source + i * kStepBytes, kStepBytes, arrived.weights + i);
    }
    if (kStages == kSteps) return;
    wait_for_previous();
    for (int i = kStages; i < kSteps; i++) {
      int turn = i / kGroups, group = i % kGroups;
      barrier_wait(has_room(arrived, turn, group));
      load_tile(tokens_of(turn, group), &map, column_at(i), 0, arrived.tokens + i);
    }
  }

  // The thread's warp. The shuffle tells the compiler that the threads of a warp agree.
  static __device__ __forceinline__ int warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

  // Wait for the kernel before this one and ask for its tokens (HORIZON, kStride), of which the map
  // has boxes of kTokens rows.
  static __device__ __forceinline__ void start(const TensorMap& map, Arrivals& arrived, int warp) {
    int first = min(warp, kStages - 1), column = column_at(first);
    char* target = first_tokens(first);
    u64* barrier = arrived.tokens + first;
    settle_shared(target), settle_shared(barrier), settle(column);  // are there before the wait
    wait_for_previous();
    if (warp < kStages && elected()) {
      load_tile(target, &map, column, 0, barrier);
      for (int i = warp + kWarps; kStages > kWarps && i < kStages; i += kWarps)
        load_tile(first_tokens(i), &map, column_at(i), 0, arrived.tokens + i);
    }
  }

  // Multiply, do something else while the last products are under way, and leave the sums of the
  // block's tokens for sum().
  template <class Meanwhile>
  static __device__ __forceinline__ void multiply(Arrivals& arrived, int warp,
                                                  const Meanwhile& meanwhile) {
    int half = warp / 4, lane = threadIdx.x % 32;
    int group = kGroups == 2 ? half : 0;
    const char* weights = weight_tiles() + (kGroups == 2 ? 0 : half * kWeightTileBytes);
    float acc[kTokens / 2] = {};
    u32 held[kStepColumns / 16][4];
    if (kHolds) {
      barrier_wait(arrived.weights + group);
      hold(held, weights + group * kStepBytes, warp);
      if (lane == 0) barrier_arrive(arrived.held + group);
    }
#pragma unroll
    for (int i = 0; i < kTurns; i++) {
      int step = i * kGroups + group;
      if (!kHolds || i > 0) barrier_wait(arrived.weights + step);
      barrier_wait(arrived.tokens + step);
      u64 a = tile_operand(weights + step * kStepBytes), b = tile_operand(tokens_of(i, group));
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kStepColumns / 16; k++) {
        if (kHolds && i == 0) wgmma<kTokens>(acc, held[k], b + k * 2);
        else wgmma<kTokens>(acc, a + k * 2, b + k * 2);
      }
      wgmma_commit();
      if (i < kGivenBack) {
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(arrived.used + step);
      }
    }
    meanwhile();
    wgmma_wait<0>(acc);
    if (kSplit > 1) cluster_arrive_relaxed();  // nothing of this thread's is read any more
    named_barrier(1, kThreads);  // all tiles are read; the sums take their place
    keep(acc, group, kGroups == 2 ? 0 : half * 64);
    named_barrier(1, kThreads);
    if constexpr (kSplit > 1) exchange(arrived, warp);
  }

  // A warp's 16 rows of a tile of weights, as wgmma takes them from registers.
  static __device__ __forceinline__ void hold(u32 (&held)[kStepColumns / 16][4], const char* tile,
                                              int warp) {
    int lane = threadIdx.x % 32, row = warp % 4 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < kStepColumns / 16; k++)
      load_matrix4(held[k], tile + row * 128 + ((k * 2 + lane / 16) ^ (row % 8)) * 16);
    wait_for_loads(held);  // before it is said that tokens may take their place
    __syncwarp();
  }

  static __device__ __forceinline__ void keep(const float (&acc)[kTokens / 2], int group,
                                              int feature0) {
    int lane = threadIdx.x % 32, row = feature0 + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; i++)
      own(group, i / 4 * 8 + lane % 4 * 2 + i % 2)[row + i / 2 % 2 * 8] = acc[i];
  }

  // Send every block of the cluster the sums of its tokens, with those behind the last one too.
  // Warps send to several blocks at the same time if they suffice for that.
  static __device__ __forceinline__ void exchange(Arrivals& arrived, int warp) {
    constexpr int kItems = kShare * kQuads;  // for a block
    constexpr int kTeams = kItems > 128 ? 1 : kItems > 64 ? 2 : kItems > 32 ? 4 : 8;
    constexpr int kTeam = kThreads / kTeams;  // threads
    constexpr int kTurns = (kSplit - 2 + kTeams) / kTeams, kOfTurn = (kItems + kTeam - 1) / kTeam;
    int team = warp / (kTeam / 32), mate = threadIdx.x % kTeam;
    float4 values[kTurns][kOfTurn];
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
#pragma unroll
      for (int j = 0; j < kOfTurn; j++) {
        int i = min(j * kTeam + mate, kItems - 1);
        int token = rank_below(1 + turn * kTeams + team) * kShare + i / kQuads;
        values[turn][j] = of_block<float4>(token, i % kQuads * 4);
      }
    cluster_wait();  // the others have read their tiles, and their barriers count
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      int distance = 1 + turn * kTeams + team;
      if (distance >= kSplit) break;
      ClusterAddress there = address_in_block(sent(distance, 0), rank_below(distance));
      ClusterAddress barrier = address_in_block(&arrived.sums, rank_below(distance));
#pragma unroll
      for (int j = 0; j < kOfTurn; j++)
        if (j * kTeam + mate < kItems)
          send(there + (j * kTeam + mate) * 16, barrier, values[turn][j]);
    }
    barrier_wait_cluster(&arrived.sums);
  }
  // The rank that is so much lower, around the end.
  static __device__ __forceinline__ int rank_below(int distance) {
    return (u32)(rank() - distance) % kSplit;
  }

  // Two or four neighbouring features of a token, summed over this block's part of K.
  template <class Values>
  static __device__ __forceinline__ Values of_block(int token, int feature) {
    Values total = *(const Values*)(own(0, token) + feature);
    if (kGroups == 1) return total;
    return add(total, *(const Values*)(own(1, token) + feature));
  }
  static __device__ __forceinline__ float2 add(float2 a, float2 b) {
    return make_float2(a.x + b.x, a.y + b.y);
  }
  static __device__ __forceinline__ float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }

  // The same of the i-th of the block's tokens over the whole cluster, all of K.
  template <class Values>
  static __device__ __forceinline__ Values sum(int i, int feature) {
    Values total = of_block<Values>(token0() + i, feature);
#pragma unroll
    for (int distance = 1; distance < kSplit; distance++)
      total = add(total, *(const Values*)(sent(distance, i) + feature));
    return total;
  }
};

#endif
