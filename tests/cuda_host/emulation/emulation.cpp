#include "emulation.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tensor_core.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define TOKENFLOW_FIBER_ANNOTATIONS 1
#else
#define TOKENFLOW_FIBER_ANNOTATIONS 0
#endif

// Saves the caller's registers on its stack and the stack's top in *from, then goes on where `to`
// was saved. swapcontext does the same with a system call, which most of a test's time goes into;
// it serves where this file has no assembly for the machine.
#if defined(__x86_64__)
extern "C" void tokenflow_switch_stack(void** from, void* to);
asm(R"(
  .text
  .type tokenflow_switch_stack, @function
tokenflow_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size tokenflow_switch_stack, . - tokenflow_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

// Blocks that take turns in shuffled order.
constexpr size_t kBlocksAtOnce = 3;

// A place to go on from.
struct Context {
#if defined(__x86_64__)
  void* stack_top = nullptr;
#else
  ucontext_t context;
#endif
};

void switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
  tokenflow_switch_stack(&from.stack_top, to.stack_top);
#else
  swapcontext(&from.context, &to.context);
#endif
}

// A context that calls `entry`, which must not return.
void start_context(Context& context, unsigned char* stack, void (*entry)()) {
#if defined(__x86_64__)
  // As after a call: the stack is aligned to 16 below a return address (none).
  void** top =
      reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
  context.stack_top = top;
#else
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
#endif
}

enum class State { kReady, kAtBarrier, kAtWarpOperation, kAtPhase, kDone };

struct Block;

struct Copy {
  void* to;
  const void* from;
  int group;
};

// A copy that reports to a barrier in shared memory.
struct BulkCopy {
  void* to;
  const void* from;
  unsigned bytes;
  uint64_t* barrier;
};

// A product of a warpgroup, as one lane sees it: two rows of A.
struct Product {
  float* sums;
  float rows[2][16];
  uint64_t descriptor;
  bool adds;
};

struct Fiber {
  Block* block = nullptr;
  Context context;
  std::unique_ptr<unsigned char[]> stack;
  Dim3 index;
  State state = State::kDone;
  int next_slots = 0;        // which of the warp's two sets of slots the next operation uses
  std::vector<Copy> copies;  // on their way
  int closed_groups = 0;     // of copies
  const uint64_t* waits_for = nullptr;  // a barrier's phase
  std::vector<Product> products;        // not yet computed
};

// Two sets of slots: a lane can start the next operation while others still read the last one's
// result, and no lane can be two operations ahead.
struct Warp {
  unsigned char slots[2][kWarp * kSlotBytes];
  int arrived = 0;
  const char* operation = nullptr;
};

struct Block {
  Dim3 index;
  std::vector<Fiber> fibers;    // one a thread
  std::vector<unsigned> turns;  // in shuffled order of its warps, else of its threads
  std::vector<Warp> warps;
  unsigned at_barrier = 0;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<BulkCopy> bulk_copies;  // on their way
};

struct Machine {
  std::vector<std::unique_ptr<Block>> idle;  // kept for their stacks
  std::vector<std::unique_ptr<Block>> running;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;

  Order order = Order::kForward;
  std::mt19937 random;
  int64_t launches = 0, warp_operations = 0;
  std::map<const void*, size_t> allowed;
};

Machine the_machine;

__attribute__((always_inline)) inline Machine& machine() { return the_machine; }

// Back to the scheduler; returns when it is this fiber's turn again, or never if it has ended.
void leave_fiber(Fiber& fiber) {
#if TOKENFLOW_FIBER_ANNOTATIONS
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == State::kDone ? nullptr : &fake_stack,
                                 machine().scheduler_stack, machine().scheduler_stack_bytes);
#endif
  switch_context(fiber.context, machine().scheduler);
#if TOKENFLOW_FIBER_ANNOTATIONS
  __sanitizer_finish_switch_fiber(fake_stack, &machine().scheduler_stack,
                                  &machine().scheduler_stack_bytes);
#endif
}

