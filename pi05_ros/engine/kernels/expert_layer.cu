// One layer of the action expert in five kernels for GPUs with thread block clusters (sm_90+).
//
//   qkv_rope       q, k, v = rope(adarms(x) W_qkv^T)
//   attend         softmax(q K^T / sqrt(D)) V over prefix and suffix keys
//   gated_residual x += gate * (a W^T)                         (twice per layer)
//   gate_up        a = gelu_tanh(adarms(x) W_gate^T) * (adarms(x) W_up^T)
//
// Why not Triton: a product with a few dozen rows is a chain of latencies, and the long ones are
// reductions of a split K through global memory. Here the blocks of a cluster split K and add up
// through distributed shared memory, in rank order (the same bits on every run), and every kernel
// has its weights in shared memory before it waits for the kernel before it.
//
// A product is computed transposed: weight rows are the 16-row side of the matrix instruction and
// action tokens the 8-column side, so a horizon of 50 is padded to 56.
//
// Compile-time sizes (macros): HORIZON, WIDTH, MLP, HEADS, HEAD_DIM, PARTS (row stride of the sums
// of squares, at least the clusters of a residual product), QUERIES (query rows per attention
// cluster), KEYS (keys per block of an attention cluster, a multiple of 16), EPS.
// Tilings: QKV_*, OUT_*, UP_*, DOWN_*; the last cluster of a product may be partly empty.
// Storage is bfloat16, held as unsigned short. Plain twins: small_gemm.py, split_attention.py.

typedef unsigned short bf16;
typedef unsigned int u32;

constexpr int kTokenTiles = (HORIZON + 7) / 8;  // 8-token columns of the matrix instruction
constexpr int kTokens = kTokenTiles * 8;
constexpr int kPad = 8;  // elements after each row in shared memory: no bank conflicts

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float low_value, float high_value) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high_value), "f"(low_value));
  return pair;
}
__device__ __forceinline__ float rounded(float value) { return low(pack(value, 0.f)); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void copy_async(u32 target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// No block leaves while another still reads its sums. Nothing written is read after it, so it
// need not wait for the stores to global memory.
__device__ __forceinline__ void cluster_leave() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
// Makes the shared memory of the cluster's blocks visible to each other. The release is a fence of
// the whole device; after the block's own barrier one warp can do it for all (it is cumulative).
__device__ __forceinline__ void cluster_sync() {
  __syncthreads();
  if (threadIdx.x < 32)
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 at_rank(u32 address, u32 rank) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
// Volatile keeps these between the cluster's barriers; they may overtake ordinary stores.
__device__ __forceinline__ float4 load_remote(u32 address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ float2 load_remote2(u32 address) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address));
  return v;
}

// Ask for this block's share of `bytes` at `source` to be brought into L2.
__device__ __forceinline__ void prefetch_share(const void* source, u32 bytes) {
  if (threadIdx.x != 0 || bytes == 0) return;
  const u32 piece = 16384;
  for (u32 at = blockIdx.x * piece; at < bytes; at += gridDim.x * piece) {
    u32 size = bytes - at < piece ? bytes - at : piece;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"((const char*)source + at),
                 "r"(size)
                 : "memory");
  }
}

