// Attention of the prefix on a Hopper GPU's tensor cores: all heads share one K/V head of 256
// columns, the number of keys is on the device. Plain twin: prefill_attention_plain.
//
// Queries are packed as rows (position, head). A block takes 128 of them, 64 per warpgroup, and one
// of SPLITS parts of the keys: what bounds such a kernel is how fast L2 delivers keys and values, so
// each that is brought serves 128 queries. The blocks of a cluster that have the same queries and
// other keys exchange their sums through each other's shared memory at the end; each writes a part
// of the columns. SHARERS blocks that have the same keys and other queries each bring a share of the
// keys, once from L2 into all of them.
//
// While the tensor cores multiply weights and values of one tile of KEYS keys, the warpgroup turns
// the next one's scores into weights, and the other warpgroup is at another point of the same.
#include "hopper_tile.cuh"

constexpr int kDim = 256, kQueries = 64, kConsumers = 2, kThreads = 128 * kConsumers + 128;
constexpr int kCluster = SPLITS * SHARERS, kBlockQueries = kQueries * kConsumers;
constexpr int kColumnTiles = kDim / 64;
constexpr int kQueryTileBytes = kQueries * 128, kQueryBytes = kColumnTiles * kQueryTileBytes;
constexpr int kKeyTileBytes = KEYS * 128, kStageBytes = kColumnTiles * kKeyTileBytes;
constexpr int kShare = KEYS / SHARERS;  // the keys of a tile that a block brings
constexpr int kChunks = kDim / 32;      // of a row: what is exchanged and written at a time
constexpr int kOthers = SPLITS - 1, kMostChunks = (kChunks + SPLITS - 1) / SPLITS;
constexpr int kPartBytes = kMostChunks * 16 * 128 * 4;  // of a warpgroup, from one other block
// The queries' place serves for what other blocks send as soon as the last scores are there.
constexpr bool kFitsQueries = kOthers * kConsumers * kPartBytes <= kConsumers * kQueryBytes;
static_assert(kShare % 8 == 0 && KEYS % 16 == 0, "shares keep the swizzle's period");

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* tile_memory() {
  return (char*)shared_memory + (0 - (u64)shared_memory) % 1024;
}
__device__ __forceinline__ char* query_memory(int consumer) {
  return tile_memory() + consumer * kQueryBytes;
}
__device__ __forceinline__ char* stage_memory(int stage) {
  return tile_memory() + kConsumers * kQueryBytes + stage * kStageBytes;
}

// A ring's next stage; keys and values come in the order in which they are used: the keys of the
// first tile, then those of each next one before the values of the one before it.
struct Stages {
  u64 *full, *empty;
  int stage, parity;

  __device__ __forceinline__ int take() {
    int taken = stage;
    if (++stage == STAGES) stage = 0, parity ^= 1;
    return taken;
  }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full + stage, parity); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty + stage, parity ^ 1); }
  // Says to all who bring a part of a stage that this warp has read it.
  __device__ __forceinline__ void give_back(int taken, int first_sharer) {
    int lane = threadIdx.x % 32;
    if (SHARERS == 1 && lane == 0) barrier_arrive(empty + taken);
    if (SHARERS > 1 && lane < SHARERS) barrier_arrive(empty + taken, first_sharer + lane);
  }
};

struct Work {
  int split, sharer, query0, tile0, tiles, rows, count;

  __device__ __forceinline__ Work(int rank, int valid, int heads) {
    split = rank / SHARERS, sharer = rank % SHARERS;
    query0 = (blockIdx.x / kCluster * SHARERS + sharer) * kBlockQueries;
    int all = (valid + KEYS - 1) / KEYS;
    tile0 = all * split / SPLITS, tiles = all * (split + 1) / SPLITS - tile0;
    rows = valid * heads, count = valid;
  }
};

struct Producer {
  const TensorMap *q, *keys, *values;
  u64* full_queries;
  Stages ring;
  int split, sharer;

