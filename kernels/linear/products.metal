// Products of many rows on the matrix units, with weights that are unpacked, or gathered by expert, on the way. A
// threadgroup has ROW_PARTS times sixteen rows and 64 outputs, a simdgroup a quarter of them: half the rows, half the
// outputs. All take the inner dimension STEP at a time through threadgroup memory, in f32.

constant constexpr uint STEP = 32;
constant constexpr uint STEP_STRIDE = STEP + 4;
constant constexpr uint TILE_OUTS = 64;
constant constexpr uint TILE_THREADS = 4 * LANES;
constant constexpr uint OUT_PARTS = TILE_OUTS / SIDE / 2;

struct ProductSizes {
  Rows x;
  uint rows, inner, outer;
  uint matrices, divisor; // experts, and how many rows share a row of x
};

// The expert of a tile of rows that are ordered by expert: each has room for as many tiles as its rows may need.
inline uint expert_of(device const uint *starts, uint matrices, uint tile, uint tile_rows) {
  uint low = 0, high = matrices;
  while (high - low > 1) {
    const uint middle = (low + high) / 2;
    if (starts[middle] / tile_rows + middle <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// y [rows, outer]; x in rows; starts [matrices + 1] and order [rows] if routed: rows by expert. group.x is the tile of
// outputs, group.y of rows.
template <typename T, typename W, uint ROW_PARTS>
[[kernel]] void product(device T *y [[buffer(0)]], device const T *x [[buffer(1)]],
                        device const uchar *weights [[buffer(2)]], constant ProductSizes &sizes [[buffer(3)]],
                        device const uint *starts [[buffer(4), function_constant(IS_ROUTED)]],
                        device const uint *order [[buffer(5), function_constant(IS_ROUTED)]],
                        uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr uint TILE_ROWS = 2 * ROW_PARTS * SIDE;
  threadgroup float x_tile[TILE_ROWS * STEP_STRIDE];
  threadgroup float w_tile[TILE_OUTS * STEP_STRIDE];
  const uint inner = sizes.inner, outer = sizes.outer, first_out = group.x * TILE_OUTS;
  uint expert = 0, first = group.y * TILE_ROWS, end = sizes.rows;
  if (IS_ROUTED) {
    expert = expert_of(starts, sizes.matrices, group.y, TILE_ROWS);
    first = starts[expert] + (group.y - (starts[expert] / TILE_ROWS + expert)) * TILE_ROWS;
    end = starts[expert + 1];
  }
  if (first >= end)
    return;
  const W matrix = W::of(weights, expert, outer, inner);

  const uint part_y = part_row(lane), part_x = part_column(lane);
  const uint own_row = simdgroup / 2 * ROW_PARTS * SIDE, own_out = simdgroup % 2 * OUT_PARTS * SIDE;
  float2 sums[ROW_PARTS][OUT_PARTS];
  UNROLL
  for (uint r = 0; r < ROW_PARTS; r++) {
    UNROLL
    for (uint o = 0; o < OUT_PARTS; o++)
      sums[r][o] = 0;
  }
  for (uint step = 0; step < inner; step += STEP) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = index; i < TILE_ROWS * STEP; i += TILE_THREADS) {
      const uint row = i / STEP, column = i % STEP;
      float value = 0;
      if (first + row < end && step + column < inner) {
        const uint at = IS_ROUTED ? order[first + row] : first + row;
        value = float(x[row_start(sizes.x, at / sizes.divisor) + step + column]);
      }
      x_tile[row * STEP_STRIDE + column] = value;
    }
    // Neighbouring threads have neighbouring outputs: packed codes lie that way.
    for (uint i = index; i < TILE_OUTS * (STEP / 4); i += TILE_THREADS) {
      const uint out = i % TILE_OUTS, column = i / TILE_OUTS * 4;
      const float4 four = first_out + out < outer && step + column < inner ? matrix.four(first_out + out, step + column)
                                                                          : float4(0);
      for (uint j = 0; j < 4; j++)
        w_tile[out * STEP_STRIDE + column + j] = four[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint c = 0; c < STEP; c += SIDE) {
      float2 across[OUT_PARTS];
      UNROLL
      for (uint o = 0; o < OUT_PARTS; o++) {
        threadgroup const float *at = w_tile + (own_out + o * SIDE + part_x) * STEP_STRIDE + c + part_y;
        across[o] = float2(at[0], at[STEP_STRIDE]);
      }
      UNROLL
      for (uint r = 0; r < ROW_PARTS; r++) {
        threadgroup const float *at = x_tile + (own_row + r * SIDE + part_y) * STEP_STRIDE + c + part_x;
        const float2 down = float2(at[0], at[1]);
        UNROLL
        for (uint o = 0; o < OUT_PARTS; o++)
          multiply(sums[r][o], down, across[o]);
      }
    }
  }
  UNROLL
  for (uint r = 0; r < ROW_PARTS; r++) {
    const uint row = first + own_row + r * SIDE + part_y;
    if (row >= end)
      continue;
    const ulong at = IS_ROUTED ? order[row] : row;
    UNROLL
    for (uint o = 0; o < OUT_PARTS; o++)
      for (uint j = 0; j < 2; j++) {
        const uint out = first_out + own_out + o * SIDE + part_x + j;
        if (out < outer)
          y[at * outer + out] = T(sums[r][o][j]);
      }
  }
}

#define DENSE(variant, T) INSTANTIATE("product_dense_" variant, product<T, Dense<T>, 2>)
#define PACKED_8(variant, T) INSTANTIATE("product_q8_" variant, product<T, Q8, 2>)
#define PACKED_4(variant, T) INSTANTIATE("product_q4_" variant, product<T, Q4, 2>)
FOR_FLOATS(DENSE)
FOR_FLOATS(PACKED_8)
FOR_FLOATS(PACKED_4)
