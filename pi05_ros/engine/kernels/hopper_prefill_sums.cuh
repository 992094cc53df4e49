// Softmax of hopper_prefill_attention.cu, and how peers add up their sums: they have the same
// queries and other keys. Needs KEYS, BLOCK_SPLITS, CLUSTER_SPLITS, SHARERS and SUM_BYTES.
#ifndef HOPPER_PREFILL_SUMS_CUH
#define HOPPER_PREFILL_SUMS_CUH
#include "hopper_tile.cuh"

constexpr int kDim = 256, kQueries = 64, kConsumers = 2;
constexpr int kPeers = BLOCK_SPLITS * CLUSTER_SPLITS;  // who have the same queries
constexpr bool kAcross = CLUSTER_SPLITS > 1;           // in other blocks, not in this one
constexpr int kChunks = kDim / 32;                     // of a row: what is sent at a time
constexpr int kChunksPerPeer = (kChunks + kPeers - 1) / kPeers;
constexpr int kPartBytes = kChunksPerPeer * 16 * 128 * SUM_BYTES;  // from one peer to another
constexpr int kParts = (kPeers - 1) * kConsumers;                  // that a block receives
static_assert(BLOCK_SPLITS == 1 || CLUSTER_SPLITS == 1, "the same queries in a block or a cluster");

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

// Chunks of 32 columns are divided among the peers: what each adds up and writes.
__device__ __forceinline__ constexpr int owner_of(int chunk) { return chunk * kPeers / kChunks; }
__device__ __forceinline__ constexpr int first_chunk(int peer) {
  return (peer * kChunks + kPeers - 1) / kPeers;
}

// This thread's sums of a chunk as they are sent, 16 bytes at a time: in float32 or in bfloat16.
__device__ __forceinline__ uint4 sent(const float* v, int piece) {
  const float* w = v + piece * (16 / SUM_BYTES);
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    words[i] = SUM_BYTES == 4 ? __float_as_uint(w[i]) : pack(w[2 * i], w[2 * i + 1]);
  return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void receive(float (&v)[16], const uint4* source) {
#pragma unroll
  for (int piece = 0; piece < SUM_BYTES; piece++) {
    uint4 got = source[piece * 128];
    u32 words[4] = {got.x, got.y, got.z, got.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (SUM_BYTES == 4) {
        v[piece * 4 + i] = __uint_as_float(words[i]);
      } else {
        v[piece * 8 + i * 2] = low(words[i]), v[piece * 8 + i * 2 + 1] = high(words[i]);
      }
    }
  }
}

constexpr int kRowPairs = 32;  // of a warpgroup: the rows of a thread

// What comes from the peers in other blocks, per warpgroup.
__device__ __forceinline__ u32 bytes_from_peers(int split) {
  int chunks = first_chunk(split + 1) - first_chunk(split);
  return (kPeers - 1) * (chunks * 128 * 16 * SUM_BYTES + kRowPairs * 16);
}

// The same threads of peers have the same rows and columns.
struct Exchange {
  char* memory;               // kParts * kPartBytes, in each block
  uint4 (*stats)[kRowPairs];  // of each part: the greatest score and the total of two rows
  u64* arrived;               // counts what comes to this warpgroup from other blocks
  int peer, sharer, consumer;

  // Where a peer has what another one sends to it.
  __device__ __forceinline__ int part_of(int to, int from) const {
    return kAcross ? (from < to ? from : from - 1) * kConsumers + consumer : to;
  }
  __device__ __forceinline__ uint4* place(int part, int chunk) const {
    return (uint4*)(memory + part * kPartBytes) + chunk * SUM_BYTES * 128 + threadIdx.x % 128;
  }
  static __device__ __forceinline__ int row_pair() { return threadIdx.x % 128 / 4; }
  static __device__ __forceinline__ int row() {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ void put(uint4* there, uint4 v, int to) const {
    if (kAcross)
      store_async(there, v, arrived, to * SHARERS + sharer);
    else
      *there = v;
  }
  __device__ __forceinline__ void send(const float (&out)[kDim / 2], const Rows& rows) const {
#pragma unroll
    for (int to = 0; to < kPeers; to++) {
      if (to == peer) continue;
      int part = part_of(to, peer);
      if (threadIdx.x % 4 == 0)
        put(stats[part] + row_pair(),
            make_uint4(__float_as_uint(rows.most[0]), __float_as_uint(rows.total[0]),
                       __float_as_uint(rows.most[1]), __float_as_uint(rows.total[1])),
            to);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk++) {
        if (owner_of(chunk) != to) continue;
        uint4* there = place(part, chunk - first_chunk(to));
#pragma unroll
        for (int piece = 0; piece < SUM_BYTES; piece++)
          put(there + piece * 128, sent(out + chunk * 16, piece), to);
      }
    }
  }
  // What each peer's sums are multiplied with.
  __device__ __forceinline__ void factors(float (&of)[kPeers][2], const Rows& rows,
                                          float scale) const {
    float totals[kPeers][2];
#pragma unroll
    for (int from = 0; from < kPeers; from++) {
#pragma unroll
      for (int r = 0; r < 2; r++) of[from][r] = rows.most[r], totals[from][r] = rows.total[r];
      if (from == peer) continue;
      uint4 got = stats[part_of(peer, from)][row_pair()];
      of[from][0] = __uint_as_float(got.x), totals[from][0] = __uint_as_float(got.y);
      of[from][1] = __uint_as_float(got.z), totals[from][1] = __uint_as_float(got.w);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float most = of[0][r], total = 0.f;
#pragma unroll
      for (int from = 1; from < kPeers; from++) most = fmaxf(most, of[from][r]);
#pragma unroll
      for (int from = 0; from < kPeers; from++) {
        of[from][r] = exp2_fast((of[from][r] - most) * scale);
        total += of[from][r] * totals[from][r];
      }
#pragma unroll
      for (int from = 0; from < kPeers; from++) of[from][r] *= 1.f / total;
    }
  }
  // A chunk's sums of all peers, always in the same order; those of this one begin at `own`.
  __device__ __forceinline__ void add_up(float (&sums)[16], const float* own, int chunk,
                                         const float (&factor)[kPeers][2]) const {
#pragma unroll
    for (int i = 0; i < 16; i++) sums[i] = 0.f;
#pragma unroll
    for (int from = 0; from < kPeers; from++) {
      float v[16];
#pragma unroll
      for (int i = 0; i < 16; i++) v[i] = own[i];
      if (from != peer) receive(v, place(part_of(peer, from), chunk - first_chunk(peer)));
#pragma unroll
      for (int i = 0; i < 16; i++) sums[i] += v[i] * factor[from][i / 2 % 2];
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

#endif