  __device__ __forceinline__ void bring_queries(int consumer, int query0) {
    u64* full = full_queries + consumer;
    barrier_expect(full, kQueryBytes);
    for (int i = 0; i < kColumnTiles; i++)
      load_tile(query_memory(consumer) + i * kQueryTileBytes, q, i * 64,
                query0 + consumer * kQueries, full);
  }
  __device__ __forceinline__ void bring(const TensorMap* map, int tile) {
    ring.wait_empty();
    int stage = ring.take();
    u64* full = ring.full + stage;
    barrier_expect(full, kStageBytes);
    for (int i = 0; i < kColumnTiles; i++) {
      char* target = stage_memory(stage) + i * kKeyTileBytes + sharer * kShare * 128;
      int row = tile * KEYS + sharer * kShare;
      if (SHARERS == 1) {
        load_tile(target, map, i * 64, row, full);
      } else {
        unsigned short blocks = ((1 << SHARERS) - 1) << split * SHARERS;
        load_tile(target, map, i * 64, row, full, blocks);
      }
    }
  }
  __device__ __forceinline__ void run(const Work& work) {
    bring_queries(0, work.query0);
    if (work.tiles > 0) bring(keys, work.tile0);
    bring_queries(1, work.query0);
    for (int i = 0; i < work.tiles; i++) {
      if (i + 1 < work.tiles) bring(keys, work.tile0 + i + 1);
      bring(values, work.tile0 + i);
    }
  }
};

// scores (64 x KEYS) = queries keys^T, in the background.
__device__ __forceinline__ void begin_scores(float (&scores)[KEYS / 2], u64 queries, u64 keys) {
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++) scores[i] = 0.f;
  wgmma_begin();
#pragma unroll
  for (int i = 0; i < kColumnTiles; i++)
#pragma unroll
    for (int k = 0; k < 4; k++)
      wgmma<KEYS>(scores, queries + i * (kQueryTileBytes / 16) + k * 2,
                  keys + i * (kKeyTileBytes / 16) + k * 2);
  wgmma_commit();
}

// out (64 x 256) += weights values, in the background.
__device__ __forceinline__ void begin_sums(float (&out)[kDim / 2],
                                           const u32 (&weights)[KEYS / 16][4], u64 values) {
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) wgmma_rows<kDim>(out, weights[k], values + k * 128);
  wgmma_commit();
}

// The two rows of this thread, lane / 4 and 8 below; element i of its scores is of row i / 2 % 2.
struct Rows {
  float most[2];   // of the scores so far
  float total[2];  // of the weights so far, of this lane's columns until it is gathered
  float decay[2];  // what sums are multiplied with since `most` has grown

  __device__ __forceinline__ Rows() {
#pragma unroll
    for (int r = 0; r < 2; r++)
      most[r] = __int_as_float(0xff800000), total[r] = 0.f, decay[r] = 1.f;
  }
  // Scores become weights: 2^(scale (score - most)), 0 from the column `valid` on.
  __device__ __forceinline__ void weigh(float (&scores)[KEYS / 2], float scale, int valid) {
    if (valid < KEYS) {
      int column0 = threadIdx.x % 4 * 2;
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + i % 2 + column0 >= valid) scores[i] = __int_as_float(0xff800000);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top[2] = {most[r], most[r]};
#pragma unroll
      for (int i = 0; i < KEYS / 4; i++)
        top[i % 2] = fmaxf(top[i % 2], scores[i / 2 * 4 + r * 2 + i % 2]);
      float highest = fmaxf(top[0], top[1]);
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      decay[r] = exp2_fast((most[r] - highest) * scale);
      most[r] = highest;
      float offset = highest * scale, sums[2] = {total[r] * decay[r], 0.f};
#pragma unroll
      for (int i = 0; i < KEYS / 4; i++) {
        float& score = scores[i / 2 * 4 + r * 2 + i % 2];
        score = exp2_fast(score * scale - offset);
        sums[i % 2] += score;
      }
      total[r] = sums[0] + sums[1];
    }
  }
  __device__ __forceinline__ void gather_totals() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
    }
  }
};

__device__ __forceinline__ void scale_rows(float (&out)[kDim / 2], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < kDim / 2; i++) out[i] *= by[i / 2 % 2];
}

__device__ __forceinline__ void round_weights(u32 (&weights)[KEYS / 16][4],
                                              const float (&scores)[KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; i++) weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1]);
}

