// Runs the blocks of a CUDA kernel on the CPU: every thread is a fiber, blocks run one by one.
//
// Stands in for hopper.cuh and the CUDA headers. A thread runs until it waits for others (a
// barrier, a shuffle, a matrix instruction), so a missing barrier shows as a wrong result: shared
// memory begins as NaN, warps run in an order that is drawn anew in every turn, and some are late.
#ifndef HOPPER_CUH
#define HOPPER_CUH
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define DYNAMIC_SHARED(name) static unsigned char* const name = cpu::shared_memory

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline u32 __float_as_uint(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
static inline float __int_as_float(int bits) { return __uint_as_float((u32)bits); }
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
template <class T> static inline T __ldcg(const T* p) { return *p; }

namespace cpu {

struct Index { u32 x; };
constexpr int kMaxThreads = 1024, kSharedBytes = 232448;
alignas(128) static unsigned char shared_memory[kSharedBytes];
static Index thread_index, block_index, grid_size;

// What a warp's threads show each other in one collective operation; two take turns.
struct Exchange { u32 words[32][6]; const void* rows[32]; };
struct Group {  // threads that wait for each other
  int size = 0, arrived = 0;
  u64 generation = 0;
};

static ucontext_t scheduler, contexts[kMaxThreads];
static std::vector<char> stacks[kMaxThreads];
static bool finished[kMaxThreads];
static Group block_group, warp_groups[kMaxThreads / 32];
static Exchange exchanges[kMaxThreads / 32][2];
static u64 operations[kMaxThreads];
static std::function<void()> body;
static bool moved;  // anything happened in this round; if not, the block hangs

// Drawn numbers, the same ones in every process.
static u32 draw(u32 below) {
  static u32 state = 1;
  state = state * 1664525u + 1013904223u;
  return (state >> 16) % below;
}
static std::vector<int> drawn_order(int count) {
  std::vector<int> order;
  for (int i = 0; i < count; i++) order.insert(order.begin() + draw(i + 1), i);
  return order;
}

static void yield() { swapcontext(&contexts[thread_index.x], &scheduler); }

static void wait(Group& group) {
  u64 generation = group.generation;
  moved = true;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    group.generation++;
    return;
  }
  while (group.generation == generation) yield();
}

static void enter() {
  body();
  finished[thread_index.x] = moved = true;
}

// Runs every block of a grid with `threads` threads each.
static void launch(int blocks, int threads, std::function<void()> kernel) {
  body = kernel;
  grid_size.x = blocks;
  for (int block = 0; block < blocks; block++) {
    block_index.x = block;
    memset(shared_memory, 0xff, kSharedBytes);
    block_group = Group{threads};
    for (int warp = 0; warp < threads / 32; warp++) warp_groups[warp] = Group{32};
    for (int t = 0; t < threads; t++) {
      finished[t] = false;
      operations[t] = 0;
      stacks[t].resize(1 << 16);
      getcontext(&contexts[t]);
      contexts[t].uc_stack.ss_sp = stacks[t].data();
      contexts[t].uc_stack.ss_size = stacks[t].size();
      contexts[t].uc_link = &scheduler;
      makecontext(&contexts[t], enter, 0);
    }
    for (int running = threads; running > 0;) {
      moved = false;
      bool complete = true;
      for (int warp : drawn_order(threads / 32)) {
        if (draw(3) == 0) {
          complete = false;
          continue;
        }
        for (int t = warp * 32; t < warp * 32 + 32; t++) {
          if (finished[t]) continue;
          thread_index.x = t;
          swapcontext(&scheduler, &contexts[t]);
          running -= finished[t];
        }
      }
      if (complete && !moved) {
        fprintf(stderr, "block %d waits for ever\n", block);
        abort();
      }
    }
  }
}

// The exchange of this thread's warp for its next collective operation.
static Exchange& next_exchange() {
  int t = thread_index.x;
  return exchanges[t / 32][operations[t]++ % 2];
}
static void meet() { wait(warp_groups[thread_index.x / 32]); }


}  // namespace cpu

#define threadIdx cpu::thread_index
#define blockIdx cpu::block_index
#define gridDim cpu::grid_size

static inline void __syncthreads() { cpu::wait(cpu::block_group); }
static inline void __syncwarp() { cpu::meet(); }
static inline u32 __shfl_xor_sync(u32, u32 v, int mask) {
  cpu::Exchange& e = cpu::next_exchange();
  int lane = threadIdx.x % 32;
  e.words[lane][0] = v;
  cpu::meet();
  return e.words[lane ^ mask][0];
}
static inline float __shfl_xor_sync(u32, float v, int mask) {
  cpu::Exchange& e = cpu::next_exchange();
  int lane = threadIdx.x % 32;
  e.words[lane][0] = __float_as_uint(v);
  cpu::meet();
  return __uint_as_float(e.words[lane ^ mask][0]);
}

static inline float low(u32 pair) { return __uint_as_float(pair << 16); }
static inline float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
static inline u32 rounded_bits(float f) {
  u32 bits = __float_as_uint(f);
  return f != f ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
static inline u32 pack(float first, float second) {
  return rounded_bits(first) | rounded_bits(second) << 16;
}
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float reciprocal(float x) { return 1.f / x; }
static inline float log2_fast(float x) { return log2f(x); }

// Nothing starts early here: these only have to be called in a sensible order.
static inline void let_next_start() {}
static inline void wait_for_previous() {}

static inline void barrier_init(u64* barrier) { *barrier = 1; }  // one arrival, no bytes yet
static inline void barrier_init_done() {}
static inline void barrier_expect(u64* barrier, u32 bytes) { *barrier += ((u64)bytes << 8) - 1; }
static inline void barrier_wait(u64* barrier) {
  while (*barrier != 0) cpu::yield();
}
static inline uint4 load_l2(const void* source) { return *(const uint4*)source; }
static inline void copy_async(void* target, const void* source) {
  if (((u64)target | (u64)source) % 16) abort();
  memcpy(target, source, 16);
}
static inline void wait_copies() {}
static inline void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier) {
  if (((u64)target | (u64)source | bytes) % 16) abort();
  memcpy(target, source, bytes);
  *barrier -= (u64)bytes << 8;
  cpu::moved = true;
}

static inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  cpu::Exchange& e = cpu::next_exchange();
  int lane = threadIdx.x % 32;
  u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(e.words[lane], mine, sizeof(mine));
  cpu::meet();
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; k++) {
      u32 a = e.words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      u32 b = e.words[column * 4 + k % 8 / 2][4 + k / 8];
      sum += (k % 2 ? high(a) : low(a)) * (k % 2 ? high(b) : low(b));
    }
    c[i] = sum;
  }
}

template <bool kTransposed>
static inline void load_matrices(u32 (&r)[4], const void* row) {
  cpu::Exchange& e = cpu::next_exchange();
  int lane = threadIdx.x % 32;
  e.rows[lane] = row;
  cpu::meet();
  for (int m = 0; m < 4; m++) {
    bf16 element[2];
    for (int i = 0; i < 2; i++) {
      int at_row = kTransposed ? lane % 4 * 2 + i : lane / 4;
      int at_column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
      element[i] = ((const bf16*)e.rows[m * 8 + at_row])[at_column];
    }
    r[m] = element[0] | (u32)element[1] << 16;
  }
  cpu::meet();  // the rows may be overwritten after this
}
static inline void load_matrix4(u32 (&r)[4], const void* row) { load_matrices<false>(r, row); }
static inline void load_matrix4_transposed(u32 (&r)[4], const void* row) {
  load_matrices<true>(r, row);
}

#endif
