// What lies between a projection and attention: query and key heads are normalised and rotated, keys and values written
// into their pages. A simdgroup has one head of one token: query heads first, then key heads, then value heads.

constant bool HAS_KEYS [[function_constant(0)]];
constant bool NORMS_VALUES [[function_constant(1)]];

constant constexpr uint HEADS_SIMDGROUPS = 4;

struct HeadSizes {
  Rows q, k, v;
  uint tokens, d, pairs, slots;
  float q_eps, k_eps, v_eps;
};

// y [N, hq, d]; pages [2, slots, hk, d]; q, k, v [N, heads, d] in rows; cos and sin [N, pairs].
template <typename T>
[[kernel]] void norm_rope_write(device T *y [[buffer(0)]], device const T *q [[buffer(1)]],
                                device const float *q_weight [[buffer(2)]], device const float *cos [[buffer(3)]],
                                device const float *sin [[buffer(4)]], constant HeadSizes &sizes [[buffer(5)]],
                                device T *pages [[buffer(6), function_constant(HAS_KEYS)]],
                                device const T *k [[buffer(7), function_constant(HAS_KEYS)]],
                                device const float *k_weight [[buffer(8), function_constant(HAS_KEYS)]],
                                device const T *v [[buffer(9), function_constant(HAS_KEYS)]],
                                device const uint *slot_mapping [[buffer(10), function_constant(HAS_KEYS)]],
                                device const float *v_weight [[buffer(11), function_constant(NORMS_VALUES)]],
                                uint3 group [[threadgroup_position_in_grid]],
                                uint lane [[thread_index_in_simdgroup]],
                                uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const uint hq = sizes.q.heads, hk = HAS_KEYS ? sizes.k.heads : 0, d = sizes.d;
  const uint index = group.x * HEADS_SIMDGROUPS + simdgroup, token = index / (hq + 2 * hk);
  if (token >= sizes.tokens)
    return;
  uint head = index % (hq + 2 * hk), pairs = sizes.pairs;
  device const T *from = q;
  device const float *weight = q_weight;
  device T *to = y;
  float eps = sizes.q_eps;
  bool is_normed = true;
  if (head < hq) {
    from += row_start(sizes.q, token, head);
    to += (ulong(token) * hq + head) * d;
  } else {
    const bool is_key = head < hq + hk;
    head -= is_key ? hq : hq + hk;
    from = is_key ? k + row_start(sizes.k, token, head) : v + row_start(sizes.v, token, head);
    to = pages + ((is_key ? 0 : ulong(sizes.slots)) + slot_mapping[token]) * hk * d + head * d;
    is_normed = is_key || NORMS_VALUES;
    if (is_normed)
      weight = is_key ? k_weight : v_weight;
    eps = is_key ? sizes.k_eps : sizes.v_eps;
    pairs = is_key ? pairs : 0;
  }

  float scale = 1;
  if (is_normed) {
    float squares = 0;
    for (uint i = lane; i < d; i += LANES)
      squares = fma(float(from[i]), float(from[i]), squares);
    scale = 1 / sqrt(simd_sum(squares) / d + eps);
  }
  const ulong table = ulong(token) * sizes.pairs;
  for (uint i = lane; i < d - pairs; i += LANES) {
    // Rounded where a norm by itself would round.
    const uint column = i < pairs ? i : i + pairs;
    const float a = is_normed ? float(T(float(from[column]) * scale * weight[column])) : float(from[column]);
    if (i >= pairs) {
      to[column] = T(a);
      continue;
    }
    const float b = float(T(float(from[i + pairs]) * scale * weight[i + pairs])), c = cos[table + i], s = sin[table + i];
    to[i] = T(a * c - b * s);
    to[i + pairs] = T(b * c + a * s);
  }
}

#define NORM_ROPE_WRITE(variant, T) INSTANTIATE("norm_rope_write_" variant, norm_rope_write<T>)
FOR_FLOATS(NORM_ROPE_WRITE)
