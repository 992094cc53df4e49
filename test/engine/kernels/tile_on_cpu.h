// Stands in for hopper_tile.cuh where kernels run on the CPU: tiles of tensors are copied in the
// background and multiplied by warpgroups.
//
// Whatever a GPU does in the background happens here at one of several drawn moments, so a wait
// that is missing shows as a wrong result.
#ifndef HOPPER_TILE_CUH
#define HOPPER_TILE_CUH
#include "cuda_on_cpu.h"

struct TensorMap {  // a bfloat16 matrix and the tiles that are copied from it
  bf16* base;
  int rows, columns, stride, box_rows, box_columns;
};

namespace cpu {

constexpr int kTileColumns = 64, kTileAlign = 1024;
constexpr int kNarrowColumns = 16, kNarrowAlign = 256;

// Where a tile with the 128-byte swizzle has an element.
static bf16* in_tile(const void* tile, int row, int column) {
  return (bf16*)tile + row * kTileColumns + ((column / 8) ^ (row % 8)) * 8 + column % 8;
}
// The same of a narrow tile with the 32-byte swizzle.
static bf16* in_narrow(const void* tile, int row, int column) {
  return (bf16*)tile + row * kNarrowColumns + ((column / 8) ^ (row / 4 % 2)) * 8 + column % 8;
}
static bf16* in_box(const TensorMap& map, const void* tile, int row, int column) {
  bool narrow = map.box_columns == kNarrowColumns;
  return narrow ? in_narrow(tile, row, column) : in_tile(tile, row, column);
}

static int checked_bytes(const TensorMap& map, const void* tile) {
  int bytes = map.box_rows * map.box_columns * 2;
  bool narrow = map.box_columns == kNarrowColumns;
  if ((!narrow && map.box_columns != kTileColumns) || map.box_rows < 1 || map.box_rows > 256)
    fail("a tile has 64 or 16 columns and 1 to 256 rows");
  if ((u64)map.base % 16 || map.stride % 8) fail("rows of a tensor map begin at 16 bytes");
  if (!narrow && (u64)tile % kTileAlign) fail("a tile in shared memory begins at 1024 bytes");
  if (narrow && (u64)tile % kNarrowAlign) fail("a narrow tile begins at 256 bytes");
  if (!is_dynamic(tile) || !is_dynamic((const char*)tile + bytes - 1))
    fail("a tile is not in dynamic shared memory");
  return bytes;
}

static bf16* in_tensor(const TensorMap& map, int row, int column) {
  bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
  return inside ? map.base + (size_t)row * map.stride + column : nullptr;
}

// A GPU's matrices arrive some time until they are used; an arrival at a barrier does not wait.
static void check_loads(const void* target, int bytes, u32 rank) {
  for (int i = 0; i < blocks[rank].size; i++)
    for (const void* row : blocks[rank].threads[i].loads)
      if ((u64)row - (u64)target < (u64)bytes)
        fail("a tile takes the place of matrices that may be on their way: wait_for_loads");
}

static void load(void* target, const TensorMap& map, int column, int row, u64* barrier, u32 rank) {
  int bytes = checked_bytes(map, target);
  check_loads(reached_in(target, rank), bytes, rank);
  memset(reached_in(target, rank), 0xff, bytes);  // who still reads sees it
  void* tile = named_in(target, rank);
  u64* its = (u64*)named_in(barrier, rank);
  begin_copy(rank, [=] {
    for (int r = 0; r < map.box_rows; r++)
      for (int c = 0; c < map.box_columns; c++) {
        bf16* from = in_tensor(map, row + r, column + c);
        *in_box(map, tile, r, c) = from ? *from : 0;
      }
    count(its, 0, -bytes);
  });
}

// The address in an operand's descriptor; only the 128 bytes of the first row may be walked.
static const void* operand_tile(u64 operand) {
  u64 address = operand << 4;
  if (address % kTileAlign > 96 || address % 32)
    fail("wgmma begins at a multiple of 32 bytes in the first row of a tile");
  return (const void*)(address / kTileAlign * kTileAlign);
}

// This thread's part of acc (64 x n) += a (64 x 16) b (n x 16)^T, or = if acc does not count.
static void multiply(float* acc, int n, u64 a, u64 b, bool add) {
  if ((a | b) >> 63) fail("narrow tiles are multiplied with registers");
  int lane = thread_index.x % 32, warp = thread_index.x / 32 % 4;
  const void *a_tile = operand_tile(a), *b_tile = operand_tile(b);
  int a_column = (a << 4) % kTileAlign / 2, b_column = (b << 4) % kTileAlign / 2;
  float of_a[2][16];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++)
      of_a[half][k] = low(*in_tile(a_tile, warp * 16 + lane / 4 + half * 8, a_column + k));
  for (int i = 0; i < n / 4; i++) {
    int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
    float sums[2] = {};
    for (int k = 0; k < 16; k++) {
      float of_b = low(*in_tile(b_tile, column, b_column + k));
      sums[0] += of_a[0][k] * of_b, sums[1] += of_a[1][k] * of_b;
    }
    for (int half = 0; half < 2; half++) {
      float& sum = acc[i / 2 * 4 + i % 2 + half * 2];
      sum = add ? sum + sums[half] : sums[half];
    }
  }
}

