// Rows of a table, a threadgroup for each id.

struct GatherSizes {
  uint stride, rows, width;
};

// y [ids, width] from table [rows, stride]; zeros for an id beyond it. group.x counts ids.
template <typename T>
[[kernel]] void gather(device T *y [[buffer(0)]], device const T *table [[buffer(1)]],
                       device const uint *ids [[buffer(2)]], constant GatherSizes &sizes [[buffer(3)]],
                       uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
                       uint index [[thread_index_in_threadgroup]]) {
  const uint id = ids[group.x];
  device const T *from = table + ulong(id) * sizes.stride;
  device T *to = y + ulong(group.x) * sizes.width;
  for (uint i = index; i < sizes.width; i += threads.x)
    to[i] = id < sizes.rows ? from[i] : T(0.0f);
}

#define GATHER(variant, T) INSTANTIATE("gather_" variant, gather<T>)
FOR_FLOATS(GATHER)
