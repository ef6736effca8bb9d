// The gated delta rule by its recurrence. LANES lanes hold one row of the state (K values of one of the V) in
// registers from a sequence's first token to its last, so a step reads and writes the state once. A block holds
// THREADS / LANES rows of one head of one sequence; its warps prepare TOKENS tokens at a time, for all of its rows,
// in shared memory.
//
// State layout: [S, Hv, V, K], contiguous along K. A lane owns CHUNKS groups of N neighbouring values, LANES * N
// apart, so that the lanes of a row read neighbouring groups.
#include "cuda.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int TOKENS = 8;
// A decode step waits for memory: more state in flight beats more registers.
constexpr int BLOCKS_PER_SM = 8;

struct Sizes {
  uint32_t hk, hv, kd, vd;
};

struct Steps {
  const uint32_t *cu_seqlens, *context_lens, *state_slots;
  uint32_t longest;
};

// Tokens of one head, q and k normalised; v of the block's rows.
template <int K, int ROWS> struct alignas(16) Prepared {
  float q[TOKENS][K], k[TOKENS][K], v[TOKENS][ROWS];
  float qk[TOKENS], decay[TOKENS], beta[TOKENS];
};

// K is a bound on kd, and its value if EXACT.
template <typename T, int LANES, int N, int CHUNKS, bool EXACT>
__device__ void gated_delta_rule(const T *q, const T *k, const T *v, const float *g, const float *beta, float *state,
                                 T *out, Steps steps, Sizes sizes, Rows q_rows, Rows k_rows, Rows v_rows) {
  constexpr int K = LANES * N * CHUNKS, ROWS = THREADS / LANES;
  __shared__ Prepared<K, ROWS> prepared;

  const uint32_t hv = sizes.hv, vd = sizes.vd, kd = EXACT ? K : sizes.kd;
  const uint32_t tiles = (vd + ROWS - 1) / ROWS;
  const uint32_t head = blockIdx.x / tiles % hv, sequence = blockIdx.x / tiles / hv;
  const uint32_t first_row = blockIdx.x % tiles * ROWS, local_row = threadIdx.x / LANES, row = first_row + local_row;
  const uint32_t lane = threadIdx.x % LANES;
  const bool inside = row < vd; // the other rows still take part in sums and barriers
  const uint32_t begin = steps.cu_seqlens[sequence], end = steps.cu_seqlens[sequence + 1];
  if (end - begin > steps.longest) // another kernel's
    return;

  const auto column = [&](int c) { return (c * LANES + lane) * N; };
  // Where K is only a bound, N is 1: a group is inside or outside, never both.
  const auto has = [&](int c) { return EXACT || column(c) < kd; };
  float *const slot = state + ((steps.state_slots[sequence] * size_t(hv) + head) * vd + row) * kd;
  const uint32_t context = steps.context_lens[sequence];
  const bool stored = inside && context > end - begin;
  Pack<float, N> s[CHUNKS] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (stored && has(c))
      s[c] = *reinterpret_cast<const Pack<float, N> *>(slot + column(c));

  // A warp takes every WARPS-th token; all loads come before the first sum.
  const auto prepare = [&](uint32_t first) {
    constexpr int TAKES = TOKENS / WARPS, COLUMNS = K / 32, VALUES = (TOKENS * ROWS + THREADS - 1) / THREADS;
    const uint32_t warp = threadIdx.x / 32, warp_lane = threadIdx.x % 32;
    const uint32_t shared_head = head * sizes.hk / hv;
    T q_values[TAKES][COLUMNS], k_values[TAKES][COLUMNS], v_values[VALUES];
#pragma unroll
    for (int take = 0; take < TAKES; take++)
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        const uint32_t column = c * 32 + warp_lane;
        const uint32_t token = first + take * WARPS + warp;
        const bool has = token < end && (EXACT || column < kd);
        q_values[take][c] = has ? q[q_rows.start(token, shared_head) + column] : narrow<T>(0);
        k_values[take][c] = has ? k[k_rows.start(token, shared_head) + column] : narrow<T>(0);
      }
#pragma unroll
    for (int n = 0; n < VALUES; n++) {
      const uint32_t i = n * THREADS + threadIdx.x, value = first_row + i % ROWS;
      const uint32_t token = first + i / ROWS;
      const bool has = token < end && value < vd;
      v_values[n] = has ? v[v_rows.start(token, head) + value] : narrow<T>(0);
    }
    const bool has_gates = threadIdx.x < TOKENS && first + threadIdx.x < end;
    const size_t gates = (first + threadIdx.x) * size_t(hv) + head;
    const float g_value = has_gates ? g[gates] : 0, beta_value = has_gates ? beta[gates] : 0;

    if (threadIdx.x < TOKENS) {
      prepared.decay[threadIdx.x] = expf(g_value);
      prepared.beta[threadIdx.x] = beta_value;
    }
#pragma unroll
    for (int n = 0; n < VALUES; n++)
      if (const uint32_t i = n * THREADS + threadIdx.x; i < TOKENS * ROWS)
        prepared.v[i / ROWS][i % ROWS] = widen(v_values[n]);
#pragma unroll
    for (int take = 0; take < TAKES; take++) {
      float qq = 0, kk = 0, qk = 0;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        const float q_value = widen(q_values[take][c]), k_value = widen(k_values[take][c]);
        qq = fmaf(q_value, q_value, qq);
        kk = fmaf(k_value, k_value, kk);
        qk = fmaf(q_value, k_value, qk);
      }
      const float q_scale = 1 / (sqrtf(sum_lanes(qq, 32) + 1e-6f) * sqrtf(kd));
      const float k_scale = 1 / sqrtf(sum_lanes(kk, 32) + 1e-6f);
      qk = sum_lanes(qk, 32) * q_scale * k_scale;
      const uint32_t i = take * WARPS + warp;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        prepared.q[i][c * 32 + warp_lane] = widen(q_values[take][c]) * q_scale;
        prepared.k[i][c * 32 + warp_lane] = widen(k_values[take][c]) * k_scale;
      }
      if (warp_lane == 0)
        prepared.qk[i] = qk;
    }
  };

  for (uint32_t first = begin; first < end; first += TOKENS) {
    __syncthreads(); // the last tokens have been read
    prepare(first);
    __syncthreads();
    const uint32_t count = min(TOKENS, end - first);
    for (uint32_t i = 0; i < count; i++) {
      // N chains of additions, not one: a token's latency is what a long prompt pays for.
      Pack<float, N> k_pack[CHUNKS], sk = {}, sq = {};
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        k_pack[c] = *reinterpret_cast<const Pack<float, N> *>(&prepared.k[i][column(c)]);
        const auto q_pack = *reinterpret_cast<const Pack<float, N> *>(&prepared.q[i][column(c)]);
#pragma unroll
        for (int j = 0; j < N; j++) {
          sk.values[j] = fmaf(s[c].values[j], k_pack[c].values[j], sk.values[j]);
          sq.values[j] = fmaf(s[c].values[j], q_pack.values[j], sq.values[j]);
        }
      }
#pragma unroll
      for (int j = 1; j < N; j++) {
        sk.values[0] += sk.values[j];
        sq.values[0] += sq.values[j];
      }
      const float decay = prepared.decay[i];
      const float delta = prepared.beta[i] * fmaf(-decay, sum_lanes(sk.values[0], LANES), prepared.v[i][local_row]);
      // (decay S + delta k^T) q, so that both sums over the old state run side by side.
      const float y = fmaf(delta, prepared.qk[i], decay * sum_lanes(sq.values[0], LANES));
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int j = 0; j < N; j++)
          s[c].values[j] = fmaf(delta, k_pack[c].values[j], decay * s[c].values[j]);
      if (inside && lane == 0)
        out[((first + i) * size_t(hv) + head) * vd + row] = narrow<T>(y);
    }
  }

