// Tensor cores of compute capability 8.0 on, for f16 and bf16: products of 16 x 16 by 16 x 8 values into f32, fragments
// from shared memory, asynchronous copies. How operands lie in a warp: PTX ISA, "Matrix fragments for mma.m16n8k16".
#pragma once

#include "cuda.cuh"

// c [16, 8] += a [16, 16] b [16, 8].
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values in one register, the first in its lower half.
__device__ inline uint32_t narrow_pair(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t &>(pair);
}
__device__ inline uint32_t narrow_pair(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t &>(pair);
}
__device__ inline float2 unpair(uint32_t x, __nv_bfloat16) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(x));
}
__device__ inline float2 unpair(uint32_t x, __half) { return __half22float2(reinterpret_cast<const __half2 &>(x)); }

__device__ inline uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes into shared memory, or fills them with zeros; `from` is an address of the operand either way. The
// thread sees them after `wait_for_copies`, others after a barrier as well.
__device__ inline void copy_async(uint32_t to, const void *from, bool is_inside = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_inside ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async(void *to, const void *from, bool is_inside = true) {
  copy_async(shared_address(to), from, is_inside);
}
// Makes a group of the thread's copies since the last.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until no more than N groups of copies are on their way.
template <int N> __device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Where 16 bytes of a row lie in rows of WIDTH values: eight rows hold the same column in different banks.
template <int WIDTH> __device__ inline uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return (row * (WIDTH / 8) + (chunk ^ (row % 8))) * 16;
}

// Four matrices of 8 x 8 values: lane i brings the address of row i % 8 of matrix i / 8. Transposed on the way to the
// registers, or not.
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
__device__ inline void load_matrices(uint32_t (&fragment)[4], const void *row) {
  load_matrices(fragment, shared_address(row));
}
__device__ inline void load_transposed(uint32_t (&fragment)[4], const void *row) {
  load_transposed(fragment, shared_address(row));
}
__device__ inline uint32_t transpose(uint32_t fragment) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// Rows of PIECES pieces of 16 bytes in shared memory, permuted so that the same piece of eight rows lies in all banks.
template <typename T, int PIECES> struct Tile {
  T *values;

  __device__ T *at(uint32_t row, uint32_t piece) const {
    const uint32_t shift = PIECES >= 8 ? row % 8 : row * PIECES / 8 % PIECES;
    return values + (row * PIECES + (piece ^ shift)) * (16 / sizeof(T));
  }
};

// The largest value of lanes that differ in the bits from FROM to TO alone, both powers of two.
template <int FROM, int TO> __device__ inline float max_lanes(float x) {
#pragma unroll
  for (int offset = FROM; offset <= TO; offset *= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
  return x;
}
