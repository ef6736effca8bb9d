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

// Attention over pages, a threadgroup for a query of one head, or for a part of its keys: simdgroups take keys in turn,
// each with an online softmax of its own, and meet in threadgroup memory. No score is ever stored.

// Whether the keys are shared by several threadgroups; `paged_attention_merge` then joins their parts.
constant bool IS_SPLIT [[function_constant(0)]];

constant constexpr uint ATTENTION_SIMDGROUPS = 4;

struct AttentionSizes {
  Rows q;
  uint sequences, hq, hk, d, block_size, max_blocks, slots, splits, is_causal, window;
  float scale, softcap; // 0 for none
};

// The sequence that holds a token.
inline uint find_sequence(device const uint *cu_seqlens, uint sequences, uint token) {
  uint low = 0, high = sequences;
  while (high - low > 1) {
    const uint middle = (low + high) / 2;
    if (cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// What a part weighs whose scores reach `part`, beside one that reaches `largest`. A part without keys reaches
// -INFINITY.
inline float weight_of(float part, float largest) { return part == -INFINITY ? 0 : exp(part - largest); }

// y and q [N, hq, d], q in rows; kv [2, slots, hk, d]; partial [N, hq, splits, 2 + d]: largest score, sum of weights,
// weighted values. group.x is the head, group.y the token, group.z the split. D bounds d, and is d if EXACT.
template <typename T, uint D, bool EXACT>
[[kernel]] void paged_attention(device T *y [[buffer(0)]], device const T *q [[buffer(1)]],
                                device const T *kv [[buffer(2)]], device const uint *cu_seqlens [[buffer(3)]],
                                device const uint *context_lens [[buffer(4)]],
                                device const uint *block_tables [[buffer(5)]],
                                constant AttentionSizes &sizes [[buffer(6)]],
                                device float *partial [[buffer(7), function_constant(IS_SPLIT)]],
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
  const uint context = context_lens[sequence], position = context - (cu_seqlens[sequence + 1] - token);
  const uint first = position + 1 > sizes.window ? position + 1 - sizes.window : 0;
  const uint last = sizes.is_causal != 0 ? position + 1 : context;
  const uint share = (last - first + sizes.splits - 1) / sizes.splits;
  const uint from = first + group.z * share, to = min(from + share, last);

  float query[COLUMNS], sums[COLUMNS];
  device const T *q_row = q + row_start(sizes.q, token, head);
  for (uint c = 0; c < COLUMNS; c++) {
    const uint column = c * LANES + lane;
    query[c] = EXACT || column < d ? float(q_row[column]) * sizes.scale : 0;
    sums[c] = 0;
  }
  float largest = -INFINITY, total = 0;
  device const uint *blocks = block_tables + ulong(sequence) * sizes.max_blocks;
  for (uint key = from + simdgroup; key < to; key += ATTENTION_SIMDGROUPS) {
    const ulong slot = ulong(blocks[key / sizes.block_size]) * sizes.block_size + key % sizes.block_size;
    device const T *k_row = kv + (slot * sizes.hk + shared_head) * d;
    device const T *v_row = k_row + ulong(sizes.slots) * sizes.hk * d;
    float score = 0;
    for (uint c = 0; c < COLUMNS; c++) {
      const uint column = c * LANES + lane;
      if (EXACT || column < d)
        score = fma(query[c], float(k_row[column]), score);
    }
    score = simd_sum(score);
    if (sizes.softcap != 0)
      score = sizes.softcap * precise::tanh(score / sizes.softcap);
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
  uint splits, d;
};

// Joins the parts of a row: group.x is the row, index runs over columns.
template <typename T>
[[kernel]] void paged_attention_merge(device T *y [[buffer(0)]], device const float *partial [[buffer(1)]],
                                      constant MergeSizes &sizes [[buffer(2)]],
                                      uint3 group [[threadgroup_position_in_grid]],
                                      uint3 threads [[threads_per_threadgroup]],
                                      uint index [[thread_index_in_threadgroup]]) {
  const uint d = sizes.d, stride = 2 + d;
  device const float *parts = partial + ulong(group.x) * sizes.splits * stride;
  float largest = -INFINITY, total = 0;
  for (uint i = 0; i < sizes.splits; i++)
    largest = max(largest, parts[i * stride]);
  for (uint i = 0; i < sizes.splits; i++)
    total += weight_of(parts[i * stride], largest) * parts[i * stride + 1];
  for (uint column = index; column < d; column += threads.x) {
    float sum = 0;
    for (uint i = 0; i < sizes.splits; i++)
      sum += weight_of(parts[i * stride], largest) * parts[i * stride + 2 + column];
    y[ulong(group.x) * d + column] = T(sum / total);
  }
}

#define D64(variant, T) INSTANTIATE("paged_attention_d64_" variant, paged_attention<T, 64, true>)
#define D128(variant, T) INSTANTIATE("paged_attention_d128_" variant, paged_attention<T, 128, true>)
#define D256(variant, T) INSTANTIATE("paged_attention_d256_" variant, paged_attention<T, 256, true>)
#define UP_TO_512(variant, T) INSTANTIATE("paged_attention_any_" variant, paged_attention<T, 512, false>)
#define MERGE(variant, T) INSTANTIATE("paged_attention_merge_" variant, paged_attention_merge<T>)
FOR_FLOATS(D64)
FOR_FLOATS(D128)
FOR_FLOATS(D256)
FOR_FLOATS(UP_TO_512)
FOR_FLOATS(MERGE)
