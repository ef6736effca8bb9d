// Rows of a table. blockDim.x threads share a row, blockDim.y rows share a block.
#include "cuda.cuh"

// table [rows, stride], ids [n], y [n, words].
template <typename T>
__device__ void gather(const T *table, uint64_t stride, uint32_t rows, const uint32_t *ids, T *y, uint32_t n,
                       uint32_t words) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  let_next_start();
  wait_for_inputs();
  if (row >= n)
    return;
  const uint32_t id = ids[row];
  const T *from = table + id * stride;
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
    y[row * size_t(words) + i] = id < rows ? from[i] : T();
}

#define GATHER(name, T)                                                                                                \
  extern "C" __global__ void name(const T *table, uint64_t stride, uint32_t rows, const uint32_t *ids, T *y,           \
                                  uint32_t n, uint32_t words) {                                                        \
    gather<T>(table, stride, rows, ids, y, n, words);                                                                  \
  }
GATHER(gather_u128, uint4)
GATHER(gather_u32, uint32_t)
GATHER(gather_u16, uint16_t)