// Chunks of 32 columns belong to the blocks of a cluster in turn: what a block writes.
__device__ __forceinline__ constexpr int owner_of(int chunk) { return chunk * SPLITS / kChunks; }
__device__ __forceinline__ constexpr int first_chunk(int split) {
  return (split * kChunks + SPLITS - 1) / SPLITS;
}

struct Stats { float most, total; };

// Sums of the blocks that have the same queries and other keys.
struct Exchange {
  Stats (*stats)[kBlockQueries];  // from each other block
  int split, sharer, consumer;

  // Where a block has what another one sends, for this thread.
  static __device__ __forceinline__ int slot_of(int split, int from) {
    return from < split ? from : from - 1;
  }
  __device__ __forceinline__ uint4* part(int slot, int chunk) const {
    char* memory = tile_memory() + (slot * kConsumers + consumer) * kPartBytes;
    return (uint4*)memory + chunk * 4 * 128 + threadIdx.x % 128;
  }
  static __device__ __forceinline__ int row() {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ void send(const float (&out)[kDim / 2], const Rows& rows) const {
#pragma unroll
    for (int to = 0; to < SPLITS; to++) {
      if (to == split) continue;
      int slot = slot_of(to, split), rank = to * SHARERS + sharer;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk++) {
        if (owner_of(chunk) != to) continue;
        uint4* target = in_block(part(slot, chunk - first_chunk(to)), rank);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* v = out + chunk * 16 + i * 4;
          target[i * 128] = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                       __float_as_uint(v[2]), __float_as_uint(v[3]));
        }
      }
      if (threadIdx.x % 4 == 0) {
        Stats* there = in_block(stats[slot] + row(), rank);
        there[0] = {rows.most[0], rows.total[0]}, there[8] = {rows.most[1], rows.total[1]};
      }
    }
  }
  // What each block's sums are multiplied with, by its place in the order of blocks.
  __device__ __forceinline__ void factors(float (&of)[SPLITS][2], const Rows& rows,
                                          float scale) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float most = rows.most[r], total = 0.f, totals[SPLITS];
#pragma unroll
      for (int from = 0; from < SPLITS; from++) {
        of[from][r] = rows.most[r], totals[from] = rows.total[r];
        if (from == split) continue;
        Stats other = stats[slot_of(split, from)][row() + r * 8];
        of[from][r] = other.most, totals[from] = other.total;
        most = fmaxf(most, other.most);
      }
#pragma unroll
      for (int from = 0; from < SPLITS; from++) {
        of[from][r] = exp2_fast((of[from][r] - most) * scale);
        total += of[from][r] * totals[from];
      }
#pragma unroll
      for (int from = 0; from < SPLITS; from++) of[from][r] *= 1.f / total;
    }
  }
  // A chunk's sums of all blocks; those of this block begin at `own`.
  __device__ __forceinline__ void merge(float (&sums)[16], const float* own, int chunk,
                                        const float (&factor)[SPLITS][2]) const {
#pragma unroll
    for (int i = 0; i < 16; i++) sums[i] = 0.f;
#pragma unroll
    for (int from = 0; from < SPLITS; from++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float v[4] = {own[i * 4], own[i * 4 + 1], own[i * 4 + 2], own[i * 4 + 3]};
        if (from != split) {
          uint4 got = part(slot_of(split, from), chunk - first_chunk(split))[i * 128];
          v[0] = __uint_as_float(got.x), v[1] = __uint_as_float(got.y);
          v[2] = __uint_as_float(got.z), v[3] = __uint_as_float(got.w);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i * 4 + j] += v[j] * factor[from][j / 2];
      }
    }
  }
};

// Four neighbouring lanes hold the rows of a 4 x 4 matrix; after this, its columns.
__device__ __forceinline__ void transpose4(u32 (&v)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      u32 got = __shfl_xor_sync(~0u, upper ? v[i] : v[i | step], step);
      if (upper) v[i] = got; else v[i | step] = got;
    }
  }
}

