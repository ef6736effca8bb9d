// The gated delta rule by its recurrence, for sequences too short for chunks. PARTS lanes hold one row of the state (K
// values of one of the V) in registers from a sequence's first token to its last, so a step reads and writes the state
// once. The rows of a simdgroup share nothing but their instructions: no threadgroup memory and no barrier. group.x
// counts rows in tiles, group.y is the head, group.z the sequence.
//
// State layout: [S, Hv, V, K], contiguous along K. A lane owns CHUNKS groups of four neighbours, PARTS * 4 apart, so
// that the lanes of a row read neighbouring groups.

struct DeltaSizes {
  Rows q, k, v;
  uint hk, hv, kd, vd, chunked; // tokens of a sequence that goes by chunks, at least
};

// Four values of a row from `column`; nothing past `kd`, unless rows are known to be whole.
template <bool EXACT, typename T>
inline float4 load(device const T *row, uint column, uint kd) {
  float4 values = 0;
  for (uint j = 0; j < 4; j++)
    if (EXACT || column + j < kd)
      values[j] = float(row[column + j]);
  return values;
}

// PARTS * CHUNKS * 4 is kd if EXACT, and a bound on it if not; the state starts at a multiple of 16 bytes if EXACT.
template <typename T, uint PARTS, uint CHUNKS, bool EXACT>
[[kernel]] void gated_delta_rule(device float *state [[buffer(0)]], device T *y [[buffer(1)]],
                                 device const T *q [[buffer(2)]], device const T *k [[buffer(3)]],
                                 device const T *v [[buffer(4)]], device const float *g [[buffer(5)]],
                                 device const float *beta [[buffer(6)]],
                                 device const uint *cu_seqlens [[buffer(7)]],
                                 device const uint *context_lens [[buffer(8)]],
                                 device const uint *state_slots [[buffer(9)]],
                                 constant DeltaSizes &sizes [[buffer(10)]],
                                 uint3 group [[threadgroup_position_in_grid]],
                                 uint3 threads [[threads_per_threadgroup]],
                                 uint index [[thread_index_in_threadgroup]]) {
  const uint hv = sizes.hv, kd = sizes.kd, vd = sizes.vd;
  const uint row = (group.x * threads.x + index) / PARTS, part = index % PARTS;
  const uint head = group.y, sequence = group.z, shared_head = head * sizes.hk / hv;
  const bool inside = row < vd; // the other rows still take part in shuffles
  const uint begin = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
  if (end - begin >= sizes.chunked)
    return;
  device float *slot = state + ((ulong(state_slots[sequence]) * hv + head) * vd + row) * kd;

  float4 s[CHUNKS];
  for (uint c = 0; c < CHUNKS; c++) {
    s[c] = 0;
    const uint column = (c * PARTS + part) * 4;
    if (inside && context_lens[sequence] != end - begin)
      s[c] = EXACT ? *(device const float4 *)(slot + column) : load<EXACT>((device const float *)slot, column, kd);
  }

  for (uint token = begin; token < end; token++) {
    device const T *q_row = q + row_start(sizes.q, token, shared_head);
    device const T *k_row = k + row_start(sizes.k, token, shared_head);
    float4 k_values[CHUNKS];
    // q.q, k.k, S k and S q over the lane's columns, and q.k.
    float4 sums = 0;
    float qk = 0;
    for (uint c = 0; c < CHUNKS; c++) {
      const uint column = (c * PARTS + part) * 4;
      const float4 q_values = load<EXACT>(q_row, column, kd);
      k_values[c] = load<EXACT>(k_row, column, kd);
      sums += float4(dot(q_values, q_values), dot(k_values[c], k_values[c]), dot(s[c], k_values[c]),
                     dot(s[c], q_values));
      qk += dot(q_values, k_values[c]);
    }
    for (ushort step = PARTS / 2; step > 0; step /= 2) {
      sums += simd_shuffle_xor(sums, step);
      qk += simd_shuffle_xor(qk, step);
    }
    const float q_scale = 1 / (sqrt(sums[0] + 1e-6f) * sqrt(float(kd))), k_scale = 1 / sqrt(sums[1] + 1e-6f);
    const ulong gate = ulong(token) * hv + head;
    const float decay = exp(g[gate]);
    const float value = inside ? float(v[row_start(sizes.v, token, head) + row]) : 0;
    const float delta = beta[gate] * (value - decay * (sums[2] * k_scale));
    // (decay S + delta k^T) q, so that both sums over the old state run side by side.
    if (inside && part == 0)
      y[gate * vd + row] = T(q_scale * (decay * sums[3] + delta * k_scale * qk));
    for (uint c = 0; c < CHUNKS; c++)
      s[c] = decay * s[c] + (delta * k_scale) * k_values[c];
  }

  if (inside)
    for (uint c = 0; c < CHUNKS; c++) {
      const uint column = (c * PARTS + part) * 4;
      if (EXACT)
        *(device float4 *)(slot + column) = s[c];
      else
        for (uint j = 0; j < 4; j++)
          if (column + j < kd)
            slot[column + j] = s[c][j];
    }
}

#define K32(variant, T) INSTANTIATE("gated_delta_rule_k32_" variant, gated_delta_rule<T, 8, 1, true>)
#define K64(variant, T) INSTANTIATE("gated_delta_rule_k64_" variant, gated_delta_rule<T, 8, 2, true>)
#define K128(variant, T) INSTANTIATE("gated_delta_rule_k128_" variant, gated_delta_rule<T, 8, 4, true>)
#define UP_TO_256(variant, T) INSTANTIATE("gated_delta_rule_any_" variant, gated_delta_rule<T, 32, 2, false>)
FOR_FLOATS(K32)
FOR_FLOATS(K64)
FOR_FLOATS(K128)
FOR_FLOATS(UP_TO_256)
