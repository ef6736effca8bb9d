// The index of each row's largest value: threadgroups of a row find theirs, then a simdgroup has the last word.

inline uint2 greatest_of_lanes(uint2 key) {
  for (ushort step = LANES / 2; step > 0; step /= 2)
    key = greater(key, simd_shuffle_xor(key, step));
  return key;
}

struct ArgmaxSizes {
  uint stride, count, threadgroups;
};

// keys [rows, threadgroups of a row, 2]; x [rows, stride], of which `count` take part. group.y is the row.
template <typename T>
[[kernel]] void argmax(device uint *keys [[buffer(0)]], device const T *x [[buffer(1)]],
                       constant ArgmaxSizes &sizes [[buffer(2)]], uint3 group [[threadgroup_position_in_grid]],
                       uint3 threads [[threads_per_threadgroup]], uint index [[thread_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint high[LANES];
  threadgroup uint low[LANES];
  device const T *row = x + ulong(group.y) * sizes.stride;
  uint2 best = uint2(0, 0);
  for (uint i = group.x * threads.x + index; i < sizes.count; i += sizes.threadgroups * threads.x)
    best = greater(best, key_of(float(row[i]), i));
  best = greatest_of_lanes(best);
  if (lane == 0) {
    high[simdgroup] = best.x;
    low[simdgroup] = best.y;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (index != 0)
    return;
  for (uint i = 1; i < threads.x / LANES; i++)
    best = greater(best, uint2(high[i], low[i]));
  const ulong at = (ulong(group.y) * sizes.threadgroups + group.x) * 2;
  keys[at] = best.x;
  keys[at + 1] = best.y;
}

// indices [rows] from keys [rows, threadgroups, 2]; group.x is the row.
[[kernel]] void argmax_of_threadgroups(device uint *indices [[buffer(0)]], device const uint *keys [[buffer(1)]],
                                       constant uint &threadgroups [[buffer(2)]],
                                       uint3 group [[threadgroup_position_in_grid]],
                                       uint lane [[thread_index_in_simdgroup]]) {
  device const uint *row = keys + ulong(group.x) * threadgroups * 2;
  uint2 best = uint2(0, 0);
  for (uint i = lane; i < threadgroups; i += LANES)
    best = greater(best, uint2(row[2 * i], row[2 * i + 1]));
  best = greatest_of_lanes(best);
  if (lane == 0)
    indices[group.x] = is_fit(best) ? index_of(best) : NOTHING;
}

#define ARGMAX(variant, T) INSTANTIATE("argmax_" variant, argmax<T>)
FOR_FLOATS(ARGMAX)