__device__ __forceinline__ void load_matrix4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix2(u32& r0, u32& r1, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix4_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One block's part of a product: ROWS weight rows by a K range of DEPTH, out of a cluster of
// RANKS blocks that share the rows and split K. WARPS_N x 16 * TILES_N weight rows are spread
// over WARPS_N warps; WARPS_K groups of warps split DEPTH again.
template <int ROWS_, int DEPTH_, int RANKS_, int WARPS_N_, int WARPS_K_>
struct Tiling {
  static constexpr int ROWS = ROWS_, DEPTH = DEPTH_, RANKS = RANKS_;
  static constexpr int WARPS_N = WARPS_N_, WARPS_K = WARPS_K_;
  static constexpr int TILES_N = ROWS / 16 / WARPS_N;
  static constexpr int THREADS = WARPS_N * WARPS_K * 32;
  static constexpr int LD = DEPTH + kPad;    // of weights and activations, in elements
  static constexpr int LD_SUM = ROWS + 4;    // of partial sums, in floats
  static constexpr int TOKENS_PER_RANK = (HORIZON + RANKS - 1) / RANKS;
  static_assert(ROWS % (16 * WARPS_N) == 0 && DEPTH % (16 * WARPS_K) == 0, "tiling");
};

template <class T, class RowOf>
__device__ __forceinline__ void load_weights(bf16* target, const bf16* weights, int k_stride,
                                             int k0, RowOf row_of) {
  constexpr int kChunks = T::DEPTH / 8;
  for (int i = threadIdx.x; i < T::ROWS * kChunks; i += T::THREADS) {
    int row = i / kChunks, chunk = i % kChunks;
    const bf16* source = weights + (size_t)row_of(row) * k_stride + k0 + chunk * 8;
    copy_async(shared_address(target + row * T::LD + chunk * 8), source);
  }
}

// Copies (HORIZON, DEPTH) activations as they are.
template <class T>
__device__ __forceinline__ void load_plain(bf16* target, const bf16* source, int stride, int k0) {
  constexpr int kChunks = T::DEPTH / 8;
  for (int i = threadIdx.x; i < HORIZON * kChunks; i += T::THREADS) {
    int token = i / kChunks, chunk = i % kChunks;
    copy_async(shared_address(target + token * T::LD + chunk * 8),
               source + (size_t)token * stride + k0 + chunk * 8);
  }
}

// The adaptive norm of a (HORIZON, DEPTH) part of x: construct before the dependency wait (the
// modulation is constant), call after it.
template <class T>
struct Normed {
  static constexpr int kChunks = T::DEPTH / 8;
  static constexpr int kPass = T::THREADS / kChunks;  // tokens per pass
  static constexpr int kPasses = (HORIZON + kPass - 1) / kPass;
  static_assert(T::THREADS % kChunks == 0, "a thread keeps its columns");
  float scale[8], shift[8];
  int column;

  __device__ __forceinline__ Normed(const float* modulation, int k0) {
    column = k0 + (threadIdx.x % kChunks) * 8;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float4 a = *(const float4*)(modulation + column + i);
      float4 b = *(const float4*)(modulation + WIDTH + column + i);
      scale[i] = 1.f + a.x, scale[i + 1] = 1.f + a.y;
      scale[i + 2] = 1.f + a.z, scale[i + 3] = 1.f + a.w;
      shift[i] = b.x, shift[i + 1] = b.y, shift[i + 2] = b.z, shift[i + 3] = b.w;
    }
  }

  __device__ __forceinline__ void load(bf16* target, float* inverse_rms, const bf16* x,
                                       const float* ssq) {
    uint4 raw[kPasses];
    int first = threadIdx.x / kChunks;
#pragma unroll
    for (int p = 0; p < kPasses; p++) {
      int token = first + p * kPass;
      if (token < HORIZON) raw[p] = *(const uint4*)(x + (size_t)token * WIDTH + column);
    }
    constexpr int kLanes = PARTS / 4;  // lanes per token
    for (int base = 0; base < kTokens * kLanes; base += T::THREADS) {
      int token = (base + threadIdx.x) / kLanes, lane = threadIdx.x % kLanes;
      float sum = 0.f;
      if (token < HORIZON) {
        float4 v = *(const float4*)(ssq + token * PARTS + lane * 4);
        sum = (v.x + v.y) + (v.z + v.w);
      }
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (token < HORIZON && lane == 0) inverse_rms[token] = rsqrtf(sum / WIDTH + EPS);
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kPasses; p++) {
      int token = first + p * kPass;
      if (token >= HORIZON) break;
      float r = inverse_rms[token];
      u32 in[4] = {raw[p].x, raw[p].y, raw[p].z, raw[p].w}, out[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        out[i] = pack(low(in[i]) * r * scale[2 * i] + shift[2 * i],
                      high(in[i]) * r * scale[2 * i + 1] + shift[2 * i + 1]);
      *(uint4*)(target + token * T::LD + (threadIdx.x % kChunks) * 8) =
          make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
};

// The operands of one 16-deep step of a warp's products.
template <class T>
struct Fragments {
  u32 a[T::TILES_N][4], b[kTokenTiles + 1][2];

  __device__ __forceinline__ void load(u32 a_at, u32 b_at, u32 b_last_at, int step) {
#pragma unroll
    for (int t = 0; t + 1 < kTokenTiles; t += 2) {
      u32 r[4];
      load_matrix4(r, b_at + (t * 8 * T::LD + step * 16) * 2);
      b[t][0] = r[0], b[t][1] = r[1], b[t + 1][0] = r[2], b[t + 1][1] = r[3];
    }
    if (kTokenTiles % 2)
      load_matrix2(b[kTokenTiles - 1][0], b[kTokenTiles - 1][1], b_last_at + step * 32);
#pragma unroll
    for (int n = 0; n < T::TILES_N; n++)
      load_matrix4(a[n], a_at + (n * 16 * T::LD + step * 16) * 2);
  }
};

// Multiplies the block's part and leaves sums[token][row] in shared memory, over the operands.
template <class T>
__device__ __forceinline__ void multiply(const bf16* weights, const bf16* tokens, float* sums) {
  constexpr int kSteps = T::DEPTH / T::WARPS_K / 16;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int row0 = (warp % T::WARPS_N) * T::TILES_N * 16;
  int group = warp / T::WARPS_N;
  int k0 = group * kSteps * 16 + lane / 8 % 2 * 8;
  u32 a_at = shared_address(weights + (row0 + lane % 16) * T::LD + group * kSteps * 16 +
                            lane / 16 * 8);
  u32 b_at = shared_address(tokens + (lane / 16 * 8 + lane % 8) * T::LD + k0);
  u32 b_last_at = shared_address(tokens + ((kTokenTiles - 1) * 8 + lane % 8) * T::LD + k0);
  float acc[T::TILES_N][kTokenTiles][4] = {};
  Fragments<T> next;
  next.load(a_at, b_at, b_last_at, 0);
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    Fragments<T> now = next;  // the next step's operands are on their way during this one
    if (step + 1 < kSteps) next.load(a_at, b_at, b_last_at, step + 1);
#pragma unroll
    for (int n = 0; n < T::TILES_N; n++)
#pragma unroll
      for (int t = 0; t < kTokenTiles; t++) mma(acc[n][t], now.a[n], now.b[t][0], now.b[t][1]);
  }
  __syncthreads();  // the operands are read; the sums take their place
#pragma unroll
  for (int turn = T::WARPS_K - 1; turn >= 0; turn--) {  // groups of warps add one after another
    if (group == turn) {
#pragma unroll
      for (int n = 0; n < T::TILES_N; n++)
#pragma unroll
        for (int t = 0; t < kTokenTiles; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            int row = row0 + n * 16 + lane / 4 + i / 2 * 8;
            int token = t * 8 + lane % 4 * 2 + i % 2;
            float* sum = sums + token * T::LD_SUM + row;
            *sum = turn == T::WARPS_K - 1 ? acc[n][t][i] : *sum + acc[n][t][i];
          }
    }
    if (turn > 0) __syncthreads();
  }
}

// Four consecutive rows of one token, summed over the cluster in rank order.
template <class T>
__device__ __forceinline__ float4 cluster_sum(const float* sums, int token, int row) {
  u32 at = shared_address(sums + token * T::LD_SUM + row);
  float4 v[T::RANKS];
#pragma unroll
  for (int r = 0; r < T::RANKS; r++) v[r] = load_remote(at_rank(at, r));
  float4 sum = v[0];
#pragma unroll
  for (int r = 1; r < T::RANKS; r++)
    sum.x += v[r].x, sum.y += v[r].y, sum.z += v[r].z, sum.w += v[r].w;
  return sum;
}

extern __shared__ __align__(128) unsigned char shared_memory[];

typedef Tiling<QKV_ROWS, WIDTH / QKV_RANKS, QKV_RANKS, QKV_WARPS_N, QKV_WARPS_K> Qkv;
typedef Tiling<OUT_ROWS, HEADS * HEAD_DIM / OUT_RANKS, OUT_RANKS, OUT_WARPS_N, OUT_WARPS_K> Out;
typedef Tiling<UP_ROWS, WIDTH / UP_RANKS, UP_RANKS, UP_WARPS_N, UP_WARPS_K> Up;
typedef Tiling<DOWN_ROWS, MLP / DOWN_RANKS, DOWN_RANKS, DOWN_WARPS_N, DOWN_WARPS_K> Down;

extern "C" __global__ void __launch_bounds__(Qkv::THREADS) qkv_rope(
    const bf16* x,            // (H, WIDTH)
    const float* ssq,         // (H, PARTS)
    const float* modulation,  // (3, WIDTH)
    const bf16* weights,      // ((HEADS + 2) * HEAD_DIM, WIDTH)
    const bf16* cosines, const bf16* sines,  // (positions, HEAD_DIM / 2)
    const int* n_prefix,
    bf16* out,  // (HEADS + 2, H, HEAD_DIM)
    const void* next, u32 next_bytes) {
  constexpr int kPairs = Qkv::ROWS / 2, kHalf = HEAD_DIM / 2;
  constexpr int kAllPairs = (HEADS + 2) * kHalf;
  bf16* tokens = (bf16*)shared_memory;
  bf16* w = tokens + HORIZON * Qkv::LD;  // reads of tokens up to the next 8 end in here
  float* inverse_rms = (float*)(w + Qkv::ROWS * Qkv::LD);
  float* sums = (float*)shared_memory;
  int rank = cluster_rank(), pair0 = blockIdx.x / Qkv::RANKS * kPairs;
  load_weights<Qkv>(w, weights, WIDTH, rank * Qkv::DEPTH, [&](int row) {
    int pair = min(pair0 + row % kPairs, kAllPairs - 1);
    return pair / kHalf * HEAD_DIM + pair % kHalf + row / kPairs * kHalf;
  });
  Normed<Qkv> normed(modulation, rank * Qkv::DEPTH);
  prefetch_share(next, next_bytes);
  int start = *n_prefix;
  wait_for_previous();
  let_next_start();
  normed.load(tokens, inverse_rms, x, ssq);
  wait_copies();
  __syncthreads();
  multiply<Qkv>(w, tokens, sums);
  cluster_sync();
  for (int i = threadIdx.x; i < Qkv::TOKENS_PER_RANK * kPairs / 4; i += Qkv::THREADS) {
    int token = rank * Qkv::TOKENS_PER_RANK + i / (kPairs / 4), row = i % (kPairs / 4) * 4;
    if (token >= HORIZON) break;
    if (pair0 + row >= kAllPairs) continue;
    int head = (pair0 + row) / kHalf, column = (pair0 + row) % kHalf;
    size_t table = (size_t)(start + token) * kHalf + column;
    uint2 cos2 = *(const uint2*)(cosines + table), sin2 = *(const uint2*)(sines + table);
    float4 a4 = cluster_sum<Qkv>(sums, token, row);
    float4 b4 = cluster_sum<Qkv>(sums, token, row + kPairs);
    float a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
    float c[4] = {low(cos2.x), high(cos2.x), low(cos2.y), high(cos2.y)};
    float s[4] = {low(sin2.x), high(sin2.x), low(sin2.y), high(sin2.y)};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float first = rounded(a[j]), second = rounded(b[j]);
      bool is_value = head == HEADS + 1;
      a[j] = is_value ? first : rounded(first * c[j]) - rounded(second * s[j]);
      b[j] = is_value ? second : rounded(second * c[j]) + rounded(first * s[j]);
    }
    bf16* target = out + ((size_t)head * HORIZON + token) * HEAD_DIM + column;
    *(uint2*)target = make_uint2(pack(a[0], a[1]), pack(a[2], a[3]));
    *(uint2*)(target + kHalf) = make_uint2(pack(b[0], b[1]), pack(b[2], b[3]));
  }
  cluster_leave();
}

extern "C" __global__ void __launch_bounds__(Up::THREADS) gate_up(
    const bf16* x,            // (H, WIDTH)
    const float* ssq,         // (H, PARTS)
    const float* modulation,  // (3, WIDTH)
    const bf16* weights,      // (2 * MLP, WIDTH): gate rows, up rows
    bf16* out,                // (H, MLP)
    const void* next, u32 next_bytes) {
  constexpr int kColumns = Up::ROWS / 2;
  bf16* tokens = (bf16*)shared_memory;
  bf16* w = tokens + HORIZON * Up::LD;  // reads of tokens up to the next 8 end in here
  float* inverse_rms = (float*)(w + Up::ROWS * Up::LD);
  float* sums = (float*)shared_memory;
  int rank = cluster_rank(), column0 = blockIdx.x / Up::RANKS * kColumns;
  load_weights<Up>(w, weights, WIDTH, rank * Up::DEPTH, [&](int row) {
    return row / kColumns * MLP + column0 + row % kColumns;
  });
  Normed<Up> normed(modulation, rank * Up::DEPTH);
  prefetch_share(next, next_bytes);
  wait_for_previous();
  let_next_start();
  normed.load(tokens, inverse_rms, x, ssq);
  wait_copies();
  __syncthreads();
  multiply<Up>(w, tokens, sums);
  cluster_sync();
#pragma unroll
  for (int i0 = 0; i0 < Up::TOKENS_PER_RANK * kColumns / 4; i0 += Up::THREADS) {
    int i = i0 + threadIdx.x;
    int token = rank * Up::TOKENS_PER_RANK + i / (kColumns / 4), row = i % (kColumns / 4) * 4;
    if (i >= Up::TOKENS_PER_RANK * kColumns / 4 || token >= HORIZON) break;
    float4 g4 = cluster_sum<Up>(sums, token, row);
    float4 u4 = cluster_sum<Up>(sums, token, row + kColumns);
    float g[4] = {g4.x, g4.y, g4.z, g4.w}, u[4] = {u4.x, u4.y, u4.z, u4.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float v = rounded(g[j]);
      // gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3).
      float twice_z = 1.5957691216057308f * v * (1.f + 0.044715f * v * v);
      g[j] = rounded(v / (1.f + __expf(-twice_z))) * rounded(u[j]);
    }
    *(uint2*)(out + (size_t)token * MLP + column0 + row) =
        make_uint2(pack(g[0], g[1]), pack(g[2], g[3]));
  }
  cluster_leave();
}

template <class T>
__device__ __forceinline__ void gated_residual(
    const bf16* activations,  // (H, depth)
    const bf16* weights,      // (WIDTH, depth)
    const float* gate,        // (WIDTH,)
    bf16* x,                  // (H, WIDTH), updated
    float* ssq,               // (H, PARTS), written
    const void* next, u32 next_bytes) {
  constexpr int kDepth = T::DEPTH * T::RANKS;
  // In the epilogue a warp has one token, a lane four columns.
  static_assert(T::TOKENS_PER_RANK * 32 <= T::THREADS && T::ROWS <= 128, "epilogue");
  bf16* tokens = (bf16*)shared_memory;
  bf16* w = tokens + HORIZON * T::LD;  // reads of tokens up to the next 8 end in here
  float* sums = (float*)shared_memory;
  int rank = cluster_rank(), part = blockIdx.x / T::RANKS;
  load_weights<T>(w, weights, kDepth, rank * T::DEPTH, [&](int row) {
    return min(part * T::ROWS + row, WIDTH - 1);
  });
  int warp = threadIdx.x / 32, token = rank * T::TOKENS_PER_RANK + warp;
  int row = threadIdx.x % 32 * 4, column = part * T::ROWS + row;
  bool mine = warp < T::TOKENS_PER_RANK && token < HORIZON && row < T::ROWS && column < WIDTH;
  float4 g4 = make_float4(0.f, 0.f, 0.f, 0.f);
  if (mine) g4 = *(const float4*)(gate + column);
  prefetch_share(next, next_bytes);
  wait_for_previous();
  let_next_start();
  load_plain<T>(tokens, activations, kDepth, rank * T::DEPTH);
  uint2* target = (uint2*)(x + (size_t)token * WIDTH + column);
  uint2 old = make_uint2(0, 0);
  if (mine) old = *target;
  wait_copies();
  __syncthreads();
  multiply<T>(w, tokens, sums);
  cluster_sync();
  float square = 0.f;
  if (mine) {
    float4 p4 = cluster_sum<T>(sums, token, row);
    float p[4] = {p4.x, p4.y, p4.z, p4.w}, g[4] = {g4.x, g4.y, g4.z, g4.w};
    float before[4] = {low(old.x), high(old.x), low(old.y), high(old.y)};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      p[j] = rounded(before[j] + rounded(rounded(p[j]) * rounded(g[j])));
      square += p[j] * p[j];
    }
    *target = make_uint2(pack(p[0], p[1]), pack(p[2], p[3]));
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) square += __shfl_xor_sync(~0u, square, step);
  if (mine && row == 0) ssq[token * PARTS + part] = square;
  cluster_leave();
}

