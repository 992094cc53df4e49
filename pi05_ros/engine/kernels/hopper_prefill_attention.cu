// Attention of the prefix on a Hopper GPU's tensor cores: all heads share one K/V head of 256
// columns, the number of keys is on the device. Plain twin: prefill_attention_plain.
//
// Queries are packed as rows (position, head); a block has 64 of them. Two warpgroups multiply, each
// with every other tile of 64 keys, and add up what they have in the end. While the tensor cores
// multiply weights and values of one tile, the warpgroup turns the next one's scores into weights,
// and the other warpgroup is at another point of the same.
#include "hopper_lanes.cuh"
#include "hopper_tile.cuh"

constexpr int kDim = 256, kQueries = 64, kKeys = 64;
constexpr int kStages = 3;  // of keys or values, for each warpgroup
constexpr int kConsumers = 2, kMultiplying = 128 * kConsumers, kThreads = kMultiplying + 128;
constexpr int kHeld = 8;  // steps of 16 columns of the queries that stay in registers
constexpr int kColumnTiles = kDim / 64, kTileBytes = 64 * 128;  // of queries, keys or values
constexpr int kQueryBytes = kColumnTiles * kTileBytes, kStageBytes = kQueryBytes;
constexpr int kChunks = kDim / 32, kOwnChunks = kChunks / kConsumers;  // of sums, per warpgroup
constexpr int kSentBytes = kOwnChunks * 16 * 128 * 4;                  // from one to the other

DYNAMIC_SHARED(shared_memory);

__device__ __forceinline__ char* query_memory() {
  return (char*)(((u64)shared_memory + 1023) / 1024 * 1024);
}

struct Barriers {
  u64 full[kConsumers][kStages], empty[kConsumers][kStages];
  u64 first[kColumnTiles];  // columns of the queries and the first keys: products begin with them
};

struct Work {
  int query0, valid, tiles, rows;  // valid keys, their tiles, valid query rows

  __device__ __forceinline__ Work(int valid_keys, int heads) {
    query0 = blockIdx.x * kQueries;
    valid = valid_keys;
    tiles = (valid + kKeys - 1) / kKeys;
    rows = valid * heads;
  }
  // A warpgroup's tiles of keys, and where its i-th one begins.
  __device__ __forceinline__ int tiles_of(int consumer) const { return (tiles + 1 - consumer) / 2; }
  __device__ __forceinline__ int first_key(int consumer, int i) const {
    return (2 * i + consumer) * kKeys;
  }
};

// A place in a warpgroup's ring of stages. Keys and values come in the order in which they are used:
// the next keys, then the values of the keys before them. The rings are apart, for a wait tells a
// phase of a barrier from the one before it, but not from the one before that: whoever waits at a
// barrier has to wait for each of its phases.
struct Ring {
  Barriers& barriers;
  int consumer, stage = 0, parity = 0;

  __device__ __forceinline__ Ring(Barriers& barriers, int consumer)
      : barriers(barriers), consumer(consumer) {}
  __device__ __forceinline__ char* memory(int stage) const {
    return query_memory() + kQueryBytes + (consumer * kStages + stage) * kStageBytes;
  }
  __device__ __forceinline__ int take() {
    int taken = stage;
    if (++stage == kStages) stage = 0, parity ^= 1;
    return taken;
  }
  __device__ __forceinline__ u64* full() const { return barriers.full[consumer] + stage; }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full(), parity); }
  __device__ __forceinline__ void wait_empty() const {
    barrier_wait(barriers.empty[consumer] + stage, parity ^ 1);
  }
  // Says that this warp has read a stage.
  __device__ __forceinline__ void give_back(int taken) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(barriers.empty[consumer] + taken);
  }
};

struct Producer {
  const TensorMap &q, &keys, &values;
  Barriers& barriers;

