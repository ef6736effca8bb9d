// Rotary position embedding. position.x runs over pairs and what does not rotate, position.y over rows.

struct RopeSizes {
  Rows x;
  uint rows, d, half_size;
};

// x [N, heads, d] in rows; cos and sin [N, half_size]; y [N, heads, d].
template <typename T>
[[kernel]] void rope(device T *y [[buffer(0)]], device const T *x [[buffer(1)]], device const float *cos [[buffer(2)]],
                     device const float *sin [[buffer(3)]], constant RopeSizes &sizes [[buffer(4)]],
                     uint3 group [[threadgroup_position_in_grid]],
                     uint3 position [[thread_position_in_threadgroup]],
                     uint3 threads [[threads_per_threadgroup]]) {
  const uint row = group.x * threads.y + position.y, d = sizes.d, pairs = sizes.half_size;
  if (row >= sizes.rows)
    return;
  device const T *from = x + row_start(sizes.x, row);
  device T *to = y + ulong(row) * d;
  const ulong table = ulong(row / sizes.x.heads) * pairs;
  for (uint i = position.x; i < d - pairs; i += threads.x) {
    if (i >= pairs) {
      to[i + pairs] = from[i + pairs];
      continue;
    }
    const float a = float(from[i]), b = float(from[i + pairs]), c = cos[table + i], s = sin[table + i];
    to[i] = T(a * c - b * s);
    to[i + pairs] = T(b * c + a * s);
  }
}

struct RotationSizes {
  uint rows, pairs;
};

// both [2, rows, pairs]: cosines, then sines; positions [rows]; inv_freq [pairs]. A thread has one angle, of which fast
// functions would lose the digits behind some hundred turns.
[[kernel]] void rotations(device float *both [[buffer(0)]], device const uint *positions [[buffer(1)]],
                          device const float *inv_freq [[buffer(2)]], constant RotationSizes &sizes [[buffer(3)]],
                          uint3 at [[thread_position_in_grid]]) {
  const uint count = sizes.rows * sizes.pairs;
  if (at.x >= count)
    return;
  const float angle = float(positions[at.x / sizes.pairs]) * inv_freq[at.x % sizes.pairs];
  both[at.x] = precise::cos(angle);
  both[count + at.x] = precise::sin(angle);
}

#define ROPE(variant, T) INSTANTIATE("rope_" variant, rope<T>)
FOR_FLOATS(ROPE)
