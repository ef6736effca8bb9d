// Activations: gates of MLPs and of attention, GELU, the softcap. N values at a time where rows allow it.
#include "activation/activation.cuh"

// y [n, d] of a and b, rows of two strides each; a thread has N values of a row.
template <typename T, int N, typename F>
__device__ void each(const T *a, Rows a_rows, const T *b, Rows b_rows, T *y, uint32_t n, uint32_t d, F f) {
  let_next_start();
  wait_for_inputs();
  const size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  const uint32_t packs = d / N, row = i / packs, column = i % packs * N;
  if (row >= n)
    return;
  const auto as = *reinterpret_cast<const Pack<T, N> *>(a + a_rows.start(row) + column);
  const auto bs = *reinterpret_cast<const Pack<T, N> *>(b + b_rows.start(row) + column);
  Pack<T, N> out;
#pragma unroll
  for (int j = 0; j < N; j++)
    out.values[j] = narrow<T>(f(widen(as.values[j]), widen(bs.values[j])));
  *reinterpret_cast<Pack<T, N> *>(y + row * size_t(d) + column) = out;
}

struct Silu {
  __device__ float operator()(float a, float b) const { return silu(a) * b; }
};
struct GeluTanh {
  __device__ float operator()(float a, float b) const { return gelu_tanh(a) * b; }
};
struct Sigmoid {
  __device__ float operator()(float a, float b) const { return a / (1 + expf(-b)); }
};

#define PAIRED(name, T, N, F)                                                                                          \
  extern "C" __global__ void name(const T *a, uint32_t a_heads, uint32_t a_token, uint32_t a_head, const T *b,         \
                                  uint32_t b_heads, uint32_t b_token, uint32_t b_head, T *y, uint32_t n, uint32_t d) { \
    each<T, N>(a, {a_heads, a_token, a_head}, b, {b_heads, b_token, b_head}, y, n, d, F());                            \
  }
#define SILU(name, T) PAIRED(name, T, 1, Silu) PAIRED(name##_wide, T, 16 / sizeof(T), Silu)
#define GELU_TANH(name, T) PAIRED(name, T, 1, GeluTanh) PAIRED(name##_wide, T, 16 / sizeof(T), GeluTanh)
#define SIGMOID(name, T) PAIRED(name, T, 1, Sigmoid) PAIRED(name##_wide, T, 16 / sizeof(T), Sigmoid)
FOR_FLOATS(SILU, silu_gated)
FOR_FLOATS(GELU_TANH, gelu_tanh_gated)
FOR_FLOATS(SIGMOID, sigmoid_gated)

// y of x, both of count values that lie side by side.
template <typename T, int N, typename F> __device__ void map(const T *x, T *y, uint64_t count, F f) {
  let_next_start();
  wait_for_inputs();
  const auto *from = reinterpret_cast<const Pack<T, N> *>(x);
  auto *to = reinterpret_cast<Pack<T, N> *>(y);
  const uint64_t step = gridDim.x * uint64_t(blockDim.x);
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count / N; i += step) {
    Pack<T, N> pack = from[i];
#pragma unroll
    for (int j = 0; j < N; j++)
      pack.values[j] = narrow<T>(f(widen(pack.values[j])));
    to[i] = pack;
  }
}

#define MAPPED_GELU(name, T, N)                                                                                        \
  extern "C" __global__ void name(const T *x, T *y, uint64_t count) {                                                  \
    map<T, N>(x, y, count, [](float value) { return gelu_of<T>(value); });                                                   \
  }
#define MAPPED_SOFTCAP(name, T, N)                                                                                     \
  extern "C" __global__ void name(const T *x, T *y, uint64_t count, float cap) {                                       \
    map<T, N>(x, y, count, [cap](float value) { return cap * tanhf(value / cap); });                                   \
  }
#define GELU(name, T) MAPPED_GELU(name, T, 1) MAPPED_GELU(name##_wide, T, 16 / sizeof(T))
#define SOFTCAP(name, T) MAPPED_SOFTCAP(name, T, 1) MAPPED_SOFTCAP(name##_wide, T, 16 / sizeof(T))
FOR_FLOATS(GELU, gelu)
FOR_FLOATS(SOFTCAP, softcap)