extern "C" __global__ void __launch_bounds__(Out::THREADS) attention_out(
    const bf16* activations, const bf16* weights, const float* gate, bf16* x, float* ssq,
    const void* next, u32 next_bytes) {
  gated_residual<Out>(activations, weights, gate, x, ssq, next, next_bytes);
}

extern "C" __global__ void __launch_bounds__(Down::THREADS) down(
    const bf16* activations, const bf16* weights, const float* gate, bf16* x, float* ssq,
    const void* next, u32 next_bytes) {
  gated_residual<Down>(activations, weights, gate, x, ssq, next, next_bytes);
}

// Attention: a cluster of 8 blocks takes kQueries packed query rows (all heads share one K/V
// head); its blocks split the keys. Prefix keys are in shared memory before the dependency wait.
constexpr int kRanks = 8, kWarps = 8;
constexpr int kQueries = QUERIES;
constexpr int kQueryTiles = (kQueries + 15) / 16;
constexpr int kLdHead = HEAD_DIM + kPad;
constexpr int kQueryRows = kQueryTiles * 16;
constexpr int kTurns = (KEYS / 16 + kWarps - 1) / kWarps;
constexpr int kLdWeights = KEYS + kPad, kLdOut = HEAD_DIM + 8;
constexpr int kDims = HEAD_DIM / kWarps;  // output columns per warp
constexpr int kQueryElements = kQueries * kLdHead > kQueryRows * kLdWeights
                                   ? kQueries * kLdHead
                                   : kQueryRows * kLdWeights;
