// Attention of many queries on the matrix units: an online softmax in registers, and no score in memory.
//
// A row is a query of one of the heads that share a key head. A threadgroup has STRIPS times eight rows, and reads the
// keys that any of them sees KEYS at a time, then their values, through threadgroup memory. A simdgroup has eight rows
// and at most 128 columns of the head; where the head is larger, several share rows, add up their parts of the scores
// and do the softmax alike.

// Rows KEYS from `start` on of keys or values; zero for what lies outside of `from` and `to`, where anything may be.
template <typename T, uint D, uint KEYS, uint STRIDE>
inline void fetch(threadgroup T *tile, device const T *values, constant Rows &rows, thread const Keys &keys, uint head,
                  uint start, uint from, uint to, uint index, uint threads) {
  typedef vec<T, 4> Four;
  for (uint i = index; i < KEYS * (D / 4); i += threads) {
    const uint key = i / (D / 4), column = i % (D / 4) * 4;
    Four four = Four(T(0));
    if (start + key >= from && start + key < to)
      four = *(device const Four *)(values + row_start(rows, keys.at(start + key), head) + column);
    *(threadgroup Four *)(tile + key * STRIDE + column) = four;
  }
}

// y and q [N, hq, D], q in rows; k and v in pages or rows, each at a multiple of four values. group.x counts tiles of a
// sequence's rows, group.y is the key head, group.z the sequence.
template <typename T, uint D, uint KEYS, uint STRIPS>
[[kernel]] void attention_tiles(device T *y [[buffer(0)]], device const T *q [[buffer(1)]],
                                device const T *k [[buffer(2)]], device const T *v [[buffer(3)]],
                                device const uint *cu_seqlens [[buffer(4)]],
                                device const uint *context_lens [[buffer(5)]],
                                device const uint *block_tables [[buffer(6)]],
                                constant AttentionSizes &sizes [[buffer(7)]],
                                uint3 group [[threadgroup_position_in_grid]],
                                uint index [[thread_index_in_threadgroup]],
                                uint lane [[thread_index_in_simdgroup]],
                                uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr uint COLUMNS = D < 128 ? D : 128, SHARES = D / COLUMNS, THREADS = STRIPS * SHARES * LANES;
  constexpr uint STRIDE = D + 8; // rows start in different banks
  constexpr uint PARTS = COLUMNS / SIDE, KEY_PARTS = KEYS / SIDE, STRIP_SCORES = SIDE * KEYS;
  threadgroup T tile[KEYS * STRIDE];
  threadgroup float scores[SHARES > 1 ? SHARES * STRIPS * STRIP_SCORES : 1];

  const uint sequence = group.z, shared_head = group.y, heads = sizes.hq / sizes.hk;
  const uint begin = cu_seqlens[sequence], length = cu_seqlens[sequence + 1] - begin;
  const uint rows = length * heads, first_row = group.x * STRIPS * SIDE;
  if (length < sizes.tiled || first_row >= rows)
    return;
  const uint context = context_lens[sequence], past = context - length;
  const uint from = visible(sizes, past + first_row / heads, context).first;
  const uint to = visible(sizes, past + (min(first_row + STRIPS * SIDE, rows) - 1) / heads, context).last;
  const Keys keys = {block_tables + ulong(sequence) * sizes.max_blocks, sizes.block_size, begin};

  // The lane's row, and where it is in parts of 8 x 8.
  const uint strip = simdgroup % STRIPS, share = simdgroup / STRIPS, row = first_row + strip * SIDE + part_row(lane);
  const uint part_y = part_row(lane), part_x = part_column(lane), first_column = share * COLUMNS;
  const bool inside = row < rows; // the others see nothing
  const uint token = inside ? row / heads : 0, head = shared_head * heads + (inside ? row % heads : 0);
  const Visible seen = visible(sizes, past + token, context);
  device const T *q_row = q + row_start(sizes.q, begin + token, head) + first_column;

  float2 query[PARTS], sums[PARTS];
  UNROLL
  for (uint c = 0; c < PARTS; c++) {
    device const T *at = q_row + c * SIDE + part_x;
    query[c] = float2(float(at[0]), float(at[1])) * sizes.scale;
    sums[c] = 0;
  }
  float largest = -INFINITY, total = 0;
  // Tiles start at multiples of KEYS wherever the window does.
  for (uint start = from / KEYS * KEYS; start < to; start += KEYS) {
    threadgroup_barrier(mem_flags::mem_threadgroup); // the last values have been read
    fetch<T, D, KEYS, STRIDE>(tile, k, sizes.k, keys, shared_head, start, from, to, index, THREADS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float2 weights[KEY_PARTS];
    UNROLL
    for (uint n = 0; n < KEY_PARTS; n++)
      weights[n] = 0;
    UNROLL
    for (uint c = 0; c < PARTS; c++) {
      UNROLL
      for (uint n = 0; n < KEY_PARTS; n++) {
        // Keys are rows of the tile, and columns of the product.
        threadgroup const T *at = tile + (n * SIDE + part_x) * STRIDE + first_column + c * SIDE + part_y;
        multiply(weights[n], query[c], float2(float(at[0]), float(at[STRIDE])));
      }
    }
    if (SHARES > 1) {
      threadgroup float *own = scores + simdgroup * STRIP_SCORES + part_y * KEYS + part_x;
      for (uint n = 0; n < KEY_PARTS; n++) {
        own[n * SIDE] = weights[n][0];
        own[n * SIDE + 1] = weights[n][1];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (SHARES > 1)
      for (uint n = 0; n < KEY_PARTS; n++) {
        weights[n] = 0;
        for (uint other = 0; other < SHARES; other++) {
          threadgroup const float *at =
              scores + (other * STRIPS + strip) * STRIP_SCORES + part_y * KEYS + part_x + n * SIDE;
          weights[n] += float2(at[0], at[1]);
        }
      }
    fetch<T, D, KEYS, STRIDE>(tile, v, sizes.v, keys, shared_head, start, from, to, index, THREADS);

    float reached = largest;
    UNROLL
    for (uint n = 0; n < KEY_PARTS; n++)
      for (uint j = 0; j < 2; j++) {
        const uint key = start + n * SIDE + part_x + j;
        const bool sees = inside && key >= seen.first && key < seen.last;
        weights[n][j] = sees ? capped(weights[n][j], sizes.softcap) : -INFINITY;
        reached = max(reached, weights[n][j]);
      }
    reached = row_max(reached);
    const float kept = weight_of(largest, reached);
    largest = reached;
    float added = 0;
    UNROLL
    for (uint n = 0; n < KEY_PARTS; n++)
      for (uint j = 0; j < 2; j++) {
        weights[n][j] = weight_of(weights[n][j], reached);
        added += weights[n][j];
      }
    total = total * kept + row_sum(added);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (uint c = 0; c < PARTS; c++) {
      sums[c] *= kept;
      UNROLL
      for (uint n = 0; n < KEY_PARTS; n++) {
        threadgroup const T *at = tile + (n * SIDE + part_y) * STRIDE + first_column + c * SIDE + part_x;
        multiply(sums[c], weights[n], float2(float(at[0]), float(at[1])));
      }
    }
  }

  if (!inside)
    return;
  device T *to_row = y + (ulong(begin + token) * sizes.hq + head) * D + first_column + part_x;
  for (uint c = 0; c < PARTS; c++)
    for (uint j = 0; j < 2; j++)
      to_row[c * SIDE + j] = T(sums[c][j] / total);
}

// Sixteen kilobytes of keys or values at a time; 32 KiB a threadgroup is the limit.
#define TILES_64(variant, T) INSTANTIATE("attention_tiles_d64_" variant, attention_tiles<T, 64, 32, 4>)
#define TILES_128(variant, T) INSTANTIATE("attention_tiles_d128_" variant, attention_tiles<T, 128, 32, 4>)
#define TILES_256(variant, T) INSTANTIATE("attention_tiles_d256_" variant, attention_tiles<T, 256, 64 / sizeof(T), 4>)
#define TILES_512(variant, T) INSTANTIATE("attention_tiles_d512_" variant, attention_tiles<T, 512, 32 / sizeof(T), 2>)
FOR_FLOATS(TILES_64)
FOR_FLOATS(TILES_128)
FOR_FLOATS(TILES_256)
FOR_FLOATS(TILES_512)
