// Stands in for <metal_stdlib>: as much of MSL as Taper's kernels use, for clang 19. With EMULATOR_FLAT all memory is
// one address space, which sanitizers need; without it casts between address spaces can be found.
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
#define NAN (__builtin_nanf(""))

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
} // namespace metal
#define EMULATOR_VECTORS(T)                                                                                            \
  typedef metal::vec<T, 2> T##2;                                                                                       \
  typedef metal::vec<T, 3> T##3;                                                                                       \
  typedef metal::vec<T, 4> T##4;
EMULATOR_VECTORS(float)
EMULATOR_VECTORS(half)
EMULATOR_VECTORS(bfloat)
EMULATOR_VECTORS(char)
EMULATOR_VECTORS(uchar)
EMULATOR_VECTORS(uint)
EMULATOR_VECTORS(ushort)
EMULATOR_VECTORS(ulong)

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

// What follows reads what lanes gave to the runtime, which is no memory of a kernel's.
#define EMULATOR_OWN                                                                                                   \
  _Pragma("clang attribute push(__attribute__((no_sanitize(\"address\", \"thread\", \"undefined\"))), apply_to = function)")
#define EMULATOR_KERNELS _Pragma("clang attribute pop")

EMULATOR_OWN
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
  Reduced &reduced = *lanes.all.reduced;
  if (reduced.is_there) {
    __builtin_memcpy(&value, reduced.value, sizeof value);
    return value;
  }
  T values[32];
  uint32_t count = lanes.all.lanes;
  for (uint32_t i = 0; i < count; i++)
    values[i] = lanes[i];
  for (; count > 1; count = (count + 1) / 2)
    for (uint32_t i = 0; i < count / 2; i++)
      values[i] = join(values[i], values[i + (count + 1) / 2]);
  __builtin_memcpy(reduced.value, values, sizeof value);
  reduced.is_there = true;
  return values[0];
}
EMULATOR_KERNELS

} // namespace emulator