static_assert(kDims % 16 == 0 && KEYS % 16 == 0, "attention tiling");
static_assert(kQueryRows * kLdOut * 2 <= KEYS * kLdHead, "outputs fit over the keys");

extern "C" __global__ void __launch_bounds__(kWarps * 32) attend(
    const bf16* qkv,                        // (HEADS + 2, H, HEAD_DIM)
    const bf16* keys, const bf16* values,   // (P_max, HEAD_DIM)
    const int* n_prefix,
    bf16* out,  // (H, HEADS * HEAD_DIM)
    float log2_scale, const void* next, u32 next_bytes) {
  bf16* k_rows = (bf16*)shared_memory;
  bf16* v_rows = k_rows + KEYS * kLdHead;
  bf16* q_rows = v_rows + KEYS * kLdHead;
  bf16* weights = q_rows;  // once the queries are used
  float2* top_norm = (float2*)(q_rows + kQueryElements);
  float* warp_top = (float*)(top_norm + kQueryRows);
  float* warp_norm = warp_top + kWarps * kQueryRows;
  float* sums = (float*)shared_memory;  // over the keys, once they are used
  constexpr int kChunks = HEAD_DIM / 8;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int rank = cluster_rank(), query0 = blockIdx.x / kRanks * kQueries;
  int prefix = *n_prefix, total = prefix + HORIZON;
  int per_rank = ((total + kRanks - 1) / kRanks + 15) / 16 * 16;
  int first = rank * per_rank;
  int count = min(max(total - first, 0), per_rank);
  for (int i = threadIdx.x; i < per_rank * kChunks; i += kWarps * 32) {
    int row = i / kChunks, chunk = i % kChunks * 8, key = first + row;
    if (row < count && key < prefix) {
      copy_async(shared_address(k_rows + row * kLdHead + chunk),
                 keys + (size_t)key * HEAD_DIM + chunk);
      copy_async(shared_address(v_rows + row * kLdHead + chunk),
                 values + (size_t)key * HEAD_DIM + chunk);
    } else if (row >= count) {
      *(uint4*)(v_rows + row * kLdHead + chunk) = make_uint4(0, 0, 0, 0);
    }
  }
  prefetch_share(next, next_bytes);
  wait_for_previous();
  let_next_start();
  for (int i = threadIdx.x; i < kQueries * kChunks; i += kWarps * 32) {
    int row = i / kChunks, chunk = i % kChunks * 8;
    if (query0 + row < HEADS * HORIZON)
      copy_async(shared_address(q_rows + row * kLdHead + chunk),
                 qkv + (size_t)(query0 + row) * HEAD_DIM + chunk);
  }
  int suffix_row = max(prefix - first, 0);
  for (int i = suffix_row * kChunks + threadIdx.x; i < count * kChunks; i += kWarps * 32) {
    int row = i / kChunks, chunk = i % kChunks * 8;
    const bf16* source = qkv + (size_t)(HEADS * HORIZON + first + row - prefix) * HEAD_DIM + chunk;
    copy_async(shared_address(k_rows + row * kLdHead + chunk), source);
    copy_async(shared_address(v_rows + row * kLdHead + chunk), source + HORIZON * HEAD_DIM);
  }
  wait_copies();
  __syncthreads();

  // Logits of 16 keys per warp and turn, kept in registers until the row maxima are known.
  const float kLowest = __int_as_float(0xff800000);
  int groups = per_rank / 16;
  float acc_qk[kTurns][kQueryTiles][2][4] = {};
  float top[kQueryTiles][2];
#pragma unroll
  for (int t = 0; t < kQueryTiles; t++) top[t][0] = top[t][1] = kLowest;
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    int g = turn * kWarps + warp;
    if (g >= groups) break;
    u32 a_at = shared_address(q_rows + lane % 16 * kLdHead + lane / 16 * 8);
    u32 b_at = shared_address(k_rows + (g * 16 + lane / 16 * 8 + lane % 8) * kLdHead +
                              lane / 8 % 2 * 8);
    u32 b[2][4], a[2][kQueryTiles][4];
    load_matrix4(b[0], b_at);
#pragma unroll
    for (int t = 0; t < kQueryTiles; t++) load_matrix4(a[0][t], a_at + t * 16 * kLdHead * 2);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++) {
      const int now = step % 2, next = 1 - now;
      if (step + 1 < HEAD_DIM / 16) {
        load_matrix4(b[next], b_at + (step + 1) * 32);
#pragma unroll
        for (int t = 0; t < kQueryTiles; t++)
          load_matrix4(a[next][t], a_at + (t * 16 * kLdHead + (step + 1) * 16) * 2);
      }
#pragma unroll
      for (int t = 0; t < kQueryTiles; t++) {
        mma(acc_qk[turn][t][0], a[now][t], b[now][0], b[now][1]);
        mma(acc_qk[turn][t][1], a[now][t], b[now][2], b[now][3]);
      }
    }
