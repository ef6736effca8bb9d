// Layer normalisation of a residual sum: a block has a row, which it reads three times, twice from the caches.
#include "cuda.cuh"

constexpr int WARPS = 8;

__device__ float sum_block(float x, float *warps) {
  x = sum_lanes(x, 32);
  __syncthreads(); // the last sum has been read
  if (threadIdx.x % 32 == 0)
    warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < WARPS; warp++)
    x += warps[warp];
  return x;
}

template <typename T>
__device__ void add_layer_norm(const T *x, Rows x_rows, const T *residual, Rows residual_rows, const float *weight,
                               const float *bias, T *y, uint32_t d, float eps) {
  __shared__ float warps[WARPS];
  const T *from = x + x_rows.start(blockIdx.x), *other = residual + residual_rows.start(blockIdx.x);
  const auto sum = [&](uint32_t i) { return widen(from[i]) + widen(other[i]); };
  float total = 0;
  for (uint32_t i = threadIdx.x; i < d; i += WARPS * 32)
    total += sum(i);
  const float mean = sum_block(total, warps) / d;
  float squares = 0;
  for (uint32_t i = threadIdx.x; i < d; i += WARPS * 32)
    squares += (sum(i) - mean) * (sum(i) - mean);
  const float scale = 1 / sqrtf(sum_block(squares, warps) / d + eps);
  for (uint32_t i = threadIdx.x; i < d; i += WARPS * 32)
    y[blockIdx.x * size_t(d) + i] = narrow<T>(fmaf((sum(i) - mean) * scale, weight[i], bias[i]));
}

#define ADD_LAYER_NORM(name, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, uint32_t x_heads, uint32_t x_token, uint32_t x_head, const T *residual, uint32_t r_heads,       \
           uint32_t r_token, uint32_t r_head, const float *weight, const float *bias, T *y, uint32_t d, float eps) {   \
    add_layer_norm<T>(x, {x_heads, x_token, x_head}, residual, {r_heads, r_token, r_head}, weight, bias, y, d, eps);   \
  }
FOR_FLOATS(ADD_LAYER_NORM, add_layer_norm)
