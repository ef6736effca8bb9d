// Rotary position embedding, and the rotations of a step.
#include "cuda.cuh"

// A block has a token's heads: threadIdx.x runs over components, threadIdx.y over heads.
template <typename T>
__device__ void rope(const T *x, Rows rows, const float *cos, const float *sin, T *y, uint32_t half, uint32_t d) {
  const uint32_t token = blockIdx.x;
  for (uint32_t head = threadIdx.y; head < rows.heads; head += blockDim.y) {
    const T *from = x + rows.start(token, head);
    T *to = y + (token * size_t(rows.heads) + head) * d;
    for (uint32_t i = threadIdx.x; i < d - half; i += blockDim.x) {
      // A pair is (i, i + half); beyond both halves components stay, half further on.
      if (i < half) {
        const float a = widen(from[i]), b = widen(from[i + half]);
        const float c = cos[token * size_t(half) + i], s = sin[token * size_t(half) + i];
        to[i] = narrow<T>(a * c - b * s);
        to[i + half] = narrow<T>(b * c + a * s);
      } else {
        to[i + half] = from[i + half];
      }
    }
  }
}

// Cosines, then sines, [2, N, half] of positions [N] times frequencies [half]; count is N * half.
extern "C" __global__ void rotations(const uint32_t *positions, const float *inv_freq, float *out, uint32_t half,
                                     uint32_t count) {
  wait_for_inputs();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count)
    sincosf(positions[i / half] * inv_freq[i % half], &out[count + i], &out[i]);
}

#define ROPE(name, T)                                                                                                  \
  extern "C" __global__ void name(const T *x, uint32_t heads, uint32_t token_stride, uint32_t head_stride,             \
                                  const float *cos, const float *sin, T *y, uint32_t half, uint32_t d) {               \
    rope<T>(x, {heads, token_stride, head_stride}, cos, sin, y, half, d);                                              \
  }
FOR_FLOATS(ROPE, rope)
