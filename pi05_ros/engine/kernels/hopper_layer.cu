// One Euler step of the action expert as a chain of small kernels for Hopper GPUs.
//
//   qkv             q, k, v = rope(normed W_qkv^T)
//   attend          attention of the action tokens, in clusters of blocks
//   attention_out   a W_out^T, one range of K per cluster, as partial sums
//   residual        x += gate * sum of the ranges;  normed = adarms(x)     (twice per layer)
//   gate_up         a = gelu_tanh(normed W_gate^T) * (normed W_up^T)
//   down            a W_down^T, as attention_out
//   step_end        x_t += dt (W_out normed + b);  x = W_in x_t + b;  normed = adarms(x), in
//                   clusters, once per step
//
// Why not Triton: with a few dozen rows a product waits for three things: its weights from device
// memory, its activations from L2, and the kernel before it. Here every block has its weights in
// shared memory, packed as the matrix instruction wants them, before it waits for the kernel
// before it. After the wait the copy engine brings the activations beside them. Triton can place
// neither.
//
// A product is computed transposed: weight rows ("features") are the 64-row side of the warpgroup
// instruction and action tokens its columns, so a horizon of 50 is padded to 56, and a thread has
// few enough sums for three blocks to fit on a multiprocessor.
//
// Compile-time sizes (macros): HORIZON, WIDTH, MLP, HEADS, HEAD_DIM, ACTIONS, EPS; of each product
// *_FEATURES and *_DEPTH of K per block, *_SPLIT blocks of a cluster along K, *_STAGES steps of K
// whose tokens have room beside all weights; QUERY_BLOCK (a multiple of 16) query rows per cluster,
// RANGES of keys with at most KEYS (a multiple of 16) in each; END_TOKENS per cluster of END_BLOCKS
// at a step's end. Storage is bfloat16, held as unsigned short; sums are float32.
// Plain twins: small_gemm.py, split_attention.py, euler.py.
#include "hopper_attention.cuh"
#include "hopper_product.cuh"
#include "hopper_step_end.cuh"

constexpr int kHalf = HEAD_DIM / 2;

typedef Product<QKV_FEATURES, QKV_DEPTH, QKV_SPLIT, QKV_STAGES, WIDTH, (HEADS + 2) * HEAD_DIM>
    Qkv;
typedef Product<OUT_FEATURES, OUT_DEPTH, OUT_SPLIT, OUT_STAGES, HEADS * HEAD_DIM, WIDTH> Out;
typedef Product<UP_FEATURES, UP_DEPTH, UP_SPLIT, UP_STAGES, WIDTH, 2 * MLP> Up;
typedef Product<DOWN_FEATURES, DOWN_DEPTH, DOWN_SPLIT, DOWN_STAGES, MLP, WIDTH> Down;

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) qkv(
    const __grid_constant__ TensorMap normed,  // (H, WIDTH), boxes of kTokens rows
    const bf16* weights,  // packed: a block has as many first halves of pairs as second ones
    const bf16* cosines, const bf16* sines,  // (positions, HEAD_DIM / 2)
    const int* n_prefix,
    bf16* out) {  // (HEADS + 2, H, HEAD_DIM): q heads, k, v
  constexpr int kPairs = Qkv::kFeatures / 2, kQuads = kPairs / 4;
  constexpr int kItems = (Qkv::kShare * kQuads + kThreads - 1) / kThreads;
  __shared__ Arrivals arrived;
  let_next_start();
  Qkv::begin(normed, arrived);
  if (Qkv::brings()) return Qkv::bring(weights, normed, arrived);
  int head = Qkv::unit() * kPairs / kHalf, pair0 = Qkv::unit() * kPairs % kHalf;
  int items = Qkv::tokens() * kQuads;
  uint2 cos2[kItems], sin2[kItems];
#pragma unroll
  for (int j = 0; j < kItems; j++) {
    int i = max(min(j * kThreads + (int)threadIdx.x, items - 1), 0);
    size_t position = *n_prefix + Qkv::token0() + i / kQuads;
    size_t table = position * kHalf + pair0 + i % kQuads * 4;
    cos2[j] = *(const uint2*)(cosines + table), sin2[j] = *(const uint2*)(sines + table);
  }
  Qkv::multiply(normed, arrived);
  if (Qkv::surplus()) return;
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    int i = item * kThreads + threadIdx.x;
    if (i >= items) break;
    int token = i / kQuads, row = i % kQuads * 4;
    float4 a4 = Qkv::sum(token, row), b4 = Qkv::sum(token, row + kPairs);
    float a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
    float c[4] = {low(cos2[item].x), high(cos2[item].x), low(cos2[item].y), high(cos2[item].y)};
    float s[4] = {low(sin2[item].x), high(sin2[item].x), low(sin2[item].y), high(sin2[item].y)};
    bool is_value = head == HEADS + 1;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float first = rounded(a[j]), second = rounded(b[j]);
      a[j] = is_value ? first : rounded(first * c[j]) - rounded(second * s[j]);
      b[j] = is_value ? second : rounded(second * c[j]) + rounded(first * s[j]);
    }
    bf16* target =
        out + ((size_t)head * HORIZON + Qkv::token0() + token) * HEAD_DIM + pair0 + row;
    *(uint2*)target = make_uint2(pack(a[0], a[1]), pack(a[2], a[3]));
    *(uint2*)(target + kHalf) = make_uint2(pack(b[0], b[1]), pack(b[2], b[3]));
  }
}

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) gate_up(
    const __grid_constant__ TensorMap normed,  // (H, WIDTH), boxes of kTokens rows
    const bf16* weights,  // packed: a block has as many gate rows as up rows
    bf16* out) {          // (H, MLP)
  constexpr int kColumns = Up::kFeatures / 2, kQuads = kColumns / 4;
  __shared__ Arrivals arrived;
  let_next_start();
  Up::begin(normed, arrived);
  if (Up::brings()) return Up::bring(weights, normed, arrived);
  Up::multiply(normed, arrived);
  if (Up::surplus()) return;
#pragma unroll
  for (int j = 0; j < Up::kShare * kQuads; j += kThreads) {
    int i = j + threadIdx.x;
    if (i >= Up::tokens() * kQuads) break;
    int token = i / kQuads, row = i % kQuads * 4;
    float4 g4 = Up::sum(token, row), u4 = Up::sum(token, row + kColumns);
    float g[4] = {g4.x, g4.y, g4.z, g4.w}, u[4] = {u4.x, u4.y, u4.z, u4.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float v = rounded(g[k]);
      // gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3).
      float twice_z = 1.5957691216057308f * v * (1.f + 0.044715f * v * v);
      g[k] = rounded(v * reciprocal(1.f + exp2_fast(-kLog2E * twice_z))) * rounded(u[k]);
    }
    *(uint2*)(out + (size_t)(Up::token0() + token) * MLP + Up::unit() * kColumns + row) =
        make_uint2(pack(g[0], g[1]), pack(g[2], g[3]));
  }
}

