// RMS normalisation. threads.x threads, whole simdgroups, share a row; threads.y rows share a threadgroup if a row
// takes no more than a simdgroup, else a row has the threadgroup to itself.

// The norm is multiplied by SiLU of the other operand, or the other operand is added to it and the sum multiplied by a
// factor.
constant bool HAS_OTHER [[function_constant(0)]];
constant bool IS_GATED [[function_constant(1)]];

// Neighbours that a thread takes at once.
constant constexpr uint TAKES = 4;

struct NormSizes {
  Rows x, other;
  uint rows, d;
  float eps, factor;
};

// x and other [rows, d] in rows; weight [d]; y [rows, d].
template <typename T>
[[kernel]] void rms_norm(device T *y [[buffer(0)]], device const T *x [[buffer(1)]],
                         device const float *weight [[buffer(2)]], constant NormSizes &sizes [[buffer(3)]],
                         device const T *other [[buffer(4), function_constant(HAS_OTHER)]],
                         uint3 group [[threadgroup_position_in_grid]],
                         uint3 position [[thread_position_in_threadgroup]],
                         uint3 threads [[threads_per_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float parts[LANES];
  const uint row = group.x * threads.y + position.y, d = sizes.d;
  const bool inside = row < sizes.rows; // the others still take part in sums
  device const T *from = x + row_start(sizes.x, inside ? row : 0);

  float squares = 0;
  for (uint first = TAKES * position.x; first < d; first += TAKES * threads.x)
    for (uint j = 0; j < TAKES; j++)
      if (first + j < d)
        squares = fma(float(from[first + j]), float(from[first + j]), squares);
  squares = simd_sum(squares);
  if (threads.x > LANES) {
    if (lane == 0)
      parts[simdgroup] = squares;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    squares = 0;
    for (uint i = 0; i < threads.x / LANES; i++)
      squares += parts[i];
  }
  if (!inside)
    return;

  const float scale = 1 / sqrt(squares / d + sizes.eps);
  device T *to = y + ulong(row) * d;
  for (uint first = TAKES * position.x; first < d; first += TAKES * threads.x)
    for (uint i = first; i < min(first + TAKES, d); i++) {
      float value = float(from[i]) * scale * weight[i];
      if (HAS_OTHER) {
        const float with = float(other[row_start(sizes.other, row) + i]);
        // A sum is rounded where ops by themselves would round.
        value = IS_GATED ? value * (with / (1 + exp(-with))) : float(T(with + float(T(value)))) * sizes.factor;
      }
      to[i] = T(value);
    }
}

#define RMS_NORM(variant, T) INSTANTIATE("rms_norm_" variant, rms_norm<T>)
FOR_FLOATS(RMS_NORM)
