// What all kernels share; stands before every `.metal`, which is compiled when a program first needs it.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant constexpr uint LANES = 32;

// Where the rows of an operand [N, heads, D] lie, in values: whole in the last dimension, in strides in the others.
struct Rows {
  uint heads, token_stride, head_stride;
};

inline ulong row_start(constant Rows &rows, uint token, uint head) {
  return ulong(token) * rows.token_stride + ulong(head) * rows.head_stride;
}

// `row` counts over tokens and heads.
inline ulong row_start(constant Rows &rows, uint row) { return row_start(rows, row / rows.heads, row % rows.heads); }

#define INSTANTIATE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// KERNEL(variant, T) for every float that the compiler has.
#if defined(__HAVE_BFLOAT__)
#define FOR_FLOATS(KERNEL) KERNEL("f32", float) KERNEL("f16", half) KERNEL("bf16", bfloat)
#else
#define FOR_FLOATS(KERNEL) KERNEL("f32", float) KERNEL("f16", half)
#endif

// Products and sums are rounded apart wherever a kernel does not say `fma`, as the emulator rounds them: even safe math
// may fuse them within a statement.
#if !defined(EMULATOR)
#pragma STDC FP_CONTRACT OFF
#endif

// Before a loop whose bounds are constants, lest an array that it indexes leave the registers.
#if defined(EMULATOR)
#define UNROLL
#else
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

// Matrix units multiply parts of 8 x 8. A lane has two neighbours of a row, so that rows can be scaled, masked and
// summed where they are. The layout is not documented; it is the one that MLX's kernels rely on.
constant constexpr uint SIDE = 8;
inline uint part_row(uint lane) { return (lane & 16) / 4 + lane / 2 % 4; }
inline uint part_column(uint lane) { return (lane & 8) / 2 + lane % 2 * 2; }

// to += a b. All lanes of the simdgroup take part.
inline void multiply(thread float2 &to, float2 a, float2 b) {
  simdgroup_float8x8 left, right, sum;
  reinterpret_cast<thread float2 &>(left.thread_elements()) = a;
  reinterpret_cast<thread float2 &>(right.thread_elements()) = b;
  reinterpret_cast<thread float2 &>(sum.thread_elements()) = to;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  to = reinterpret_cast<thread float2 &>(sum.thread_elements());
}

// The sum, or the greatest, of a row of a part: the lanes that share it.
inline float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}
inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}
