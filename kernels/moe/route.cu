// Routing: the most probable experts of each token, and their weights.
#include "cuda.cuh"

// A warp for a token; a lane has every 32nd of up to 32 * EACH logits [n, num_experts]. experts, weights [n, k].
template <typename T, int EACH>
__device__ void route(const T *logits, uint32_t *experts, T *weights, uint32_t n, uint32_t num_experts, uint32_t k) {
  const uint32_t lane = threadIdx.x % 32, token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= n)
    return;
  logits += token * size_t(num_experts), experts += token * size_t(k), weights += token * size_t(k);
  float values[EACH], largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    values[i] = i * 32 + lane < num_experts ? widen(logits[i * 32 + lane]) : -INFINITY;
    largest = fmaxf(largest, values[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
  // Bits of a positive float are in its order; 0 stands for what is chosen or absent. A NaN counts as the least, and
  // makes all weights NaN.
  uint32_t keys[EACH];
  bool is_nan = false;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    is_nan |= isnan(values[i]);
    const float p = isnan(values[i]) ? 0 : expf(values[i] - largest);
    keys[i] = i * 32 + lane < num_experts ? __float_as_uint(p) + 1 : 0;
  }
  is_nan = __any_sync(0xffffffff, is_nan);
  // Lane i keeps every 32nd choice: k is at most 32 * EACH.
  float chosen[EACH], sum = 0;
#pragma unroll
  for (int part = 0; part < EACH; part++)
    for (uint32_t i = 0; i < 32 && part * 32 + i < k; i++) {
      uint32_t best = 0;
#pragma unroll
      for (int j = 0; j < EACH; j++)
        best = max(best, keys[j]);
      best = __reduce_max_sync(0xffffffff, best);
      uint32_t at = UINT32_MAX;
#pragma unroll
      for (int j = EACH - 1; j >= 0; j--)
        at = keys[j] == best ? j * 32 + lane : at;
      at = __reduce_min_sync(0xffffffff, at);
#pragma unroll
      for (int j = 0; j < EACH; j++)
        keys[j] = at == j * 32 + lane ? 0 : keys[j];
      const float p = __uint_as_float(best - 1);
      sum += p;
      if (lane == i) {
        chosen[part] = p;
        experts[part * 32 + i] = at;
      }
    }
#pragma unroll
  for (int part = 0; part < EACH; part++)
    if (part * 32 + lane < k)
      weights[part * 32 + lane] = narrow<T>(is_nan ? NAN : chosen[part] / sum);
}

#define ROUTE(name, T, EACH)                                                                                           \
  extern "C" __global__ void __launch_bounds__(128)                                                                    \
      name(const T *logits, uint32_t *experts, T *weights, uint32_t n, uint32_t num_experts, uint32_t k) {             \
    route<T, EACH>(logits, experts, weights, n, num_experts, k);                                                       \
  }
#define ROUTE_256(name, T) ROUTE(name, T, 8)
#define ROUTE_1024(name, T) ROUTE(name, T, 32)
FOR_FLOATS(ROUTE_256, moe_route_256)
FOR_FLOATS(ROUTE_1024, moe_route_1024)
