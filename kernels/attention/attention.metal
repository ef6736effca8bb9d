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
