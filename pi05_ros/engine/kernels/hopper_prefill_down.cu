// out = x weight^T + residual on a Hopper GPU's tensor cores: the down projection of the prefill,
// whose K is long. Plain twin: linear_plain (cublaslt.py).
//
// A block has FEATURES by TOKENS of the result and a part of K; the SPLIT blocks of a cluster have
// the same ones and all of K. In the end each block finishes some of the tokens: all send it their
// sums, thread by thread, for threads of the same number have sums of the same elements. They take
// the place of the ring.
//
// The rows of the weight are in an order that gives a thread neighbouring features to write at once
// (hopper_vision_product.order_features). They depend on no kernel: the first ones travel before the
// wait for the kernel before.
#include "hopper_prefill_product.cuh"

static_assert(CLUSTER == 1, "blocks of a cluster share no weights");
constexpr int kGroups = TOKENS / 8;                    // of 8 tokens
constexpr int kShare = (kGroups + SPLIT - 1) / SPLIT;  // groups that a block finishes
constexpr int kSums = kShare * kParts * kMultiplying;  // float4 that a block gets from each
static_assert(SPLIT * kSums * 16 <= STAGES * kStageBytes, "the sums take the place of the ring");

// What one thread of the block `rank` of the cluster has of a group of the block that gets it.
__device__ __forceinline__ float4* sums_of(int rank, int group, int part) {
  return (float4*)stage_memory(0) + rank * kSums + (group * kParts + part) * kMultiplying +
         threadIdx.x;
}
// The groups of a block of the cluster; the last blocks may have fewer or none.
__device__ __forceinline__ int groups_of(int rank) {
  return max(min(kGroups - rank * kShare, kShare), 0);
}

// Bring a block's part of K.
__device__ __forceinline__ void bring(const TensorMap& x, const TensorMap& weight, const Tile& tile,
                                      int begin, int end, Barriers& barriers) {
  int ahead = min(STAGES, end - begin);
  for (int i = 0; i < ahead; i++) {
    barrier_expect(barriers.full + i, kStageBytes);
    int column = (begin + i) * kDepth;
    bring_features(weight, column, tile.feature0, stage_memory(i), barriers.full + i);
  }
  wait_for_previous();
  for (int i = 0; i < ahead; i++)
    bring_tokens(x, (begin + i) * kDepth, tile.token0, stage_memory(i), barriers.full + i);
  Place place;  // the ring is full, which is its first round
  bring_tile(x, weight, tile, begin + ahead, end, barriers, place);
}

// Give every block of the cluster the sums of its tokens. The others have read their rings, and
// their barriers count.
__device__ __forceinline__ void send_sums(const Sums& sums, int rank, u64* arrived) {
#pragma unroll
  for (int group = 0; group < kGroups; group++) {
    int owner = group / kShare;
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      const float* v = sums.acc[part] + group * 4;
      float4 values = make_float4(v[0], v[1], v[2], v[3]);
      float4* there = sums_of(rank, group % kShare, part);
      if (owner == rank)
        *there = values;
      else
        send(address_in_block(there, owner), address_in_block(arrived, owner), values);
    }
  }
}

// Where a thread reads and writes: four features of a token of each group and part.
struct Corner {
  size_t first;
  int token, rows, width;

  __device__ __forceinline__ Corner(const Tile& tile, int group0, int rows, int width)
      : rows(rows), width(width) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    token = tile.token0 + group0 * 8 + lane / 4;
    int feature = tile.feature0 + warp / 4 * (64 * kParts) + warp % 4 * 16 + lane % 4 * 4;
    first = (size_t)token * width + feature;
  }
  __device__ __forceinline__ bool inside(int group) const { return token + group * 8 < rows; }
  __device__ __forceinline__ size_t at(int group, int part) const {
    return first + (size_t)(group * 8) * width + part * 64;
  }
};

// The sums of a thread: features l / 4 and l / 4 + 8 of 16, two tokens of 8. The residual comes as
// four features of a token, which is the same transposed.
__device__ __forceinline__ uint2 add_residual(float4 v, uint2 residual) {
  u32 x = transpose8(residual.x), y = transpose8(residual.y);
  return make_uint2(transpose8(pack(v.x + low(x), v.y + high(x))),
                    transpose8(pack(v.z + low(y), v.w + high(y))));
}

__device__ __forceinline__ void finish(const bf16* residual, bf16* out, const Corner& place,
                                       int groups, u64* arrived) {
  uint2 old[kShare][kParts];
#pragma unroll
  for (int group = 0; group < kShare; group++)
#pragma unroll
    for (int part = 0; part < kParts; part++)
      old[group][part] = place.inside(group) ? *(const uint2*)(residual + place.at(group, part))
                                             : make_uint2(0, 0);
  if (SPLIT > 1) barrier_wait_cluster(arrived);
#pragma unroll
  for (int group = 0; group < kShare; group++) {
    if (group >= groups) break;
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      float4 total = *sums_of(0, group, part);
#pragma unroll
      for (int rank = 1; rank < SPLIT; rank++) {
        float4 more = *sums_of(rank, group, part);
        total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z,
                            total.w + more.w);
      }
      uint2 words = add_residual(total, old[group][part]);
      if (place.inside(group)) *(uint2*)(out + place.at(group, part)) = words;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) prefill_down(
    const __grid_constant__ TensorMap x,       // (rows, depth), boxes of TOKENS rows
    const __grid_constant__ TensorMap weight,  // (features, depth) ordered, boxes of FEATURES rows
    const bf16* residual,                      // (rows, features); may be out
    bf16* out, int rows, int features, int depth) {
  __shared__ Barriers barriers;
  __shared__ u64 arrived;  // the sums of the others
  let_next_start();
  int rank = blockIdx.x % SPLIT, own_groups = groups_of(rank);
  if (SPLIT > 1 && threadIdx.x == 0) {
    barrier_init(&arrived);
    barrier_expect(&arrived, (SPLIT - 1) * own_groups * kParts * kMultiplying * 16);
  }
  begin_ring(x, weight, barriers);
  Tile tile = Tiles(rows, features).tile(blockIdx.x / SPLIT);
  int steps = depth / kDepth, begin = steps * rank / SPLIT, end = steps * (rank + 1) / SPLIT;
  if (threadIdx.x >= kMultiplying) {
    fewer_registers<40>();
    if (brings()) bring(x, weight, tile, begin, end, barriers);
    __syncwarp();
    if (SPLIT > 1) {
      cluster_arrive_relaxed();
      cluster_wait();
    }
  } else {
    more_registers<232>();
    Place place;
    Sums sums;
    multiply_tile(sums, end - begin, barriers, place);
    // The ring is read: the sums take its place.
    if (SPLIT > 1) {
      cluster_arrive_relaxed();
      cluster_wait();
    } else {
      named_barrier(1, kMultiplying);
    }
    send_sums(sums, rank, &arrived);
    wait_for_previous();
    Corner at(tile, rank * kShare, rows, features);
    finish(residual, out, at, own_groups, &arrived);
  }
}
