// Writing keys and values into their pages. Bits move, so a kernel is named for its word and not for a dtype.

// In words.
struct WriteKvSizes {
  Rows k, v;
  uint slots, heads, d;
};

// kv [2, slots, heads, d]; k and v [N, heads, d] in rows. group.x is the token, group.y 0 for k and 1 for v; position.x
// runs over the words of a head, position.y over heads.
template <typename Word>
[[kernel]] void write_kv(device Word *kv [[buffer(0)]], device const Word *k [[buffer(1)]],
                         device const Word *v [[buffer(2)]], device const uint *slot_mapping [[buffer(3)]],
                         constant WriteKvSizes &sizes [[buffer(4)]],
                         uint3 group [[threadgroup_position_in_grid]],
                         uint3 position [[thread_position_in_threadgroup]],
                         uint3 threads [[threads_per_threadgroup]]) {
  const uint token = group.x, plane = group.y, d = sizes.d;
  device Word *to = kv + (ulong(plane) * sizes.slots + slot_mapping[token]) * sizes.heads * d;
  for (uint head = position.y; head < sizes.heads; head += threads.y) {
    device const Word *from = plane == 0 ? k + row_start(sizes.k, token, head) : v + row_start(sizes.v, token, head);
    for (uint i = position.x; i < d; i += threads.x)
      to[head * d + i] = from[i];
  }
}

INSTANTIATE("write_kv_u16", write_kv<ushort>)
INSTANTIATE("write_kv_u32", write_kv<uint>)
INSTANTIATE("write_kv_u128", write_kv<uint4>)

// Attention, a threadgroup for a query of one head, or for a part of its keys: simdgroups take keys in turn, each with
// an online softmax of its own, and meet in threadgroup memory. No score is ever stored.

// Whether the keys are shared by several threadgroups; `attention_merge` then joins their parts.
constant bool IS_SPLIT [[function_constant(1)]];

constant constexpr uint ATTENTION_SIMDGROUPS = 4;

