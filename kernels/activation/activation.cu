// Activations: gates of MLPs and of attention, GELU, the softcap. N values at a time where rows allow it.
#include "cuda.cuh"

__device__ float silu(float x) { return x / (1 + expf(-x)); }
// 0.5 (1 + tanh(z)) = sigmoid(2 z), and 1 + erf(z) = erfc(-z): these lose nothing where the result is small.
__device__ float gelu_tanh(float x) { return x / (1 + expf(-1.5957691216f * fmaf(0.044715f * x * x, x, x))); }
__device__ float gelu(float x) { return 0.5f * x * erfcf(-0.7071067812f * x); }

// erfc(z) = t exp(p(t) - z^2) with t = 2 / (2 + z) and z from 0 on: within 1.2e-7 of it, relatively. Coefficients:
// Press et al., "Numerical Recipes", section 6.2.
__device__ float erfc_of_positive(float z) {
  constexpr float P[] = {-1.26551223f, 1.00002368f, 0.37409196f, 0.09678418f, -0.18628806f,
                         0.27886807f,  -1.13520398f, 1.48851587f, -0.82215223f, 0.17087277f};
  const float t = __fdividef(1, fmaf(0.5f, z, 1));
  float p = P[9];
#pragma unroll
  for (int i = 8; i >= 0; i--)
    p = fmaf(p, t, P[i]);
  return t * __expf(fmaf(-z, z, p));
}

// For what is rounded to 16 bits anyway, in a third of the time: what `__expf` loses is below 1e-5 where a result is not
// zero in f16, and 1e-4 in bf16.
__device__ float gelu_rounded(float x) {
  const float tail = erfc_of_positive(fabsf(x) * 0.7071067812f);
  return 0.5f * x * (x < 0 ? tail : 2 - tail);
}
template <typename T> __device__ float gelu_of(float x) { return sizeof(T) == 2 ? gelu_rounded(x) : gelu(x); }

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
