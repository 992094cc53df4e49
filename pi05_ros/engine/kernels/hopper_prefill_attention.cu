// Attention of the prefix on a Hopper GPU's tensor cores: all heads share one K/V head of 256
// columns, the number of keys is on the device. Plain twin: prefill_attention_plain.
//
// Queries are packed as rows (position, head). Two warpgroups of a block multiply, 64 queries each.
// Either they have the same queries and every other tile of keys (BLOCK_SPLITS = 2); or each has
// queries of its own, and blocks of a cluster divide the keys (CLUSTER_SPLITS): then half as many
// bytes come into a multiprocessor, and sums cross the cluster at the end. SHARERS blocks that have
// the same keys and other queries each bring a share of them, once from L2 into all; so do blocks
// that have the same queries.
//
// While the tensor cores multiply weights and values of one tile of KEYS keys, the warpgroup turns
// the next one's scores into weights, and the other warpgroup is at another point of the same.
#include "hopper_prefill_sums.cuh"

constexpr int kThreads = 128 * kConsumers + 128, kCluster = CLUSTER_SPLITS * SHARERS;
constexpr int kQueryTiles = kConsumers / BLOCK_SPLITS, kBlockQueries = kQueries * kQueryTiles;
constexpr int kColumnTiles = kDim / 64;
constexpr int kQueryTileBytes = kQueries * 128, kQueryBytes = kColumnTiles * kQueryTileBytes;
constexpr int kKeyTileBytes = KEYS * 128, kStageBytes = kColumnTiles * kKeyTileBytes;
constexpr int kShare = KEYS / SHARERS;  // the keys of a tile that a block brings
// The queries' place serves for what other blocks send as soon as the last scores are there.
constexpr bool kFitsQueries = kParts * kPartBytes <= kQueryTiles * kQueryBytes;
static_assert(kShare % 8 == 0 && KEYS % 16 == 0, "shares keep the swizzle's period");
static_assert(STAGES >= 2 * BLOCK_SPLITS, "a warpgroup holds values while it waits for keys");
static_assert(kParts * kPartBytes <= kQueryTiles * kQueryBytes + STAGES * kStageBytes, "room");

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* query_memory(int tile) {
  return (char*)shared_memory + (0 - (u64)shared_memory) % 1024 + tile * kQueryBytes;
}
__device__ __forceinline__ char* stage_memory(int stage) {
  return query_memory(kQueryTiles) + stage * kStageBytes;
}

// A place in the ring of stages. Keys and values come in rounds, in the order in which they are
// used: for each warpgroup with keys of its own its next keys, then the values before them.
struct Ring {
  u64 *full, *empty;
  int stage, parity;

  __device__ __forceinline__ int take() {
    int taken = stage;
    skip(1);
    return taken;
  }
  __device__ __forceinline__ void skip(int stages) {
    stage += stages;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full + stage, parity); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty + stage, parity ^ 1); }
  // Says to all who bring a part of a stage that this warp has read it.
  __device__ __forceinline__ void give_back(int taken, int first_sharer) const {
    int lane = threadIdx.x % 32;
    if (SHARERS == 1 && lane == 0) barrier_arrive(empty + taken);
    if (SHARERS > 1 && lane < SHARERS) barrier_arrive(empty + taken, first_sharer + lane);
  }
};

struct Work {
  int split, sharer, query0, key0, key_end, tiles, rows;

  __device__ __forceinline__ Work() {
    int rank = kCluster > 1 ? cluster_rank() : 0;
    split = rank / SHARERS, sharer = rank % SHARERS;
    query0 = (blockIdx.x / kCluster * SHARERS + sharer) * kBlockQueries;
  }
  // Returns whether a block of this cluster has valid queries.
  __device__ __forceinline__ bool divide(int valid, int heads) {
    key0 = valid * split / CLUSTER_SPLITS / 16 * 16;
    key_end = split + 1 < CLUSTER_SPLITS ? valid * (split + 1) / CLUSTER_SPLITS / 16 * 16 : valid;
    tiles = (key_end - key0 + KEYS - 1) / KEYS;
    rows = valid * heads;
    return query0 - sharer * kBlockQueries < rows;
  }
  // A warpgroup's tiles of keys, and where its i-th one begins.
  __device__ __forceinline__ int tiles_of(int consumer) const {
    return BLOCK_SPLITS == 1 ? tiles : (tiles + 1 - consumer) / 2;
  }
  __device__ __forceinline__ int first_key(int consumer, int i) const {
    return key0 + (BLOCK_SPLITS == 1 ? i : 2 * i + consumer) * KEYS;
  }
  // The stages that are a warpgroup's in a round.
  __device__ __forceinline__ int stages_of(int consumer, int round) const {
    int own = tiles_of(consumer);
    return (round < own) + (round > 0 && round <= own);
  }
};