void enter_fiber(Fiber& fiber) {
  machine().current = &fiber;
#if TOKENFLOW_FIBER_ANNOTATIONS
  __sanitizer_start_switch_fiber(&machine().scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  switch_context(machine().scheduler, fiber.context);
#if TOKENFLOW_FIBER_ANNOTATIONS
  __sanitizer_finish_switch_fiber(machine().scheduler_fake_stack, nullptr, nullptr);
#endif
  machine().current = nullptr;
}

void fiber_main() {
  Machine& m = machine();
#if TOKENFLOW_FIBER_ANNOTATIONS
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  (*m.body)();
  m.current->state = State::kDone;
  leave_fiber(*m.current);
}

std::string describe(const Dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
         ")";
}

std::string stuck_message(const Block& block) {
  std::string message = "block " + describe(block.index) + " cannot go on:";
  unsigned done = 0, barrier = 0, warp = 0, phase = 0;
  const char* operation = "";
  for (const Fiber& fiber : block.fibers) {
    done += fiber.state == State::kDone;
    barrier += fiber.state == State::kAtBarrier;
    phase += fiber.state == State::kAtPhase;
    warp += fiber.state == State::kAtWarpOperation;
    if (fiber.state == State::kAtWarpOperation) {
      operation = block.warps[fiber.index.x / kWarp].operation;
    }
  }
  message += " of " + std::to_string(block.fibers.size()) + " threads " + std::to_string(barrier) +
             " wait at the barrier, " + std::to_string(done) + " have returned";
  if (phase) message += ", " + std::to_string(phase) + " wait for a phase of a barrier in memory";
  if (warp) message += ", " + std::to_string(warp) + " wait for their warp in " + operation;
  return message;
}

void start_block(Dim3 index, unsigned threads, size_t shared_bytes) {
  Machine& m = machine();
  if (m.idle.empty()) m.idle.push_back(std::make_unique<Block>());
  m.running.push_back(std::move(m.idle.back()));
  m.idle.pop_back();
  Block& block = *m.running.back();
  block.index = index;
  block.at_barrier = 0;
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  // A buffer of its own for each block, so that its exact end is guarded.
  block.shared.reset(new unsigned char[shared_bytes]);
  block.bulk_copies.clear();
  std::memset(block.shared.get(), 0xff, shared_bytes);
  block.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
    fiber.block = &block;
    fiber.index = Dim3(i, 0, 0);
    fiber.state = State::kReady;
    fiber.next_slots = 0;
    fiber.copies.clear();
    fiber.closed_groups = 0;
    fiber.products.clear();
    start_context(fiber.context, fiber.stack.get(), fiber_main);
  }
  block.turns.resize(m.order == Order::kShuffled ? block.warps.size() : threads);
  std::iota(block.turns.begin(), block.turns.end(), 0u);
  if (m.order == Order::kReverse) std::reverse(block.turns.begin(), block.turns.end());
  if (m.order == Order::kShuffled) {
    std::shuffle(block.turns.begin(), block.turns.end(), m.random);
    std::swap(m.running[m.random() % m.running.size()], m.running.back());
  }
}

void enter_if_ready(Fiber& fiber) {
  if (fiber.state != State::kReady) return;
  enter_fiber(fiber);
  if (!machine().error.empty()) throw Error(std::exchange(machine().error, {}));
}

// Whether what runs beside the threads is done at once, and not as late as it may be.
bool is_done_at_once() {
  Machine& m = machine();
  return m.order == Order::kReverse || (m.order == Order::kShuffled && m.random() % 2 == 0);
}

// Whether it is time for another warp or block to be the one that runs ahead.
bool change_favourite() { return machine().random() % 64 == 0; }

// A barrier in shared memory. Its words are what is read and written here alone.
struct Phases {
  uint32_t phase : 1;
  uint32_t arrivals : 15;  // of a phase
  uint32_t missing : 16;   // arrivals still to come
  int32_t bytes;           // expected and still to come
};
static_assert(sizeof(Phases) == sizeof(uint64_t), "a barrier is 8 bytes");

Phases& phases_of(uint64_t* barrier) { return *reinterpret_cast<Phases*>(barrier); }

// Ends the phase that nothing is missing from, and wakes who waits for that.
void end_phase_if_complete(Block& block, uint64_t* barrier) {
  Phases& phases = phases_of(barrier);
  if (phases.missing > 0 || phases.bytes != 0) return;
  phases.phase ^= 1;
  phases.missing = phases.arrivals;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::kAtPhase && fiber.waits_for == barrier) fiber.state = State::kReady;
  }
}

