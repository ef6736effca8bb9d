// Attention in f32 arithmetic for any head size, dtype and block size, and the merge of contexts that were split.
//
// A block takes ROWS rows of one key head. A warp takes ROWS / WARPS of them: its lanes are keys while it forms scores,
// and columns while it adds values.
#include "attention/attention.cuh"

constexpr int ROWS = 16, KEYS = 32, WARPS = 4, ROWS_OF_WARP = ROWS / WARPS;
// Of a context, as in cuda.rs.
constexpr int MAX_SPLITS = 64;

// blockIdx.x is the tile, .y the key head, .z the split; d is at most 32 * COLUMNS. Shared memory holds ROWS * d +
// KEYS * (d + 1) floats.
template <typename T, int COLUMNS> __device__ void attention_any(const Step &step) {
  extern __shared__ float shared[];
  const uint32_t d = step.d, group = step.group(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float *queries = shared;          // [ROWS, d]
  float *tile = queries + ROWS * d; // [KEYS, d + 1], keys first and then values
  Sequence sequence;
  const int first_row = find_tile<ROWS>(step, blockIdx.x, false, sequence);
  if (first_row < 0)
    return;

  const int rows = min(ROWS, sequence.tokens * int(group) - first_row);
  const auto head_of = [&](int row) { return blockIdx.y * group + (first_row + row) % group; };
  const auto token_of = [&](int row) { return sequence.start + (first_row + row) / int(group); };
  const T *q = static_cast<const T *>(step.q);
  for (uint32_t i = threadIdx.x; i < ROWS * d; i += blockDim.x) {
    const int row = i / d;
    queries[i] = row < rows ? widen(q[token_of(row) * size_t(step.q_token) + head_of(row) * step.q_head + i % d]) : 0;
  }

  int first_seen[ROWS_OF_WARP], end_seen[ROWS_OF_WARP];
  float maximum[ROWS_OF_WARP], weight[ROWS_OF_WARP], sums[ROWS_OF_WARP][COLUMNS] = {};
#pragma unroll
  for (int r = 0; r < ROWS_OF_WARP; r++) {
    const int position = sequence.past + (first_row + int(warp) * ROWS_OF_WARP + r) / int(group);
    first_seen[r] = sequence.first_seen(step, position);
    end_seen[r] = sequence.end_seen(step, position);
    maximum[r] = -INFINITY;
    weight[r] = 0;
  }

  // What the rows of the block see, in steps of KEYS, shared by the splits.
  const int last_position = sequence.past + (first_row + rows - 1) / int(group);
  const int from = sequence.first_seen(step, sequence.past + first_row / int(group)) / KEYS * KEYS;
  const int to = sequence.end_seen(step, last_position);
  const int share = ((max(to - from, 0) + step.splits * KEYS - 1) / (step.splits * KEYS)) * KEYS;
  const int begin = from + blockIdx.z * share, end = min(begin + share, to);

  const auto load = [&](const void *rows_of, size_t token_stride, uint32_t head_stride, int key) {
    __syncthreads();
    const T *data = static_cast<const T *>(rows_of) + blockIdx.y * size_t(head_stride);
    for (int j = warp; j < KEYS; j += WARPS) {
      const bool is_inside = key + j < end && key + j >= sequence.first_seen(step, sequence.past);
      const T *row = data + (is_inside ? sequence.slot(step, key + j) * token_stride : 0);
      for (uint32_t i = lane; i < d; i += 32)
        tile[j * (d + 1) + i] = is_inside ? widen(row[i]) : 0;
    }
    __syncthreads();
  };
  for (int key = begin; key < end; key += KEYS) {
    load(step.k, step.k_token, step.k_head, key);
    float scores[ROWS_OF_WARP] = {};
    const float *k = tile + lane * (d + 1), *row = queries + warp * ROWS_OF_WARP * d;
    for (uint32_t i = 0; i < d; i++)
#pragma unroll
      for (int r = 0; r < ROWS_OF_WARP; r++)
        scores[r] += row[r * d + i] * k[i];
#pragma unroll
    for (int r = 0; r < ROWS_OF_WARP; r++) {
      const int position = key + lane;
      const bool is_seen = position >= first_seen[r] && position < end_seen[r] && position < end;
      const float score = is_seen ? step.score(scores[r]) : -INFINITY;
      float largest = score;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
      largest = fmaxf(largest, maximum[r]);
      const float kept = rescale(maximum[r], largest);
      maximum[r] = largest;
      scores[r] = rescale(score, largest);
      weight[r] = weight[r] * kept + scores[r];
#pragma unroll
      for (int c = 0; c < COLUMNS; c++)
        sums[r][c] *= kept;
    }
    load(step.v, step.v_token, step.v_head, key);
    for (int j = 0; j < KEYS; j++) {
      float weights[ROWS_OF_WARP];
#pragma unroll
      for (int r = 0; r < ROWS_OF_WARP; r++)
        weights[r] = __shfl_sync(0xffffffff, scores[r], j);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        const float v = c * 32 + lane < d ? tile[j * (d + 1) + c * 32 + lane] : 0;
#pragma unroll
        for (int r = 0; r < ROWS_OF_WARP; r++)
          sums[r][c] += weights[r] * v;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS_OF_WARP; r++) {
    const float total = sum_lanes(weight[r], 32);
    const int row = warp * ROWS_OF_WARP + r;
    if (row >= rows)
      continue;
    const size_t place = token_of(row) * size_t(step.hq) + head_of(row), part = place * step.splits + blockIdx.z;
    if (step.splits > 1 && lane == 0) {
      float *statistics = step.partial + size_t(step.num_tokens) * step.hq * step.splits * d + part * 2;
      statistics[0] = maximum[r];
      statistics[1] = total;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
      if (const uint32_t i = c * 32 + lane; i < d) {
        if (step.splits > 1)
          step.partial[part * d + i] = sums[r][c];
        else
          static_cast<T *>(step.y)[place * d + i] = narrow<T>(total == 0 ? 0 : sums[r][c] / total);
      }
  }
}

// Adds the splits of sequences of one token. blockIdx.x is the query head, .y the sequence, .z a block of columns; a
// warp has every WARPS-th split, its lanes VALUES columns each.
template <typename T, int VALUES> __device__ void merge(const Step &step) {
  __shared__ float factors[MAX_SPLITS];
  __shared__ Pack<float, VALUES> parts[WARPS][32];
  let_next_start();
  wait_for_inputs();
  const uint32_t token = step.cu_seqlens[blockIdx.y], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (step.cu_seqlens[blockIdx.y + 1] - token != 1)
    return;
  const size_t place = token * size_t(step.hq) + blockIdx.x, first = place * step.splits;
  const float *statistics = step.partial + size_t(step.num_tokens) * step.hq * step.splits * step.d + first * 2;
  // Every warp adds up all weights.
  float maxima[MAX_SPLITS / 32], weights[MAX_SPLITS / 32], largest = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < MAX_SPLITS / 32; i++) {
    const uint32_t split = i * 32 + lane;
    maxima[i] = split < step.splits ? statistics[split * 2] : -INFINITY;
    weights[i] = split < step.splits ? statistics[split * 2 + 1] : 0;
    largest = fmaxf(largest, maxima[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
#pragma unroll
  for (int i = 0; i < MAX_SPLITS / 32; i++) {
    const float factor = rescale(maxima[i], largest);
    total += factor * weights[i];
    if (warp == 0)
      factors[i * 32 + lane] = factor;
  }
  total = sum_lanes(total, 32);
  __syncthreads();

  const uint32_t column = (blockIdx.z * 32 + lane) * VALUES;
  Pack<float, VALUES> sum = {};
  if (column < step.d)
#pragma unroll 4
    for (uint32_t split = warp; split < step.splits; split += WARPS) {
      // A split without keys has written nothing else.
      const float factor = factors[split];
      Pack<float, VALUES> part = {};
      if (factor != 0)
        part = *reinterpret_cast<const Pack<float, VALUES> *>(step.partial + (first + split) * step.d + column);
#pragma unroll
      for (int j = 0; j < VALUES; j++)
        sum.values[j] += factor * part.values[j];
    }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= step.d)
    return;
  Pack<T, VALUES> y;
#pragma unroll
  for (int j = 0; j < VALUES; j++) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
      all += parts[w][lane].values[j];
    y.values[j] = narrow<T>(total == 0 ? 0 : all / total);
  }
  *reinterpret_cast<Pack<T, VALUES> *>(static_cast<T *>(step.y) + place * step.d + column) = y;
}

#define ATTENTION_ANY_D128(name, T)                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const __grid_constant__ Step step) {                   \
    attention_any<T, 4>(step);                                                                                         \
  }
#define ATTENTION_ANY_D512(name, T)                                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const __grid_constant__ Step step) {                   \
    attention_any<T, 16>(step);                                                                                        \
  }
#define ATTENTION_MERGE_SCALAR(name, T)                                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const __grid_constant__ Step step) {                   \
    merge<T, 1>(step);                                                                                                 \
  }
#define ATTENTION_MERGE_VECTOR(name, T)                                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(const __grid_constant__ Step step) {                   \
    merge<T, 4>(step);                                                                                                 \
  }
FOR_FLOATS(ATTENTION_ANY_D128, attention_any_d128)
FOR_FLOATS(ATTENTION_ANY_D512, attention_any_d512)
FOR_FLOATS(ATTENTION_MERGE_SCALAR, attention_merge_scalar)
FOR_FLOATS(ATTENTION_MERGE_VECTOR, attention_merge_vector)
