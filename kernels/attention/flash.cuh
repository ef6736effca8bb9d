// The softmax of both prompt kernels: scores of tiles of rows and keys as the accumulators of products hold them, where
// a lane has two rows, lane / 4 and 8 further, and of every 8 keys the pair lane % 4.
#pragma once

#include "attention/attention.cuh"
#include "mma.cuh"

// A block's rows, all of one sequence and one key head, and the tiles of KEYS keys that any of them sees.
template <int ROWS, int KEYS> struct FlashTile {
  static constexpr int NUM_ROWS = ROWS;
  Sequence sequence;
  uint32_t head;
  int first_row; // below 0 if there is nothing to do
  int num_rows, first_seen, begin, end, full_begin, full_end;

  __device__ FlashTile() {}
  // Tile `index` of all sequences with more than one token.
  __device__ FlashTile(const Step &step, uint32_t index, uint32_t head) : head(head) {
    first_row = find_tile<ROWS>(step, index, true, sequence);
    if (first_row < 0)
      return;
    num_rows = min(ROWS, sequence.tokens * int(step.group()) - first_row);
    const int low = position(step, 0), high = position(step, num_rows - 1);
    first_seen = sequence.first_seen(step, sequence.past);
    begin = sequence.first_seen(step, low) / KEYS;
    end = (sequence.end_seen(step, high) + KEYS - 1) / KEYS;
    // All rows see all keys of the tiles between these.
    full_begin = (sequence.first_seen(step, high) + KEYS - 1) / KEYS;
    full_end = sequence.end_seen(step, low) / KEYS;
  }

  __device__ int position(const Step &step, int row) const {
    return sequence.past + (first_row + row) / int(step.group());
  }
  __device__ bool is_full(int tile) const { return tile >= full_begin && tile < full_end; }
  // Whether the cache holds nothing for some keys of the tile.
  __device__ bool is_edge(int tile) const { return tile * KEYS < first_seen || (tile + 1) * KEYS > sequence.context; }
  __device__ bool has_key(int key) const { return key >= first_seen && key < sequence.context; }
  __device__ int token(const Step &step, int row) const {
    return sequence.start + (first_row + row) / int(step.group());
  }
  __device__ uint32_t query_head(const Step &step, int row) const {
    return head * step.group() + (first_row + row) % step.group();
  }
  template <typename T> __device__ const T *query(const Step &step, int row) const {
    return static_cast<const T *>(step.q) + token(step, row) * size_t(step.q_token) +
           query_head(step, row) * size_t(step.q_head);
  }
};

// The running softmax of the lane's two rows.
struct Softmax {
  int first_seen[2], end_seen[2];
  float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {}; // maxima as scores are stored; weights of the lane's keys
  float factor;                                              // makes stored scores powers of two

  template <typename Tile> __device__ Softmax(const Step &step, const Tile &tile, int row) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int position = tile.position(step, row + i * 8);
      first_seen[i] = tile.sequence.first_seen(step, position);
      end_seen[i] = tile.sequence.end_seen(step, position);
    }
    factor = step.softcap == 0 ? step.scale * LOG2E : 1;
  }

  // Turns products with keys from `key` on into weights, and says by what sums so far must be multiplied.
  template <int N>
  __device__ void update(const Step &step, float (&scores)[N][4], int key, bool is_full, float (&kept)[2]) {
    if (step.softcap != 0)
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          scores[i][j] = step.score(scores[i][j]);
    if (!is_full)
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int position = key + i * 8 + int(threadIdx.x % 4) * 2 + j % 2;
          if (position < first_seen[j / 2] || position >= end_seen[j / 2])
            scores[i][j] = -INFINITY;
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float largest = maximum[r];
#pragma unroll
      for (int i = 0; i < N; i++)
        largest = fmaxf(largest, fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
      largest = max_lanes<1, 2>(largest);
      // Until a row sees a key all its weights are zero.
      const float shift = largest == -INFINITY ? 0 : largest * factor;
      kept[r] = power_of_two(maximum[r] * factor - shift);
      maximum[r] = largest;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; j++) {
          scores[i][j] = power_of_two(scores[i][j] * factor - shift);
          sum += scores[i][j];
        }
      weight[r] = weight[r] * kept[r] + sum;
    }
  }

  // The lane's part of the weights of keys 16 i to 16 i + 15, as the first operand of a product.
  template <typename T, int N>
  static __device__ void narrow(const float (&weights)[N][4], int i, uint32_t (&fragment)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      fragment[j] = narrow_pair(weights[2 * i + j / 2][j % 2 * 2], weights[2 * i + j / 2][j % 2 * 2 + 1], T());
  }

  // Divides the lane's sums by the weights and stores them from `column` on.
  template <typename T, typename Tile, int N>
  __device__ void store(const Step &step, const Tile &tile, int row, int column, const float (&sums)[N][4]) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float total = weight[r] + __shfl_xor_sync(0xffffffff, weight[r], 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      const float inverse = total == 0 ? 0 : 1 / total;
      if (const int at = row + r * 8; at < tile.num_rows) {
        T *y = static_cast<T *>(step.y) +
               (tile.token(step, at) * size_t(step.hq) + tile.query_head(step, at)) * step.d + column;
#pragma unroll
        for (int i = 0; i < N; i++)
          *reinterpret_cast<uint32_t *>(y + i * 8 + threadIdx.x % 4 * 2) =
              narrow_pair(sums[i][2 * r] * inverse, sums[i][2 * r + 1] * inverse, T());
      }
    }
  }
};