  __device__ __forceinline__ void bring_queries() const {
#pragma unroll 1
    for (int i = 0; i < kColumnTiles; i++) {
      u64* full = barriers.first + i;
      barrier_expect(full, kTileBytes);
      load_tile(query_memory() + i * kTileBytes, &q, i * 64, blockIdx.x * kQueries, full);
    }
  }
  __device__ __forceinline__ void bring(const TensorMap& map, Ring& ring, int first_key,
                                        bool by_columns) const {
    ring.wait_empty();
    u64* full = ring.full();
    char* target = ring.memory(ring.take());
    if (by_columns)
      barrier_arrive(full);
    else
      barrier_expect(full, kStageBytes);
#pragma unroll 1
    for (int i = 0; i < kColumnTiles; i++) {
      u64* columns = by_columns ? barriers.first + i : full;
      if (by_columns) barrier_expect(columns, kTileBytes);
      load_tile(target + i * kTileBytes, &map, i * 64, first_key, columns);
    }
  }
  // What a warpgroup uses in a round.
  __device__ __forceinline__ void bring_round(const Work& work, Ring& ring, int round) const {
    int own = work.tiles_of(ring.consumer);
    if (round < own)
      bring(keys, ring, work.first_key(ring.consumer, round), round + ring.consumer == 0);
    if (round > 0 && round <= own)
      bring(values, ring, work.first_key(ring.consumer, round - 1), false);
  }
  __device__ __forceinline__ void run(const Work& work) const {
    Ring first(barriers, 0), second(barriers, 1);
#pragma unroll 1
    for (int round = 0; round <= work.tiles_of(0); round++) {
      bring_round(work, first, round);
      bring_round(work, second, round);
    }
  }
  // Nothing may be on its way into the memory of a block that ends.
  __device__ __forceinline__ void end_without_work() const {
    for (int i = 0; i < kColumnTiles; i++) {
      barrier_arrive(barriers.first + i);
      barrier_wait(barriers.first + i, 0);
    }
  }
};

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
  __device__ __forceinline__ void weigh(float (&scores)[kKeys / 2], float scale, int valid) {
    if (valid < kKeys) {
      int column0 = threadIdx.x % 4 * 2;
#pragma unroll
      for (int i = 0; i < kKeys / 2; i++)
        if (i / 4 * 8 + i % 2 + column0 >= valid) scores[i] = __int_as_float(0xff800000);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top[2] = {most[r], most[r]};
#pragma unroll
      for (int i = 0; i < kKeys / 4; i++)
        top[i % 2] = fmaxf(top[i % 2], scores[i / 2 * 4 + r * 2 + i % 2]);
      float highest = fmaxf(top[0], top[1]);
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      decay[r] = exp2_fast((most[r] - highest) * scale);
      most[r] = highest;
      float offset = highest * scale, sums[2] = {total[r] * decay[r], 0.f};
#pragma unroll
      for (int i = 0; i < kKeys / 4; i++) {
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

__device__ __forceinline__ void round_weights(u32 (&weights)[kKeys / 16][4],
                                              const float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; i++)
    weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1]);
}

// The queries as an operand. The first steps of 16 columns are in registers: with both operands of
// narrow products in shared memory, that delivers hardly as fast as they multiply.
struct Queries {
  u32 held[kHeld][4];

  static __device__ __forceinline__ u64 operand(u64 tiles, int step) {
    return tiles + step / 4 * (kTileBytes / 16) + step % 4 * 2;
  }
  __device__ __forceinline__ void hold() {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < kHeld; step++) {
      int chunk = (step % 4 * 2 + lane / 16) ^ row % 8;
      load_matrix4(held[step], query_memory() + step / 4 * kTileBytes + row * 128 + chunk * 16);
    }
  }
  // scores (64 x 64) = queries keys^T, in the background, of columns as they come.
  __device__ __forceinline__ void begin_first_scores(float (&scores)[kKeys / 2], u64 keys,
                                                     u64* columns) const {
    u64 queries = tile_operand(query_memory());
#pragma unroll
    for (int i = 0; i < kKeys / 2; i++) scores[i] = 0.f;
#pragma unroll
    for (int i = 0; i < kColumnTiles; i++) {
      barrier_wait(columns + i, 0);
      wgmma_begin();
#pragma unroll
      for (int step = i * 4; step < i * 4 + 4; step++)
        wgmma<kKeys>(scores, operand(queries, step), operand(keys, step));
    }
    wgmma_commit();
  }
  // The same where all is there.
  __device__ __forceinline__ void begin_scores(float (&scores)[kKeys / 2], u64 keys) const {
    u64 queries = tile_operand(query_memory());
#pragma unroll
    for (int i = 0; i < kKeys / 2; i++) scores[i] = 0.f;
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kDim / 16; i++) {
      int step = (i + kHeld) % (kDim / 16);  // held ones last: they need not be there so early
      if (step < kHeld)
        wgmma<kKeys>(scores, held[step], operand(keys, step));
      else
        wgmma<kKeys>(scores, operand(queries, step), operand(keys, step));
    }
    wgmma_commit();
  }
};

