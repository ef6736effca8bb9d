// The index of each row's largest value: blocks of a row find theirs, then a warp has the last word.
#include "cuda.cuh"

constexpr int WARPS = 8;
constexpr uint32_t NOTHING = 0xffffffff;

// Orders values as integers, equal ones by index from the back; what cannot be chosen among comes out on top.
__device__ uint64_t key(float value, uint32_t index) {
  const uint32_t bits = __float_as_uint(value), ordered = bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
  return isnan(value) || value == INFINITY ? ~uint64_t(0) : uint64_t(ordered) << 32 | ~index;
}

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
  const bool chooses = best != ~uint64_t(0) && best >> 32 > (~__float_as_uint(-INFINITY));
  if (threadIdx.x == 0)
    indices[blockIdx.x] = chooses ? ~uint32_t(best) : NOTHING;
}

#define ARGMAX(name, T)                                                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, uint32_t stride, uint32_t count, uint64_t *keys) {                                              \
    argmax<T>(x, stride, count, keys);                                                                                 \
  }
FOR_FLOATS(ARGMAX, argmax)
