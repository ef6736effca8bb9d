// Runs launches that come on stdin and answers on stdout. Threadgroups run one after the other, the threads of one as
// fibers on one host thread, in an order that the launch's schedule decides and that is the same every time.
//
// Stricter than Metal: a simdgroup operation must be reached by all of a simdgroup's lanes together, and a barrier by
// all threads of a threadgroup. Threadgroup memory holds NaN until it is written.
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

// Built without sanitizers: only the kernels' own accesses are judged, and this is what takes most of the time.
#ifdef EMULATOR_TSAN
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
}
#else
static void *__tsan_get_current_fiber() { return nullptr; }
static void *__tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void *, unsigned) {}
static void __tsan_acquire(void *) {}
static void __tsan_release(void *) {}
#endif

#ifndef __x86_64__
#error "fibers switch by x86-64 assembly"
#endif
// Saves the caller's registers on its stack, leaves the stack in `from`, and goes on where `to` was left.
extern "C" void switch_stack(void **from, void *to);
asm(R"(
.text
.globl switch_stack
.type switch_stack,@function
switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size switch_stack,.-switch_stack
.section .note.GNU-stack,"",@progbits
.text
)");

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr uint32_t LANES = 32, MAX_THREADS = 1024;
constexpr size_t MAX_THREADGROUP_BYTES = 32 << 10;

enum class State { READY, AT_BARRIER, AT_SIMDGROUP, DONE };

struct Fiber {
  void *stack, *top, *tsan;
  Thread thread;
  State state;
  int operation, line;
  // Which of the simdgroup's two sets of slots the lane used last.
  int side;
};

struct Simdgroup {
  uint32_t first, lanes;
  unsigned char slots[2][LANES][SLOT_BYTES];
  Reduced reduced[2];
};

struct Argument {
  Access access;
  size_t offset, bytes;
  unsigned char *data;
};

struct Launch {
  std::string kernel;
  std::vector<bool> constants;
  uint32_t threadgroups[3], threads[3], schedule;
  std::vector<Argument> arguments;
};

std::map<std::string, Kernel> &kernels() {
  static std::map<std::string, Kernel> kernels;
  return kernels;
}

std::map<uint32_t, bool *> &constants() {
  static std::map<uint32_t, bool *> constants;
  return constants;
}

// Kept from one threadgroup to the next; the first `count` are the running one's.
std::vector<Fiber> fibers;
uint32_t count;
std::vector<Simdgroup> simdgroups;
Fiber *running;
void *host_top, *host_tsan;
const Kernel *kernel;
void *buffers[32];
std::string error;
// What orders threads for TSan: the launch, a barrier, an operation of a simdgroup.
char launched, finished, at_barrier, at_simdgroup[MAX_THREADS / LANES];
uint64_t threadgroup_number;
size_t threadgroup_bytes;

// The lanes of the simdgroup whose turn it is, in order, and how many of them have had it.
std::vector<Fiber *> turn;
size_t taken;

// The next one that can run, to which `top` gives way; the host if there is none.
void give_way(void *&top) {
  running = nullptr;
  while (!running && taken < turn.size() && error.empty()) {
    Fiber *const next = turn[taken++];
    if (next->state == State::READY)
      running = next;
  }
  __tsan_switch_to_fiber(running ? running->tsan : host_tsan, 1); // 1: a switch orders nothing
  switch_stack(&top, running ? running->top : host_top);
}

void park() { give_way(running->top); }

void run_thread() {
  __tsan_acquire(&launched);
  kernel->call(kernel->function, kernel->parameters, buffers);
  running->state = State::DONE;
  __tsan_release(&finished);
  park();
  abort();
}

