// A product with tensor copies and warpgroups, as tile_on_cpu.h has to run it.
#include "hopper.cuh"

DYNAMIC_SHARED(shared_memory);

// What a kernel can forget; nothing in the kernel that is right.
enum Mistake {
  kNone, kNoWaitForTiles, kNoWaitForRoom, kRoomTooEarly, kRoomOfOwnBlock, kNoCommit,
  kNoWaitForSums, kLeaveEarly, kNoBarriersYet, kTooFewBytes, kMissedPhase
};

constexpr int kRows = 64, kColumns = 128, kDepth = 64, kStages = 2, kConsumers = 128;
constexpr int kTileA = kRows * kDepth * 2, kTileB = kColumns * kDepth * 2;
constexpr int kStage = kTileA + kTileB;

struct Shared {
  u64 *full, *empty;
  unsigned char* stages;
};

// One warp brings the tiles; each block of the cluster brings half of b for both.
__device__ __forceinline__ void produce(const Shared& s, const TensorMap* a, const TensorMap* b,
                                        int row, int column, int depth, int mistake) {
  if (threadIdx.x % 32) return;
  for (int step = 0; step * kDepth < depth; step++) {
    int stage = step % kStages, half = cluster_rank() * kTileB / 2;
    unsigned char* tiles = s.stages + stage * kStage;
    if (mistake != kNoWaitForRoom) barrier_wait(s.empty + stage, step / kStages % 2 ^ 1);
    barrier_expect(s.full + stage, mistake == kTooFewBytes ? kStage - 128 : kStage);
    load_tile(tiles, a, step * kDepth, row, s.full + stage);
    load_tile(tiles + kTileA + half, b, step * kDepth, column + half / 128, s.full + stage, 3);
  }
}

// Tells the blocks that write into a stage that this warp has read it.
__device__ __forceinline__ void give_back(const Shared& s, int step, int mistake) {
  if (step < 0 || threadIdx.x % 32) return;
  barrier_arrive(s.empty + step % kStages);
  if (mistake != kRoomOfOwnBlock)
    barrier_arrive(s.empty + step % kStages, cluster_rank() ^ 1);
}

__device__ __forceinline__ void multiply(const Shared& s, float (&acc)[kColumns / 2], int depth,
                                         int mistake) {
  int step = 0;
  for (; step * kDepth < depth; step++) {
    unsigned char* tiles = s.stages + step % kStages * kStage;
    bool waits = mistake != kNoWaitForTiles && !(mistake == kMissedPhase && step == 1);
    if (waits) barrier_wait(s.full + step % kStages, step / kStages % 2);
    u64 a = tile_operand(tiles), b = tile_operand(tiles + kTileA);
    wgmma_begin();
    for (int k = 0; k < kDepth / 16; k++) wgmma<kColumns>(acc, a + k * 2, b + k * 2);
    if (mistake != kNoCommit) wgmma_commit();
    if (mistake == kRoomTooEarly) {
      __syncwarp();
      give_back(s, step, mistake);
      continue;
    }
    wgmma_wait<1>();
    give_back(s, step - 1, mistake);
  }
  if (mistake != kNoWaitForSums) wgmma_wait<0>();
}

__device__ __forceinline__ void store(bf16* c, int rows, int columns,
                                      const float (&acc)[kColumns / 2], int row, int column) {
  int lane = threadIdx.x % 32;
  for (int i = 0; i < kColumns / 4; i++) {
    int r = row + threadIdx.x / 32 * 16 + lane / 4 + i % 2 * 8, at = column + i / 2 * 8 + lane % 4 * 2;
    if (r < rows && at < columns)
      *(u32*)(c + (size_t)r * columns + at) = pack(acc[i * 2], acc[i * 2 + 1]);
  }
}

// c = a b^T; the blocks of a cluster have the same columns of c and neighbouring rows.
extern "C" __global__ void __launch_bounds__(kConsumers + 32) product(
    const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
    bf16* c, int rows, int columns, int depth, int mistake) {
  __shared__ u64 full[kStages], empty[kStages];
  Shared s = {full, empty, (unsigned char*)(((u64)shared_memory + 1023) / 1024 * 1024)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, mistake == kRoomOfOwnBlock ? 4 : 8);
    }
    barrier_init_done();
  }
  if (mistake == kNoBarriersYet) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  int column_tiles = (columns + kColumns - 1) / kColumns;
  int pair = blockIdx.x / 2, column = pair % column_tiles * kColumns;
  int row = (pair / column_tiles * 2 + cluster_rank()) * kRows;
  if (threadIdx.x >= kConsumers) {
    fewer_registers<24>();
    produce(s, &a, &b, row, column, depth, mistake);
  } else {
    more_registers<240>();
    float acc[kColumns / 2] = {};
    multiply(s, acc, depth, mistake);
    store(c, rows, columns, acc, row, column);
  }
  if (mistake == kLeaveEarly) return;
  cluster_arrive();
  cluster_wait();
}