namespace metal {

inline float exp(float x) { return __builtin_expf(x); }
template <class To, class From> To as_type(From from) { return __builtin_bit_cast(To, from); }
inline float log(float x) { return __builtin_logf(x); }
inline float abs(float x) { return __builtin_fabsf(x); }
inline bool isnan(float x) { return x != x; }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
namespace precise {
inline float cos(float x) { return __builtin_cosf(x); }
inline float sin(float x) { return __builtin_sinf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
} // namespace precise
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <int N> vec<float, N> fma(vec<float, N> a, vec<float, N> b, vec<float, N> c) {
  for (int i = 0; i < N; i++)
    c[i] = fma(a[i], b[i], c[i]);
  return c;
}
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

EMULATOR_OWN
template <class T> T simd_sum(T x, int line = __builtin_LINE()) {
  return emulator::reduce(1, x, line, [](T a, T b) { return T(a + b); });
}
template <class T> T simd_max(T x, int line = __builtin_LINE()) {
  return emulator::reduce(2, x, line, [](T a, T b) { return max(a, b); });
}
template <class T> T simd_min(T x, int line = __builtin_LINE()) {
  return emulator::reduce(9, x, line, [](T a, T b) { return min(a, b); });
}
template <class T> T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  const auto lanes = emulator::share(3, x, line);
  const uint32_t from = emulator::this_thread().lane ^ mask;
  if (from >= lanes.all.lanes)
    emulator::fail("a shuffle reads a lane that is not there", line);
  return lanes[from];
}
template <class T> T simd_shuffle(T x, ushort from, int line = __builtin_LINE()) {
  const auto lanes = emulator::share(7, x, line);
  if (from >= lanes.all.lanes)
    emulator::fail("a shuffle reads a lane that is not there", line);
  return lanes[from];
}
inline bool simd_any(bool x, int line = __builtin_LINE()) {
  return emulator::reduce(8, x, line, [](bool a, bool b) { return a || b; });
}
EMULATOR_KERNELS

// A matrix of 8 x 8 that a simdgroup has, two neighbours of a row a lane: as in Apple's headers, whose layout is not
// documented but the one that MLX and PyTorch rely on.
template <class T, int COLUMNS, int ROWS> struct simdgroup_matrix {
  static_assert(COLUMNS == 8 && ROWS == 8, "8 x 8");
  vec<T, 2> elements;
  vec<T, 2> &thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

} // namespace metal

namespace emulator {

// Where the lane's two elements are.
inline uint32_t matrix_row(uint32_t lane) { return (lane >> 4 & 1) * 4 + (lane >> 1 & 3); }
inline uint32_t matrix_column(uint32_t lane) { return (lane >> 3 & 1) * 4 + (lane & 1) * 2; }

template <class A, class B, class C> struct Terms {
  metal::vec<A, 2> a;
  metal::vec<B, 2> b;
  metal::vec<C, 2> c;
};
typedef metal::vec<float, 8> Row;
inline void whole_simdgroup(uint32_t lanes, int line) {
  if (lanes != 32)
    fail("a matrix needs 32 lanes", line);
}

} // namespace emulator

namespace metal {

EMULATOR_OWN
template <class T, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<T, 8, 8> &to, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                   int line = __builtin_LINE()) {
  const auto lanes = emulator::share(4, emulator::Terms<A, B, C>{a.elements, b.elements, c.elements}, line);
  emulator::whole_simdgroup(lanes.all.lanes, line);
  emulator::Reduced &reduced = *lanes.all.reduced;
  auto &sums = reinterpret_cast<emulator::Row(&)[8]>(reduced.value);
  if (!reduced.is_there) {
    emulator::Row rows[2][8];
    for (uint32_t lane = 0; lane < 32; lane++) {
      const auto terms = lanes[lane];
      const uint32_t row = emulator::matrix_row(lane), column = emulator::matrix_column(lane);
      for (uint32_t i = 0; i < 2; i++) {
        rows[0][row][column + i] = float(terms.a[i]);
        rows[1][row][column + i] = float(terms.b[i]);
        sums[row][column + i] = float(terms.c[i]);
      }
    }
    for (uint32_t row = 0; row < 8; row++)
      for (uint32_t k = 0; k < 8; k++)
        sums[row] = __builtin_elementwise_fma(emulator::Row(rows[0][row][k]), rows[1][k], sums[row]);
    reduced.is_there = true;
  }
  const uint32_t lane = emulator::this_thread().lane;
  const uint32_t row = emulator::matrix_row(lane), column = emulator::matrix_column(lane);
  for (uint32_t i = 0; i < 2; i++)
    to.elements[i] = T(sums[row][column + i]);
}
template <class T, class A, class B>
void simdgroup_multiply(simdgroup_matrix<T, 8, 8> &to, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                        int line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(to, a, b, simdgroup_matrix<T, 8, 8>{}, line);
}
template <class T, int COLUMNS, int ROWS> simdgroup_matrix<T, COLUMNS, ROWS> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, COLUMNS, ROWS> matrix;
  matrix.elements[0] = matrix.elements[1] = value;
  return matrix;
}
EMULATOR_KERNELS
template <class T, class P>
void simdgroup_load(simdgroup_matrix<T, 8, 8> &to, P from, ulong stride = 8, ulong2 origin = 0, bool transpose = false,
                    int line = __builtin_LINE()) {
  emulator::simdgroup_wait(5, line);
  const uint32_t lane = emulator::this_thread().lane;
  const uint32_t row = emulator::matrix_row(lane), column = emulator::matrix_column(lane);
  for (uint32_t i = 0; i < 2; i++) {
    const ulong y = origin[1] + (transpose ? column + i : row), x = origin[0] + (transpose ? row : column + i);
    to.elements[i] = from[y * stride + x];
  }
}
template <class T, class P>
void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, P to, ulong stride = 8, ulong2 origin = 0,
                     bool transpose = false, int line = __builtin_LINE()) {
  emulator::simdgroup_wait(6, line);
  const uint32_t lane = emulator::this_thread().lane;
  const uint32_t row = emulator::matrix_row(lane), column = emulator::matrix_column(lane);
  for (uint32_t i = 0; i < 2; i++) {
    const ulong y = origin[1] + (transpose ? column + i : row), x = origin[0] + (transpose ? row : column + i);
    to[y * stride + x] = matrix.elements[i];
  }
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

#define device EMULATOR_SPACE(1)
#define constant const EMULATOR_SPACE(2)
#define threadgroup EMULATOR_SPACE(3)
#define thread
#define EMULATOR_POISON(variable)                                                                                      \
  static uint64_t poisoned_##variable;                                                                                 \
  emulator::poison((void *)(uintptr_t)&variable, sizeof variable, poisoned_##variable)