// Partial sums of a product that ends in the residual stream: (ranges of K, H, WIDTH).
template <class P>
__device__ __forceinline__ void partial_product(const TensorMap& tokens, const bf16* weights,
                                                float* partials, Arrivals& arrived) {
  let_next_start();
  P::begin(tokens, arrived);
  if (P::brings()) return P::bring(weights, tokens, arrived);
  P::multiply(tokens, arrived);
  if (P::surplus()) return;
  float* target =
      partials + ((size_t)P::range() * HORIZON + P::token0()) * WIDTH + P::feature0();
#pragma unroll
  for (int j = 0; j < P::kShare * P::kQuads; j += kThreads) {
    int i = j + threadIdx.x;
    if (i >= P::tokens() * P::kQuads) break;
    int token = i / P::kQuads, row = i % P::kQuads * 4;
    *(float4*)(target + (size_t)token * WIDTH + row) = P::sum(token, row);
  }
}

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) attention_out(
    const __grid_constant__ TensorMap attended, const bf16* weights, float* partials) {
  __shared__ Arrivals arrived;
  partial_product<Out>(attended, weights, partials, arrived);
}

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) down(
    const __grid_constant__ TensorMap activated, const bf16* weights, float* partials) {
  __shared__ Arrivals arrived;
  partial_product<Down>(activated, weights, partials, arrived);
}

// The sum of one value per thread, the same in all of them.
template <int kBlockWarps>
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float of_warp[kBlockWarps];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kBlockWarps; warp++) total += of_warp[warp];
  return total;
}

// One block per token; a thread has four features.
constexpr int kResidualThreads = WIDTH / 4;

template <int kRanges>
__device__ __forceinline__ void add_gated(const float* partials, const float* gate,
                                          const float* next_modulation, bf16* x, bf16* normed) {
  let_next_start();
  int column = threadIdx.x * 4;
  size_t at = (size_t)blockIdx.x * WIDTH + column;
  float4 g4 = *(const float4*)(gate + column);
  float4 scale4 = *(const float4*)(next_modulation + column);
  float4 shift4 = *(const float4*)(next_modulation + WIDTH + column);
  wait_for_previous();
  uint2 old = *(const uint2*)(x + at);
  uint4 part[kRanges];
#pragma unroll
  for (int r = 0; r < kRanges; r++) part[r] = load_l2(partials + (size_t)r * HORIZON * WIDTH + at);
  float p[4] = {}, g[4] = {g4.x, g4.y, g4.z, g4.w};
#pragma unroll
  for (int r = 0; r < kRanges; r++) {
    p[0] += __uint_as_float(part[r].x), p[1] += __uint_as_float(part[r].y);
    p[2] += __uint_as_float(part[r].z), p[3] += __uint_as_float(part[r].w);
  }
  float before[4] = {low(old.x), high(old.x), low(old.y), high(old.y)}, square = 0.f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    p[j] = rounded(before[j] + rounded(rounded(p[j]) * rounded(g[j])));
    square += p[j] * p[j];
  }
  float r = rsqrtf(block_sum<kResidualThreads / 32>(square) / WIDTH + EPS);
  *(uint2*)(x + at) = make_uint2(pack(p[0], p[1]), pack(p[2], p[3]));
  *(uint2*)(normed + at) = make_uint2(
      pack(p[0] * r * (1.f + scale4.x) + shift4.x, p[1] * r * (1.f + scale4.y) + shift4.y),
      pack(p[2] * r * (1.f + scale4.z) + shift4.z, p[3] * r * (1.f + scale4.w) + shift4.w));
}

extern "C" __global__ void __launch_bounds__(kResidualThreads, 1) residual_attention(
    const float* partials,         // (ranges of K, H, WIDTH)
    const float* gate,             // (WIDTH,)
    const float* next_modulation,  // (2, WIDTH): scale, shift
    bf16* x,                       // (H, WIDTH), updated
    bf16* normed) {                // (H, WIDTH), written
  add_gated<Out::kRanges>(partials, gate, next_modulation, x, normed);
}

extern "C" __global__ void __launch_bounds__(kResidualThreads, 1) residual_mlp(
    const float* partials, const float* gate, const float* next_modulation, bf16* x,
    bf16* normed) {
  add_gated<Down::kRanges>(partials, gate, next_modulation, x, normed);
}
