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