struct Producer {
  const TensorMap *q, *keys, *values;
  Ring ring;
  u64* first;   // for the columns of the first queries and keys: products begin with the first ones
  u64* second;  // for the other queries
  int split, sharer;

  // Blocks with the same queries each bring a share of the columns.
  __device__ __forceinline__ void bring_queries(int tile, int query0) {
    if (tile > 0) barrier_expect(second, kQueryBytes);
    unsigned short blocks = 0;
    for (int i = 0; i < CLUSTER_SPLITS; i++) blocks |= 1 << i * SHARERS;
    blocks <<= sharer;
#pragma unroll 1
    for (int i = 0; i < kColumnTiles; i++) {
      u64* full = tile > 0 ? second : first + i;
      if (tile == 0) barrier_expect(full, kQueryTileBytes);
      if (i % CLUSTER_SPLITS != split) continue;
      char* target = query_memory(tile) + i * kQueryTileBytes;
      if (CLUSTER_SPLITS == 1)
        load_tile(target, q, i * 64, query0 + tile * kQueries, full);
      else
        load_tile(target, q, i * 64, query0 + tile * kQueries, full, blocks);
    }
  }
  __device__ __forceinline__ void bring(const TensorMap* map, int first_key, bool by_columns) {
    ring.wait_empty();
    int stage = ring.take();
    if (by_columns)
      barrier_arrive(ring.full + stage);
    else
      barrier_expect(ring.full + stage, kStageBytes);
#pragma unroll 1
    for (int i = 0; i < kColumnTiles; i++) {
      u64* full = by_columns ? first + i : ring.full + stage;
      if (by_columns) barrier_expect(full, kKeyTileBytes);
      char* target = stage_memory(stage) + i * kKeyTileBytes + sharer * kShare * 128;
      int row = first_key + sharer * kShare;
      if (SHARERS == 1) {
        load_tile(target, map, i * 64, row, full);
      } else {
        unsigned short blocks = ((1 << SHARERS) - 1) << split * SHARERS;
        load_tile(target, map, i * 64, row, full, blocks);
      }
    }
  }
  __device__ __forceinline__ void bring_no_first_keys() {
    for (int i = 0; i < kColumnTiles; i++) barrier_arrive(first + i);
  }
  // All but the first queries, which are on their way while the count comes.
  __device__ __forceinline__ void run(const Work& work) {
    if (work.tiles == 0) bring_no_first_keys();
#pragma unroll 1
    for (int round = 0; round <= work.tiles_of(0); round++) {
#pragma unroll 1
      for (int consumer = 0; consumer < BLOCK_SPLITS; consumer++) {
        int own = work.tiles_of(consumer);
        if (round < own) bring(keys, work.first_key(consumer, round), round + consumer == 0);
        if (round > 0 && round <= own) bring(values, work.first_key(consumer, round - 1), false);
      }
      if (round == 0 && kQueryTiles == 2) bring_queries(1, work.query0);
    }
  }
  // Nothing may be on its way into the memory of a block that ends.
  __device__ __forceinline__ void end_without_work() {
    bring_no_first_keys();
    for (int i = 0; i < kColumnTiles; i++) barrier_wait(first + i, 0);
  }
};

// A warpgroup's 64 queries as an operand. The first HELD steps of 16 columns are in registers: with
// both operands of narrow products in shared memory, that delivers hardly as fast as they multiply.
struct Queries {
  const char* memory;
  u32 held[HELD > 0 ? HELD : 1][4];

  __device__ __forceinline__ u64 operand(int step) const {
    return tile_operand(memory) + step / 4 * (kQueryTileBytes / 16) + step % 4 * 2;
  }
  static __device__ __forceinline__ u64 operand(u64 keys, int step) {
    return keys + step / 4 * (kKeyTileBytes / 16) + step % 4 * 2;
  }
  __device__ __forceinline__ void hold() {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < HELD; step++) {
      int chunk = (step % 4 * 2 + lane / 16) ^ row % 8;
      load_matrix4(held[step], memory + step / 4 * kQueryTileBytes + row * 128 + chunk * 16);
    }
  }
  // scores (64 x KEYS) = queries keys^T, in the background; of columns as they come, in shared
  // memory.
  __device__ __forceinline__ void begin_first_scores(float (&scores)[KEYS / 2], u64 keys,
                                                     u64* columns) const {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) scores[i] = 0.f;
