// A token of each row, drawn from its most likely ones: simdgroups find the best of what they see, then a threadgroup
// has the last word.

constant constexpr uint BEST = 64, SIMDGROUPS = 8;

// The keys of a simdgroup, BEST of them: those of a lane are at `lane` and `lane + LANES`.
struct Run {
  uint2 front, back;
};

// One step of a bitonic sort: keys at a distance below 32 of each other. The greater one goes to the front where
// `falls`.
inline uint2 compare(uint2 key, uint lane, uint distance, bool falls) {
  const uint2 other = simd_shuffle_xor(key, ushort(distance));
  return is_greater(key, other) == (((lane & distance) == 0) == falls) ? key : other;
}

// A run that falls and then rises, or the other way round, falls.
inline void settle(thread Run &run, uint lane) {
  const uint2 back = run.back;
  run.back = is_greater(run.front, back) ? back : run.front;
  run.front = greater(run.front, back);
  for (uint distance = LANES / 2; distance > 0; distance /= 2) {
    run.front = compare(run.front, lane, distance, true);
    run.back = compare(run.back, lane, distance, true);
  }
}

// Any run falls.
inline void sort(thread Run &run, uint lane) {
  for (uint size = 2; size <= LANES; size *= 2)
    for (uint distance = size / 2; distance > 0; distance /= 2) {
      run.front = compare(run.front, lane, distance, (lane & size) == 0);
      run.back = compare(run.back, lane, distance, ((lane + LANES) & size) == 0);
    }
  settle(run, lane);
}

// The best of two runs that fall: the greater ones of the first and the second backwards fall and then rise.
inline void merge(thread Run &best, Run run, uint lane) {
  best.front = greater(best.front, simd_shuffle_xor(run.back, ushort(LANES - 1)));
  best.back = greater(best.back, simd_shuffle_xor(run.front, ushort(LANES - 1)));
  settle(best, lane);
}

// The key of value i of a row, of which `count` take part.
template <typename T> uint2 key_at(device const T *row, uint i, uint count) {
  return i < count ? key_of(float(row[i]), i) : uint2(0, 0);
}

struct SampleSizes {
  uint stride, count, runs;
};

// keys [rows, runs of a row, BEST]; x [rows, stride], of which `count` take part. group.y is the row; threadgroups have
// SIMDGROUPS, which write a run each.
template <typename T>
[[kernel]] void best_of_simdgroups(device uint2 *keys [[buffer(0)]], device const T *x [[buffer(1)]],
                                   constant SampleSizes &sizes [[buffer(2)]],
                                   uint3 group [[threadgroup_position_in_grid]],
                                   uint lane [[thread_index_in_simdgroup]],
                                   uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  device const T *row = x + ulong(group.y) * sizes.stride;
  const uint number = group.x * SIMDGROUPS + simdgroup;
  Run best = {uint2(0, 0), uint2(0, 0)};
  for (uint start = number * BEST; start < sizes.count; start += sizes.runs * BEST) {
    const uint i = start + lane;
    Run run = {key_at(row, i, sizes.count), key_at(row, i + LANES, sizes.count)};
    const uint2 least = simd_shuffle(best.back, ushort(LANES - 1));
    if (!simd_any(is_greater(run.front, least) || is_greater(run.back, least)))
      continue;
    sort(run, lane);
    merge(best, run, lane);
  }
  device uint2 *to = keys + (ulong(group.y) * sizes.runs + number) * BEST;
  to[lane] = best.front;
  to[lane + LANES] = best.back;
}

// A sum of twice the digits of a float.
struct Sum {
  float high, low;
};

// x is no larger than the sum, unless that is 0.
inline Sum plus(Sum sum, float x) {
  const float high = sum.high + x;
  return {high, sum.low + (x - (high - sum.high))};
}

// Of a sum, so that the higher part decides if it can.
inline Sum rounded(Sum sum) {
  const float high = sum.high + sum.low;
  return {high, sum.low - (high - sum.high)};
}

