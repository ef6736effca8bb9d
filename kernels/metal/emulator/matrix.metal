// For the emulator's own tests.

// y [8, 8] = a [8, 8] b^T, b [8, 8], by matrices of T; where [2, 8, 8] has each lane and element at its place in a
// matrix.
template <typename T>
[[kernel]] void matrix(device float *y [[buffer(0)]], device float *where [[buffer(1)]],
                       device const T *a [[buffer(2)]], device const T *b [[buffer(3)]],
                       uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_matrix<T, 8, 8> left, right;
  simdgroup_load(left, a, 8);
  simdgroup_load(right, b, 8, ulong2(0, 0), true);
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, y, 8);
  for (uint i = 0; i < 2; i++) {
    where[part_row(lane) * 8 + part_column(lane) + i] = float(left.thread_elements()[i]);
    where[64 + part_row(lane) * 8 + part_column(lane) + i] = sum.thread_elements()[i];
  }
}

// Some lanes miss the product.
[[kernel]] void divergent(device float *y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
  float2 sum = 0;
  if (lane < 30)
    multiply(sum, float2(1), float2(1));
  y[lane] = sum[0];
}

// A word more than there may be.
[[kernel]] void too_large(device float *y [[buffer(0)]], uint index [[thread_index_in_threadgroup]]) {
  threadgroup float values[8193];
  values[index] = 1;
  y[index] = values[index];
}

// A value that the first thread writes and all read: when it is there.
[[kernel]] void shared(device float *y [[buffer(0)]], uint index [[thread_index_in_threadgroup]]) {
  threadgroup float values[1];
  if (index == 0)
    values[0] = 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[index] = values[0];
}

// At any time.
[[kernel]] void racing(device float *y [[buffer(0)]], uint index [[thread_index_in_threadgroup]]) {
  threadgroup float values[1];
  if (index == 0)
    values[0] = 1;
  y[index] = values[0];
}

// Waits for a value that nobody writes.
[[kernel]] void endless(device float *y [[buffer(0)]], uint index [[thread_index_in_threadgroup]]) {
  do {
    y[index] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  } while (y[index] == 1);
}

#define MATRIX(variant, T) INSTANTIATE("matrix_" variant, matrix<T>)
FOR_FLOATS(MATRIX)