#pragma unroll
    for (int i = 0; i < kColumnTiles; i++) {
      barrier_wait(columns + i, 0);
      wgmma_begin();
#pragma unroll
      for (int step = i * 4; step < i * 4 + 4; step++)
        wgmma<KEYS>(scores, operand(step), operand(keys, step));
    }
    wgmma_commit();
  }
  // The same where all is there.
  __device__ __forceinline__ void begin_scores(float (&scores)[KEYS / 2], u64 keys) const {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) scores[i] = 0.f;
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kDim / 16; i++) {
      int step = (i + HELD) % (kDim / 16);  // held ones last: the first need not add to zeros then
      if (step < HELD)
        wgmma<KEYS>(scores, held[step], operand(keys, step));
      else
        wgmma<KEYS>(scores, operand(step), operand(keys, step));
    }
    wgmma_commit();
  }
};

// out (64 x 256) += weights values, in the background.
__device__ __forceinline__ void begin_sums(float (&out)[kDim / 2],
                                           const u32 (&weights)[KEYS / 16][4], u64 values) {
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) wgmma_rows<kDim>(out, weights[k], values + k * 128);
  wgmma_commit();
}
// The same for a last tile, where the weights are 0 from the key `valid` on.
__device__ __forceinline__ void begin_last_sums(float (&out)[kDim / 2],
                                                const u32 (&weights)[KEYS / 16][4], u64 values,
                                                int valid) {
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) {
    if (k * 16 >= valid) continue;
    wgmma_begin();  // after a branch once more
    wgmma_rows<kDim>(out, weights[k], values + k * 128);
  }
  wgmma_commit();
}

// A warpgroup's sums over its keys. Weights are computed while products are under way: keep_order
// and the loop of a barrier's wait keep the compiler from moving that behind the wait for products.
struct Consumer {
  const Work& work;
  Ring ring;
  int consumer, tiles, first_sharer;

  // To this warpgroup's stages of the next round.
  __device__ __forceinline__ void end_round(int round) {
    if (BLOCK_SPLITS == 2)
      ring.skip(consumer == 0 ? work.stages_of(1, round) : work.stages_of(0, round + 1));
  }
  __device__ __forceinline__ void run(float (&sums)[kDim / 2], Rows& rows, Queries queries,
                                      u64* first, float scale) {
    float scores[KEYS / 2];
    u32 weights[KEYS / 16][4];
    int valid = work.key_end - work.first_key(consumer, 0);  // keys from this tile on
    if (tiles > 0) {
      if (BLOCK_SPLITS == 2 && consumer == 1) ring.skip(work.stages_of(0, 0));
      ring.wait_full();
      int of_keys = ring.take();
      queries.begin_first_scores(scores, tile_operand(stage_memory(of_keys)), first);
      queries.hold();
      wgmma_wait<0>(scores);
      ring.give_back(of_keys, first_sharer);
      rows.weigh(scores, scale, valid);
      round_weights(weights, scores);
      end_round(0);
      ring.wait_full();
    }
    for (int i = 1; i < tiles; i++) {
      int of_keys = ring.take();
      queries.begin_scores(scores, tile_operand(stage_memory(of_keys)));
      ring.wait_full();
      int of_values = ring.take();
      scale_rows(sums, rows.decay);
      begin_sums(sums, weights, rows_operand(stage_memory(of_values), kKeyTileBytes));
      wgmma_wait<1>(scores);
      ring.give_back(of_keys, first_sharer);
      rows.weigh(scores, scale, valid - i * KEYS * BLOCK_SPLITS);
      keep_order(scores);
      end_round(i);
      ring.wait_full();
      wgmma_wait<0>(sums);
      ring.give_back(of_values, first_sharer);
      round_weights(weights, scores);
    }
    if (kAcross && kFitsQueries) cluster_arrive();  // the queries are read
    if (tiles > 0) {
      int of_values = ring.take();
      scale_rows(sums, rows.decay);
      begin_last_sums(sums, weights, rows_operand(stage_memory(of_values), kKeyTileBytes),
                      valid - (tiles - 1) * KEYS * BLOCK_SPLITS);
      rows.gather_totals();
      wgmma_wait<0>(sums);
    }
  }
};

