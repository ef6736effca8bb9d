// What lies between a projection and attention: query and key heads are normalised and rotated, keys and values written
// into their pages. A warp has one head of one token, which it keeps in shared memory between the norm and the rotation.
#include "heads/heads.cuh"

constexpr int WARPS = 8; // of a block
constexpr uint32_t NO_SLOT = 0xffffffff;

struct Sizes {
  uint32_t tokens, d, half; // half: pairs that turn
};

// Heads of query, then of key, then of value; those without keys have one kind of head.
template <typename T, int N>
__device__ void norm_rope_write(const T *q, Rows q_rows, HeadNorm q_norm, const T *k, Rows k_rows, HeadNorm k_norm,
                                const T *v, Rows v_rows, HeadNorm v_norm, const float *cos, const float *sin,
                                const uint32_t *slot_mapping, uint64_t plane, T *pages, T *out, Sizes sizes) {
  extern __shared__ float shared[];
  const uint32_t lane = threadIdx.x % 32, d = sizes.d, half = sizes.half;
  float *const head_values = shared + threadIdx.x / 32 * d;
  const uint32_t hq = q_rows.heads, hk = k_rows.heads, per_token = hq + 2 * hk;
  const uint32_t index = blockIdx.x * WARPS + threadIdx.x / 32, token = index / per_token;
  if (token >= sizes.tokens)
    return;
  let_next_start();
  const uint32_t slot = slot_mapping[token]; // there before the step's first kernel
  wait_for_inputs();
  uint32_t head = index % per_token;
  const T *from;
  T *to;
  HeadNorm norm;
  const bool is_query = head < hq, is_key = !is_query && head < hq + hk;
  if (is_query) {
    from = q + q_rows.start(token, head);
    to = out + (token * size_t(hq) + head) * d;
    norm = q_norm;
  } else {
    if (slot == NO_SLOT)
      return;
    head -= is_key ? hq : hq + hk;
    from = is_key ? k + k_rows.start(token, head) : v + v_rows.start(token, head);
    to = pages + (is_key ? 0 : plane) + (slot * size_t(hk) + head) * d;
    norm = is_key ? k_norm : v_norm;
  }
  float squares = 0;
  for (uint32_t i = lane * N; i < d; i += 32 * N) {
    const auto pack = *reinterpret_cast<const Pack<T, N> *>(from + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float value = widen(pack.values[j]);
      squares = fmaf(value, value, squares);
      head_values[i + j] = value;
    }
  }
  const float scale = norm.weight ? 1 / sqrtf(sum_lanes(squares, 32) / d + norm.eps) : 1;
  __syncwarp();
  // Rounded where a norm and a rotation by themselves would round.
  const auto normed = [&](uint32_t i) {
    return norm.weight ? widen(narrow<T>(head_values[i] * scale * norm.weight[i])) : head_values[i];
  };
  const bool turns = is_query || is_key;
  for (uint32_t i = lane * N; i < d; i += 32 * N) {
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; j++) {
      const uint32_t column = i + j;
      float value = normed(column);
      if (turns && column < 2 * half) {
        const bool is_first = column < half;
        const size_t angle = token * size_t(half) + (is_first ? column : column - half);
        const float other = normed(is_first ? column + half : column - half);
        value = is_first ? value * cos[angle] - other * sin[angle] : value * cos[angle] + other * sin[angle];
      }
      pack.values[j] = narrow<T>(value);
    }
    *reinterpret_cast<Pack<T, N> *>(to + i) = pack;
  }
}

// The same of heads of 32 N values, which stay in registers. A warp has HEADS heads of one token, loaded together.
template <typename T, int N, int HEADS>
__device__ void norm_rope_write_lanes(const T *q, Rows q_rows, HeadNorm q_norm, const T *k, Rows k_rows,
                                      HeadNorm k_norm, const T *v, Rows v_rows, HeadNorm v_norm, const float *cos,
                                      const float *sin, const uint32_t *slot_mapping, uint64_t plane, T *pages, T *out,
                                      Sizes sizes) {
  constexpr uint32_t D = 32 * N;
  const uint32_t column = threadIdx.x % 32 * N;
  const uint32_t hq = q_rows.heads, hk = k_rows.heads, per_token = hq + 2 * hk, groups = (per_token - 1) / HEADS + 1;
  const uint32_t index = blockIdx.x * WARPS + threadIdx.x / 32, token = index / groups;
  const uint32_t first = index % groups * HEADS;
  if (token >= sizes.tokens)
    return;
  let_next_start();
  const uint32_t slot = slot_mapping[token]; // there before the step's first kernel
  wait_for_inputs();
  Pack<T, N> kept[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    if (const uint32_t head = first + h; head < per_token) {
      const T *from = head < hq        ? q + q_rows.start(token, head)
                      : head < hq + hk ? k + k_rows.start(token, head - hq)
                                       : v + v_rows.start(token, head - hq - hk);
      kept[h] = *reinterpret_cast<const Pack<T, N> *>(from + column);
    }
  const Turning<N> turning(cos, sin, token, sizes.half);
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    const uint32_t head = first + h;
    if (head >= per_token)
      break;
    const bool is_query = head < hq, is_key = !is_query && head < hq + hk;
    const auto entered =
        enter_head<T, N>(kept[h], is_query ? q_norm : is_key ? k_norm : v_norm, turning, !is_query && !is_key);
    T *to = out + (token * size_t(hq) + head) * D;
    if (!is_query) {
      if (slot == NO_SLOT)
        continue;
      to = pages + (is_key ? 0 : plane) + (slot * size_t(hk) + (head - (is_key ? hq : hq + hk))) * D;
    }
    *reinterpret_cast<Pack<T, N> *>(to + column) = entered;
  }
}

#define NORM_ROPE_WRITE(name, T, FUNCTION)                                                                             \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *q, uint32_t hq, uint32_t q_token, uint32_t q_head, const float *q_norm, float q_eps, const T *k,   \
           uint32_t hk, uint32_t k_token, uint32_t k_head, const float *k_norm, float k_eps, const T *v,               \
           uint32_t v_token, uint32_t v_head, const float *v_norm, float v_eps, const float *cos, const float *sin,    \
           const uint32_t *slot_mapping, uint64_t plane, T *pages, T *out, uint32_t tokens, uint32_t d,                \
           uint32_t half) {                                                                                            \
    FUNCTION(q, {hq, q_token, q_head}, {q_norm, q_eps}, k, {hk, k_token, k_head}, {k_norm, k_eps}, v,                  \
             {hk, v_token, v_head}, {v_norm, v_eps}, cos, sin, slot_mapping, plane, pages, out, {tokens, d, half});    \
  }
#define ONE(name, T) NORM_ROPE_WRITE(name, T, (norm_rope_write<T, 1>))
#define FOUR(name, T) NORM_ROPE_WRITE(name, T, (norm_rope_write<T, 4>))
FOR_FLOATS(ONE, norm_rope_write)
FOR_FLOATS(FOUR, norm_rope_write_wide)

#define LANES(D, name, T)                                                                                              \
  NORM_ROPE_WRITE(norm_rope_write_d##D##_##name, T, (norm_rope_write_lanes<T, D / 32, 1>))                             \
  NORM_ROPE_WRITE(norm_rope_write_many_d##D##_##name, T, (norm_rope_write_lanes<T, D / 32, 4>))
#define LANES_OF(D) LANES(D, f16, __half) LANES(D, bf16, __nv_bfloat16)
LANES_OF(64)
LANES_OF(128)
LANES_OF(256)
LANES_OF(512)