// This thread's part of acc (64 x n) += a (64 x 16) b, with a in the registers of four lanes.
template <class OfB>
static void multiply_registers(float* acc, int n, const u32* const (&a)[4], OfB of_b) {
  for (int i = 0; i < n / 4; i++) {
    int column = i / 2 * 8 + thread_index.x % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32* words = a[k % 8 / 2] + k / 8 * 2;
      for (int half = 0; half < 2; half++)
        acc[i / 2 * 4 + i % 2 + half * 2] += (k % 2 ? high : low)(words[half]) * of_b(column, k);
    }
  }
}

// Registers are read some time until wgmma_wait, so this exchanges where they are.
template <class OfB>
static void begin_registers(float* acc, int n, const u32 (&a)[4], OfB of_b) {
  if (!thread->products.begun) fail("wgmma without wgmma_begin");
  thread->products.count++;
  thread->loads.clear();
  Exchange& e = next_exchange();
  int lane = thread_index.x % 32;
  e.rows[lane] = a;
  meet();
  const u32* words[4];
  for (int i = 0; i < 4; i++) words[i] = (const u32*)e.rows[lane / 4 * 4 + i];
  begin_task(thread->products, [=] { multiply_registers(acc, n, words, of_b); }, true);
}

// An operand with a row per K: its address, and how far the tiles beside each other are apart.
constexpr int kApartShift = 48;  // addresses on this machine have 47 bits

static bf16* in_rows(u64 operand, int row, int column) {
  u64 address = (operand & ((1ull << kApartShift) - 1)) << 4, apart = operand >> kApartShift << 4;
  return in_tile((const char*)address + column / kTileColumns * apart, row, column % kTileColumns);
}

// An operand that is a narrow tile; null if it is none.
constexpr u64 kNarrow = 1ull << 63;
static const void* narrow_tile(u64 operand) {
  if (!(operand & kNarrow)) return nullptr;
  u64 address = operand << 4;
  if (address % kNarrowAlign) fail("wgmma begins at a multiple of 8 rows of a narrow tile");
  return (const void*)address;
}

}  // namespace cpu

static inline void barrier_init(u64* barrier, u32 arrivals) { cpu::init(barrier, arrivals); }
static inline void barrier_arrive(u64* barrier) { cpu::count(barrier, 1, 0); }
static inline void barrier_arrive(u64* barrier, u32 rank) {
  cpu::count((u64*)cpu::reached_in(barrier, rank), 1, 0);
}
static inline void barrier_wait(u64* barrier, u32 parity) { cpu::wait(barrier, parity); }

