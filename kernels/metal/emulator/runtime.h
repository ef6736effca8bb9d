// What translated kernels (through msl.h) and the runtime share.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

// Where the running thread is: positions and extents as in MSL, x first.
struct Thread {
  uint32_t position_in_grid[3], threadgroup[3], position[3], threadgroups[3], threads[3];
  uint32_t index, lane, simdgroup, simdgroups;
};
const Thread &this_thread();

// Parks the thread until all of its threadgroup wait at `line`.
void threadgroup_wait(int line);

// Parks the thread until all lanes of its simdgroup wait at `line` with `operation`.
void simdgroup_wait(int operation, int line);

constexpr size_t SLOT_BYTES = 64;
// What the first lane that comes to it makes of all lanes' values, for the others: a matrix of floats at most.
struct Reduced {
  bool is_there;
  alignas(SLOT_BYTES) unsigned char value[8 * 8 * sizeof(float)];
};
// A value from each lane of the simdgroup.
struct Exchange {
  const unsigned char (*slots)[SLOT_BYTES];
  uint32_t lanes;
  Reduced *reduced;
};
Exchange exchange(int operation, int line, const void *value, size_t bytes);

// Ends the launch with an error.
[[noreturn]] void fail(const char *message, int line);

// Fills a threadgroup variable with NaN, once for each threadgroup; `last` is the last one that it was filled for.
void poison(void *variable, size_t bytes, uint64_t &last);

enum class Attribute {
  BUFFER,
  POSITION_IN_GRID,
  THREADGROUP,
  POSITION,
  THREADGROUPS,
  THREADS,
  INDEX,
  LANE,
  SIMDGROUP,
  SIMDGROUPS,
};

// A kernel's parameter as its signature declares it.
struct Parameter {
  Attribute attribute;
  uint32_t index;
  // Bound only if a function constant says so.
  bool optional;
};

// What a launch binds to a buffer index.
enum class Access : uint8_t { READ, WRITE, WORDS, ABSENT };

// What a parameter's type asks for; bytes of what a reference refers to.
struct Type {
  Access access;
  size_t bytes;
};

struct Kernel {
  void (*call)(void *function, const Parameter *parameters, void *const *buffers);
  void *function;
  const Parameter *parameters;
  const Type *types;
  size_t count;
};

void add_kernel(const char *name, Kernel kernel);
void add_constant(uint32_t index, bool *value);

} // namespace emulator
