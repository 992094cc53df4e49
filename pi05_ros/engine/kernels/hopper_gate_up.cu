// out = gelu_tanh(s gate(x)) * (s up(x)), s per row: the largest product of the prefill, on a Hopper
// GPU's tensor cores. Plain twin: gate_up_plain (gate_up.py).
//
// A block works on tiles of FEATURES = 256 by TOKENS, one after the other; while it writes one, the
// ring fills with the next. The rows of the weight are in an order that leaves gate and up of a unit
// 8 rows apart, in one thread, and the units of both parts of a warpgroup side by side
// (hopper_gate_up.interleave).
//
// x is older than the kernel before this one, which computes s: only who uses s waits for it.
#include "hopper_prefill_product.cuh"

constexpr int kWarpUnits = 8 * kParts;
static_assert(kParts == 2, "a warp writes 32 bytes of a token");

// gelu_tanh(a gate) * (a up) of two units of a token, with one reciprocal: 1 / x = y / (x y). Where
// the exponential is cut off, the result is 0 in bfloat16 as well. Two tokens must not share one: the
// second may be a row beyond the prompt, and the first one's rounding would tell what it holds.
// gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3), in powers of two.
__device__ __forceinline__ float2 geglu2(float a, float gate0, float up0, float gate1, float up1) {
  float g0 = gate0 * a, g1 = gate1 * a;
  float x = 1.f + exp2_fast(fminf(g0 * (-2.3022082f - 0.10294324f * g0 * g0), 60.f));
  float y = 1.f + exp2_fast(fminf(g1 * (-2.3022082f - 0.10294324f * g1 * g1), 60.f));
  float r = reciprocal(x * y);
  return make_float2(g0 * (up0 * a) * (y * r), g1 * (up1 * a) * (x * r));
}

// The scales of a tile's tokens: lane l of a warp has those of the tokens l, l + 32, ...
struct Scales {
  float of_lane[(TOKENS + 31) / 32];

  __device__ __forceinline__ void fetch(const float* scales, int token0, int rows) {
#pragma unroll
    for (int i = 0; i < (TOKENS + 31) / 32; i++) {
      int token = token0 + i * 32 + threadIdx.x % 32;
      of_lane[i] = token < rows ? scales[token] : 0.f;
    }
  }
  // Of the tokens 8 group + 2 (l % 4) + second, which lane l has sums of.
  __device__ __forceinline__ float of(int group, int second) const {
    int lane = group % 4 * 8 + threadIdx.x % 4 * 2 + second;
    return __shfl_sync(~0u, of_lane[group / 4], lane);
  }
};

// A lane has a unit and two tokens of each 8 x 8; transposed, a token and two units of each part.
__device__ __forceinline__ void write(const Sums& sums, const Scales& scales, bf16* out, int token0,
                                      int rows, int width) {
  int lane = threadIdx.x % 32, token = token0 + lane / 4;
  bf16* target = out + (size_t)token * width + threadIdx.x / 32 * kWarpUnits + lane % 4 * 4;
  // From one address to the next: nothing multiplies meanwhile, and computing each takes longer.
  size_t step = (size_t)8 * width;
#pragma unroll
  for (int group = 0; group < TOKENS / 8; group++, target += step) {
    const float *v = sums.acc[0] + group * 4, *w = sums.acc[1] + group * 4;
    float2 first = geglu2(scales.of(group, 0), v[0], v[2], w[0], w[2]);
    float2 second = geglu2(scales.of(group, 1), v[1], v[3], w[1], w[3]);
    u32 words[kParts] = {transpose8(pack(first.x, second.x)), transpose8(pack(first.y, second.y))};
    if (token + group * 8 < rows) store_global(target, words[0], words[1]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) gate_up(
    const __grid_constant__ TensorMap x,       // (rows, depth), boxes of TOKENS rows
    const __grid_constant__ TensorMap weight,  // (features, depth) ordered, boxes of kBoxRows rows
    const float* scales,                       // (rows)
    bf16* out,                                 // (rows, features / 2)
    int rows, int features, int depth) {
  __shared__ Barriers barriers;
  let_next_start();
  begin_ring(x, weight, barriers);
  Tiles tiles(rows, features);
  int steps = depth / kDepth;
  Place place;
  if (threadIdx.x >= kMultiplying) {
    fewer_registers<40>();
    place.parity = 1;
    if (brings())
      for (int unit = tiles.first(); unit < tiles.units; unit += tiles.stride())
        bring_tile(x, weight, tiles.tile(unit), 0, steps, barriers, place);
  } else {
    more_registers<232>();
    wait_for_previous();
    for (int unit = tiles.first(); unit < tiles.units; unit += tiles.stride()) {
      Tile tile = tiles.tile(unit);
      Scales own_scales;
      own_scales.fetch(scales, tile.token0, rows);
      Sums sums;
      multiply_tile(sums, steps, barriers, place);
      write(sums, own_scales, out + tile.feature0 / 2, tile.token0, rows, features / 2);
    }
  }
  end_ring();
}