// Fibers of a threadgroup, about to start.
void start(const Launch &launch, const uint32_t threadgroup[3]) {
  count = launch.threads[0] * launch.threads[1] * launch.threads[2];
  while (fibers.size() < count) {
    Fiber fiber{};
    fiber.stack =
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fiber.tsan = __tsan_create_fiber(0);
    fibers.push_back(fiber);
  }
  simdgroups.resize((count + LANES - 1) / LANES);
  for (Simdgroup &simdgroup : simdgroups)
    simdgroup.lanes = 0;
  for (uint32_t i = 0; i < count; i++) {
    Thread &thread = fibers[i].thread;
    const uint32_t *threads = launch.threads;
    const uint32_t position[3] = {i % threads[0], i / threads[0] % threads[1], i / (threads[0] * threads[1])};
    for (int axis = 0; axis < 3; axis++) {
      thread.position[axis] = position[axis];
      thread.threadgroup[axis] = threadgroup[axis];
      thread.position_in_grid[axis] = threadgroup[axis] * threads[axis] + position[axis];
      thread.threads[axis] = threads[axis];
      thread.threadgroups[axis] = launch.threadgroups[axis];
    }
    thread.index = i;
    thread.lane = i % LANES;
    thread.simdgroup = i / LANES;
    thread.simdgroups = simdgroups.size();
    simdgroups[i / LANES].first = i / LANES * LANES;
    simdgroups[i / LANES].lanes++;
    fibers[i].state = State::READY;
    void **top = reinterpret_cast<void **>(static_cast<char *>(fibers[i].stack) + STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(run_thread);
    for (int saved = 0; saved < 6; saved++)
      *--top = nullptr;
    fibers[i].top = top;
  }
  threadgroup_number++;
  threadgroup_bytes = 0;
}

std::string at(int line) { return " at line " + std::to_string(line); }

bool is_ready(const Simdgroup &simdgroup) {
  for (uint32_t i = 0; i < simdgroup.lanes; i++)
    if (fibers[simdgroup.first + i].state == State::READY)
      return true;
  return false;
}

// Lets a simdgroup go on whose lanes have all reached one operation.
void settle(const Simdgroup &simdgroup) {
  const Fiber *lanes = &fibers[simdgroup.first];
  const auto *waiting = std::find_if(lanes, lanes + simdgroup.lanes,
                                     [](const Fiber &lane) { return lane.state == State::AT_SIMDGROUP; });
  if (waiting == lanes + simdgroup.lanes)
    return;
  for (uint32_t i = 0; i < simdgroup.lanes; i++)
    if (lanes[i].state != State::AT_SIMDGROUP || lanes[i].line != waiting->line ||
        lanes[i].operation != waiting->operation) {
      error = "a part of a simdgroup is at the operation" + at(waiting->line);
      return;
    }
  for (uint32_t i = 0; i < simdgroup.lanes; i++)
    fibers[simdgroup.first + i].state = State::READY;
}

// Lets a threadgroup go on that waits at one barrier. False if all of its threads are done.
bool pass_barrier() {
  const auto waits = [](const Fiber &fiber) { return fiber.state == State::AT_BARRIER; };
  Fiber *const end = fibers.data() + count, *const waiting = std::find_if(fibers.data(), end, waits);
  if (waiting == end)
    return false;
  for (Fiber *fiber = fibers.data(); fiber != end; fiber++)
    if (!waits(*fiber) || fiber->line != waiting->line) {
      error = "a part of the threads is at the barrier" + at(waiting->line);
      return true;
    }
  for (Fiber *fiber = fibers.data(); fiber != end; fiber++)
    fiber->state = State::READY;
  return true;
}

// Schedules: 0 simdgroups in turn, 1 the same backwards, 2 the first that can run as far as it can, 3 the last,
// others at random.
void run_threadgroup(uint32_t schedule, std::mt19937 &random) {
  static std::vector<uint32_t> ready;
  size_t turns = 0;
  while (error.empty()) {
    ready.clear();
    for (uint32_t i = 0; i < simdgroups.size(); i++)
      if (is_ready(simdgroups[i]))
        ready.push_back(i);
    if (ready.empty()) {
      if (!pass_barrier())
        return;
      continue;
    }
    if (schedule == 1)
      std::reverse(ready.begin(), ready.end());
    const size_t pick = schedule <= 1   ? turns++ % ready.size()
                        : schedule == 2 ? 0
                        : schedule == 3 ? ready.size() - 1
                                        : random() % ready.size();
    const Simdgroup &simdgroup = simdgroups[ready[pick]];
    turn.resize(simdgroup.lanes);
    for (uint32_t i = 0; i < simdgroup.lanes; i++)
      turn[i] = &fibers[simdgroup.first + (schedule % 2 == 1 ? simdgroup.lanes - 1 - i : i)];
    if (schedule > 3)
      std::shuffle(turn.begin(), turn.end(), random);
    taken = 0;
    give_way(host_top);
    if (error.empty())
      settle(simdgroup);
  }
}

// Whether the launch binds exactly what the kernel's signature asks for.
bool fits(const Launch &launch) {
  std::vector<bool> used(launch.arguments.size());
  for (size_t i = 0; i < kernel->count; i++) {
    const Parameter &parameter = kernel->parameters[i];
    if (parameter.attribute != Attribute::BUFFER)
      continue;
    const std::string name = "buffer " + std::to_string(parameter.index);
    if (parameter.index >= used.size()) {
      if (!parameter.optional)
        error = name + " is not bound";
      continue;
    }
    used[parameter.index] = true;
    const Argument &argument = launch.arguments[parameter.index];
    if (argument.access == Access::ABSENT) {
      if (!parameter.optional)
        error = name + " is not bound";
      continue;
    }
    const Type &type = kernel->types[i];
    if (argument.access != type.access)
      error = name + " is bound as another kind than the kernel's parameter: read, written or words";
    if (type.access == Access::WORDS && argument.bytes != type.bytes)
      error = name + " has " + std::to_string(argument.bytes) + " bytes, expected " + std::to_string(type.bytes);
    if (argument.offset > argument.bytes)
      error = name + " starts past its end";
  }
  for (size_t i = 0; i < used.size(); i++)
    if (!used[i])
      error = "buffer " + std::to_string(i) + " is no parameter of the kernel";
  return error.empty();
}

void run(const Launch &launch) {
  const auto found = kernels().find(launch.kernel);
  if (found == kernels().end()) {
    error = "there is no such kernel";
    return;
  }
  kernel = &found->second;
  const uint32_t *groups = launch.threadgroups, *threads = launch.threads;
  const uint64_t in_threadgroup = uint64_t(threads[0]) * threads[1] * threads[2];
  if (in_threadgroup == 0 || in_threadgroup > MAX_THREADS) {
    error = std::to_string(in_threadgroup) + " threads in a threadgroup";
    return;
  }
  for (auto [index, value] : constants()) {
    if (index >= launch.constants.size())
      continue;
    *value = launch.constants[index];
  }
  if (!fits(launch))
    return;
  std::fill(std::begin(buffers), std::end(buffers), nullptr);
  for (size_t i = 0; i < launch.arguments.size(); i++)
    if (launch.arguments[i].access != Access::ABSENT)
      buffers[i] = launch.arguments[i].data + launch.arguments[i].offset;

  std::mt19937 random(launch.schedule);
  std::vector<uint32_t> order(size_t(groups[0]) * groups[1] * groups[2]);
  for (size_t i = 0; i < order.size(); i++)
    order[i] = launch.schedule % 2 == 1 ? order.size() - 1 - i : i;
  if (launch.schedule > 3)
    std::shuffle(order.begin(), order.end(), random);
  host_tsan = __tsan_get_current_fiber();
  for (uint32_t i : order) {
    const uint32_t threadgroup[3] = {i % groups[0], i / groups[0] % groups[1], i / (groups[0] * groups[1])};
    start(launch, threadgroup);
    __tsan_release(&launched);
    run_threadgroup(launch.schedule, random);
    __tsan_acquire(&finished);
    if (!error.empty())
      return;
  }
}

void read_bytes(void *to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes)
    exit(feof(stdin) ? 0 : 1);
}