static inline bool elected() { return threadIdx.x % 32 == 0; }
static inline void fetch_map(const TensorMap*) {}
static inline void load_tile(void* target, const TensorMap* map, int column, int row,
                             u64* barrier) {
  cpu::load(target, *map, column, row, barrier, cluster_rank());
}
static inline void load_tile(void* target, const TensorMap* map, int column, int row, u64* barrier,
                             unsigned short blocks) {
  for (int rank = 0; rank < 16; rank++)
    if (blocks >> rank & 1) cpu::load(target, *map, column, row, barrier, rank);
}
static inline u64 tile_operand(const void* shared) {
  if ((u64)shared % cpu::kTileAlign) cpu::fail("a tile in shared memory begins at 1024 bytes");
  if (!cpu::is_dynamic(shared)) cpu::fail("a tile is not in dynamic shared memory");
  return (u64)shared >> 4;
}
static inline u64 rows_operand(const void* shared, u32 tile_bytes) {
  u64 tile = tile_operand(shared);
  if (tile_bytes % cpu::kTileAlign) cpu::fail("tiles are a multiple of 1024 bytes apart");
  return tile | (u64)(tile_bytes >> 4) << cpu::kApartShift;
}
static inline u64 narrow_operand(const void* shared) {
  if (!cpu::is_dynamic(shared)) cpu::fail("a tile is not in dynamic shared memory");
  return (u64)shared >> 4 | cpu::kNarrow;
}
static inline void wgmma_begin() { cpu::thread->products.begun = true; }
template <int N, bool kAdd = true>
static inline void wgmma(float (&acc)[N / 2], u64 a, u64 b) {
  static_assert(N % 8 == 0 && N <= 256, "columns of wgmma");
  if (!cpu::thread->products.begun) cpu::fail("wgmma without wgmma_begin");
  cpu::thread->products.count++;
  float* sums = acc;
  cpu::begin_task(cpu::thread->products, [=] { cpu::multiply(sums, N, a, b, kAdd); }, true);
}
template <int N>
static inline void wgmma_first(float (&acc)[N / 2], u64 a, u64 b) {
  std::fill(acc, acc + N / 2, NAN);  // who still adds to them sees it
  wgmma<N, false>(acc, a, b);
}
template <int N>
static inline void wgmma(float (&acc)[N / 2], const u32 (&a)[4], u64 b) {
  if (const void* narrow = cpu::narrow_tile(b))
    return cpu::begin_registers(acc, N, a, [=](int column, int k) {
      return low(*cpu::in_narrow(narrow, column, k));
    });
  const void* tile = cpu::operand_tile(b);
  int first = (b << 4) % cpu::kTileAlign / 2;
  cpu::begin_registers(acc, N, a, [=](int column, int k) {
    return low(*cpu::in_tile(tile, column, first + k));
  });
}
template <int N>
static inline void wgmma_rows(float (&acc)[N / 2], const u32 (&a)[4], u64 b) {
  static_assert(N == cpu::kNarrowColumns || N % 64 == 0 && N <= 256, "columns of whole tiles");
  const void* narrow = cpu::narrow_tile(b);
  if ((narrow != nullptr) != (N == cpu::kNarrowColumns))
    cpu::fail("16 columns with a row per K are a narrow tile");
  if (narrow)
    return cpu::begin_registers(acc, N, a, [=](int column, int k) {
      return low(*cpu::in_narrow(narrow, k, column));
    });
  if ((b << 4) % cpu::kTileAlign) cpu::fail("wgmma begins at a multiple of 8 rows of a tile");
  cpu::begin_registers(acc, N, a, [=](int column, int k) {
    return low(*cpu::in_rows(b, k, column));
  });
}
static inline void wgmma_commit() { cpu::thread->products.groups++; }
template <int kGroupsLeft>
static inline void wgmma_wait() {
  cpu::end_tasks(cpu::thread->products, kGroupsLeft);
  cpu::meet();  // .sync: the whole warp has waited
}
template <int N>
static inline void keep_order(float (&)[N]) {}
template <int kGroupsLeft, int N>
static inline void wgmma_wait(float (&)[N]) { wgmma_wait<kGroupsLeft>(); }

template <int kRegisters>
static inline void more_registers() {}
template <int kRegisters>
static inline void fewer_registers() {}
static inline void named_barrier(int id, int threads) { cpu::wait_at(id, threads); }
template <int N>
static inline void wait_for_loads(const u32 (&)[N][4]) { cpu::thread->loads.clear(); }

#endif
