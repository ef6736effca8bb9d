// Tensor cores of compute capability 8.0 on, for f16 and bf16: m16n8k16 products, fragments from swizzled shared
// memory, asynchronous copies.
#pragma once

#include "cuda.cuh"

__device__ inline uint32_t shared_address(const void *pointer) { return __cvta_generic_to_shared(pointer); }

// Copies 16 bytes into shared memory, or fills them with zeros; `from` must be an address of the operand either way.
__device__ inline void copy_async(uint32_t to, const void *from, bool is_inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_inside ? 16 : 0));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until no more than N groups of copies are on their way.
template <int N> __device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Where 16 bytes of a row lie in rows of WIDTH values: eight rows hold the same column in different banks.
template <int WIDTH> __device__ inline uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return (row * (WIDTH / 8) + (chunk ^ (row % 8))) * 16;
}

// Four 8 x 8 matrices, whose rows the lanes name eight by eight; transposed on the way to the registers if asked.
__device__ inline void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}
__device__ inline uint32_t transpose(uint32_t fragment) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

#define MMA(T, type)                                                                                                   \
  __device__ inline void multiply_add(float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1, T) {              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "                      \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                                       \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                      \
  }
MMA(__half, "f16")
MMA(__nv_bfloat16, "bf16")

// Two values in one register, the first in its lower half.
__device__ inline uint32_t narrow_pair(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t &>(pair);
}
__device__ inline uint32_t narrow_pair(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t &>(pair);
}

// The largest value of lanes that differ in the bits from FROM to TO alone, both powers of two.
template <int FROM, int TO> __device__ inline float max_lanes(float x) {
#pragma unroll
  for (int offset = FROM; offset <= TO; offset *= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
  return x;
}

// 2^x; subnormal results are zero.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
