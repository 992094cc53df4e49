// Runs the blocks of a CUDA kernel on the CPU: every thread is a fiber.
//
// A thread runs until it waits for others, so a missing barrier shows as a wrong result: shared
// memory begins as NaN, warps run in an order that is drawn anew in every turn, some are late, and
// at times a warp or a whole block rests until all others wait for it.
// The blocks of a cluster run at the same time, other blocks one by one.
#ifndef BLOCKS_ON_CPU_H
#define BLOCKS_ON_CPU_H
#include <link.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A library's thread-local variables are neighbours in memory, and nothing else here is
// thread-local: that makes them easy to exchange when another block of a cluster has its turn.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) static unsigned char* const& name = cpu::shared_memory

namespace cpu {

struct Index { u32 x; };
constexpr int kMaxThreads = 1024, kMaxCluster = 16, kStackBytes = 1 << 16;
constexpr int kSharedBytes = 232448, kSharedAlign = 128;  // aligned no better than promised

// What a warp's threads show each other in one collective operation; two take turns.
struct Exchange { u32 words[32][6]; const void* rows[32]; };
struct Group {  // threads that wait for each other
  int size = 0, arrived = 0;
  u64 generation = 0;
};
struct Task {  // work of the tensor cores or the copy engine that a thread has to wait for
  std::function<void()> run;  // empty: done already
  int group;
};
struct Tasks {
  std::vector<Task> open;
  int groups = 0, count = 0;
  bool begun = false;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished;
  const char* waits_in;
  u64 operations;
  bool at_cluster_barrier;  // arrived there and has not waited yet
  u64 cluster_generation;
  Tasks copies, products;
  std::vector<const void*> loads;  // 16-byte rows whose matrices nobody has used yet
  std::map<const u64*, u32> phases;  // of barriers, how many have passed when it last looked
};
struct alignas(1024) Block {
  unsigned char displaced[kSharedAlign];
  unsigned char memory[kSharedBytes];   // the dynamic shared memory
  std::vector<unsigned char> statics;   // __shared__ variables while another block has its turn
  int rank, index, size, running;
  Group barriers[16], warps[kMaxThreads / 32];  // barrier 0 is __syncthreads
  Exchange exchanges[kMaxThreads / 32][2];
  u64 quiet_since[kMaxThreads / 32];
  Thread threads[kMaxThreads];
};
struct Copy {  // bytes on their way into a block
  int rank, rounds;
  std::function<void()> deliver;
};

static Block blocks[kMaxCluster];
static int cluster_size;
static struct { int live, arrived; u64 generation; } cluster_barrier;
static std::vector<Copy> copies;
static Block* block;           // whose turn it is
static Thread* thread;         // null in the scheduler
static unsigned char* shared_memory;
static unsigned char* statics_home;
static size_t statics_bytes;
static thread_local char anchor;  // so that there is a thread-local variable
static Index thread_index, block_index, grid_size;
static ucontext_t scheduler;
static std::function<void()> body;
static std::string failure;
static u64 moves;  // grows whenever anything happens; if it stays, the blocks hang

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

static void yield(const char* where) {
  thread->waits_in = where;
  swapcontext(&thread->context, &scheduler);
}

// Ends the launch; a thread does not come back.
static void fail(const std::string& what) {
  if (failure.empty()) failure = "block " + std::to_string(block->index) + ": " + what;
  while (thread) yield("fail");
}

static void wait(Group& group, const char* where) {
  u64 generation = group.generation;
  moves++;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    group.generation++;
    return;
  }
  while (group.generation == generation) yield(where);
}

static void wait_at(int id, int threads) {
  Group& barrier = block->barriers[id];
  if (barrier.arrived == 0) barrier.size = threads;
  if (barrier.size != threads) fail("threads disagree how many meet at a barrier");
  wait(barrier, id ? "named_barrier" : "__syncthreads");
}

static void end_cluster_phase() {
  if (cluster_barrier.arrived < cluster_barrier.live) return;
  cluster_barrier.arrived = 0;
  cluster_barrier.generation++;
}
static bool counts_at_cluster_barrier() {
  return thread->at_cluster_barrier && thread->cluster_generation == cluster_barrier.generation;
}

// Puts a block's __shared__ variables where the compiler expects them.
static void take_turn(Block& next) {
  if (block == &next) return;
  if (block) memcpy(block->statics.data(), statics_home, statics_bytes);
  block = &next;
  memcpy(statics_home, next.statics.data(), statics_bytes);
  shared_memory = next.memory;
  block_index.x = next.index;
}