#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (inside && has(c) && context > 0) // else the sequence pads the step, and has no slot
      *reinterpret_cast<Pack<float, N> *>(slot + column(c)) = s[c];
}

#define GATED_DELTA_RULE(name, T, LANES, N, CHUNKS, EXACT)                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)                                                 \
      name(const T *q, uint32_t q_token, uint32_t q_head, const T *k, uint32_t k_token, uint32_t k_head, const T *v,   \
           uint32_t v_token, uint32_t v_head, const float *g, const float *beta, float *state, T *out,                 \
           const uint32_t *cu_seqlens, const uint32_t *context_lens, const uint32_t *state_slots, uint32_t hk,         \
           uint32_t hv, uint32_t kd, uint32_t vd, uint32_t longest) {                                                  \
    gated_delta_rule<T, LANES, N, CHUNKS, EXACT>(q, k, v, g, beta, state, out,                                         \
                                                 {cu_seqlens, context_lens, state_slots, longest}, {hk, hv, kd, vd},   \
                                                 {hk, q_token, q_head}, {hk, k_token, k_head}, {hv, v_token, v_head}); \
  }
#define K32(name, T) GATED_DELTA_RULE(name, T, 8, 4, 1, true)
#define K64(name, T) GATED_DELTA_RULE(name, T, 8, 4, 2, true)
#define K128(name, T) GATED_DELTA_RULE(name, T, 8, 4, 4, true)
#define UP_TO_256(name, T) GATED_DELTA_RULE(name, T, 32, 1, 8, false)
FOR_FLOATS(K32, gated_delta_rule_k32)
FOR_FLOATS(K64, gated_delta_rule_k64)
FOR_FLOATS(K128, gated_delta_rule_k128)
FOR_FLOATS(UP_TO_256, gated_delta_rule_any)
