// Products of few rows. A simdgroup has OUTS outputs, for ROWS rows at once: its lanes share the inner dimension, so
// that every weight is read once. In the same pass the bias, the gate and the residual sum.

constant bool IS_GATED [[function_constant(1)]]; // by SiLU, or GELU
constant bool IS_GELU [[function_constant(2)]];
constant bool HAS_BIAS [[function_constant(3)]];
constant bool HAS_RESIDUAL [[function_constant(4)]];

constant constexpr uint OUTS = 4;
constant constexpr uint LINEAR_SIMDGROUPS = 4;

struct LinearSizes {
  Rows x;
  uint rows, inner, outer; // outer: of the result
  uint matrices, divisor;  // experts, and how many rows share a row of x
};

// Four values of a row from `column`; zero past its end, unless rows are whole and aligned.
template <bool EXACT, typename T> inline float4 load(device const T *row, uint column, uint inner) {
  if (EXACT)
    return float4(*(device const vec<T, 4> *)(row + column));
  float4 values = 0;
  for (uint i = 0; i < 4; i++)
    if (column + i < inner)
      values[i] = float(row[column + i]);
  return values;
}

inline float gate_of(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1 + exp(IS_GELU ? -2 * u : -x));
}

// y [rows, outer]; x [rows, inner] in rows; weight [outer, inner], or [2 outer, inner] if gated, and one for each
// expert if routed; bias [outer]; residual [rows, outer]. group.x counts outputs, group.y rows.
template <typename T, uint ROWS, bool EXACT>
[[kernel]] void linear(device T *y [[buffer(0)]], device const T *x [[buffer(1)]], device const T *weight [[buffer(2)]],
                       constant LinearSizes &sizes [[buffer(3)]],
                       device const T *extra [[buffer(4), function_constant(HAS_BIAS)]],
                       device const T *residual [[buffer(5), function_constant(HAS_RESIDUAL)]],
                       device const uint *experts [[buffer(6), function_constant(IS_ROUTED)]],
                       uint3 group [[threadgroup_position_in_grid]],
                       uint lane [[thread_index_in_simdgroup]],
                       uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const uint first_out = (group.x * LINEAR_SIMDGROUPS + simdgroup) * OUTS, first_row = group.y * ROWS;
  const uint inner = sizes.inner, outer = sizes.outer;
  if (first_out >= outer)
    return;
  device const T *matrix = weight;
  if (IS_ROUTED) {
    if (experts[first_row] >= sizes.matrices)
      return;
    matrix += ulong(experts[first_row]) * outer * inner;
  }
  device const T *x_rows[ROWS];
  UNROLL
  for (uint r = 0; r < ROWS; r++)
    x_rows[r] = x + row_start(sizes.x, min(first_row + r, sizes.rows - 1) / sizes.divisor);

  float sums[2][OUTS][ROWS];
  UNROLL
  for (uint half_ = 0; half_ < 2; half_++) {
    UNROLL
    for (uint o = 0; o < OUTS; o++) {
      UNROLL
      for (uint r = 0; r < ROWS; r++)
        sums[half_][o][r] = 0;
    }
  }
  for (uint column = 4 * lane; column < inner; column += 4 * LANES) {
    float4 values[ROWS];
    UNROLL
    for (uint r = 0; r < ROWS; r++)
      values[r] = load<EXACT>(x_rows[r], column, inner);
    UNROLL
    for (uint half_ = 0; half_ < 2; half_++) {
      if (half_ == 1 && !IS_GATED)
        continue;
      UNROLL
      for (uint o = 0; o < OUTS; o++) {
        const uint out = min(first_out + o, outer - 1) + half_ * outer;
        const float4 weights = load<EXACT>(matrix + ulong(out) * inner, column, inner);
        UNROLL
        for (uint r = 0; r < ROWS; r++)
          sums[half_][o][r] += dot(weights, values[r]);
      }
    }
  }
  UNROLL
  for (uint o = 0; o < OUTS; o++) {
    UNROLL
    for (uint r = 0; r < ROWS; r++) {
      float sum = simd_sum(sums[0][o][r]);
      if (IS_GATED)
        sum = gate_of(sum) * simd_sum(sums[1][o][r]);
      const uint out = first_out + o, row = first_row + r;
      if (lane != o * ROWS + r || out >= outer || row >= sizes.rows)
        continue;
      if (HAS_BIAS)
        sum += float(extra[out]);
      if (HAS_RESIDUAL)
        sum += float(residual[ulong(row) * outer + out]);
      y[ulong(row) * outer + out] = T(sum);
    }
  }
}

#define LINEAR_1(variant, T) INSTANTIATE("linear_1_" variant, linear<T, 1, true>)
#define LINEAR_2(variant, T) INSTANTIATE("linear_2_" variant, linear<T, 2, true>)
#define LINEAR_4(variant, T) INSTANTIATE("linear_4_" variant, linear<T, 4, true>)
#define LINEAR_8(variant, T) INSTANTIATE("linear_8_" variant, linear<T, 8, true>)
#define LINEAR_ANY(variant, T) INSTANTIATE("linear_any_" variant, linear<T, 1, false>)
FOR_FLOATS(LINEAR_1)
FOR_FLOATS(LINEAR_2)
FOR_FLOATS(LINEAR_4)
FOR_FLOATS(LINEAR_8)
FOR_FLOATS(LINEAR_ANY)
