// What the expert's kernels need of a Hopper GPU (sm_90 and later) and C++ has no word for.
//
// The test suite compiles the kernels for the CPU with another header of the same functions.
#ifndef HOPPER_CUH
#define HOPPER_CUH

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Shared memory whose size is an argument of the launch.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to bfloat16, the first one in the low half.
__device__ __forceinline__ u32 pack(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

// Programmatic dependent launch: the next kernel of the stream may start; wait until the previous
// one has completed and its writes are visible.
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// A cluster: neighbouring blocks that run at the same time and reach each other's shared memory.
__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster arrive; after the wait each sees the others' writes,
// with a relaxed arrival only that they are there and what barriers they have.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier that counts the bytes of bulk copies into shared memory; used once per launch.
__device__ __forceinline__ void barrier_init(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

// Wait for what other blocks of the cluster send.
__device__ __forceinline__ void barrier_wait_cluster(u64* barrier) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

// A shared variable of another block of the cluster, and 16 bytes written there, which a barrier
// of that block counts. Adding to the address adds bytes.
typedef u32 ClusterAddress;
__device__ __forceinline__ ClusterAddress address_in_block(const void* variable, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(shared_address(variable)), "r"(rank));
  return there;
}
__device__ __forceinline__ void send(ClusterAddress there, ClusterAddress barrier, float4 v) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], "
      "{%1, %2, %3, %4}, [%5];" ::"r"(there),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
}

// Bulk copies: addresses and sizes are multiples of 16 bytes. Weights are read once per step and
// leave L2 first.
__device__ __forceinline__ void copy_bulk(void* target, const void* source, u32 bytes,
                                          u64* barrier) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// Have an address computed here and not where it is used; or a number that is never negative.
__device__ __forceinline__ void settle(const void* address) {
  asm volatile("{\n.reg .pred none;\nsetp.eq.u64 none, %0, 0;\n@none trap;\n}" ::"l"(address));
}
__device__ __forceinline__ void settle_shared(const void* address) {
  asm volatile("{\n.reg .pred none;\nsetp.eq.u32 none, %0, 0;\n@none trap;\n}" ::"r"(
      shared_address(address)));
}
__device__ __forceinline__ void settle(int number) {
  asm volatile("{\n.reg .pred none;\nsetp.lt.s32 none, %0, 0;\n@none trap;\n}" ::"r"(number));
}

// 16 bytes from L2, in the order of the program: all loads are on their way before one is needed.
__device__ __forceinline__ uint4 load_l2(const void* source) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
}

// 8 bytes to device memory at once, where the compiler makes two stores of an assignment.
__device__ __forceinline__ void store_global(void* target, u32 first, u32 second) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(first), "r"(second)
               : "memory");
}

// 16 bytes from L2 into shared memory, in the background, in groups that arrive in order. A thread
// waits for all of its groups but the last few.
__device__ __forceinline__ void copy_async(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
               "l"(source)
               : "memory");
}
__device__ __forceinline__ void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kCount>
__device__ __forceinline__ void wait_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kCount) : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8): the layout of m16n8k16 in the PTX manual.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                    u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8, and all lanes how
// many bytes behind it.
__device__ __forceinline__ void load_matrix4(u32 (&r)[4], const void* row,
                                             int offset = 0) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row) + offset)
               : "memory");
}
__device__ __forceinline__ void load_matrix4_transposed(u32 (&r)[4], const void* row,
                                                        int offset = 0) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row) + offset)
               : "memory");
}

// An 8 x 8 matrix transposed: lane l has elements 2 (l % 4) and behind it of row l / 4.
__device__ __forceinline__ u32 transpose8(u32 pair) {
  u32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

#endif