// Shared memory of a block whose turn it is: NaN.
static void spoil() {
  memset(block->memory, 0xff, kSharedBytes);
  memset(statics_home, 0xff, statics_bytes);
}

static void enter() {
  body();
  if (!thread->copies.open.empty()) fail("a thread ends without wait_copies");
  if (!thread->products.open.empty()) fail("a thread ends without wgmma_wait");
  thread->finished = true;
  moves++;
  cluster_barrier.live--;  // who has ended is not waited for
  if (counts_at_cluster_barrier()) cluster_barrier.arrived--;
  end_cluster_phase();
}

static void end_block() {
  for (Copy& copy : copies)
    if (copy.rank == block->rank) return fail("ends while copies into it are on their way");
  for (int i = 0; i < block->size; i++)
    if (block->threads[i].products.count != block->threads[i / 128 * 128].products.count)
      return fail("wgmma without all four warps of a group");
  if (cluster_size > 1) spoil();  // it may be another block's by now
}

static int find_statics(dl_phdr_info* library, size_t, void*) {
  unsigned char* home = (unsigned char*)library->dlpi_tls_data;
  for (int i = 0; home && i < library->dlpi_phnum; i++) {
    const auto& segment = library->dlpi_phdr[i];
    if (segment.p_type != PT_TLS) continue;
    if ((unsigned char*)&anchor < home || (unsigned char*)&anchor >= home + segment.p_memsz)
      continue;
    statics_home = home, statics_bytes = segment.p_memsz;
    return 1;
  }
  return 0;
}

static void begin_block(int rank, int index, int threads) {
  Block& b = blocks[rank];
  b.rank = rank, b.index = index, b.size = b.running = threads;
  b.statics.resize(statics_bytes);
  take_turn(b);
  spoil();
  for (Group& barrier : b.barriers) barrier = Group{};
  for (int warp = 0; warp < threads / 32; warp++) b.warps[warp] = Group{32};
  memset(b.quiet_since, 0xff, sizeof(b.quiet_since));
  for (int i = 0; i < threads; i++) {
    Thread& t = b.threads[i];
    if (!t.stack) t.stack.reset(new char[kStackBytes]);
    t.finished = t.at_cluster_barrier = false;
    t.operations = 0;
    t.copies = t.products = Tasks{};
    t.loads.clear();
    t.phases.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = &scheduler;
    makecontext(&t.context, enter, 0);
  }
}

static void run_warp(Block& b, int warp) {
  take_turn(b);
  u64 before = moves;
  for (int i = warp * 32; i < warp * 32 + 32 && failure.empty(); i++) {
    if (b.threads[i].finished) continue;
    thread = &b.threads[i];
    thread_index.x = i;
    swapcontext(&scheduler, &thread->context);
    thread = nullptr;
    b.running -= b.threads[i].finished;
  }
  b.quiet_since[warp] = moves == before ? moves : ~0ull;
  if (b.running == 0) end_block();
}

static void begin_copy(int rank, std::function<void()> deliver) {
  int late = draw(6) ? 0 : draw(60);  // at times behind all that others do meanwhile
  copies.push_back({rank, (int)draw(6) + late, deliver});
  moves++;
}
static void deliver_copies() {
  for (size_t i = 0; i < copies.size();) {
    if (copies[i].rounds-- > 0) {
      i++;
      continue;
    }
    take_turn(blocks[copies[i].rank]);
    copies[i].deliver();
    copies.erase(copies.begin() + i);
    moves++;
  }
}

struct Resting {  // warps of the cluster, in order of their blocks
  int first = 0, count = 0;
  bool has(int warp) const { return warp >= first && warp < first + count; }
};
static Resting drawn_rest(int warps) {
  int block = draw(cluster_size);
  if (draw(2)) return {block * warps, warps};
  return {block * warps + (int)draw(warps), 1};
}

// Whether no thread has done anything since each of them was asked.
static bool hang(int warps, Resting resting) {
  if (!copies.empty()) return false;
  for (int i = 0; i < cluster_size * warps; i++) {
    const Block& b = blocks[i / warps];
    if (b.running > 0 && !resting.has(i) && b.quiet_since[i % warps] != moves) return false;
  }
  return true;
}

static void fail_for_hanging() {
  for (int rank = 0; rank < cluster_size; rank++)
    for (int i = 0; i < blocks[rank].size; i++) {
      if (blocks[rank].threads[i].finished) continue;
      take_turn(blocks[rank]);
      return fail("thread " + std::to_string(i) + " waits for ever in " +
                  blocks[rank].threads[i].waits_in);
    }
}