#pragma unroll
    for (int t = 0; t < kQueryTiles; t++)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          bool seen = g * 16 + n * 8 + lane % 4 * 2 + i % 2 < count;
          float logit = seen ? acc_qk[turn][t][n][i] * log2_scale : kLowest;
          acc_qk[turn][t][n][i] = logit;
          top[t][i / 2] = fmaxf(top[t][i / 2], logit);
        }
  }
#pragma unroll
  for (int t = 0; t < kQueryTiles; t++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float v = top[t][h];
      v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
      v = fmaxf(v, __shfl_xor_sync(~0u, v, 2));
      if (lane % 4 == 0) warp_top[warp * kQueryRows + t * 16 + h * 8 + lane / 4] = v;
    }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kQueryTiles; t++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = t * 16 + h * 8 + lane / 4;
      float v = warp_top[row], norm = 0.f;
#pragma unroll
      for (int w = 1; w < kWarps; w++) v = fmaxf(v, warp_top[w * kQueryRows + row]);
      if (count == 0) v = 0.f;  // a block without keys: its weights become 0, not NaN
#pragma unroll
      for (int turn = 0; turn < kTurns; turn++) {
        int g = turn * kWarps + warp;
        if (g >= groups) break;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float p0 = exp2_fast(acc_qk[turn][t][n][h * 2] - v);
          float p1 = exp2_fast(acc_qk[turn][t][n][h * 2 + 1] - v);
          norm += p0 + p1;
          int key = g * 16 + n * 8 + lane % 4 * 2;
          *(u32*)(weights + row * kLdWeights + key) = pack(p0, p1);
        }
      }
      norm += __shfl_xor_sync(~0u, norm, 1);
      norm += __shfl_xor_sync(~0u, norm, 2);
      if (lane % 4 == 0) warp_norm[warp * kQueryRows + row] = norm;
    }
  __syncthreads();
  if (threadIdx.x < kQueryRows) {
    float v = kLowest, norm = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      v = fmaxf(v, warp_top[w * kQueryRows + threadIdx.x]);
      norm += warp_norm[w * kQueryRows + threadIdx.x];
    }
    top_norm[threadIdx.x] = make_float2(v, norm);
  }
  {
    float acc[kQueryTiles][kDims / 8][4] = {};
    u32 a_at = shared_address(weights + lane % 16 * kLdWeights + lane / 16 * 8);
    u32 b_at = shared_address(v_rows + lane % 16 * kLdHead + warp * kDims + lane / 16 * 8);
#pragma unroll
    for (int g = 0; g < KEYS / 16; g++) {
      if (g >= groups) break;
      u32 a[kQueryTiles][4], b[kDims / 16][4];
#pragma unroll
      for (int n = 0; n < kDims / 16; n++)
        load_matrix4_transposed(b[n], b_at + (g * 16 * kLdHead + n * 16) * 2);
#pragma unroll
      for (int t = 0; t < kQueryTiles; t++)
        load_matrix4(a[t], a_at + (t * 16 * kLdWeights + g * 16) * 2);
#pragma unroll
      for (int n = 0; n < kDims / 16; n++)
#pragma unroll
        for (int t = 0; t < kQueryTiles; t++) {
          mma(acc[t][2 * n], a[t], b[n][0], b[n][1]);
          mma(acc[t][2 * n + 1], a[t], b[n][2], b[n][3]);
        }
    }
#pragma unroll
    for (int t = 0; t < kQueryTiles; t++)
#pragma unroll
      for (int n = 0; n < kDims / 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          int row = t * 16 + lane / 4 + h * 8, dim = warp * kDims + n * 8 + lane % 4 * 2;
          *(float2*)(sums + row * kLdOut + dim) =
              make_float2(acc[t][n][h * 2], acc[t][n][h * 2 + 1]);
        }
  }
  cluster_sync();
  constexpr int kRowsPerRank = (kQueries + kRanks - 1) / kRanks;
  for (int i = threadIdx.x; i < kRowsPerRank * (HEAD_DIM / 4); i += kWarps * 32) {
    int row = rank * kRowsPerRank + i / (HEAD_DIM / 4), dim = i % (HEAD_DIM / 4) * 4;
    int query = query0 + row;
    if (row >= kQueries || query >= HEADS * HORIZON) break;
    u32 top_at = shared_address(top_norm + row), sum_at = shared_address(sums + row * kLdOut + dim);
    float2 tn[kRanks];
    float4 part[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
      tn[r] = load_remote2(at_rank(top_at, r));
      part[r] = load_remote(at_rank(sum_at, r));
    }
    float top = tn[0].x;
#pragma unroll
    for (int r = 1; r < kRanks; r++) top = fmaxf(top, tn[r].x);
    float norm = 0.f;
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
      if (tn[r].y == 0.f) continue;  // a block without keys
      float scale = exp2_fast(tn[r].x - top);
      norm += tn[r].y * scale;
      o.x += part[r].x * scale, o.y += part[r].y * scale;
      o.z += part[r].z * scale, o.w += part[r].w * scale;
    }
    float inverse = 1.f / norm;
    int head = query / HORIZON, token = query % HORIZON;
    *(uint2*)(out + ((size_t)token * HEADS + head) * HEAD_DIM + dim) =
        make_uint2(pack(o.x * inverse, o.y * inverse), pack(o.z * inverse, o.w * inverse));
  }
  cluster_leave();
}
