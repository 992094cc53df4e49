// One Euler step of the action expert as a chain of small kernels for Hopper GPUs.
//
//   qkv             q, k, v = rope(adarms(x) W_qkv^T)
//   attend          attention of the action tokens, in clusters of blocks
//   attention_out   x += gate * (a W_out^T)
//   gate_up         a = gelu_tanh(adarms(x) W_gate^T) * (adarms(x) W_up^T)
//   down            x += gate * (a W_down^T)
//   step_end        x_t += dt (W_out adarms(x) + b);  x = W_in x_t + b, in clusters, once per step
//
// The norm costs no pass (small_gemm.py): whoever writes x also writes scaled = x * (1 + scale) of
// the next norm and the sums of squares of its columns; the kernel behind the norm multiplies its
// sums by 1 / rms and adds shift W^T, a constant of the step.
//
// A kernel starts early, when some before it may still read what it writes, or write what it reads.
// So every thread waits for the kernel before it ahead of all that: that one is complete then, and,
// as it waited too, so are all kernels before it. Only what no kernel writes is read ahead.
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
// whose tokens have room beside all weights, *_IN_FLIGHT bytes of weights on their way at once;
// QUERY_BLOCK (a multiple of 16) query rows per cluster, RANGES of keys with at most KEYS (a multiple
// of 16) in each; END_TOKENS per cluster of END_BLOCKS at a step's end; SQUARES parts of a sum of
// squares. Storage is bfloat16, held as unsigned short; sums are float32.
// Plain twins: small_gemm.py, split_attention.py, euler.py.
#include "hopper_attention.cuh"
#include "hopper_product.cuh"
#include "hopper_step_end.cuh"

constexpr int kHalf = HEAD_DIM / 2;

typedef Product<QKV_FEATURES, QKV_DEPTH, QKV_SPLIT, QKV_STAGES, QKV_IN_FLIGHT, WIDTH,
                (HEADS + 2) * HEAD_DIM>
    Qkv;
typedef Product<OUT_FEATURES, OUT_DEPTH, OUT_SPLIT, OUT_STAGES, OUT_IN_FLIGHT, HEADS * HEAD_DIM,
                WIDTH>
    Out;
typedef Product<UP_FEATURES, UP_DEPTH, UP_SPLIT, UP_STAGES, UP_IN_FLIGHT, WIDTH, 2 * MLP> Up;
typedef Product<DOWN_FEATURES, DOWN_DEPTH, DOWN_SPLIT, DOWN_STAGES, DOWN_IN_FLIGHT, MLP, WIDTH>
    Down;

// What the sums of a product behind a norm need of the block's tokens.
template <class P>
struct Norm {
  static constexpr int kLanes = SQUARES / 4;  // of a token
  static constexpr int kQuads = P::kShare * kLanes;
  static_assert(kQuads <= kThreads && 32 % kLanes == 0, "a quad per thread");

  float inverse[P::kShare + 1];  // 1 / rms of the block's tokens; the last is for other threads

  // The last threads take a quad each, and their neighbours add them up: the first warps ask for
  // tokens.
  static __device__ __forceinline__ int quad() { return (int)threadIdx.x - (kThreads - kQuads); }

  // The thread's quad in all sums of squares (HORIZON, SQUARES).
  static __device__ __forceinline__ const float4* quad_of(const float* squares) {
    int i = max(quad(), 0), token = min(P::token0() + i / kLanes, HORIZON - 1);
    return (const float4*)(squares + token * SQUARES) + i % kLanes;
  }
  __device__ __forceinline__ void add_up(float4 squares) {
    float total = sum_of_quad(squares);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) total += __shfl_xor_sync(~0u, total, step);
    inverse[quad() < 0 ? P::kShare : quad() / kLanes] = inverse_rms(total);
  }
};

