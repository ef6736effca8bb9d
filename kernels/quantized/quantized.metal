// Products of few rows with packed weights, and rows of packed weights. A threadgroup has a panel: a lane has an
// output, so that no sum crosses lanes, and simdgroups share the groups of inputs.

constant constexpr uint QUANTIZED_SIMDGROUPS = 8;

struct QuantizedSizes {
  Rows x;
  uint rows, inner, outer;
  uint matrices, divisor; // experts, and how many rows share a row of x
};

// y [rows, outer]; x [rows, inner] in rows; experts [rows] if routed. group.x is the panel, group.y counts rows.
template <typename T, typename W, uint ROWS>
[[kernel]] void quantized(device T *y [[buffer(0)]], device const T *x [[buffer(1)]],
                          device const uchar *weights [[buffer(2)]], constant QuantizedSizes &sizes [[buffer(3)]],
                          device const uint *experts [[buffer(4), function_constant(IS_ROUTED)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint lane [[thread_index_in_simdgroup]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float parts[QUANTIZED_SIMDGROUPS * ROWS * LANES];
  const uint first_row = group.y * ROWS, inner = sizes.inner;
  uint expert = 0;
  if (IS_ROUTED) {
    expert = experts[first_row];
    if (expert >= sizes.matrices)
      return;
  }
  const W matrix = W::of(weights, expert, sizes.outer, inner);
  device const T *x_rows[ROWS];
  float sums[ROWS];
  UNROLL
  for (uint r = 0; r < ROWS; r++) {
    x_rows[r] = x + row_start(sizes.x, min(first_row + r, sizes.rows - 1) / sizes.divisor);
    sums[r] = 0;
  }
  for (uint g = simdgroup; g < matrix.groups; g += QUANTIZED_SIMDGROUPS) {
    device const uint *block = matrix.block(group.x, g);
    const uint first = g * W::GROUP;
    float products[ROWS], totals[ROWS];
    UNROLL
    for (uint r = 0; r < ROWS; r++)
      products[r] = totals[r] = 0;
    for (uint i = 0; i < W::GROUP / 4; i++) {
      const float4 codes = W::codes(block, lane, i);
      UNROLL
      for (uint r = 0; r < ROWS; r++) {
        float4 values = 0;
        for (uint j = 0; j < 4; j++)
          if (first + 4 * i + j < inner)
            values[j] = float(x_rows[r][first + 4 * i + j]);
        products[r] += dot(codes, values);
        totals[r] += values[0] + values[1] + values[2] + values[3];
      }
    }
    UNROLL
    for (uint r = 0; r < ROWS; r++)
      sums[r] += W::scale(block, lane) * products[r] + W::minimum(block, lane) * totals[r];
  }
  UNROLL
  for (uint r = 0; r < ROWS; r++)
    parts[(simdgroup * ROWS + r) * LANES + lane] = sums[r];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint out = group.x * PANEL + lane;
  for (uint r = simdgroup; r < ROWS; r += QUANTIZED_SIMDGROUPS) {
    float sum = 0;
    for (uint i = 0; i < QUANTIZED_SIMDGROUPS; i++)
      sum += parts[(i * ROWS + r) * LANES + lane];
    if (out < sizes.outer && first_row + r < sizes.rows)
      y[ulong(first_row + r) * sizes.outer + out] = T(sum);
  }
}

struct LookUpSizes {
  uint inner, outer;
};

// y [rows, inner], of the rows ids [rows]; group.y is the row. An id that is not there gives NaN.
template <typename W>
[[kernel]] void look_up(device float *y [[buffer(0)]], device const uchar *weights [[buffer(1)]],
                        device const uint *ids [[buffer(2)]], constant LookUpSizes &sizes [[buffer(3)]],
                        uint3 at [[thread_position_in_grid]]) {
  const uint column = 4 * at.x, id = ids[at.y];
  if (column >= sizes.inner)
    return;
  const W matrix = W::of(weights, 0, sizes.outer, sizes.inner);
  const float4 four = id < sizes.outer ? matrix.four(id, column) : float4(NAN);
  for (uint i = 0; i < 4; i++)
    if (column + i < sizes.inner)
      y[ulong(at.y) * sizes.inner + column + i] = four[i];
}

#define QUANTIZED_8_1(variant, T) INSTANTIATE("quantized_q8_1_" variant, quantized<T, Q8, 1>)
#define QUANTIZED_8_8(variant, T) INSTANTIATE("quantized_q8_8_" variant, quantized<T, Q8, 8>)
#define QUANTIZED_4_1(variant, T) INSTANTIATE("quantized_q4_1_" variant, quantized<T, Q4, 1>)
#define QUANTIZED_4_8(variant, T) INSTANTIATE("quantized_q4_8_" variant, quantized<T, Q4, 8>)
FOR_FLOATS(QUANTIZED_8_1)
FOR_FLOATS(QUANTIZED_8_8)
FOR_FLOATS(QUANTIZED_4_1)
FOR_FLOATS(QUANTIZED_4_8)
INSTANTIATE("look_up_q8", look_up<Q8>)
INSTANTIATE("look_up_q4", look_up<Q4>)