uint32_t read_word() {
  uint32_t word;
  read_bytes(&word, sizeof word);
  return word;
}

Launch read_launch() {
  Launch launch;
  launch.kernel.resize(read_word());
  read_bytes(launch.kernel.data(), launch.kernel.size());
  for (uint32_t count = read_word(); count > 0; count--)
    launch.constants.push_back(read_word() != 0);
  for (uint32_t &extent : launch.threadgroups)
    extent = read_word();
  for (uint32_t &extent : launch.threads)
    extent = read_word();
  launch.schedule = read_word();
  for (uint32_t count = read_word(); count > 0; count--) {
    Argument argument{Access(read_word()), read_word(), read_word(), nullptr};
    argument.data = static_cast<unsigned char *>(malloc(argument.bytes));
    read_bytes(argument.data, argument.bytes);
    launch.arguments.push_back(argument);
  }
  return launch;
}

} // namespace

const Thread &this_thread() { return running->thread; }

void fail(const char *message, int line) {
  error = message + at(line);
  __tsan_release(&finished); // the message
  park();
  abort();
}

void threadgroup_wait(int line) {
  __tsan_release(&at_barrier);
  running->state = State::AT_BARRIER;
  running->line = line;
  park();
  __tsan_acquire(&at_barrier);
}

void simdgroup_wait(int operation, int line) {
  char *order = &at_simdgroup[running->thread.simdgroup];
  __tsan_release(order);
  running->state = State::AT_SIMDGROUP;
  running->operation = operation;
  running->line = line;
  park();
  __tsan_acquire(order);
}

