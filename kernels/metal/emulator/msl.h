// Stands in for <metal_stdlib>: as much of MSL as Taper's kernels use, for clang 19. With EMULATOR_FLAT all memory is one
// address space, which sanitizers need; without it casts between address spaces can be found.
#pragma once
#pragma clang system_header // may use more of C++ than kernels
#include "runtime.h"

#ifdef EMULATOR_FLAT
#define EMULATOR_SPACE(n)
#else
#define EMULATOR_SPACE(n) __attribute__((address_space(n)))
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
#define INFINITY (__builtin_inff())

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
} // namespace metal

namespace emulator {

template <class T> struct Components {
  using Scalar = T;
  static constexpr int COUNT = 1;
};
template <class T, int N> struct Components<metal::vec<T, N>> {
  using Scalar = T;
  static constexpr int COUNT = N;
};

// Vector constructors: the translator writes `float4(a, b)` as `make<float4>(a, b)`.
template <class V, class... A> V make(A... arguments) {
  using T = typename Components<V>::Scalar;
  V vector;
  int next = 0;
  const auto put = [&](auto argument) {
    using Argument = decltype(argument);
    if constexpr (Components<Argument>::COUNT == 1)
      vector[next++] = T(argument);
    else
      for (int i = 0; i < Components<Argument>::COUNT; i++)
        vector[next++] = T(argument[i]);
  };
  constexpr int GIVEN = (0 + ... + Components<A>::COUNT);
  if constexpr (sizeof...(A) == 1 && GIVEN == 1)
    for (int i = 0; i < Components<V>::COUNT; i++)
      (put(arguments), ...);
  else {
    static_assert(GIVEN == Components<V>::COUNT, "wrong number of vector components");
    (put(arguments), ...);
  }
  return vector;
}

template <class T> struct Lanes {
  Exchange all;
  T operator[](uint32_t lane) const {
    T value;
    __builtin_memcpy(&value, all.slots[lane], sizeof value);
    return value;
  }
};
template <class T> Lanes<T> share(int operation, T value, int line) {
  static_assert(sizeof value <= SLOT_BYTES);
  return {exchange(operation, line, &value, sizeof value)};
}

template <class T, class F> T reduce(int operation, T value, int line, F join) {
  const auto lanes = share(operation, value, line);
  T values[32];
  uint32_t count = lanes.all.lanes;
  for (uint32_t i = 0; i < count; i++)
    values[i] = lanes[i];
  for (; count > 1; count = (count + 1) / 2)
    for (uint32_t i = 0; i < count / 2; i++)
      values[i] = join(values[i], values[i + (count + 1) / 2]);
  return values[0];
}

} // namespace emulator

namespace metal {

inline float exp(float x) { return __builtin_expf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
namespace precise {
inline float tanh(float x) { return __builtin_tanhf(x); }
} // namespace precise
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class V> float dot(V a, V b) {
  float sum = 0;
  for (int i = 0; i < emulator::Components<V>::COUNT; i++)
    sum += a[i] * b[i];
  return sum;
}
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { emulator::threadgroup_wait(line); }
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) { emulator::simdgroup_wait(0, line); }

template <class T> T simd_sum(T x, int line = __builtin_LINE()) {
  return emulator::reduce(1, x, line, [](T a, T b) { return T(a + b); });
}
template <class T> T simd_max(T x, int line = __builtin_LINE()) {
  return emulator::reduce(2, x, line, [](T a, T b) { return max(a, b); });
}
template <class T> T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  const auto lanes = emulator::share(3, x, line);
  const uint32_t from = emulator::this_thread().lane ^ mask;
  if (from >= lanes.all.lanes)
    emulator::fail("a shuffle reads a lane that is not there", line);
  return lanes[from];
}

} // namespace metal

namespace emulator {

// How a kernel is called: its parameters from the bound buffers and the running thread.
template <class P> struct Argument {
  static Type type() { return {Access::WORDS, 0}; }
  static P get(const Parameter &parameter, void *const *) {
    const Thread &thread = this_thread();
    const auto triple = [&]() -> const uint32_t * {
      switch (parameter.attribute) {
      case Attribute::POSITION_IN_GRID: return thread.position_in_grid;
      case Attribute::THREADGROUP: return thread.threadgroup;
      case Attribute::POSITION: return thread.position;
      case Attribute::THREADGROUPS: return thread.threadgroups;
      case Attribute::THREADS: return thread.threads;
      case Attribute::INDEX: return &thread.index;
      case Attribute::LANE: return &thread.lane;
      case Attribute::SIMDGROUP: return &thread.simdgroup;
      case Attribute::SIMDGROUPS: return &thread.simdgroups;
      case Attribute::BUFFER: break;
      }
      __builtin_trap();
    }();
    if constexpr (Components<P>::COUNT == 1)
      return P(*triple);
    else {
      P position;
      for (int i = 0; i < Components<P>::COUNT; i++)
        position[i] = triple[i];
      return position;
    }
  }
};
template <class T> struct Argument<T *> {
  static Type type() { return {__is_const(T) ? Access::READ : Access::WRITE, 0}; }
  static T *get(const Parameter &parameter, void *const *buffers) { return (T *)(uintptr_t)buffers[parameter.index]; }
};
template <class T> struct Argument<T &> {
  static Type type() { return {Access::WORDS, sizeof(T)}; }
  static T &get(const Parameter &parameter, void *const *buffers) { return *(T *)(uintptr_t)buffers[parameter.index]; }
};

template <size_t... I> struct Indices {};
template <size_t N, size_t... I> struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <size_t... I> struct UpTo<0, I...> {
  using Type = Indices<I...>;
};
template <class... P, size_t... I>
void call(void (*function)(P...), const Parameter *parameters, void *const *buffers, Indices<I...>) {
  function(Argument<P>::get(parameters[I], buffers)...);
}
template <class... P> void register_kernel(const char *name, void (*function)(P...), const Parameter *parameters) {
  static const Type types[] = {Argument<P>::type()...};
  const auto thunk = [](void *function, const Parameter *parameters, void *const *buffers) {
    call((void (*)(P...))function, parameters, buffers, typename UpTo<sizeof...(P)>::Type{});
  };
  add_kernel(name, {thunk, (void *)function, parameters, types, sizeof...(P)});
}

} // namespace emulator

#define EMULATOR_VECTORS(T)                                                                                            \
  typedef metal::vec<T, 2> T##2;                                                                                       \
  typedef metal::vec<T, 3> T##3;                                                                                       \
  typedef metal::vec<T, 4> T##4;
EMULATOR_VECTORS(float)
EMULATOR_VECTORS(half)
EMULATOR_VECTORS(bfloat)
EMULATOR_VECTORS(uint)
EMULATOR_VECTORS(ushort)

#define device EMULATOR_SPACE(1)
#define constant const EMULATOR_SPACE(2)
#define threadgroup EMULATOR_SPACE(3)
#define thread
#define EMULATOR_POISON(variable) emulator::poison((void *)(uintptr_t)&variable, sizeof variable)
