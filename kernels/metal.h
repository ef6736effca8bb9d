// What all kernels share; stands before every `.metal`, which is compiled when a program first needs it.
#include <metal_stdlib>
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
