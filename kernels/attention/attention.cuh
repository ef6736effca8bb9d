// What the attention kernels share: the step they work on, which rows a block takes, which keys a row sees.
//
// The query heads of a group read the same keys and values, so a sequence's queries are counted in rows: row
// `token * group + head within the group`, for each key head.
#pragma once

#include "cuda.cuh"

constexpr float LOG2E = 1.44269504f;

// One call, as `Step` in cuda.rs. Strides are in values, from token to token and from head to head.
struct Step {
  const void *q, *k, *v; // [N, hq, d]; pages of [block_size, hk, d], or [N, hk, d] if nothing is cached
  void *y;               // [N, hq, d] contiguous
  float *partial;        // with splits: [N * hq, splits, d] sums, then [N * hq, splits, 2] maxima and weights
  const uint32_t *cu_seqlens, *context_lens, *block_tables;
  uint32_t q_token, q_head, k_token, k_head, v_token, v_head;
  uint32_t num_tokens, num_sequences, hq, hk, d;
  uint32_t block_size; // 0 if nothing is cached
  uint32_t max_blocks, splits;
  uint32_t is_causal, window;
  float scale, softcap; // softcap 0 is none

  __device__ uint32_t group() const { return hq / hk; }

  // A score from a product, in powers of two.
  __device__ float score(float product) const {
    const float x = product * scale;
    return (softcap == 0 ? x : softcap * tanhf(x / softcap)) * LOG2E;
  }
};

struct Sequence {
  int index, start, tokens, past, context;

  __device__ Sequence() {}
  __device__ Sequence(const Step &step, int i)
      : index(i), start(step.cu_seqlens[i]), tokens(step.cu_seqlens[i + 1] - start),
        past(int(step.context_lens[i]) - tokens), context(step.context_lens[i]) {}

  // The first position that a query at `position` sees, and the first after it that it does not.
  __device__ int first_seen(const Step &step, int position) const {
    return position >= int(min(step.window, 0x7fffffffu)) ? position + 1 - int(step.window) : 0;
  }
  __device__ int end_seen(const Step &step, int position) const { return step.is_causal ? position + 1 : context; }

  // Where the keys and values of `position` lie, counted in rows of all heads.
  __device__ uint32_t slot(const Step &step, uint32_t position) const {
    if (step.block_size == 0)
      return start + position;
    const uint32_t block = step.block_tables[index * size_t(step.max_blocks) + position / step.block_size];
    return block * step.block_size + position % step.block_size;
  }
};

// Finds tile `tile` of all sequences' rows in tiles of ROWS, none of which belongs to two sequences. Sequences of one
// token have no tiles if `skip_single`. Returns the first row within the sequence, or -1 if there are fewer tiles. All
// lanes of a warp call it together.
template <int ROWS> __device__ int find_tile(const Step &step, uint32_t tile, bool skip_single, Sequence &sequence) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t before = 0;
  for (uint32_t base = 0; base < step.num_sequences; base += 32) {
    const uint32_t i = base + lane;
    const uint32_t tokens = i < step.num_sequences ? step.cu_seqlens[i + 1] - step.cu_seqlens[i] : 0;
    const uint32_t tiles = skip_single && tokens == 1 ? 0 : (tokens * step.group() + ROWS - 1) / ROWS;
    uint32_t end = before + tiles;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffff, end - before, offset);
      end += lane >= offset ? other : 0;
    }
    if (const uint32_t later = __ballot_sync(0xffffffff, tile < end)) {
      const int found = __ffs(later) - 1;
      sequence = Sequence(step, base + found);
      return (tile - __shfl_sync(0xffffffff, end - tiles, found)) * ROWS;
    }
    before = __shfl_sync(0xffffffff, end, 31);
  }
  return -1;
}

// The factor that turns weights relative to `from` into weights relative to `to`, a maximum so far.
__device__ inline float rescale(float from, float to) { return from == -INFINITY ? 0 : exp2f(from - to); }
