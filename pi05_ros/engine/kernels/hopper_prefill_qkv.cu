// Queries, keys and values of a layer of the prefill on a Hopper GPU's tensor cores: the projection
// of the raw residual, its row's scale, the rotation of queries and keys. Plain twin: qkv_rope_plain
// (rope.py).
//
// A block computes FEATURES = 128 of a head, 64 rotation pairs (d, d + 128), for TOKENS. The rows of
// the weight are in an order that leaves both halves of a pair 8 rows apart
// (hopper_prefill_qkv.order_qkv). When all products are done, the sums take the ring's place in
// shared memory, and each thread finishes four neighbouring pairs of a token at a time.
//
// x is older than the kernel before this one, which computes s = 1 / rms per row: the products begin
// before it has completed, only who uses s or writes waits for it.
#include "hopper_prefill_product.cuh"

constexpr int kDim = 256, kHalf = kDim / 2, kPairs = FEATURES / 2;
constexpr int kQuads = kPairs / 4;                                        // of a token
constexpr int kTurns = (TOKENS * kQuads + kMultiplying - 1) / kMultiplying;  // of a thread
constexpr int kLdSum = FEATURES + 4;                                      // no bank conflicts
static_assert(FEATURES == 128, "half a head");
static_assert(TOKENS * kLdSum * 4 <= STAGES * kStageBytes, "the sums take the place of the ring");

// The sums of a token: first elements of pairs, then second ones.
__device__ __forceinline__ float* sums_of(int token) {
  return (float*)stage_memory(0) + token * kLdSum;
}

// What a thread finishes: quad() of the tokens token(0), token(1), ...
__device__ __forceinline__ int quad() { return threadIdx.x % kQuads; }
__device__ __forceinline__ int token(int turn) {
  return turn * (kMultiplying / kQuads) + threadIdx.x / kQuads;
}
// Whether a turn has a token, and the matrix a row for it.
__device__ __forceinline__ bool has_token(int turn, int token0, int rows) {
  bool whole = TOKENS * kQuads % kMultiplying == 0;
  return (whole || token(turn) < TOKENS) && token0 + token(turn) < rows;
}

// cos and sin of four pairs of each of a thread's tokens.
struct Rotation {
  uint2 cosine[kTurns], sine[kTurns];

  __device__ __forceinline__ void none() {
#pragma unroll
    for (int i = 0; i < kTurns; i++)
      cosine[i] = make_uint2(0x3f803f80, 0x3f803f80), sine[i] = make_uint2(0, 0);  // 1 and 0
  }
  __device__ __forceinline__ void fetch(const bf16* cosines, const bf16* sines, int token0, int rows,
                                        int pair0) {
#pragma unroll
    for (int i = 0; i < kTurns; i++) {
      if (!has_token(i, token0, rows)) continue;
      size_t at = (size_t)(token0 + token(i)) * kHalf + pair0 + quad() * 4;
      cosine[i] = *(const uint2*)(cosines + at);
      sine[i] = *(const uint2*)(sines + at);
    }
  }
};

__device__ __forceinline__ void keep(const Sums& sums) {
  int lane = threadIdx.x % 32, pair = threadIdx.x / 32 * 8 + lane / 4;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++)
    sums_of(i / 4 * 8 + lane % 4 * 2 + i % 2)[pair + i / 2 % 2 * kPairs] = sums.acc[0][i];
}

// Two pairs: the rotated first elements and second elements.
__device__ __forceinline__ uint2 rotate2(float x0, float x1, float y0, float y1, float scale,
                                         u32 cosines, u32 sines) {
  float c0 = low(cosines) * scale, c1 = high(cosines) * scale;
  float s0 = low(sines) * scale, s1 = high(sines) * scale;
  return make_uint2(pack(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1),
                    pack(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1));
}

// Rows of `out` are `stride` apart and begin with the block's first pair.
__device__ __forceinline__ void write(bf16* out, int stride, const Rotation& rotation,
                                      const float* scales, int token0, int rows) {
#pragma unroll
  for (int i = 0; i < kTurns; i++) {
    if (!has_token(i, token0, rows)) continue;
    const float* sums = sums_of(token(i)) + quad() * 4;
    float4 x = *(const float4*)sums, y = *(const float4*)(sums + kPairs);
    float scale = scales[token(i)];
    uint2 front = rotate2(x.x, x.y, y.x, y.y, scale, rotation.cosine[i].x, rotation.sine[i].x);
    uint2 back = rotate2(x.z, x.w, y.z, y.w, scale, rotation.cosine[i].y, rotation.sine[i].y);
    bf16* row = out + (size_t)(token0 + token(i)) * stride + quad() * 4;
    *(uint2*)row = make_uint2(front.x, back.x);
    *(uint2*)(row + kHalf) = make_uint2(front.y, back.y);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) prefill_qkv(
    const __grid_constant__ TensorMap x,       // (rows, depth), boxes of TOKENS rows
    const __grid_constant__ TensorMap weight,  // (features, depth) ordered, boxes of kBoxRows rows
    const float* scales,                       // (rows)
    const bf16* cosines, const bf16* sines,    // (rows, kHalf)
    bf16* q,                                   // (rows, heads * kDim)
    bf16* keys, bf16* values,                  // (rows, kDim)
    int rows, int features, int depth) {
  __shared__ Barriers barriers;
  __shared__ float own_scales[TOKENS];
  let_next_start();
  begin_ring(x, weight, barriers);
  Tiles tiles(rows, features);
  Tile tile = tiles.tile(tiles.first());
  int steps = depth / kDepth;
  Place place;
  if (threadIdx.x >= kMultiplying) {
    fewer_registers<40>();
    place.parity = 1;
    if (brings()) bring_tile(x, weight, tile, 0, steps, barriers, place);
  } else {
    more_registers<232>();
    int head = tile.feature0 / kDim, heads = features / kDim - 2;
    int pair0 = tile.feature0 % kDim / 2;
    Rotation rotation;
    if (head <= heads)
      rotation.fetch(cosines, sines, tile.token0, rows, pair0);
    else
      rotation.none();
    Sums sums;
    multiply_tile(sums, steps, barriers, place);
    wait_for_previous();
    bool has_scale = threadIdx.x < TOKENS && tile.token0 + threadIdx.x < rows;
    float scale = has_scale ? scales[tile.token0 + threadIdx.x] : 0.f;
    named_barrier(1, kMultiplying);  // all of the ring is read
    keep(sums);
    if (threadIdx.x < TOKENS) own_scales[threadIdx.x] = scale;
    named_barrier(1, kMultiplying);
    bf16* out = head < heads ? q + head * kDim : head == heads ? keys : values;
    int stride = head < heads ? heads * kDim : kDim;
    write(out + pair0, stride, rotation, own_scales, tile.token0, rows);
  }
  end_ring();
}