// out (64 x 256) += weights values, in the background.
__device__ __forceinline__ void begin_sums(float (&out)[kDim / 2],
                                           const u32 (&weights)[kKeys / 16][4], u64 values) {
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kKeys / 16; k++) wgmma_rows<kDim>(out, weights[k], values + k * 128);
  wgmma_commit();
}
// The same for a last tile, where the weights are 0 from the key `valid` on.
__device__ __forceinline__ void begin_last_sums(float (&out)[kDim / 2],
                                                const u32 (&weights)[kKeys / 16][4], u64 values,
                                                int valid) {
#pragma unroll
  for (int k = 0; k < kKeys / 16; k++) {
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

  __device__ __forceinline__ void run(float (&sums)[kDim / 2], Rows& rows, float scale) {
    int tiles = work.tiles_of(ring.consumer);
    if (tiles == 0) return;
    float scores[kKeys / 2];
    u32 weights[kKeys / 16][4];
    Queries queries;
    int valid = work.valid - work.first_key(ring.consumer, 0);  // keys from this tile on
    ring.wait_full();
    int of_keys = ring.take();
    u64 keys = tile_operand(ring.memory(of_keys));
    queries.begin_first_scores(scores, keys, ring.barriers.first);
    queries.hold();
    wgmma_wait<0>(scores);
    ring.give_back(of_keys);
    rows.weigh(scores, scale, valid);
    round_weights(weights, scores);
    ring.wait_full();
    for (int i = 1; i < tiles; i++) {
      of_keys = ring.take();
      queries.begin_scores(scores, tile_operand(ring.memory(of_keys)));
      ring.wait_full();
      int of_values = ring.take();
      scale_rows(sums, rows.decay);
      begin_sums(sums, weights, rows_operand(ring.memory(of_values), kTileBytes));
      wgmma_wait<1>(scores);
      ring.give_back(of_keys);
      rows.weigh(scores, scale, valid - i * kKeys * kConsumers);
      keep_order(scores);
      ring.wait_full();
      wgmma_wait<0>(sums);
      ring.give_back(of_values);
      round_weights(weights, scores);
    }
    int of_values = ring.take();
    scale_rows(sums, rows.decay);
    begin_last_sums(sums, weights, rows_operand(ring.memory(of_values), kTileBytes),
                    valid - (tiles - 1) * kKeys * kConsumers);
    rows.gather_totals();
    wgmma_wait<0>(sums);
  }
};

// What the other warpgroup's thread of the same rows and columns gives this one.
struct Exchange {
  uint4 (*stats)[kQueries / 2];  // to each warpgroup: the greatest score and the total of two rows
  int consumer;

  static __device__ __forceinline__ float4* place(int to, int chunk) {
    float4* all = (float4*)(query_memory() + to * kSentBytes);
    return all + chunk % kOwnChunks * 4 * 128 + threadIdx.x % 128;
  }
  static __device__ __forceinline__ int row_pair() { return threadIdx.x % 128 / 4; }
  __device__ __forceinline__ bool owns(int chunk) const { return chunk / kOwnChunks == consumer; }

  __device__ __forceinline__ void give(const float (&sums)[kDim / 2], const Rows& rows) const {
    int to = 1 - consumer;
    if (threadIdx.x % 4 == 0)
      stats[to][row_pair()] =
          make_uint4(__float_as_uint(rows.most[0]), __float_as_uint(rows.total[0]),
                     __float_as_uint(rows.most[1]), __float_as_uint(rows.total[1]));
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
      if (owns(chunk)) continue;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* v = sums + chunk * 16 + i * 4;
        place(to, chunk)[i * 128] = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
  }
  // What both warpgroups' sums of two rows are multiplied with: first those of this one.
  __device__ __forceinline__ void factors(float (&own)[2], float (&other)[2], const Rows& rows,
                                          float scale) const {
    uint4 got = stats[consumer][row_pair()];
    float most[2] = {__uint_as_float(got.x), __uint_as_float(got.z)};
    float total[2] = {__uint_as_float(got.y), __uint_as_float(got.w)};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = fmaxf(rows.most[r], most[r]);
      own[r] = exp2_fast((rows.most[r] - highest) * scale);
      other[r] = exp2_fast((most[r] - highest) * scale);
      float inverse = 1.f / (own[r] * rows.total[r] + other[r] * total[r]);
      own[r] *= inverse, other[r] *= inverse;
    }
  }
};

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

