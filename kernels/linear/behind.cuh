// What stands behind a product: a bias, the gate of an MLP, the residual stream.
#pragma once

#include "cuda.cuh"

enum Activation : uint32_t { NONE, SILU, GELU_TANH };

__device__ inline float activate(float x, uint32_t activation) {
  // 0.5 (1 + tanh(z)) = sigmoid(2 z)
  return x / (1 + expf(-(activation == SILU ? x : 1.5957691216f * fmaf(0.044715f * x * x, x, x))));
}

template <typename T> struct Behind {
  T *y; // [rows, outer]
  const T *bias, *residual;
  uint32_t residual_stride, outer;
  uint32_t activation; // not NONE: the weight is [2 outer, inner], gates before what they multiply

  // What an output becomes behind its sums.
  __device__ void finish(uint32_t row, uint32_t output, float sum, float up) const {
    if (activation != NONE) {
      sum = activate(sum, activation) * up;
    } else {
      if (bias)
        sum += widen(bias[output]);
      if (residual)
        sum += widen(residual[row * size_t(residual_stride) + output]);
    }
    y[row * size_t(outer) + output] = narrow<T>(sum);
  }
};
