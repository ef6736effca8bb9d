// Activations of one value.
#pragma once

#include "cuda.cuh"

__device__ inline float silu(float x) { return x / (1 + expf(-x)); }
// 0.5 (1 + tanh(z)) = sigmoid(2 z), and 1 + erf(z) = erfc(-z): these lose nothing where the result is small.
__device__ inline float gelu_tanh(float x) { return x / (1 + expf(-1.5957691216f * fmaf(0.044715f * x * x, x, x))); }
__device__ inline float gelu(float x) { return 0.5f * x * erfcf(-0.7071067812f * x); }

// For what is rounded to 16 bits anyway, in few instructions: within 2e-5, relatively, of what is not below 1e-7.
__device__ inline float silu_rounded(float x) { return x * reciprocal(1 + power_of_two(-1.4426950409f * x)); }
__device__ inline float gelu_tanh_rounded(float x) {
  return x * reciprocal(1 + power_of_two(-2.3022081983f * fmaf(0.044715f * x * x, x, x)));
}
// x / (1 + 2^(x p(x^2))): p, fitted to what makes it the GELU, is kept where it was fitted.
__device__ inline float gelu_rounded(float x) {
  constexpr float P[] = {-2.30211401f,    -0.105007887f,  0.00018269282f, 0.000140551303f,
                         -9.52087612e-6f, 2.92731812e-7f, -3.5679415e-9f};
  const float square = fminf(x * x, 36);
  float p = P[6];
#pragma unroll
  for (int i = 5; i >= 0; i--)
    p = fmaf(p, square, P[i]);
  return x * reciprocal(1 + power_of_two(x * p));
}
template <typename T> __device__ inline float gelu_of(float x) { return sizeof(T) == 2 ? gelu_rounded(x) : gelu(x); }