// Peers send where nobody reads any more.
__device__ __forceinline__ void wait_before_sending() {
  if (kAcross && !kFitsQueries) cluster_arrive();
  if (kAcross) cluster_wait();
  if (BLOCK_SPLITS == 2) named_barrier(1, 128 * kConsumers);
}
__device__ __forceinline__ void wait_for_peers(u64* arrived) {
  if (kAcross) barrier_wait(arrived, 0);
  if (BLOCK_SPLITS == 2) named_barrier(1, 128 * kConsumers);
}

__device__ __forceinline__ void consume(const Work& work, const Producer& producer,
                                        uint4 (*stats)[kRowPairs], u64* arrived, float scale,
                                        bf16* out) {
  // The shuffle tells the compiler that a warp's threads agree.
  int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0), tile = consumer / BLOCK_SPLITS;
  float sums[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; i++) sums[i] = 0.f;
  Rows rows;
  if (tile > 0) barrier_wait(producer.second, 0);
  if (work.tiles == 0)  // nothing else waits for the first queries
    for (int i = 0; i < kColumnTiles; i++) barrier_wait(producer.first + i, 0);
  Consumer own = {work, producer.ring, consumer, work.tiles_of(consumer), work.split * SHARERS};
  own.run(sums, rows, {query_memory(tile)}, producer.first, scale);
  int peer = BLOCK_SPLITS == 2 ? consumer : work.split;
  Exchange exchange = {query_memory(0), stats, arrived + consumer, peer, work.sharer, consumer};
  wait_before_sending();
  exchange.send(sums, rows);
  wait_for_peers(arrived + consumer);
  float factor[kPeers][2];
  exchange.factors(factor, rows, scale);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk++) {
    if (owner_of(chunk) != peer) continue;
    float added[16];
    exchange.add_up(added, sums + chunk * 16, chunk, factor);
    write_chunk(out, added, work.query0 + tile * kQueries + exchange.row(), work.rows, chunk);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) prefill_attention(
    const __grid_constant__ TensorMap q,       // (positions * heads, 256), boxes of 64 rows
    const __grid_constant__ TensorMap keys,    // (>= positions, 256), boxes of kShare rows
    const __grid_constant__ TensorMap values,  // as keys
    const int* count,                          // (1): valid keys and positions
    float scale,                               // of the scores, times log2(e)
    bf16* out,                                 // (positions * heads, 256)
    int heads) {
  __shared__ u64 full[STAGES], empty[STAGES], first[kColumnTiles], second;
  __shared__ u64 arrived[kConsumers];
  __shared__ uint4 stats[kParts > 0 ? kParts : 1][kRowPairs];
  let_next_start();
  Work work;
  if (threadIdx.x == 0) {
    fetch_map(&q), fetch_map(&keys), fetch_map(&values);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kQueryTiles * 4 * SHARERS);  // every consumer warp that reads it
    }
    for (int i = 0; i < kColumnTiles; i++) barrier_init(first + i, 2);  // queries and keys
    barrier_init(&second, 1);
    for (int i = 0; kAcross && i < kConsumers; i++) {
      barrier_init(arrived + i, 1);
      barrier_expect(arrived + i, bytes_from_peers(work.split));
    }
    barrier_init_done();
  }
  if (kCluster > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  Ring ring = {full, empty, 0, 0};
  Producer producer = {&q, &keys, &values, ring, first, &second, work.split, work.sharer};
  wait_for_previous();
  if (threadIdx.x == 128 * kConsumers) producer.bring_queries(0, work.query0);
  __syncwarp();
  if (!work.divide(__ldcg(count), heads)) {
    if (threadIdx.x == 128 * kConsumers) producer.end_without_work();
    return;
  }
  if (threadIdx.x >= 128 * kConsumers) {
    fewer_registers<24>();
    if (threadIdx.x == 128 * kConsumers) producer.run(work);
    __syncwarp();
    if (kAcross) cluster_arrive(), cluster_wait();  // as the consumers do
  } else {
    more_registers<240>();
    consume(work, producer, stats, arrived, scale, out);
  }
  if (!kAcross && SHARERS > 1) {  // nobody leaves while others copy into its shared memory
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}