static void run_cluster(int first, int threads) {
  int warps = threads / 32;
  copies.clear();
  cluster_barrier = {cluster_size * threads, 0, 0};
  block = nullptr;  // nothing of the last cluster is to be kept
  for (int rank = 0; rank < cluster_size; rank++) begin_block(rank, first + rank, threads);
  auto running = [] {
    for (int rank = 0; rank < cluster_size; rank++)
      if (blocks[rank].running > 0) return true;
    return false;
  };
  Resting resting;
  while (running()) {
    deliver_copies();
    if (resting.count == 0 && draw(4) == 0) resting = drawn_rest(warps);
    for (int i : drawn_order(cluster_size * warps)) {
      Block& b = blocks[i / warps];
      if (draw(3) == 0 || resting.has(i) || b.running == 0) continue;
      run_warp(b, i % warps);
      if (!failure.empty()) return;
    }
    if (!running() || !hang(warps, resting)) continue;
    if (resting.count == 0) return fail_for_hanging();
    resting = {};
  }
}

// Runs a grid of blocks with so many threads each; returns what went wrong, or null.
static const char* launch(int grid, int threads, int cluster, std::function<void()> kernel) {
  failure.clear();
  body = kernel;
  grid_size.x = grid;
  cluster_size = cluster;
  anchor = 0;
  dl_iterate_phdr(find_statics, nullptr);
  if (cluster < 1 || cluster > kMaxCluster || grid % cluster)
    return "the cluster size must be 1 to 16 and divide the number of blocks";
  if (threads < 32 || threads > kMaxThreads || threads % 32)
    return "a block must have 32 to 1024 threads in whole warps";
  for (int first = 0; first < grid && failure.empty(); first += cluster)
    run_cluster(first, threads);
  return failure.empty() ? nullptr : failure.c_str();
}

// A task is done at once or when it is waited for, in order behind those before it if need be.
static void begin_task(Tasks& tasks, std::function<void()> run, bool in_order = false) {
  bool behind = in_order && !tasks.open.empty() && tasks.open.back().run;
  if (!behind && draw(2)) {
    run();
    run = nullptr;
  }
  tasks.open.push_back({run, tasks.groups});
}
static void end_tasks(Tasks& tasks, int groups_left) {
  while (!tasks.open.empty() && tasks.open[0].group < tasks.groups - groups_left) {
    if (tasks.open[0].run) tasks.open[0].run();
    tasks.open.erase(tasks.open.begin());
  }
}

// The exchange of this thread's warp for its next collective operation.
static Exchange& next_exchange() {
  return block->exchanges[thread_index.x / 32][thread->operations++ % 2];
}
static void meet() { wait(block->warps[thread_index.x / 32], "a warp's operation"); }

static bool is_static(const void* p) {
  return (u64)p - (u64)statics_home < statics_bytes;
}
static bool is_dynamic(const void* p) { return (u64)p - (u64)shared_memory < kSharedBytes; }

// The same place in the shared memory of another block, as that block names it in its own turn.
static void* named_in(void* p, u32 rank) {
  if (rank >= (u32)cluster_size) fail("the cluster has no block of this rank");
  if (!is_static(p) && !is_dynamic(p)) fail("an address outside of the block's shared memory");
  return is_static(p) ? p : (char*)p - (u64)shared_memory + (u64)blocks[rank].memory;
}
// The same as this block reaches it.
static void* reached_in(void* p, u32 rank) {
  void* there = named_in(p, rank);
  if (!is_static(p) || (int)rank == block->rank) return there;
  return blocks[rank].statics.data() + ((u64)p - (u64)statics_home);
}

}  // namespace cpu

#define threadIdx cpu::thread_index
#define blockIdx cpu::block_index
#define gridDim cpu::grid_size

static inline u32 cluster_rank() { return cpu::block->rank; }
static inline void cluster_arrive() {
  if (cpu::thread->at_cluster_barrier) cpu::fail("cluster_arrive twice without cluster_wait");
  cpu::thread->at_cluster_barrier = true;
  cpu::thread->cluster_generation = cpu::cluster_barrier.generation;
  cpu::cluster_barrier.arrived++;
  cpu::end_cluster_phase();
  cpu::moves++;
}
static inline void cluster_arrive_relaxed() { cluster_arrive(); }
static inline void cluster_wait() {
  if (!cpu::thread->at_cluster_barrier) cpu::fail("cluster_wait without cluster_arrive");
  while (cpu::counts_at_cluster_barrier()) cpu::yield("cluster_wait");
  cpu::thread->at_cluster_barrier = false;
}

#endif