// y and q [N, hq, d], q in rows; k and v in pages or rows; partial [N, hq, splits, 2 + d]: largest score, sum of
// weights, weighted values. group.x is the head, group.y the token, group.z the split. D bounds d, and is d if EXACT.
template <typename T, uint D, bool EXACT>
[[kernel]] void attention_rows(device T *y [[buffer(0)]], device const T *q [[buffer(1)]],
                               device const T *k [[buffer(2)]], device const T *v [[buffer(3)]],
                               device const uint *cu_seqlens [[buffer(4)]],
                               device const uint *context_lens [[buffer(5)]],
                               device const uint *block_tables [[buffer(6)]],
                               constant AttentionSizes &sizes [[buffer(7)]],
                               device float *partial [[buffer(8), function_constant(IS_SPLIT)]],
                               uint3 group [[threadgroup_position_in_grid]],
                               uint index [[thread_index_in_threadgroup]],
                               uint lane [[thread_index_in_simdgroup]],
                               uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float values[ATTENTION_SIMDGROUPS * D];
  threadgroup float maxima[ATTENTION_SIMDGROUPS];
  threadgroup float totals[ATTENTION_SIMDGROUPS];
  constexpr uint COLUMNS = D / LANES;
  const uint head = group.x, token = group.y, d = sizes.d, shared_head = head * sizes.hk / sizes.hq;

  const uint sequence = find_sequence(cu_seqlens, sizes.sequences, token);
  const uint begin = cu_seqlens[sequence], end = cu_seqlens[sequence + 1], context = context_lens[sequence];
  if (end - begin >= sizes.tiled)
    return;
  const Visible seen = visible(sizes, context - (end - token), context);
  const uint share = (seen.last - seen.first + sizes.splits - 1) / sizes.splits;
  const uint from = seen.first + group.z * share, to = min(from + share, seen.last);

  float query[COLUMNS], sums[COLUMNS];
  device const T *q_row = q + row_start(sizes.q, token, head);
  for (uint c = 0; c < COLUMNS; c++) {
    const uint column = c * LANES + lane;
    query[c] = EXACT || column < d ? float(q_row[column]) * sizes.scale : 0;
    sums[c] = 0;
  }
  float largest = -INFINITY, total = 0;
  const Keys keys = {block_tables + ulong(sequence) * sizes.max_blocks, sizes.block_size, begin};
  for (uint key = from + simdgroup; key < to; key += ATTENTION_SIMDGROUPS) {
    const uint at = keys.at(key);
    device const T *k_row = k + row_start(sizes.k, at, shared_head);
    device const T *v_row = v + row_start(sizes.v, at, shared_head);
    float score = 0;
    for (uint c = 0; c < COLUMNS; c++) {
      const uint column = c * LANES + lane;
      if (EXACT || column < d)
        score = fma(query[c], float(k_row[column]), score);
    }
    score = capped(simd_sum(score), sizes.softcap);
    const float reached = max(largest, score), kept = weight_of(largest, reached), weight = exp(score - reached);
    largest = reached;
    total = total * kept + weight;
    for (uint c = 0; c < COLUMNS; c++) {
      const uint column = c * LANES + lane;
      if (EXACT || column < d)
        sums[c] = fma(weight, float(v_row[column]), sums[c] * kept);
    }
  }

  for (uint c = 0; c < COLUMNS; c++)
    values[simdgroup * D + c * LANES + lane] = sums[c];
  if (lane == 0) {
    maxima[simdgroup] = largest;
    totals[simdgroup] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  largest = -INFINITY;
  for (uint i = 0; i < ATTENTION_SIMDGROUPS; i++)
    largest = max(largest, maxima[i]);
  total = 0;
  for (uint i = 0; i < ATTENTION_SIMDGROUPS; i++)
    total += weight_of(maxima[i], largest) * totals[i];
  const ulong row = ulong(token) * sizes.hq + head;
  for (uint column = index; column < d; column += ATTENTION_SIMDGROUPS * LANES) {
    float sum = 0;
    for (uint i = 0; i < ATTENTION_SIMDGROUPS; i++)
      sum += weight_of(maxima[i], largest) * values[i * D + column];
    if (IS_SPLIT)
      partial[(row * sizes.splits + group.z) * (2 + d) + 2 + column] = sum;
    else
      y[row * d + column] = T(sum / total);
  }
  if (IS_SPLIT && index == 0) {
    partial[(row * sizes.splits + group.z) * (2 + d)] = largest;
    partial[(row * sizes.splits + group.z) * (2 + d) + 1] = total;
  }
}

struct MergeSizes {
  uint sequences, hq, splits, d, tiled;
};

// Joins the parts of a row: group.x is the head, group.y the token, index runs over columns.
template <typename T>
[[kernel]] void attention_merge(device T *y [[buffer(0)]], device const float *partial [[buffer(1)]],
                                device const uint *cu_seqlens [[buffer(2)]],
                                constant MergeSizes &sizes [[buffer(3)]],
                                uint3 group [[threadgroup_position_in_grid]],
                                uint3 threads [[threads_per_threadgroup]],
                                uint index [[thread_index_in_threadgroup]]) {
  const uint sequence = find_sequence(cu_seqlens, sizes.sequences, group.y);
  if (cu_seqlens[sequence + 1] - cu_seqlens[sequence] >= sizes.tiled)
    return;
  const uint d = sizes.d, stride = 2 + d;
  const ulong row = ulong(group.y) * sizes.hq + group.x;
  device const float *parts = partial + row * sizes.splits * stride;
  float largest = -INFINITY, total = 0;
  for (uint i = 0; i < sizes.splits; i++)
    largest = max(largest, parts[i * stride]);
  for (uint i = 0; i < sizes.splits; i++)
    total += weight_of(parts[i * stride], largest) * parts[i * stride + 1];
  for (uint column = index; column < d; column += threads.x) {
    float sum = 0;
    for (uint i = 0; i < sizes.splits; i++)
      sum += weight_of(parts[i * stride], largest) * parts[i * stride + 2 + column];
    y[row * d + column] = T(sum / total);
  }
}

#define D64(variant, T) INSTANTIATE("attention_rows_d64_" variant, attention_rows<T, 64, true>)
#define D128(variant, T) INSTANTIATE("attention_rows_d128_" variant, attention_rows<T, 128, true>)
#define D256(variant, T) INSTANTIATE("attention_rows_d256_" variant, attention_rows<T, 256, true>)
#define UP_TO_512(variant, T) INSTANTIATE("attention_rows_any_" variant, attention_rows<T, 512, false>)
#define MERGE(variant, T) INSTANTIATE("attention_merge_" variant, attention_merge<T>)
FOR_FLOATS(D64)
FOR_FLOATS(D128)
FOR_FLOATS(D256)
FOR_FLOATS(UP_TO_512)
FOR_FLOATS(MERGE)