__device__ __forceinline__ void consume(const Work& work, Barriers& barriers,
                                        uint4 (*stats)[kQueries / 2], float scale, bf16* out) {
  // The shuffle tells the compiler that a warp's threads agree.
  int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0);
  float sums[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; i++) sums[i] = 0.f;
  Rows rows;
  Consumer{work, {barriers, consumer}}.run(sums, rows, scale);
  Exchange exchange = {stats, consumer};
  named_barrier(1, kMultiplying);  // what is given takes the place of queries and keys
  exchange.give(sums, rows);
  named_barrier(1, kMultiplying);
  float own[2], other[2];
  exchange.factors(own, other, rows, scale);
  int row = work.query0 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk++) {
    if (!exchange.owns(chunk)) continue;
    float added[16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float4 got = exchange.place(consumer, chunk)[i * 128];
      const float* v = sums + chunk * 16 + i * 4;
      added[i * 4] = v[0] * own[0] + got.x * other[0];
      added[i * 4 + 1] = v[1] * own[0] + got.y * other[0];
      added[i * 4 + 2] = v[2] * own[1] + got.z * other[1];
      added[i * 4 + 3] = v[3] * own[1] + got.w * other[1];
    }
    write_chunk(out, added, row, work.rows, chunk);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) prefill_attention(
    const __grid_constant__ TensorMap q,       // (positions * heads, 256), boxes of 64 rows
    const __grid_constant__ TensorMap keys,    // (>= positions, 256), as q
    const __grid_constant__ TensorMap values,  // as keys
    const int* count,                          // (1): valid keys and positions
    float scale,                               // of the scores, times log2(e)
    bf16* out,                                 // (positions * heads, 256)
    int heads) {
  __shared__ Barriers barriers;
  __shared__ uint4 stats[kConsumers][kQueries / 2];
  let_next_start();
  if (threadIdx.x == 0) {
    fetch_map(&q), fetch_map(&keys), fetch_map(&values);
    for (int i = 0; i < kConsumers * kStages; i++) {
      barrier_init(barriers.full[0] + i, 1);
      barrier_init(barriers.empty[0] + i, 4);  // the warps of the warpgroup that reads it
    }
    for (int i = 0; i < kColumnTiles; i++) barrier_init(barriers.first + i, 2);  // queries, keys
    barrier_init_done();
  }
  __syncthreads();
  bool copies = threadIdx.x == kMultiplying;
  Producer producer = {q, keys, values, barriers};
  wait_for_previous();
  if (copies) producer.bring_queries();  // while the count comes
  __syncwarp();
  Work work(__ldcg(count), heads);
  if (work.query0 >= work.rows) {
    if (copies) producer.end_without_work();
    return;
  }
  if (threadIdx.x >= kMultiplying) {
    fewer_registers<24>();
    if (copies) producer.run(work);
  } else {
    more_registers<240>();
    consume(work, barriers, stats, scale, out);
  }
}