void deliver(Block& block, const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  phases_of(copy.barrier).bytes -= static_cast<int32_t>(copy.bytes);
  end_phase_if_complete(block, copy.barrier);
}

// Lets some of the block's threads run; false if all have returned.
bool run_turns(Block& block) {
  Machine& m = machine();
  const auto is_ready = [](const Fiber& fiber) { return fiber.state == State::kReady; };
  if (std::none_of(block.fibers.begin(), block.fibers.end(), is_ready)) {
    if (!block.bulk_copies.empty()) {
      const BulkCopy copy = block.bulk_copies.front();
      block.bulk_copies.erase(block.bulk_copies.begin());
      deliver(block, copy);
      return true;
    }
    for (const Fiber& fiber : block.fibers) {
      if (fiber.state != State::kDone) throw Error(stuck_message(block));
    }
    return false;
  }
  if (m.order != Order::kShuffled) {
    for (const unsigned i : block.turns) enter_if_ready(block.fibers[i]);
    return true;
  }
  // The first warp that can run does, as far ahead of the others as barriers allow.
  if (change_favourite()) std::shuffle(block.turns.begin(), block.turns.end(), m.random);
  for (const unsigned warp : block.turns) {
    const auto begin = block.fibers.begin() + warp * kWarp;
    const auto end = block.fibers.begin() +
                     std::min<size_t>((warp + 1) * static_cast<size_t>(kWarp), block.fibers.size());
    if (std::none_of(begin, end, is_ready)) continue;
    std::vector<Fiber*> lanes;
    for (auto fiber = begin; fiber != end; ++fiber) lanes.push_back(&*fiber);
    std::shuffle(lanes.begin(), lanes.end(), m.random);
    for (Fiber* fiber : lanes) enter_if_ready(*fiber);
    break;
  }
  return true;
}

// Ends the launch with machine().error. The fiber is never resumed, so it must own nothing here.
[[noreturn]] void fail() {
  leave_fiber(*machine().current);
  std::abort();
}

}  // namespace

void set_order(Order order, unsigned seed) {
  machine().order = order;
  machine().random.seed(seed);
}

int64_t launches() { return machine().launches; }

int64_t warp_operations() { return machine().warp_operations; }

const Dim3& current_thread() { return machine().current->index; }
const Dim3& current_block() { return machine().current->block->index; }
void* shared_memory() { return machine().current->block->shared.get(); }
int lane() { return static_cast<int>(machine().current->index.x) % kWarp; }

void allow_shared_bytes(const void* kernel, size_t bytes) { machine().allowed[kernel] = bytes; }

size_t allowed_shared_bytes(const void* kernel) {
  const auto found = machine().allowed.find(kernel);
  return std::max<size_t>(48 * 1024, found == machine().allowed.end() ? 0 : found->second);
}

void run_grid(Dim3 grid, unsigned block_threads, size_t shared_bytes,
              const std::function<void()>& thread) {
  Machine& m = machine();
  ++m.launches;
  m.error.clear();
  m.body = &thread;
  m.running.clear();  // what an error has left behind

  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> blocks(count);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (m.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (m.order == Order::kShuffled) std::shuffle(blocks.begin(), blocks.end(), m.random);
  const size_t at_once = m.order == Order::kShuffled ? kBlocksAtOnce : 1;
  uint64_t started = 0;
  while (started < count || !m.running.empty()) {
    for (; started < count && m.running.size() < at_once; ++started) {
      const uint64_t i = blocks[started];
      start_block(
          Dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
               static_cast<unsigned>(i / grid.x / grid.y)),
          block_threads, shared_bytes);
    }
    if (at_once > 1 && change_favourite()) {
      std::shuffle(m.running.begin(), m.running.end(), m.random);
    }
    if (run_turns(*m.running.front())) continue;
    m.idle.push_back(std::move(m.running.front()));
    m.running.erase(m.running.begin());
  }
}

void block_barrier() {
  Fiber& self = *machine().current;
  Block& block = *self.block;
  self.state = State::kAtBarrier;
  if (++block.at_barrier == block.fibers.size()) {
    block.at_barrier = 0;
    for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
  }
  leave_fiber(self);
}

unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(shared) -
                               machine().current->block->shared.get());
}

void set_up_barrier(uint64_t* barrier, unsigned arrivals) {
  check_vector(barrier, sizeof(*barrier));
  phases_of(barrier) = {0, arrivals & 0x7fffu, arrivals & 0xffffu, 0};
}

void arrive(uint64_t* barrier, unsigned expected_bytes) {
  Phases& phases = phases_of(barrier);
  if (phases.missing == 0) {
    machine().error = "more arrivals at a barrier in memory than its phase has";
    fail();
  }
  phases.bytes += static_cast<int32_t>(expected_bytes);
  --phases.missing;
  end_phase_if_complete(*machine().current->block, barrier);
}

void wait_for_phase(uint64_t* barrier, unsigned phase) {
  Fiber& self = *machine().current;
  while (phases_of(barrier).phase == phase) {
    self.waits_for = barrier;
    self.state = State::kAtPhase;
    leave_fiber(self);
  }
}

void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  Block& block = *machine().current->block;
  check_vector(shared, 16);
  check_vector(global, 16);
  if (bytes % 16 != 0) {
    machine().error = "a bulk copy is not of whole vectors of 16 bytes";
    fail();
  }
  const BulkCopy copy = {shared, global, bytes, barrier};
  if (is_done_at_once()) {
    deliver(block, copy);
  } else {
    block.bulk_copies.push_back(copy);
  }
}

const unsigned char* post(unsigned mask, const char* operation, const void* value, size_t bytes) {
  Machine& m = machine();
  Fiber& fiber = *m.current;
  const unsigned warp_index = fiber.index.x / kWarp;
  Warp& warp = fiber.block->warps[warp_index];
  if (mask != 0xffffffffu || fiber.block->fibers.size() % kWarp != 0) {
    m.error = std::string(operation) + ": only whole warps are emulated";
    fail();
  }
  if (warp.arrived > 0 && warp.operation != operation &&
      std::strcmp(warp.operation, operation) != 0) {
    m.error = std::string("lanes of a warp are at different operations: ") + operation + " and " +
              warp.operation;
    fail();
  }
  const int set = fiber.next_slots;
  fiber.next_slots = 1 - set;
  std::memcpy(warp.slots[set] + static_cast<size_t>(lane()) * kSlotBytes, value, bytes);
  warp.operation = operation;
  fiber.state = State::kAtWarpOperation;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++m.warp_operations;
    for (unsigned i = warp_index * kWarp; i < (warp_index + 1) * kWarp; ++i) {
      fiber.block->fibers[i].state = State::kReady;
    }
  }
  leave_fiber(fiber);
  return warp.slots[set];
}

uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fffu);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520
  if (magnitude < 0x38800000u) {                                               // below 2^-14
    const float scaled = std::nearbyint(std::fabs(value) * 16777216.0f);       // in units of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(scaled));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

namespace {

struct HalfTable {
  float values[65536];

  HalfTable() {
    for (unsigned i = 0; i < 65536; ++i) {
      const int exponent = static_cast<int>(i >> 10 & 31u);
      const float fraction = static_cast<float>(i & 1023u);
      float value =
          exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
      if (exponent == 31) value = fraction > 0 ? std::nanf("") : INFINITY;
      values[i] = i & 0x8000u ? -value : value;
    }
  }
};

const HalfTable half_table;

// How many products hardware may add up at once.
int product_group() {
  const Order order = machine().order;
  return order == Order::kForward ? 16 : (order == Order::kReverse ? 4 : 8);
}

}  // namespace

float from_half(uint16_t half) { return half_table.values[half]; }

void multiply_add_16x8x16(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                          unsigned b0, unsigned b1) {
  struct Lane {
    float words[6][2];
  };
  static_assert(sizeof(Lane) == kSlotBytes, "a slot holds a lane's operands");
  Lane mine;
  const unsigned words[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; ++i) {
    mine.words[i][0] = from_half(static_cast<uint16_t>(words[i] & 0xffffu));
    mine.words[i][1] = from_half(static_cast<uint16_t>(words[i] >> 16));
  }
  Lane lanes[kWarp];
  std::memcpy(lanes, post(0xffffffffu, "mma", &mine, sizeof(mine)), sizeof(lanes));
  const int row = lane() / 4, column = lane() % 4 * 2;
  // Columns 2t, 2t + 1 and 8 further are in lane t of a quad.
  const auto gather = [](const Lane* quad, int first, int step, float* values) {
    for (int k = 0; k < 16; ++k) values[k] = quad[k % 8 / 2].words[first + k / 8 * step][k % 2];
  };
  for (int i = 0; i < 4; ++i) {
    float a[16], b[16];
    gather(&lanes[row * 4], i / 2, 2, a);
    gather(&lanes[(column + i % 2) * 4], 4, 1, b);
    sum[i] = accumulate(sum[i], a, b, product_group());
  }
}

namespace {

// Element (k, n) of what a descriptor without swizzling names: matrices of 8 x 8, each 128 bytes in
// a row, the next along k and along n as far away as it says.
float described_element(const Block& block, uint64_t descriptor, int k, int n) {
  const auto field = [&](int bit) { return (descriptor >> bit & 0x3fffu) << 4; };
  const size_t at = field(0) + static_cast<size_t>(k / 8) * field(16) +
                    static_cast<size_t>(n / 8) * field(32) +
                    static_cast<size_t>(n % 8 * 16 + k % 8 * 2);
  uint16_t half;
  std::memcpy(&half, block.shared.get() + at, sizeof(half));  // watched by AddressSanitizer
  return from_half(half);
}

void compute(const Block& block, const Product& product, int in_quad) {
  for (int n = 0; n < 128; ++n) {
    if (n % 8 / 2 != in_quad) continue;
    float column[16];
    for (int k = 0; k < 16; ++k) column[k] = described_element(block, product.descriptor, k, n);
    for (int half = 0; half < 2; ++half) {
      float& sum = product.sums[n / 8 * 4 + half * 2 + n % 2];
      sum = accumulate(product.adds ? sum : 0.0f, product.rows[half], column, product_group());
    }
  }
}

}  // namespace

void multiply_add_64x128x16(float* sums, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                            uint64_t descriptor, bool adds) {
  const unsigned mine[4] = {a0, a1, a2, a3};
  unsigned lanes[kWarp][kSlotBytes / sizeof(unsigned)];
  std::memcpy(lanes, post(0xffffffffu, "wgmma", mine, sizeof(mine)), sizeof(lanes));
  Product product = {sums, {}, descriptor, adds};
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const unsigned word = lanes[lane() / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
      product.rows[half][k] = from_half(static_cast<uint16_t>(word >> (k % 2 * 16) & 0xffffu));
    }
  }
  Fiber& fiber = *machine().current;
  // Products are computed one after the other, none at once after one that is late.
  if (is_done_at_once() && fiber.products.empty()) {
    compute(*fiber.block, product, lane() % 4);
  } else {
    fiber.products.push_back(product);
  }
}

void wait_for_products() {
  Fiber& fiber = *machine().current;
  for (const Product& product : fiber.products) compute(*fiber.block, product, lane() % 4);
  fiber.products.clear();
}

void check_vector(const void* position, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(position) % bytes == 0) return;
  machine().error = "a vector of " + std::to_string(bytes) + " bytes is not aligned to as many";
  fail();
}

void copy_async(void* shared, const void* global) {
  check_vector(shared, 16);
  check_vector(global, 16);
  Fiber& fiber = *machine().current;
  if (is_done_at_once()) {
    std::memcpy(shared, global, 16);
  } else {
    fiber.copies.push_back({shared, global, fiber.closed_groups});
  }
}

void commit_copies() { ++machine().current->closed_groups; }

void wait_for_copies(int may_run) {
  Fiber& fiber = *machine().current;
  const auto first_left =
      std::find_if(fiber.copies.begin(), fiber.copies.end(),
                   [&](const Copy& copy) { return copy.group >= fiber.closed_groups - may_run; });
  for (auto copy = fiber.copies.begin(); copy != first_left; ++copy) {
    std::memcpy(copy->to, copy->from, 16);
  }
  fiber.copies.erase(fiber.copies.begin(), first_left);
}

}  // namespace emulation
