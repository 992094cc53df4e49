// Tensor copies and warpgroup products of Hopper GPUs (sm_90a).
//
// Tiles in shared memory have rows of 64 bfloat16 (128 bytes) and begin at multiples of 1024 bytes;
// the 16-byte chunk c of row r lies at chunk c ^ (r % 8), which keeps banks apart. Narrow tiles have
// rows of 16 and begin at multiples of 256 bytes; chunk c of row r lies at chunk c ^ (r / 4 % 2).
#ifndef HOPPER_TILE_CUH
#define HOPPER_TILE_CUH
#include "hopper.cuh"

struct alignas(64) TensorMap { u64 opaque[16]; };  // CUtensorMap of the driver

// Barriers that are used over and over: a wait names the parity of the phase that must be over.
__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrive at the same barrier of a block of the cluster.
__device__ __forceinline__ void barrier_arrive(u64* barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Wait until these registers are loaded. An arrival at a barrier overtakes loads from shared memory
// that are on their way, and what is copied to their place after that would be loaded instead.
template <int N>
__device__ __forceinline__ void wait_for_loads(const u32 (&values)[N][4]) {
  u32 all = 0;
#pragma unroll
  for (int i = 0; i < N; i++) all |= values[i][0] | values[i][1] | values[i][2] | values[i][3];
  // No square is 2 modulo 4, but nobody who compiles this knows: the values have to be there.
  asm volatile(
      "{\n.reg .pred none;\n.reg .b32 square;\n"
      "mul.lo.u32 square, %0, %0;\nand.b32 square, square, 3;\n"
      "setp.eq.u32 none, square, 2;\n@none trap;\n}" ::"r"(all)
      : "memory");
}
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether the thread is the one of its warp that does something for all of them, who are here. Copies
// that it begins need fewer instructions than those of a thread that is chosen by number.
__device__ __forceinline__ bool elected() {
  u32 is;
  asm volatile("{\n.reg .pred is;\nelect.sync _|is, -1;\nselp.u32 %0, 1, 0, is;\n}" : "=r"(is));
  return is;
}

// Ask for the description of a matrix ahead.
__device__ __forceinline__ void fetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copy a box of a matrix into shared memory; zeros beyond the matrix. The barrier counts its bytes.
__device__ __forceinline__ void load_tile(void* target, const TensorMap* map, int column, int row,
                                          u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(target)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same into every block of the cluster whose bit is set, and at its barrier.
__device__ __forceinline__ void load_tile(void* target, const TensorMap* map, int column, int row,
                                          u64* barrier, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// A tile as an operand of wgmma; 2 more is 16 further along K.
__device__ __forceinline__ u64 tile_operand(const void* shared) {
  u64 address = (shared_address(shared) & 0x3ffff) >> 4;
  return address | 1ull << 16 | 64ull << 32 | 1ull << 62;  // 1024 bytes per 8 rows, 128-byte swizzle
}
// Tiles beside each other as an operand with a row per K; 128 more is 16 rows further along K. The
// tiles are tile_bytes apart.
__device__ __forceinline__ u64 rows_operand(const void* shared, u32 tile_bytes) {
  u64 address = (shared_address(shared) & 0x3ffff) >> 4;
  return address | (u64)(tile_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
// A narrow tile as an operand of either kind: 16 along K, or 16 columns with a row per K, where 32
// more is 16 rows further along K. Eight rows take 256 bytes, 32-byte swizzle (code 3); nothing lies
// beside the tile, so the other distance is not used, and it is the same to be safe.
__device__ __forceinline__ u64 narrow_operand(const void* shared) {
  u64 address = (shared_address(shared) & 0x3ffff) >> 4;
  return address | 16ull << 16 | 16ull << 32 | 3ull << 62;
}
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler computes these registers before this point and uses them after it.
template <int N>
__device__ __forceinline__ void keep_order(float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(v[i])::"memory");
}
// Wait for the products that `acc` sums up; what uses it is not moved before the wait.
template <int kPending, int N>
__device__ __forceinline__ void wgmma_wait(float (&acc)[N]) {
  wgmma_wait<kPending>();
  keep_order(acc);
}

// acc (64 x N, fp32) += a (64 x 16) b (N x 16)^T, by the four warps of a warpgroup.
template <int N>
__device__ __forceinline__ void wgmma(float (&acc)[N / 2], u64 a, u64 b);
// acc = a b^T, whatever acc was: sums begin so without zeros being written first.
template <int N>
__device__ __forceinline__ void wgmma_first(float (&acc)[N / 2], u64 a, u64 b);

// The same with a in registers, as load_matrix4 brings it: its rows and columns lie where acc has
// those of 16 columns, in pairs.
template <int N>
__device__ __forceinline__ void wgmma(float (&acc)[N / 2], const u32 (&a)[4], u64 b);
// And acc += a b, where b (16 x N) has a row per K (rows_operand).
template <int N>
__device__ __forceinline__ void wgmma_rows(float (&acc)[N / 2], const u32 (&a)[4], u64 b);

// Columns of 8 have 4 registers each: NAMES_12 are the names of the first 12 registers, SUMS_12 the
// registers.
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_12 NAMES_8 ", %8, %9, %10, %11"
#define NAMES_16 NAMES_12 ", %12, %13, %14, %15"
#define NAMES_20 NAMES_16 ", %16, %17, %18, %19"
#define NAMES_24 NAMES_20 ", %20, %21, %22, %23"
#define NAMES_28 NAMES_24 ", %24, %25, %26, %27"
#define NAMES_32 NAMES_28 ", %28, %29, %30, %31"
#define NAMES_36 NAMES_32 ", %32, %33, %34, %35"
#define NAMES_40 NAMES_36 ", %36, %37, %38, %39"
#define NAMES_44 NAMES_40 ", %40, %41, %42, %43"
#define NAMES_48 NAMES_44 ", %44, %45, %46, %47"
#define NAMES_52 NAMES_48 ", %48, %49, %50, %51"
#define NAMES_56 NAMES_52 ", %52, %53, %54, %55"
#define NAMES_60 NAMES_56 ", %56, %57, %58, %59"
#define NAMES_64 NAMES_60 ", %60, %61, %62, %63"
#define NAMES_68 NAMES_64 ", %64, %65, %66, %67"
#define NAMES_72 NAMES_68 ", %68, %69, %70, %71"
#define NAMES_76 NAMES_72 ", %72, %73, %74, %75"
#define NAMES_80 NAMES_76 ", %76, %77, %78, %79"
#define NAMES_84 NAMES_80 ", %80, %81, %82, %83"
#define NAMES_88 NAMES_84 ", %84, %85, %86, %87"
#define NAMES_92 NAMES_88 ", %88, %89, %90, %91"
#define NAMES_96 NAMES_92 ", %92, %93, %94, %95"
#define NAMES_100 NAMES_96 ", %96, %97, %98, %99"
#define NAMES_104 NAMES_100 ", %100, %101, %102, %103"
#define NAMES_108 NAMES_104 ", %104, %105, %106, %107"
#define NAMES_112 NAMES_108 ", %108, %109, %110, %111"
#define NAMES_116 NAMES_112 ", %112, %113, %114, %115"
#define NAMES_120 NAMES_116 ", %116, %117, %118, %119"
#define NAMES_124 NAMES_120 ", %120, %121, %122, %123"
#define NAMES_128 NAMES_124 ", %124, %125, %126, %127"
#define SUMS_OF_4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define SUMS_4 SUMS_OF_4(0)
#define SUMS_8 SUMS_4, SUMS_OF_4(4)
#define SUMS_12 SUMS_8, SUMS_OF_4(8)
#define SUMS_16 SUMS_12, SUMS_OF_4(12)
#define SUMS_20 SUMS_16, SUMS_OF_4(16)
#define SUMS_24 SUMS_20, SUMS_OF_4(20)
#define SUMS_28 SUMS_24, SUMS_OF_4(24)
#define SUMS_32 SUMS_28, SUMS_OF_4(28)
#define SUMS_36 SUMS_32, SUMS_OF_4(32)
#define SUMS_40 SUMS_36, SUMS_OF_4(36)
#define SUMS_44 SUMS_40, SUMS_OF_4(40)
#define SUMS_48 SUMS_44, SUMS_OF_4(44)
#define SUMS_52 SUMS_48, SUMS_OF_4(48)
#define SUMS_56 SUMS_52, SUMS_OF_4(52)
#define SUMS_60 SUMS_56, SUMS_OF_4(56)
#define SUMS_64 SUMS_60, SUMS_OF_4(60)
#define SUMS_68 SUMS_64, SUMS_OF_4(64)
#define SUMS_72 SUMS_68, SUMS_OF_4(68)
#define SUMS_76 SUMS_72, SUMS_OF_4(72)
#define SUMS_80 SUMS_76, SUMS_OF_4(76)
#define SUMS_84 SUMS_80, SUMS_OF_4(80)
#define SUMS_88 SUMS_84, SUMS_OF_4(84)
#define SUMS_92 SUMS_88, SUMS_OF_4(88)
#define SUMS_96 SUMS_92, SUMS_OF_4(92)
#define SUMS_100 SUMS_96, SUMS_OF_4(96)
#define SUMS_104 SUMS_100, SUMS_OF_4(100)
#define SUMS_108 SUMS_104, SUMS_OF_4(104)
#define SUMS_112 SUMS_108, SUMS_OF_4(108)
#define SUMS_116 SUMS_112, SUMS_OF_4(112)
#define SUMS_120 SUMS_116, SUMS_OF_4(116)
#define SUMS_124 SUMS_120, SUMS_OF_4(120)
#define SUMS_128 SUMS_124, SUMS_OF_4(124)
#define WGMMA_TILES(NAME, COMPARE, N, SUMS, A, B)                                           \
  template <>                                                                               \
  __device__ __forceinline__ void NAME<N>(float (&acc)[N / 2], u64 a, u64 b) {              \
    asm volatile("{\n.reg .pred add;\nsetp." #COMPARE ".u32 add, 0, 0;\n"                  \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "                 \
                 "{" NAMES_##SUMS "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n}"                \
                 : SUMS_##SUMS                                                              \
                 : "l"(a), "l"(b));                                                         \
  }
#define WGMMA(N, SUMS, A, B)                  \
  WGMMA_TILES(wgmma, eq, N, SUMS, A, B)       \
  WGMMA_TILES(wgmma_first, ne, N, SUMS, A, B)
WGMMA(8, 4, 4, 5)
WGMMA(16, 8, 8, 9)
WGMMA(24, 12, 12, 13)
WGMMA(32, 16, 16, 17)
WGMMA(40, 20, 20, 21)
WGMMA(48, 24, 24, 25)
WGMMA(56, 28, 28, 29)
WGMMA(64, 32, 32, 33)
WGMMA(72, 36, 36, 37)
WGMMA(80, 40, 40, 41)
WGMMA(88, 44, 44, 45)
WGMMA(96, 48, 48, 49)
WGMMA(104, 52, 52, 53)
WGMMA(112, 56, 56, 57)
WGMMA(120, 60, 60, 61)
WGMMA(128, 64, 64, 65)
WGMMA(136, 68, 68, 69)
WGMMA(144, 72, 72, 73)
WGMMA(152, 76, 76, 77)
WGMMA(160, 80, 80, 81)
WGMMA(168, 84, 84, 85)
WGMMA(176, 88, 88, 89)
WGMMA(184, 92, 92, 93)
WGMMA(192, 96, 96, 97)
WGMMA(200, 100, 100, 101)
WGMMA(208, 104, 104, 105)
WGMMA(216, 108, 108, 109)
WGMMA(224, 112, 112, 113)
WGMMA(232, 116, 116, 117)
WGMMA(240, 120, 120, 121)
WGMMA(248, 124, 124, 125)
WGMMA(256, 128, 128, 129)

#define WGMMA_REGISTERS(NAME, N, SUMS, A0, A1, A2, A3, B, TRANSPOSED)                      \
  template <>                                                                               \
  __device__ __forceinline__ void NAME<N>(float (&acc)[N / 2], const u32 (&a)[4], u64 b) {  \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                            \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "                 \
                 "{" NAMES_##SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B       \
                 ", add, 1, 1, " #TRANSPOSED ";\n}"                                         \
                 : SUMS_##SUMS                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
  }
WGMMA_REGISTERS(wgmma, 8, 4, 4, 5, 6, 7, 8, 0)
WGMMA_REGISTERS(wgmma, 16, 8, 8, 9, 10, 11, 12, 0)
WGMMA_REGISTERS(wgmma, 24, 12, 12, 13, 14, 15, 16, 0)
WGMMA_REGISTERS(wgmma, 32, 16, 16, 17, 18, 19, 20, 0)
WGMMA_REGISTERS(wgmma, 40, 20, 20, 21, 22, 23, 24, 0)
WGMMA_REGISTERS(wgmma, 48, 24, 24, 25, 26, 27, 28, 0)
WGMMA_REGISTERS(wgmma, 56, 28, 28, 29, 30, 31, 32, 0)
WGMMA_REGISTERS(wgmma, 64, 32, 32, 33, 34, 35, 36, 0)
WGMMA_REGISTERS(wgmma, 128, 64, 64, 65, 66, 67, 68, 0)
WGMMA_REGISTERS(wgmma_rows, 16, 8, 8, 9, 10, 11, 12, 1)
WGMMA_REGISTERS(wgmma_rows, 64, 32, 32, 33, 34, 35, 36, 1)
WGMMA_REGISTERS(wgmma_rows, 256, 128, 128, 129, 130, 131, 132, 1)

// Registers move from the warpgroup that copies to those that multiply.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif
