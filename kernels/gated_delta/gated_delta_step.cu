// One token of the gated delta rule for each of many sequences; K = 128. A warp has ROWS rows of one head's state,
// a lane four neighbouring columns of each, and needs no other warp: all loads of a step are in flight together.
#include "cuda.cuh"

constexpr int K = 128;

// The sums over all lanes of COUNT values a lane, a power of two: lane i gets that of value i * COUNT / 32.
template <int COUNT> __device__ inline float sum_each(float (&values)[COUNT]) {
  const int lane = threadIdx.x % 32;
  int offset = 16;
#pragma unroll
  for (int count = COUNT / 2; count > 0; count /= 2, offset /= 2)
#pragma unroll
    for (int i = 0; i < count; i++) {
      const bool upper = lane & offset;
      const float sent = upper ? values[i] : values[i + count];
      values[i] = (upper ? values[i + count] : values[i]) + __shfl_xor_sync(0xffffffff, sent, offset);
    }
  return sum_lanes(values[0], 32 / COUNT);
}

template <typename T, int WARPS, int ROWS, bool STREAM>
__device__ void step(const T *q, const T *k, const T *v, const float *g, const float *beta, float *state, T *out,
                     const uint32_t *context_lens, const uint32_t *state_slots, uint32_t hk,
                     uint32_t hv, uint32_t vd, Rows q_rows, Rows k_rows, Rows v_rows) {
  constexpr int LANES = 16 / ROWS; // that share a sum
  const uint32_t lane = threadIdx.x % 32, tiles = vd / ROWS;
  const uint32_t tile = blockIdx.x * WARPS + threadIdx.x / 32;
  const uint32_t head = tile / tiles % hv, sequence = tile / tiles / hv, shared_head = head * hk / hv;
  const uint32_t row = tile % tiles * ROWS, own_row = row + lane / LANES % ROWS;
  const uint32_t token = sequence, context = context_lens[sequence];
  auto *const slot = reinterpret_cast<float4 *>(
      state + ((state_slots[sequence] * size_t(hv) + head) * vd + row) * K + lane * 4);

  // The state is that of the step before, which has long ended: only what the kernels of this one make is waited for.
  let_next_start();
  float4 s[ROWS] = {};
  if (context > 1)
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      s[r] = STREAM ? __ldcs(slot + r * (K / 4)) : slot[r * (K / 4)];
  wait_for_inputs();
  const auto q_pack = *reinterpret_cast<const Pack<T, 4> *>(q + q_rows.start(token, shared_head) + lane * 4);
  const auto k_pack = *reinterpret_cast<const Pack<T, 4> *>(k + k_rows.start(token, shared_head) + lane * 4);
  const float value = widen(v[v_rows.start(token, head) + own_row]);
  const float decay = expf(g[token * size_t(hv) + head]), strength = beta[token * size_t(hv) + head];

  float q_values[4], k_values[4], qq = 0, kk = 0, qk = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    q_values[j] = widen(q_pack.values[j]), k_values[j] = widen(k_pack.values[j]);
    qq = fmaf(q_values[j], q_values[j], qq);
    kk = fmaf(k_values[j], k_values[j], kk);
    qk = fmaf(q_values[j], k_values[j], qk);
  }
  const float q_scale = 1 / (sqrtf(sum_lanes(qq, 32) + 1e-6f) * sqrtf(K));
  const float k_scale = 1 / sqrtf(sum_lanes(kk, 32) + 1e-6f);
  qk = sum_lanes(qk, 32) * q_scale * k_scale;

  float products[2 * ROWS]; // S k, then S q
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    products[r] = fmaf(s[r].x, k_values[0], s[r].y * k_values[1]) + fmaf(s[r].z, k_values[2], s[r].w * k_values[3]);
    products[ROWS + r] =
        fmaf(s[r].x, q_values[0], s[r].y * q_values[1]) + fmaf(s[r].z, q_values[2], s[r].w * q_values[3]);
  }
  const float sum = sum_each(products);
  const float sk = __shfl_sync(0xffffffff, sum, lane % 16) * k_scale;
  const float sq = __shfl_sync(0xffffffff, sum, lane % 16 + 16) * q_scale;
  const float delta = strength * fmaf(-decay, sk, value);
  if (lane < 16 && lane % LANES == 0)
    out[(token * size_t(hv) + head) * vd + own_row] = narrow<T>(fmaf(delta, qk, decay * sq));
  if (context == 0) // pads the step, and has no slot
    return;
  const float scaled = delta * k_scale;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float factor = __shfl_sync(0xffffffff, scaled, r * LANES);
    s[r].x = fmaf(factor, k_values[0], decay * s[r].x);
    s[r].y = fmaf(factor, k_values[1], decay * s[r].y);
    s[r].z = fmaf(factor, k_values[2], decay * s[r].z);
    s[r].w = fmaf(factor, k_values[3], decay * s[r].w);
    if (STREAM)
      __stcs(slot + r * (K / 4), s[r]);
    else
      slot[r * (K / 4)] = s[r];
  }
}

#define STEP(name, T, WARPS, ROWS, STREAM)                                                                             \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *q, uint32_t q_token, uint32_t q_head, const T *k, uint32_t k_token, uint32_t k_head, const T *v,   \
           uint32_t v_token, uint32_t v_head, const float *g, const float *beta, float *state, T *out,                 \
           const uint32_t *context_lens, const uint32_t *state_slots, uint32_t hk,                                     \
           uint32_t hv, uint32_t vd) {                                                                                 \
    step<T, WARPS, ROWS, STREAM>(q, k, v, g, beta, state, out, context_lens, state_slots, hk, hv, vd,                  \
                                 {hk, q_token, q_head}, {hk, k_token, k_head}, {hv, v_token, v_head});                 \
  }
#ifndef VARIANTS
#define STEP_FOR(name, T) STEP(name, T, 2, 4, true)
FOR_FLOATS(STEP_FOR, gated_delta_step)
#else
#define V(W, R) STEP(step_##W##_##R##_0, __nv_bfloat16, W, R, false) STEP(step_##W##_##R##_1, __nv_bfloat16, W, R, true)
V(1, 8) V(2, 8) V(4, 8) V(2, 16) V(4, 16) V(1, 4) V(2, 4) V(4, 4) V(8, 4) V(8, 8)
#endif