// Four neighbouring features behind a norm, rounded as they are stored.
struct Quad {
  float v[4];
  __device__ __forceinline__ Quad(float4 sum, float inverse, float4 shift)
      : v{rounded(sum.x * inverse + shift.x), rounded(sum.y * inverse + shift.y),
          rounded(sum.z * inverse + shift.z), rounded(sum.w * inverse + shift.w)} {}
};

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) qkv(
    const __grid_constant__ TensorMap scaled,  // (H, WIDTH), boxes of kTokens rows
    const float* squares,  // (H, SQUARES)
    const float* shift,    // ((HEADS + 2) * HEAD_DIM,): shift W^T
    const bf16* weights,   // packed: a block has as many first halves of pairs as second ones
    const bf16* cosines, const bf16* sines,  // (positions, HEAD_DIM / 2)
    const int* n_prefix,
    bf16* out) {  // (HEADS + 2, H, HEAD_DIM): q heads, k, v
  constexpr int kPairs = Qkv::kFeatures / 2, kQuads = kPairs / 4;
  constexpr int kItems = (Qkv::kShare * kQuads + kThreads - 1) / kThreads;
  static_assert(kThreads % kQuads == 0, "a thread has the same features of all its tokens");
  __shared__ Arrivals arrived;
  __shared__ Norm<Qkv> norm;
  let_next_start();
  Qkv::begin(scaled, arrived);
  if (Qkv::brings()) return Qkv::bring(weights, scaled, arrived);
  int head = Qkv::unit() * kPairs / kHalf, pair0 = Qkv::unit() * kPairs % kHalf;
  int token0 = threadIdx.x / kQuads, row = threadIdx.x % kQuads * 4;
  const float* of_block = shift + head * HEAD_DIM + pair0 + row;
  float4 shift_a = *(const float4*)of_block, shift_b = *(const float4*)(of_block + kHalf);
  uint2 cos2[kItems], sin2[kItems];
#pragma unroll
  for (int j = 0; j < kItems; j++) {
    int token = min(Qkv::token0() + j * (kThreads / kQuads) + token0, HORIZON - 1);
    size_t table = (size_t)(*n_prefix + token) * kHalf + pair0 + row;
    cos2[j] = *(const uint2*)(cosines + table), sin2[j] = *(const uint2*)(sines + table);
  }
  const float4* quad = norm.quad_of(squares);
  settle(quad);  // is there before the wait
  int warp = Qkv::warp();
  Qkv::start(scaled, arrived, warp);
  float4 of_quad = __ldcg(quad);
  Qkv::multiply(arrived, warp, [&] { norm.add_up(of_quad); });
  if (Qkv::surplus()) return;
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    int token = item * (kThreads / kQuads) + token0;
    if (token >= Qkv::tokens()) break;
    float inverse = norm.inverse[token];
    Quad a(Qkv::sum<float4>(token, row), inverse, shift_a);
    Quad b(Qkv::sum<float4>(token, row + kPairs), inverse, shift_b);
    float c[4] = {low(cos2[item].x), high(cos2[item].x), low(cos2[item].y), high(cos2[item].y)};
    float s[4] = {low(sin2[item].x), high(sin2[item].x), low(sin2[item].y), high(sin2[item].y)};
    bool is_value = head == HEADS + 1;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float first = a.v[j], second = b.v[j];
      a.v[j] = is_value ? first : rounded(first * c[j]) - rounded(second * s[j]);
      b.v[j] = is_value ? second : rounded(second * c[j]) + rounded(first * s[j]);
    }
    bf16* target =
        out + ((size_t)head * HORIZON + Qkv::token0() + token) * HEAD_DIM + pair0 + row;
    *(uint2*)target = make_uint2(pack(a.v[0], a.v[1]), pack(a.v[2], a.v[3]));
    *(uint2*)(target + kHalf) = make_uint2(pack(b.v[0], b.v[1]), pack(b.v[2], b.v[3]));
  }
}

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) gate_up(
    const __grid_constant__ TensorMap scaled,  // (H, WIDTH), boxes of kTokens rows
    const float* squares,  // (H, SQUARES)
    const float* shift,    // (2 * MLP,): shift W^T
    const bf16* weights,   // packed: a block has as many gate rows as up rows
    bf16* out) {           // (H, MLP)
  constexpr int kColumns = Up::kFeatures / 2, kQuads = kColumns / 4;
  static_assert(kThreads % kQuads == 0, "a thread has the same features of all its tokens");
  __shared__ Arrivals arrived;
  __shared__ Norm<Up> norm;
  let_next_start();
  Up::begin(scaled, arrived);
  if (Up::brings()) return Up::bring(weights, scaled, arrived);
  int row = threadIdx.x % kQuads * 4, column = Up::unit() * kColumns + row;
  float4 gate_shift = *(const float4*)(shift + column);
  float4 up_shift = *(const float4*)(shift + MLP + column);
  const float4* quad = norm.quad_of(squares);
  settle(quad);  // is there before the wait
  int warp = Up::warp();
  Up::start(scaled, arrived, warp);
  float4 of_quad = __ldcg(quad);
  Up::multiply(arrived, warp, [&] { norm.add_up(of_quad); });
  if (Up::surplus()) return;
#pragma unroll
  for (int j = 0; j < Up::kShare; j += kThreads / kQuads) {
    int token = j + threadIdx.x / kQuads;
    if (token >= Up::tokens()) break;
    float inverse = norm.inverse[token];
    Quad g(Up::sum<float4>(token, row), inverse, gate_shift);
    Quad u(Up::sum<float4>(token, row + kColumns), inverse, up_shift);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float v = g.v[k];
      // gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3).
      float twice_z = 1.5957691216057308f * v * (1.f + 0.044715f * v * v);
      g.v[k] = rounded(v * reciprocal(1.f + exp2_fast(-kLog2E * twice_z))) * u.v[k];
    }
    *(uint2*)(out + (size_t)(Up::token0() + token) * MLP + column) =
        make_uint2(pack(g.v[0], g.v[1]), pack(g.v[2], g.v[3]));
  }
}

