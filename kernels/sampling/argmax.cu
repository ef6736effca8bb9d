// The index of each row's largest value: blocks of a row find theirs, then a warp has the last word.
#include "sampling/key.cuh"

constexpr int WARPS = 8;
__device__ uint64_t largest_of_lanes(uint64_t x) {
  for (int offset = 16; offset > 0; offset /= 2)
    x = max(x, (uint64_t)__shfl_xor_sync(0xffffffff, (unsigned long long)x, offset));
  return x;
}

// x [rows, stride], of which `count` take part; keys [rows, blocks of a row].
template <typename T> __device__ void argmax(const T *x, uint32_t stride, uint32_t count, uint64_t *keys) {
  let_next_start();
  wait_for_inputs();
  const T *from = x + blockIdx.y * size_t(stride);
  uint64_t best = 0;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    best = max(best, key(widen(from[i]), i));
  __shared__ uint64_t warps[WARPS];
  best = largest_of_lanes(best);
  if (threadIdx.x % 32 == 0)
    warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < WARPS; warp++)
      best = max(best, warps[warp]);
    keys[blockIdx.y * size_t(gridDim.x) + blockIdx.x] = best;
  }
}

extern "C" __global__ void argmax_of_blocks(const uint64_t *keys, uint32_t blocks, uint32_t *indices) {
  let_next_start();
  wait_for_inputs();
  uint64_t best = 0;
  for (uint32_t i = threadIdx.x; i < blocks; i += 32)
    best = max(best, keys[blockIdx.x * size_t(blocks) + i]);
  best = largest_of_lanes(best);
  if (threadIdx.x == 0)
    indices[blockIdx.x] = is_fit(best) ? index_of(best) : NOTHING;
}

#define ARGMAX(name, T)                                                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, uint32_t stride, uint32_t count, uint64_t *keys) {                                              \
    argmax<T>(x, stride, count, keys);                                                                                 \
  }
FOR_FLOATS(ARGMAX, argmax)