Exchange exchange(int operation, int line, const void *value, size_t bytes) {
  Fiber &fiber = *running;
  Simdgroup &simdgroup = simdgroups[fiber.thread.simdgroup];
  fiber.side ^= 1;
  const int side = fiber.side;
  unsigned char *slot = simdgroup.slots[side][fiber.thread.lane];
  // Sanitizers replace memcpy, but not of a length that is known.
  switch (bytes) {
  case 4: memcpy(slot, value, 4); break;
  case 8: memcpy(slot, value, 8); break;
  case 16: memcpy(slot, value, 16); break;
  case 24: memcpy(slot, value, 24); break;
  default: memcpy(slot, value, bytes);
  }
  simdgroup.reduced[side].is_there = false;
  fiber.state = State::AT_SIMDGROUP;
  fiber.operation = operation;
  fiber.line = line;
  park();
  return {simdgroup.slots[side], simdgroup.lanes, &simdgroup.reduced[side]};
}

void poison(void *variable, size_t bytes, uint64_t &last) {
  if (last == threadgroup_number)
    return;
  last = threadgroup_number;
  // No memset, which TSan would take for the running thread's.
  void *to = variable;
  size_t count = bytes;
  asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(0xff) : "memory");
  threadgroup_bytes += bytes;
  if (threadgroup_bytes > MAX_THREADGROUP_BYTES)
    fail("more than 32 KiB of threadgroup memory", 0);
}

void add_kernel(const char *name, Kernel kernel) { kernels()[name] = kernel; }

void add_constant(uint32_t index, bool *value) { constants()[index] = value; }

} // namespace emulator

// The first argument: seconds that a launch may take, after which the process dies of SIGALRM.
int main(int, char **arguments) {
  using namespace emulator;
  for (;;) {
    Launch launch = read_launch();
    error.clear();
    alarm(atoi(arguments[1]));
    run(launch);
    alarm(0);
    const uint32_t length = error.size();
    fwrite(&length, sizeof length, 1, stdout);
    fwrite(error.data(), 1, length, stdout);
    for (const Argument &argument : launch.arguments) {
      if (argument.access == Access::WRITE && error.empty())
        fwrite(argument.data, 1, argument.bytes, stdout);
      free(argument.data);
    }
    fflush(stdout);
    if (length != 0)
      exit(0); // fibers hang in the middle of the kernel
  }
}

// Older libgcc lack the conversion that clang calls; rounds to nearest, ties to even.
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint16_t upper = is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 rounded;
  memcpy(&rounded, &upper, sizeof rounded);
  return rounded;
}
