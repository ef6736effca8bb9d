// Routing, and what lies between the products of experts.

// Experts of a row at most: a bit for each of a lane's says whether it is taken.
constant constexpr uint ROUTE_SIMDGROUPS = 4;
constant constexpr uint NOBODY = 0xffffffff;

struct RouteSizes {
  uint rows, experts, k;
};

// experts and weights [rows, k]; logits [rows, experts], at most 1024 experts. A simdgroup has a row, and looks for the
// greatest k times.
template <typename T>
[[kernel]] void moe_route(device uint *experts [[buffer(0)]], device T *weights [[buffer(1)]],
                          device const T *logits [[buffer(2)]], constant RouteSizes &sizes [[buffer(3)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint lane [[thread_index_in_simdgroup]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const uint row = group.x * ROUTE_SIMDGROUPS + simdgroup;
  if (row >= sizes.rows)
    return;
  device const T *from = logits + ulong(row) * sizes.experts;
  device uint *chosen = experts + ulong(row) * sizes.k;
  float largest = -INFINITY;
  uint has_nan = 0;
  for (uint e = lane; e < sizes.experts; e += LANES) {
    largest = max(largest, float(from[e]));
    has_nan |= isnan(float(from[e])) ? 1 : 0;
  }
  largest = simd_max(largest);
  has_nan = simd_max(has_nan);
  uint taken = 0;
  float total = has_nan != 0 ? NAN : 0;
  for (uint j = 0; j < sizes.k; j++) {
    // The greatest that is left, of equal ones the first. NaN is as little as nothing.
    float best = -1;
    uint place = NOBODY;
    for (uint i = 0, e = lane; e < sizes.experts; i++, e += LANES) {
      const float value = float(from[e]), p = isnan(value) ? 0 : exp(value - largest);
      if ((taken >> i & 1) == 0 && p > best) {
        best = p;
        place = e;
      }
    }
    for (ushort step = LANES / 2; step > 0; step /= 2) {
      const float other = simd_shuffle_xor(best, step);
      const uint other_place = simd_shuffle_xor(place, step);
      if (other > best || (other == best && other_place < place)) {
        best = other;
        place = other_place;
      }
    }
    if (place % LANES == lane)
      taken |= 1u << place / LANES;
    total += best;
    if (lane == 0)
      chosen[j] = place;
  }
  simdgroup_barrier(mem_flags::mem_device);
  for (uint j = lane; j < sizes.k; j += LANES)
    weights[ulong(row) * sizes.k + j] = T(exp(float(from[chosen[j]]) - largest) / total);
}

struct GroupSizes {
  uint pairs, experts;
};

// starts [experts + 1] and order [pairs]: the pairs of each expert, in their order. A thread has an expert, and looks
// at all pairs twice; those of experts that are not there are behind the last one's, in no order.
[[kernel]] void moe_group(device uint *starts [[buffer(0)]], device uint *order [[buffer(1)]],
                          device const uint *ids [[buffer(2)]], constant GroupSizes &sizes [[buffer(3)]],
                          uint3 at [[thread_position_in_grid]]) {
  const uint expert = at.x;
  if (expert > sizes.experts)
    return;
  uint start = 0;
  for (uint pair = 0; pair < sizes.pairs; pair++)
    start += ids[pair] < expert ? 1 : 0;
  starts[expert] = start;
  if (expert == sizes.experts)
    return;
  for (uint pair = 0; pair < sizes.pairs; pair++)
    if (ids[pair] == expert)
      order[start++] = pair;
}

struct CombineSizes {
  uint hidden, k, experts;
};

// y [N, hidden], the weighted sum of terms [N, k, hidden] in the order of their experts, ids [N, k]; group.y is the
// token.
template <typename T>
[[kernel]] void moe_combine(device T *y [[buffer(0)]], device const T *terms [[buffer(1)]],
                            device const uint *ids [[buffer(2)]], device const T *weights [[buffer(3)]],
                            constant CombineSizes &sizes [[buffer(4)]], uint3 at [[thread_position_in_grid]]) {
  const uint column = at.x, token = at.y, k = sizes.k;
  if (column >= sizes.hidden)
    return;
  device const uint *own = ids + ulong(token) * k;
  float sum = 0;
  for (uint next = 0; next < sizes.experts;) {
    // The lowest expert from `next` on.
    uint lowest = sizes.experts, place = 0;
    for (uint j = 0; j < k; j++)
      if (own[j] >= next && own[j] < lowest) {
        lowest = own[j];
        place = j;
      }
    if (lowest < sizes.experts) {
      const ulong pair = ulong(token) * k + place;
      sum = fma(float(weights[pair]), float(terms[pair * sizes.hidden + column]), sum);
    }
    next = lowest + 1;
  }
  y[ulong(token) * sizes.hidden + column] = T(sum);
}

#define ROUTE(variant, T) INSTANTIATE("moe_route_" variant, moe_route<T>)
#define COMBINE(variant, T) INSTANTIATE("moe_combine_" variant, moe_combine<T>)
FOR_FLOATS(ROUTE)
FOR_FLOATS(COMBINE)
