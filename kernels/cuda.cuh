// What every kernel shares: storage to f32 and back, wide loads, sums over lanes.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow(float x) { return x; }
template <> __device__ inline __half narrow(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }

constexpr int pack_alignment(int bytes) { return bytes < 16 ? bytes : 16; }

// N values that move in as few accesses as 16 bytes each allow; their address is a multiple of the smaller of
// 16 and their size.
template <typename T, int N> struct alignas(pack_alignment(sizeof(T) * N)) Pack {
  T values[N];
};

// Where the rows of an operand [N, heads, D] start: counted over tokens, then heads.
struct Rows {
  uint32_t heads, token_stride, head_stride;

  __device__ size_t start(uint32_t token, uint32_t head) const {
    return token * size_t(token_stride) + head * size_t(head_stride);
  }
  __device__ size_t start(uint32_t row) const { return start(row / heads, row % heads); }
};

// The sum over each group of `width` lanes, a power of two up to 32, in every lane of the group. All lanes of
// the warp call it. The order of additions does not depend on the lane.
__device__ inline float sum_lanes(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

// 2^x; subnormal results are zero.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x within two units of the last place; subnormal values count as zero.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Waits, in a kernel that may start while the one before it in its stream still runs, until that one has ended and what
// it wrote can be seen. Whatever it does not write may be read earlier. Does nothing in a kernel launched otherwise.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start, up to its own `wait_for_inputs`.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all threads of the cluster have come, and what they have written to shared memory can be seen.
__device__ inline void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Defines `extern "C"` kernels <name>_f32, <name>_f16 and <name>_bf16 of one function template over the dtype:
// DEFINE is a macro of (name, T).
#define FOR_FLOATS(DEFINE, name)                                                                                       \
  DEFINE(name##_f32, float)                                                                                            \
  DEFINE(name##_f16, __half)                                                                                           \
  DEFINE(name##_bf16, __nv_bfloat16)
