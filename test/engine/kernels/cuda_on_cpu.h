// Stands in for hopper.cuh and the CUDA headers where kernels run on the CPU (blocks_on_cpu.h).
//
// A thread goes on until it meets a barrier, a shuffle or a matrix instruction.
#ifndef HOPPER_CUH
#define HOPPER_CUH
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "blocks_on_cpu.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
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

static inline void __syncthreads() { cpu::wait_at(0, cpu::block->size); }
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

static inline u32 __shfl_sync(u32, u32 v, int lane) {
  cpu::Exchange& e = cpu::next_exchange();
  e.words[threadIdx.x % 32][0] = v;
  cpu::meet();
  return e.words[lane][0];
}
static inline float __shfl_sync(u32 mask, float v, int lane) {
  return __uint_as_float(__shfl_sync(mask, __float_as_uint(v), lane));
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

// Nothing starts early here: these only have to be called in a sensible order.
static inline void let_next_start() {}
static inline void wait_for_previous() {}

// A barrier counts the arrivals and the bytes of its phase.
namespace cpu {
struct Barrier {
  int bytes;  // still awaited; negative if they come before they are announced
  u32 arrivals : 10, arrivals_of_phase : 10, phase : 5, mark : 7;
};
constexpr u32 kMark = 0x2d;

static Barrier* checked(u64* barrier) {
  Barrier* b = (Barrier*)barrier;
  if (b->mark != kMark) fail("a barrier is used without barrier_init or after its block's end");
  return b;
}
// For the block whose turn it is; of others, barriers are reached through reached_in.
static void count(u64* barrier, int arrivals, int bytes) {
  Barrier* b = checked(barrier);
  if ((int)b->arrivals < arrivals) fail("more arrivals at a barrier than it waits for");
  b->arrivals -= arrivals;
  b->bytes += bytes;
  if (b->arrivals == 0 && b->bytes == 0) {
    b->arrivals = b->arrivals_of_phase;
    b->phase++;
  }
  moves++;
}
static void init(u64* barrier, u32 arrivals) {
  if (arrivals < 1 || arrivals > 1023) fail("a barrier waits for 1 to 1023 arrivals");
  *(Barrier*)barrier = {0, arrivals, arrivals, 0, kMark};
}
// A wait tells a phase from the one before it, by its parity, and not from the one before that: it
// would be over too early if a phase that the thread has not waited for were still to come.
static void wait(u64* barrier, u32 parity) {
  while (checked(barrier)->phase % 2 == parity) yield("barrier_wait");
  u32 passed = checked(barrier)->phase, &seen = thread->phases[barrier];
  if ((passed - seen) % 32 > 1) fail("a thread waits at a barrier of which it has missed a phase");
  seen = passed;
}
}  // namespace cpu
static inline void barrier_init(u64* barrier) { cpu::init(barrier, 1); }
static inline void barrier_init_done() {}
static inline void barrier_expect(u64* barrier, u32 bytes) { cpu::count(barrier, 1, bytes); }
static inline void barrier_wait(u64* barrier) { cpu::wait(barrier, 0); }
static inline void barrier_wait_cluster(u64* barrier) { barrier_wait(barrier); }
struct ClusterAddress {
  char* there;
  u32 rank;
  ClusterAddress operator+(u32 bytes) const { return {there + bytes, rank}; }
};
static inline ClusterAddress address_in_block(void* variable, u32 rank) {
  return {(char*)cpu::named_in(variable, rank), rank};
}
static inline void send(ClusterAddress variable, ClusterAddress barrier, float4 v) {
  if ((u64)variable.there % 16) cpu::fail("send is not aligned");
  cpu::begin_copy(variable.rank, [=] {
    memcpy(variable.there, &v, 16);
    cpu::count((u64*)barrier.there, 0, -16);
  });
}
static inline void settle(const void* address) {
  if (!address) cpu::fail("settle: a null pointer");
}
static inline void settle_shared(const void* address) { settle(address); }
static inline void settle(int number) {
  if (number < 0) cpu::fail("settle: a negative number");
}
static inline uint4 load_l2(const void* source) { return *(const uint4*)source; }
static inline void store_global(void* target, u32 first, u32 second) {
  if ((u64)target % 8) cpu::fail("store_global is not aligned");
  *(uint2*)target = make_uint2(first, second);
}
static inline void copy_async(void* target, const void* source) {
  if (((u64)target | (u64)source) % 16) cpu::fail("copy_async is not aligned");
  memset(target, 0xff, 16);
  cpu::begin_task(cpu::thread->copies, [=] { memcpy(target, source, 16); });
}
static inline void end_copy_group() { cpu::thread->copies.groups++; }
template <int kCount>
static inline void wait_copies_but() {
  cpu::end_tasks(cpu::thread->copies, kCount);
}
static inline void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier) {
  if (((u64)target | (u64)source | bytes) % 16) cpu::fail("copy_bulk is not aligned");
  memset(target, 0xff, bytes);  // who still reads sees it
  cpu::begin_copy(cpu::block->rank, [=] {
    memcpy(target, source, bytes);
    cpu::count(barrier, 0, -(int)bytes);
  });
}

static inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  cpu::Exchange& e = cpu::next_exchange();
  int lane = threadIdx.x % 32;
  u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(e.words[lane], mine, sizeof(mine));
  cpu::thread->loads.clear();
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
  cpu::thread->loads.push_back(row);
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
static inline void load_matrix4(u32 (&r)[4], const void* row, int offset = 0) {
  load_matrices<false>(r, (const char*)row + offset);
}
static inline void load_matrix4_transposed(u32 (&r)[4], const void* row, int offset = 0) {
  load_matrices<true>(r, (const char*)row + offset);
}
static inline u32 transpose8(u32 pair) {
  cpu::Exchange& e = cpu::next_exchange();
  int lane = threadIdx.x % 32;
  e.words[lane][0] = pair;
  cpu::meet();
  u32 element[2];
  for (int i = 0; i < 2; i++)
    element[i] = e.words[(lane % 4 * 2 + i) * 4 + lane / 8][0] >> lane / 4 % 2 * 16 & 0xffff;
  return element[0] | element[1] << 16;
}

#endif
