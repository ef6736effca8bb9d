// Activations: gates of MLPs and of attention, GELU, the softcap. N values at a time where rows allow it.
#include "cuda.cuh"

__device__ float silu(float x) { return x / (1 + expf(-x)); }
// 0.5 (1 + tanh(z)) = sigmoid(2 z), and 1 + erf(z) = erfc(-z): these lose nothing where the result is small.
__device__ float gelu_tanh(float x) { return x / (1 + expf(-1.5957691216f * fmaf(0.044715f * x * x, x, x))); }
__device__ float gelu(float x) { return 0.5f * x * erfcf(-0.7071067812f * x); }

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

#define GELU(name, T)                                                                                                  \
  extern "C" __global__ void name(const T *x, T *y, uint64_t count) {                                                  \
    wait_for_inputs();                                                                                                 \
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += gridDim.x * uint64_t(blockDim.x)) \
      y[i] = narrow<T>(gelu(widen(x[i])));                                                                             \
  }
FOR_FLOATS(GELU, gelu)

#define SOFTCAP(name, T)                                                                                               \
  extern "C" __global__ void name(const T *x, T *y, uint64_t count, float cap) {                                       \
    wait_for_inputs();                                                                                                 \
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += gridDim.x * uint64_t(blockDim.x)) \
      y[i] = narrow<T>(cap * tanhf(widen(x[i]) / cap));                                                                \
  }
FOR_FLOATS(SOFTCAP, softcap)
