// Layer normalisation of a residual sum. A threadgroup has a row.

struct LayerNormSizes {
  Rows x, residual;
  uint d;
  float eps;
};

// A sum over the threadgroup, by simdgroups and then by all.
inline float sum_all(float x, threadgroup float *parts, uint lane, uint simdgroup, uint simdgroups) {
  x = simd_sum(x);
  threadgroup_barrier(mem_flags::mem_threadgroup); // an earlier sum has been read
  if (lane == 0)
    parts[simdgroup] = x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0;
  for (uint i = 0; i < simdgroups; i++)
    sum += parts[i];
  return sum;
}

// x and residual [rows, d] in rows; weight and bias [d]; y [rows, d].
template <typename T>
[[kernel]] void add_layer_norm(device T *y [[buffer(0)]], device const T *x [[buffer(1)]],
                               device const T *residual [[buffer(2)]], device const float *weight [[buffer(3)]],
                               device const float *bias [[buffer(4)]], constant LayerNormSizes &sizes [[buffer(5)]],
                               uint3 group [[threadgroup_position_in_grid]],
                               uint3 threads [[threads_per_threadgroup]],
                               uint index [[thread_index_in_threadgroup]],
                               uint lane [[thread_index_in_simdgroup]],
                               uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float parts[LANES];
  const uint row = group.x, d = sizes.d, simdgroups = threads.x / LANES;
  device const T *a = x + row_start(sizes.x, row);
  device const T *b = residual + row_start(sizes.residual, row);
  float sum = 0;
  for (uint i = index; i < d; i += threads.x)
    sum += float(a[i]) + float(b[i]);
  const float mean = sum_all(sum, parts, lane, simdgroup, simdgroups) / d;
  float squares = 0;
  for (uint i = index; i < d; i += threads.x) {
    const float value = float(a[i]) + float(b[i]) - mean;
    squares = fma(value, value, squares);
  }
  const float scale = 1 / sqrt(sum_all(squares, parts, lane, simdgroup, simdgroups) / d + sizes.eps);
  for (uint i = index; i < d; i += threads.x)
    y[ulong(row) * d + i] = T((float(a[i]) + float(b[i]) - mean) * scale * weight[i] + bias[i]);
}

#define ADD_LAYER_NORM(variant, T) INSTANTIATE("add_layer_norm_" variant, add_layer_norm<T>)
FOR_FLOATS(ADD_LAYER_NORM)