// c (64 x 128) = a (64 x 32) b with a in registers. b has a row per K, or is there as its transpose;
// `early` overwrites a while it may still be read.
extern "C" __global__ void __launch_bounds__(128) product_of_registers(
    const bf16* a, const __grid_constant__ TensorMap b, float* c, int row_per_k, int early) {
  __shared__ u64 full;
  unsigned char* tiles = (unsigned char*)(((u64)shared_memory + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    barrier_init_done();
    barrier_expect(&full, row_per_k ? 2 * 32 * 128 : 128 * 128);
    load_tile(tiles, &b, 0, 0, &full);
    if (row_per_k) load_tile(tiles + 32 * 128, &b, 64, 0, &full);
  }
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  u32 of_a[2][4];
  for (int i = 0; i < 8; i++)
    of_a[i / 4][i % 4] = *(const u32*)(a + (row + i % 2 * 8) * 32 + i / 2 * 8 + lane % 4 * 2);
  __syncthreads();
  barrier_wait(&full, 0);
  float acc[64] = {};
  wgmma_begin();
  for (int k = 0; k < 2; k++)
    if (row_per_k)
      wgmma_rows<128>(acc, of_a[k], rows_operand(tiles, 32 * 128) + k * 128);
    else
      wgmma<128>(acc, of_a[k], tile_operand(tiles) + k * 2);
  wgmma_commit();
  if (early) of_a[0][0] = of_a[1][3] = 0x7fc07fc0;  // NaN
  wgmma_wait<0>(acc);
  for (int i = 0; i < 64; i++)
    c[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

// A warp loads 16 rows of 16 and arrives; others take their place when it has.
extern "C" __global__ void __launch_bounds__(64) tile_after_loads(
    const __grid_constant__ TensorMap a, bf16* c, int wait) {
  __shared__ u64 full[2], held;
  unsigned char* tile = (unsigned char*)(((u64)shared_memory + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) barrier_init(full + i, 1);
    barrier_init(&held, 1);
    barrier_init_done();
    for (int i = 0; i < 2; i++) barrier_expect(full + i, 16 * 128);
    load_tile(tile, &a, 0, 0, full);
  }
  __syncthreads();
  if (threadIdx.x >= 32) {
    if (!elected()) return;
    barrier_wait(&held, 0);
    load_tile(tile, &a, 0, 16, full + 1);
    return;
  }
  u32 of_a[1][4];
  int lane = threadIdx.x, row = lane % 16;
  barrier_wait(full, 0);
  load_matrix4(of_a[0], tile + row * 128 + (lane / 16 ^ row % 8) * 16);
  if (wait) wait_for_loads(of_a);
  __syncwarp();
  if (lane == 0) barrier_arrive(&held);
  barrier_wait(full + 1, 0);
  for (int i = 0; i < 4; i++)
    *(u32*)(c + (lane / 4 + i % 2 * 8) * 16 + i / 2 * 8 + lane % 4 * 2) = of_a[0][i];
}

// The operand begins in the middle of eight rows.
extern "C" __global__ void __launch_bounds__(128) misplaced_rows() {
  float acc[32] = {};
  u32 a[4] = {};
  const void* tile = (const void*)(((u64)shared_memory + 1023) / 1024 * 1024);
  wgmma_begin();
  wgmma_rows<64>(acc, a, rows_operand(tile, 1024) + 32);
  wgmma_commit();
  wgmma_wait<0>();
}

// The same of a narrow tile.
extern "C" __global__ void __launch_bounds__(128) misplaced_narrow_rows() {
  float acc[8] = {};
  u32 a[4] = {};
  const void* tile = (const void*)(((u64)shared_memory + 1023) / 1024 * 1024);
  wgmma_begin();
  wgmma_rows<16>(acc, a, narrow_operand(tile) + 8);
  wgmma_commit();
  wgmma_wait<0>();
}

extern "C" __global__ void __launch_bounds__(128) three_warps() {
  float acc[4] = {};
  u64 tile = tile_operand((const void*)(((u64)shared_memory + 1023) / 1024 * 1024));
  wgmma_begin();
  if (threadIdx.x >= 32) wgmma<8>(acc, tile, tile);
  wgmma_commit();
  wgmma_wait<0>();
}