// A product that ends in the residual stream. A warp finishes a token, a lane two features of 64.
template <class P>
__device__ __forceinline__ void residual_product(const TensorMap& tokens, const bf16* weights,
                                                 const float* gate, const float* next_scale,
                                                 bf16* x, bf16* scaled, float* squares,
                                                 Arrivals& arrived) {
  constexpr int kPairs = P::kFeatures / 64, kRounds = (P::kShare + kWarps - 1) / kWarps;
  static_assert(P::kUnits <= SQUARES, "a part per unit of features");
  let_next_start();
  P::begin(tokens, arrived);
  if (P::brings()) return P::bring(weights, tokens, arrived);
  int warp = P::warp(), lane = threadIdx.x % 32, column = P::feature0() + lane * 2;
  float2 gates[kPairs], scales[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; k++) {
    gates[k] = *(const float2*)(gate + column + k * 64);
    scales[k] = *(const float2*)(next_scale + column + k * 64);
  }
  const u32* rows[kRounds];
#pragma unroll
  for (int j = 0; j < kRounds; j++) {
    int token = min(P::token0() + j * kWarps + warp, HORIZON - 1);
    rows[j] = (const u32*)(x + (size_t)token * WIDTH + column);
    settle(rows[j]);  // is there before the wait
  }
  P::start(tokens, arrived, warp);
  u32 before[kRounds][kPairs];
#pragma unroll
  for (int j = 0; j < kRounds; j++)
#pragma unroll
    for (int k = 0; k < kPairs; k++) before[j][k] = __ldcg(rows[j] + k * 32);
  P::multiply(arrived, warp, [] {});
  if (P::surplus()) return;
#pragma unroll
  for (int j = 0; j < kRounds; j++) {
    int token = j * kWarps + warp;
    if (token >= P::tokens()) break;
    size_t at = (size_t)(P::token0() + token) * WIDTH + column;
    float square = 0.f;
#pragma unroll
    for (int k = 0; k < kPairs; k++) {
      float2 sum = P::template sum<float2>(token, lane * 2 + k * 64);
      float first = low(before[j][k]) + rounded(rounded(sum.x) * rounded(gates[k].x));
      float second = high(before[j][k]) + rounded(rounded(sum.y) * rounded(gates[k].y));
      u32 now = pack(first, second);
      first = low(now), second = high(now);
      *(u32*)(x + at + k * 64) = now;
      *(u32*)(scaled + at + k * 64) =
          pack(first * (1.f + scales[k].x), second * (1.f + scales[k].y));
      square += first * first + second * second;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) square += __shfl_xor_sync(~0u, square, step);
    if (lane == 0) squares[(P::token0() + token) * SQUARES + P::unit()] = square;
  }
}

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) attention_out(
    const __grid_constant__ TensorMap attended,  // (H, HEADS * HEAD_DIM), boxes of kTokens rows
    const bf16* weights,      // packed
    const float* gate,        // (WIDTH,)
    const float* next_scale,  // (WIDTH,)
    bf16* x,                  // (H, WIDTH), updated
    bf16* scaled,             // (H, WIDTH), written
    float* squares) {         // (H, SQUARES), written
  __shared__ Arrivals arrived;
  residual_product<Out>(attended, weights, gate, next_scale, x, scaled, squares, arrived);
}

extern "C" __global__ void __launch_bounds__(kProductThreads, 3) down(
    const __grid_constant__ TensorMap activated,  // (H, MLP), boxes of kTokens rows
    const bf16* weights, const float* gate, const float* next_scale, bf16* x, bf16* scaled,
    float* squares) {
  __shared__ Arrivals arrived;
  residual_product<Down>(activated, weights, gate, next_scale, x, scaled, squares, arrived);
}
