// What the kernels for chunks of the gated delta rule share.
#pragma once

#include "mma.cuh"

constexpr int CHUNK = 64;
constexpr int D = 128;

struct Steps {
  const uint32_t *cu_seqlens, *context_lens, *state_slots;
  uint32_t sequences, hk, hv, shortest;

  // Where the scratch of a sequence's chunks starts: enough for each lies between.
  __device__ uint32_t first_chunk(uint32_t sequence) const { return cu_seqlens[sequence] / CHUNK + sequence; }
  __device__ bool is_short(uint32_t sequence) const {
    return cu_seqlens[sequence + 1] - cu_seqlens[sequence] < shortest;
  }
};

// A matrix [CHUNK, CHUNK], zero above the diagonal: one column of 8 values after the other.
template <typename T> struct Lower {
  static constexpr int PIECES = CHUNK / 8;
  T values[PIECES * CHUNK][8];

  __device__ T *at(int row, int piece) { return values[piece * CHUNK + row]; }
  __device__ const T *at(int row, int piece) const { return values[piece * CHUNK + row]; }
};

// Of one head's chunk.
template <typename T> struct alignas(128) Prepared {
  Lower<T> t, p;
  // Factors of k S^T, of the update, of q S^T; the decay over the chunk.
  float from_state[CHUNK], to_state[CHUNK], to_output[CHUNK], decay[4];
};

// Of 16 rows of the state a thread has rows lane / 4 and 8 more, columns 8 n + 2 (lane % 4) and the next: `slot` is the
// first of them.
__device__ inline void load_state(float (&s)[D / 8][4], const float *slot) {
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    const float2 upper = *reinterpret_cast<const float2 *>(slot + n * 8);
    const float2 lower = *reinterpret_cast<const float2 *>(slot + 8 * D + n * 8);
    s[n][0] = upper.x, s[n][1] = upper.y, s[n][2] = lower.x, s[n][3] = lower.y;
  }
}
__device__ inline void store_state(float *slot, const float (&s)[D / 8][4]) {
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    *reinterpret_cast<float2 *>(slot + n * 8) = {s[n][0], s[n][1]};
    *reinterpret_cast<float2 *>(slot + 8 * D + n * 8) = {s[n][2], s[n][3]};
  }
}

// Takes exp(G) S k^T from the values of 16 tokens: `sk` are the products of the first and of the last 8, `factors` those
// of the thread's first token on.
template <typename T>
__device__ inline void subtract_products(uint32_t (&values)[4], const float (*sk)[4], const float *factors) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float2 factor = *reinterpret_cast<const float2 *>(factors + half * 8);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float2 value = unpair(values[half * 2 + r], T());
      const float *const product = sk[half] + r * 2;
      values[half * 2 + r] =
          narrow_pair(fmaf(-factor.x, product[0], value.x), fmaf(-factor.y, product[1], value.y), T());
    }
  }
}
