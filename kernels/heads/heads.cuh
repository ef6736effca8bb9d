// A head in a warp, D / 32 values side by side in a lane: its norm, and its rotation with values of another lane.
#pragma once

#include "cuda.cuh"

struct HeadNorm {
  const float *weight; // null: no norm
  float eps;
};

// The angles of a token for the N values of a lane. N divides `half`, the pairs that turn.
template <int N> struct Turning {
  uint32_t partner;
  bool turns, is_first;
  Pack<float, N> cosines, sines;

  __device__ Turning(const float *cos, const float *sin, uint32_t token, uint32_t half) {
    const uint32_t lane = threadIdx.x % 32, column = lane * N;
    turns = column < 2 * half;
    is_first = column < half;
    partner = !turns ? lane : is_first ? lane + half / N : lane - half / N;
    if (turns) {
      const size_t angle = token * size_t(half) + (is_first ? column : column - half);
      cosines = *reinterpret_cast<const Pack<float, N> *>(cos + angle);
      sines = *reinterpret_cast<const Pack<float, N> *>(sin + angle);
    }
  }
};

// The head, normalised if there is a norm, and turned unless it holds values. All lanes call it together.
template <typename T, int N>
__device__ Pack<T, N> enter_head(Pack<T, N> head, HeadNorm norm, const Turning<N> &turning, bool is_value) {
  float values[N];
#pragma unroll
  for (int j = 0; j < N; j++)
    values[j] = widen(head.values[j]);
  if (norm.weight) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < N; j++)
      squares = fmaf(values[j], values[j], squares);
    const float scale = 1 / sqrtf(sum_lanes(squares, 32) / (32 * N) + norm.eps);
    const auto weights = *reinterpret_cast<const Pack<float, N> *>(norm.weight + threadIdx.x % 32 * N);
#pragma unroll
    for (int j = 0; j < N; j++) // rounded where a norm by itself would round
      values[j] = widen(narrow<T>(values[j] * scale * weights.values[j]));
  }
  if (!is_value) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float other = __shfl_sync(0xffffffff, values[j], turning.partner);
      if (turning.turns)
        values[j] =
            values[j] * turning.cosines.values[j] + (turning.is_first ? -other : other) * turning.sines.values[j];
    }
  }
  Pack<T, N> entered;
#pragma unroll
  for (int j = 0; j < N; j++)
    entered.values[j] = narrow<T>(values[j]);
  return entered;
}