inline Sum times(Sum sum, float x) {
  const float high = sum.high * x;
  return rounded({high, fma(sum.high, x, -high) + sum.low * x});
}

inline bool is_less(Sum a, Sum b) { return a.high < b.high || (a.high == b.high && a.low < b.low); }

struct Draw {
  float temperature;
  uint top_k;
  float top_p, min_p, position;
};

// indices [rows] from keys [rows, runs, BEST]; draws [rows]. group.x is the row, of SIMDGROUPS.
[[kernel]] void draw_of_best(device uint *indices [[buffer(0)]], device const uint2 *keys [[buffer(1)]],
                             device const Draw *draws [[buffer(2)]], constant uint &runs [[buffer(3)]],
                             uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                             uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint2 merged[SIMDGROUPS * BEST];
  threadgroup float weights[BEST];
  threadgroup uint tokens[BEST];
  device const uint2 *row = keys + ulong(group.x) * runs * BEST;
  Run best = {uint2(0, 0), uint2(0, 0)};
  for (uint at = simdgroup * BEST + lane; at < runs * BEST; at += SIMDGROUPS * BEST)
    merge(best, {row[at], row[at + LANES]}, lane);
  merged[simdgroup * BEST + lane] = best.front;
  merged[simdgroup * BEST + lane + LANES] = best.back;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0)
    return;
  for (uint at = BEST + lane; at < SIMDGROUPS * BEST; at += BEST)
    merge(best, {merged[at], merged[at + LANES]}, lane);
  const uint2 most = simd_shuffle(best.front, ushort(0));

  // Where the greatest is not finite, every difference from it is NaN, and nothing is kept.
  const uint2 own[2] = {best.front, best.back};
  device const Draw &draw = draws[group.x];
  UNROLL
  for (uint n = 0; n < 2; n++) {
    const uint i = n * LANES + lane;
    const bool takes_part = i < draw.top_k && is_fit(own[n]);
    weights[i] = takes_part ? exp((value_of(own[n]) - value_of(most)) / draw.temperature) : 0.0f;
    tokens[i] = index_of(own[n]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  Sum total = {0, 0}, before[2] = {{0, 0}, {0, 0}};
  for (uint i = 0; i < BEST; i++) {
    UNROLL
    for (uint n = 0; n < 2; n++)
      before[n] = plus(before[n], i < n * LANES + lane ? weights[i] : 0.0f);
    total = plus(total, weights[i]);
  }
  const Sum wanted = times(rounded(total), draw.top_p);
  float kept[2];
  UNROLL
  for (uint n = 0; n < 2; n++) {
    const uint i = n * LANES + lane;
    const bool is_wanted = i == 0 || is_less(rounded(before[n]), wanted);
    kept[n] = is_wanted && weights[i] >= draw.min_p ? weights[i] : 0.0f;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup); // all have read the weights
  UNROLL
  for (uint n = 0; n < 2; n++)
    weights[n * LANES + lane] = kept[n];
  simdgroup_barrier(mem_flags::mem_threadgroup);

  // The first by index that reaches the target: the position is below 1 by more than rounding.
  Sum mass = {0, 0}, reached[2] = {{0, 0}, {0, 0}};
  for (uint i = 0; i < BEST; i++) {
    UNROLL
    for (uint n = 0; n < 2; n++)
      reached[n] = plus(reached[n], tokens[i] <= index_of(own[n]) ? weights[i] : 0.0f);
    mass = plus(mass, weights[i]);
  }
  const Sum target = times(rounded(mass), draw.position);
  uint first = NOTHING;
  UNROLL
  for (uint n = 0; n < 2; n++)
    if (is_less(target, rounded(reached[n])))
      first = min(first, index_of(own[n]));
  first = simd_min(first);
  if (lane == 0)
    indices[group.x] = first;
}

#define BEST_OF_SIMDGROUPS(variant, T) INSTANTIATE("best_of_simdgroups_" variant, best_of_simdgroups<T>)
FOR_FLOATS(BEST_OF_SIMDGROUPS)