// 32 columns of this thread's two rows, eight neighbours per lane.
__device__ __forceinline__ void write_chunk(bf16* out, const float (&sums)[16], int row, int rows,
                                            int chunk) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = pack(sums[i * 4 + r * 2], sums[i * 4 + r * 2 + 1]);
    transpose4(words);
    if (row + r * 8 < rows)
      *(uint4*)(out + (size_t)(row + r * 8) * kDim + chunk * 32 + threadIdx.x % 4 * 8) =
          make_uint4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ void consume(const Work& work, Stages ring, u64* full_queries,
                                        Stats (*stats)[kBlockQueries], float scale, bf16* out) {
  // The shuffle tells the compiler that a warp's threads agree.
  int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0), first_sharer = work.split * SHARERS;
  u64 queries = tile_operand(query_memory(consumer));
  Rows rows;
  float sums[kDim / 2], scores[KEYS / 2];
  u32 weights[KEYS / 16][4];
#pragma unroll
  for (int i = 0; i < kDim / 2; i++) sums[i] = 0.f;
  barrier_wait(full_queries + consumer, 0);
  int valid = work.count - work.tile0 * KEYS;  // keys from this tile on
  if (work.tiles > 0) {
    ring.wait_full();
    int of_keys = ring.take();
    begin_scores(scores, queries, tile_operand(stage_memory(of_keys)));
    wgmma_wait<0>(scores);
    ring.give_back(of_keys, first_sharer);
    rows.weigh(scores, scale, valid);
    round_weights(weights, scores);
    ring.wait_full();
  }
  for (int i = 1; i < work.tiles; i++) {
    int of_keys = ring.take();
    begin_scores(scores, queries, tile_operand(stage_memory(of_keys)));
    ring.wait_full();
    int of_values = ring.take();
    keep_order(sums);  // scaled while the tensor cores are at work
    scale_rows(sums, rows.decay);
    begin_sums(sums, weights, rows_operand(stage_memory(of_values), kKeyTileBytes));
    wgmma_wait<1>(scores);
    ring.give_back(of_keys, first_sharer);
    rows.weigh(scores, scale, valid - i * KEYS);
    keep_order(scores);  // weighed while the tensor cores are at work
    ring.wait_full();
    wgmma_wait<0>(sums);
    ring.give_back(of_values, first_sharer);
    round_weights(weights, scores);
  }
  if (kFitsQueries) cluster_arrive();  // the queries are read
  if (work.tiles > 0) {
    int of_values = ring.take();
    scale_rows(sums, rows.decay);
    begin_sums(sums, weights, rows_operand(stage_memory(of_values), kKeyTileBytes));
    rows.gather_totals();
    wgmma_wait<0>(sums);
  }
  if (!kFitsQueries) cluster_arrive();
  cluster_wait();
  Exchange exchange = {stats, work.split, work.sharer, consumer};
  exchange.send(sums, rows);
  cluster_arrive();
  cluster_wait();
  float factor[SPLITS][2];
  exchange.factors(factor, rows, scale);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk++) {
    if (owner_of(chunk) != work.split) continue;
    float merged[16];
    exchange.merge(merged, sums + chunk * 16, chunk, factor);
    write_chunk(out, merged, work.query0 + exchange.row(), work.rows, chunk);
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
  __shared__ u64 full[STAGES], empty[STAGES], full_queries[kConsumers];
  __shared__ Stats stats[kOthers > 0 ? kOthers : 1][kBlockQueries];
  let_next_start();
  if (threadIdx.x == 0) {
    fetch_map(&q), fetch_map(&keys), fetch_map(&values);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kConsumers * 4 * SHARERS);  // every consumer warp that reads it
    }
    for (int i = 0; i < kConsumers; i++) barrier_init(full_queries + i, 1);
    barrier_init_done();
  }
  if (SHARERS > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  wait_for_previous();
  Work work(kCluster > 1 ? cluster_rank() : 0, __ldcg(count), heads);
  // All blocks of the cluster find the same.
  if (blockIdx.x / kCluster * SHARERS * kBlockQueries >= work.rows) return;
  Stages ring = {full, empty, 0, 0};
  if (threadIdx.x >= 128 * kConsumers) {
    fewer_registers<40>();
    if (threadIdx.x == 128 * kConsumers) {
      Producer producer = {&q, &keys, &values, full_queries, ring, work.split, work.sharer};
      producer.run(work);
    }
    __syncwarp();
    for (int phase = 0; phase < 2; phase++) {  // those of the exchange
      cluster_arrive();
      cluster_wait();
    }
  } else {
    more_registers<232>();
    consume(work, ring, full_queries, stats, scale, out);
  }
}
