// Writing keys and values into their pages. Bits move, so a kernel is named for its word and not for a dtype.
#include "cuda.cuh"

// kv [2, plane], k and v [N, heads, d] in rows of two strides, all in words; blockIdx.x is the token, blockIdx.y 0 for
// k and 1 for v; threadIdx.x runs over the words of a head, threadIdx.y over heads.
template <typename Word>
__device__ void write_kv(Word *kv, const Word *k, Rows k_rows, const Word *v, Rows v_rows, const uint32_t *slot_mapping,
                         uint64_t plane, uint32_t heads, uint32_t d) {
  const uint32_t token = blockIdx.x;
  Word *to = kv + blockIdx.y * plane + slot_mapping[token] * size_t(heads) * d;
  for (uint32_t head = threadIdx.y; head < heads; head += blockDim.y) {
    const Word *from = blockIdx.y == 0 ? k + k_rows.start(token, head) : v + v_rows.start(token, head);
    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x)
      to[head * d + i] = from[i];
  }
}

#define WRITE_KV(name, Word)                                                                                           \
  extern "C" __global__ void name(Word *kv, const Word *k, uint32_t k_token, uint32_t k_head, const Word *v,           \
                                  uint32_t v_token, uint32_t v_head, const uint32_t *slot_mapping, uint64_t plane,     \
                                  uint32_t heads, uint32_t d) {                                                        \
    write_kv<Word>(kv, k, {heads, k_token, k_head}, v, {heads, v_token, v_head}, slot_mapping, plane, heads, d);       \
  }
WRITE_KV(write_kv_u16, uint16_t)
WRITE_KV(write_kv_u32, uint32_t)
WRITE_KV(write_kv_u128, uint4)
