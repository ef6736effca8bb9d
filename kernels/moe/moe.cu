// Routing, and the gated MLPs of experts. A pair is one of the k experts of one token; pairs stand side by side by
// token, or grouped by expert.
//
// Few tokens for an expert: what counts is to stream its weights once, at the speed of memory. Rows of weights are the
// operand of 16 rows, tokens that of 8 columns, and weights go from memory to registers 16 bytes at a time: which four
// values a lane has does not matter to a sum as long as it has the same four of weights and tokens.
#include "gated_delta/mma.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

// A warp for a token. logits, [n, num_experts]; experts, weights [n, k].
template <typename T>
__device__ void route(const T *logits, uint32_t *experts, T *weights, uint32_t n, uint32_t num_experts, uint32_t k) {
  extern __shared__ float memory[];
  const int lane = threadIdx.x % 32;
  const uint32_t token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= n)
    return;
  // Each lane has every 32nd logit, and marks what was chosen. A NaN counts as the least, and makes all weights NaN.
  float *const left = memory + threadIdx.x / 32 * (num_experts + k), *const chosen = left + num_experts;
  float largest = -INFINITY, sum = 0;
  for (uint32_t e = lane; e < num_experts; e += 32) {
    const float logit = widen(logits[token * size_t(num_experts) + e]);
    left[e] = logit;
    largest = fmaxf(largest, logit);
  }
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
  bool is_nan = false;
  for (uint32_t e = lane; e < num_experts; e += 32) {
    is_nan |= isnan(left[e]);
    left[e] = isnan(left[e]) ? 0 : expf(left[e] - largest);
  }
  is_nan = __any_sync(0xffffffff, is_nan);
  for (uint32_t i = 0; i < k; i++) {
    float best = -1;
    uint32_t at = num_experts;
    for (uint32_t e = lane; e < num_experts; e += 32)
      if (left[e] > best || at == num_experts && left[e] >= 0)
        best = left[e], at = e;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(0xffffffff, best, offset);
      const uint32_t other_at = __shfl_xor_sync(0xffffffff, at, offset);
      if (other > best || other == best && other_at < at)
        best = other, at = other_at;
    }
    if (at % 32 == lane)
      left[at] = -1;
    if (lane == 0) {
      chosen[i] = best;
      experts[token * size_t(k) + i] = at;
    }
    sum += best;
  }
  __syncwarp();
  for (uint32_t i = lane; i < k; i += 32)
    weights[token * size_t(k) + i] = narrow<T>(is_nan ? NAN : chosen[i] / sum);
}

#define ROUTE(name, T)                                                                                                 \
  extern "C" __global__ void name(const T *logits, uint32_t *experts, T *weights, uint32_t n, uint32_t num_experts,    \
                                  uint32_t k) {                                                                        \
    route<T>(logits, experts, weights, n, num_experts, k);                                                             \
  }
FOR_FLOATS(ROUTE, moe_route)

// One block. starts [num_experts + 1]: where the pairs of an expert start in `order` [pairs]. Their order within an
// expert is any: no result depends on it. Ids beyond the experts are left out.
extern "C" __global__ void __launch_bounds__(1024)
    moe_group(const uint32_t *ids, uint32_t *starts, uint32_t *order, uint32_t pairs, uint32_t num_experts) {
  extern __shared__ uint32_t counts[];
  for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x)
    counts[e] = 0;
  __syncthreads();
  for (uint32_t pair = threadIdx.x; pair < pairs; pair += blockDim.x)
    if (ids[pair] < num_experts)
      atomicAdd(&counts[ids[pair]], 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32_t before = 0;
    for (uint32_t first = 0; first < num_experts; first += 32) {
      const uint32_t e = first + threadIdx.x, count = e < num_experts ? counts[e] : 0;
      uint32_t sum = count;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffff, sum, offset);
        sum += threadIdx.x >= offset ? other : 0;
      }
      if (e < num_experts)
        starts[e] = counts[e] = before + sum - count;
      before += __shfl_sync(0xffffffff, sum, 31);
    }
    if (threadIdx.x == 0)
      starts[num_experts] = before;
  }
  __syncthreads();
  for (uint32_t pair = threadIdx.x; pair < pairs; pair += blockDim.x)
    if (ids[pair] < num_experts)
      order[atomicAdd(&counts[ids[pair]], 1)] = pair;
}

__device__ inline float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }

template <typename T> __device__ inline float rounded(float x) { return widen(narrow<T>(x)); }

template <typename T> __device__ inline float activate(float gate, float up) {
  return rounded<T>(silu(rounded<T>(gate)) * rounded<T>(up));
}

// sums [2][TILES][4] += weights [2 x 16 rows, columns] tokens [8 TILES, columns]^T over every `step`-th 32 columns from
// `first` on. Each lane brings its rows: weights' lane / 4 and 8 more of both halves, tokens' lane / 4 of each tile, null
// for those that are not there; all at column 8 (lane % 4).
template <int TILES, int AHEAD, typename T>
__device__ inline void stream(float (&sums)[2][TILES][4], const T *const (&rows)[2][2], const T *const (&tokens)[TILES],
                              uint32_t columns, uint32_t first, uint32_t step) {
  for (uint32_t c = first * 32; c < columns; c += AHEAD * step * 32) {
    uint4 w[AHEAD][2][2];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const uint32_t column = c + a * step * 32;
          w[a][half][r] = column < columns ? __ldcs(reinterpret_cast<const uint4 *>(rows[half][r] + column)) : uint4{};
        }
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const uint32_t column = c + a * step * 32;
        const uint4 x = tokens[tile] && column < columns ? *reinterpret_cast<const uint4 *>(tokens[tile] + column)
                                                         : uint4{};
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint4 upper = w[a][half][0], lower = w[a][half][1];
          const uint32_t left[4] = {upper.x, lower.x, upper.y, lower.y}, right[4] = {upper.z, lower.z, upper.w, lower.w};
          multiply_add(sums[half][tile], left, x.x, x.y, T());
          multiply_add(sums[half][tile], right, x.z, x.w, T());
        }
      }
  }
}

// The pairs of a block: those of an expert, or one alone.
struct Group {
  uint32_t expert, first, count;

  __device__ Group(const uint32_t *ids, const uint32_t *starts, uint32_t index) {
    if (starts) {
      expert = index, first = starts[index], count = starts[index + 1] - first;
    } else {
      expert = ids[index], first = index, count = 1;
    }
  }
};

// activated [pairs, intermediate], in the order of groups. A block has 16 rows of the gate and of up; its warps share
// the columns.
template <typename T, int TILES>
__device__ void gate_up(const T *x, const T *weights, const uint32_t *ids, const uint32_t *starts,
                        const uint32_t *order, T *activated, uint32_t num_experts, uint32_t hidden,
                        uint32_t intermediate, uint32_t k) {
  __shared__ float shares[WARPS][2][TILES][4][32];
  const uint32_t tiles = intermediate / 16, row = blockIdx.x % tiles * 16;
  const Group group(ids, starts, blockIdx.x / tiles);
  if (group.count == 0 || group.expert >= num_experts)
    return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T *const matrix = weights + group.expert * size_t(2 * intermediate) * hidden + lane % 4 * 8;
  const auto of = [&](uint32_t r) { return matrix + (r + lane / 4) * size_t(hidden); };
  const T *const rows[2][2] = {{of(row), of(row + 8)}, {of(intermediate + row), of(intermediate + row + 8)}};
  for (uint32_t first = 0; first < group.count; first += TILES * 8) {
    const T *tokens[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const uint32_t place = first + tile * 8 + lane / 4;
      const uint32_t pair = place < group.count ? (starts ? order[group.first + place] : group.first) : 0;
      tokens[tile] = place < group.count ? x + pair / k * size_t(hidden) + lane % 4 * 8 : nullptr;
    }
    float sums[2][TILES][4] = {};
    stream<TILES, 4>(sums, rows, tokens, hidden, warp, WARPS);
    __syncthreads(); // the last shares have been read
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          shares[warp][half][tile][c][lane] = sums[half][tile][c];
    __syncthreads();
    // Of the 16 rows, neighbours to neighbouring threads.
    for (uint32_t i = threadIdx.x; i < 16 * TILES * 8; i += THREADS) {
      const uint32_t r = i % 16, token = i / 16;
      if (first + token >= group.count)
        break;
      const uint32_t c = r / 8 * 2 + token % 2, from = r % 8 * 4 + token % 8 / 2;
      float gate = 0, up = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        gate += shares[w][0][token / 8][c][from];
        up += shares[w][1][token / 8][c][from];
      }
      activated[(group.first + first + token) * size_t(intermediate) + row + r] = narrow<T>(activate<T>(gate, up));
    }
  }
}

// Of each pair, [pairs, hidden] by token. A warp has 32 rows.
template <typename T, int TILES>
__device__ void down(const T *activated, const T *weights, const uint32_t *starts, const uint32_t *order, T *terms,
                     uint32_t hidden, uint32_t intermediate) {
  const uint32_t tiles = (hidden + 32 * WARPS - 1) / (32 * WARPS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t row = (blockIdx.x % tiles * WARPS + warp) * 32;
  const Group group(nullptr, starts, blockIdx.x / tiles);
  if (row >= hidden)
    return;
  const T *const matrix = weights + group.expert * size_t(hidden) * intermediate + lane % 4 * 8;
  const auto of = [&](uint32_t r) { return matrix + (row + r + lane / 4) * size_t(intermediate); };
  const T *const rows[2][2] = {{of(0), of(8)}, {of(16), of(24)}};
  for (uint32_t first = 0; first < group.count; first += TILES * 8) {
    const T *tokens[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const uint32_t place = first + tile * 8 + lane / 4;
      tokens[tile] =
          place < group.count ? activated + (group.first + place) * size_t(intermediate) + lane % 4 * 8 : nullptr;
    }
    float sums[2][TILES][4] = {};
    stream<TILES, 4>(sums, rows, tokens, intermediate, 0, 1);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const uint32_t place = first + tile * 8 + lane % 4 * 2 + c;
        if (place >= group.count)
          continue;
        T *const to = terms + order[group.first + place] * size_t(hidden) + row + lane / 4;
        to[0] = narrow<T>(sums[0][tile][c]), to[8] = narrow<T>(sums[0][tile][c + 2]);
        to[16] = narrow<T>(sums[1][tile][c]), to[24] = narrow<T>(sums[1][tile][c + 2]);
      }
  }
}

// Calls `add` with each j in the order of ids[j].
template <typename Add> __device__ inline void in_order(const uint32_t *ids, uint32_t k, Add add) {
  int64_t last = -1;
  for (uint32_t i = 0; i < k; i++) {
    int64_t next = INT64_MAX;
    for (uint32_t j = 0; j < k; j++)
      if (const int64_t place = int64_t(ids[j]) * k + j; place > last && place < next)
        next = place;
    add(uint32_t(next % k));
    last = next;
  }
}

// y [n, hidden], of terms [n, k, hidden]: N values a thread.
template <typename T, int N>
__device__ void combine(const T *terms, const uint32_t *ids, const T *weights, T *y, uint32_t num_experts,
                        uint32_t hidden, uint32_t k) {
  const uint32_t groups = (hidden / N + THREADS - 1) / THREADS, token = blockIdx.x / groups;
  const uint32_t column = (blockIdx.x % groups * THREADS + threadIdx.x) * N;
  if (column >= hidden)
    return;
  ids += token * size_t(k), weights += token * size_t(k), terms += token * size_t(k) * hidden + column;
  float sums[N] = {};
  in_order(ids, k, [&](uint32_t j) {
    if (ids[j] >= num_experts)
      return;
    const auto term = *reinterpret_cast<const Pack<T, N> *>(terms + j * size_t(hidden));
#pragma unroll
    for (int i = 0; i < N; i++)
      sums[i] = fmaf(widen(weights[j]), widen(term.values[i]), sums[i]);
  });
  Pack<T, N> sum;
#pragma unroll
  for (int i = 0; i < N; i++)
    sum.values[i] = narrow<T>(sums[i]);
  *reinterpret_cast<Pack<T, N> *>(y + token * size_t(hidden) + column) = sum;
}

// Down and the sum in one, a block for 32 rows of one token, its pairs shared by warps.
template <typename T>
__device__ void down_few(const T *activated, const T *weights, const uint32_t *ids, const T *factors, T *y,
                         uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {
  extern __shared__ float terms[]; // [k, 32]
  const uint32_t tiles = hidden / 32, row = blockIdx.x % tiles * 32, token = blockIdx.x / tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ids += token * size_t(k), factors += token * size_t(k);
  for (uint32_t j = warp; j < k; j += WARPS) {
    float sums[2][1][4] = {};
    if (ids[j] < num_experts) {
      const T *const matrix = weights + ids[j] * size_t(hidden) * intermediate + lane % 4 * 8;
      const auto of = [&](uint32_t r) { return matrix + (row + r + lane / 4) * size_t(intermediate); };
      const T *const rows[2][2] = {{of(0), of(8)}, {of(16), of(24)}};
      const T *const tokens[1] = {
          lane / 4 == 0 ? activated + (token * size_t(k) + j) * intermediate + lane % 4 * 8 : nullptr};
      stream<1, 8>(sums, rows, tokens, intermediate, 0, 1);
    }
    if (lane % 4 == 0)
#pragma unroll
      for (int i = 0; i < 4; i++)
        terms[j * 32 + i * 8 + lane / 4] = rounded<T>(sums[i / 2][0][i % 2 * 2]);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float sum = 0;
    in_order(ids, k, [&](uint32_t j) { sum = fmaf(widen(factors[j]), terms[j * 32 + threadIdx.x], sum); });
    y[token * size_t(hidden) + row + threadIdx.x] = narrow<T>(sum);
  }
}

#define FOR_HALVES(DEFINE, name) DEFINE(name##_f16, __half) DEFINE(name##_bf16, __nv_bfloat16)
#define GATE_UP(name, T, TILES)                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *x, const T *weights, const uint32_t *ids, const uint32_t *starts, const uint32_t *order,           \
           T *activated, uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {                   \
    gate_up<T, TILES>(x, weights, ids, starts, order, activated, num_experts, hidden, intermediate, k);                \
  }
#define GATE_UP_FEW(name, T) GATE_UP(name, T, 1)
#define GATE_UP_SOME(name, T) GATE_UP(name, T, 4)
FOR_HALVES(GATE_UP_FEW, moe_gate_up_few)
FOR_HALVES(GATE_UP_SOME, moe_gate_up)
#define DOWN(name, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *activated, const T *weights, const uint32_t *starts, const uint32_t *order, T *terms,              \
           uint32_t hidden, uint32_t intermediate) {                                                                   \
    down<T, 4>(activated, weights, starts, order, terms, hidden, intermediate);                                        \
  }
FOR_HALVES(DOWN, moe_down)
#define DOWN_FEW(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *activated, const T *weights, const uint32_t *ids, const T *factors, T *y, uint32_t num_experts,    \
           uint32_t hidden, uint32_t intermediate, uint32_t k) {                                                       \
    down_few<T>(activated, weights, ids, factors, y, num_experts, hidden, intermediate, k);                            \
  }
FOR_HALVES(DOWN_FEW, moe_down_few)
#define COMBINE(name, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *terms, const uint32_t *ids, const T *weights, T *y, uint32_t num_experts, uint32_t hidden,         \
           uint32_t k) {                                                                                               \
    combine<T, 8>(terms, ids, weights, y, num_experts, hidden, k);                                                     \
  }
FOR_HALVES(COMBINE, moe_combine)

// Any sizes and dtypes, a warp for a value. activated [pairs, intermediate].
template <typename T, typename W>
__device__ void gate_up_any(const T *x, const W *weights, const uint32_t *ids, T *activated, uint32_t pairs,
                            uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {
  const size_t value = blockIdx.x * size_t(WARPS) + threadIdx.x / 32;
  const uint32_t pair = value / intermediate, i = value % intermediate, lane = threadIdx.x % 32;
  if (pair >= pairs || ids[pair] >= num_experts)
    return;
  const W *const gate_row = weights + (ids[pair] * size_t(2 * intermediate) + i) * hidden;
  const W *const up_row = gate_row + size_t(intermediate) * hidden;
  float gate = 0, up = 0;
  for (uint32_t c = lane; c < hidden; c += 32) {
    const float token = widen(x[pair / k * size_t(hidden) + c]);
    gate = fmaf(token, widen(gate_row[c]), gate);
    up = fmaf(token, widen(up_row[c]), up);
  }
  gate = sum_lanes(gate, 32), up = sum_lanes(up, 32);
  if (lane == 0)
    activated[value] = narrow<T>(activate<T>(gate, up));
}
template <typename T, typename W>
__device__ void down_any(const T *activated, const W *weights, const uint32_t *ids, const T *factors, T *y, uint32_t n,
                         uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {
  const size_t value = blockIdx.x * size_t(WARPS) + threadIdx.x / 32;
  const uint32_t token = value / hidden, i = value % hidden, lane = threadIdx.x % 32;
  if (token >= n)
    return;
  ids += token * size_t(k), factors += token * size_t(k), activated += token * size_t(k) * intermediate;
  float sum = 0;
  in_order(ids, k, [&](uint32_t j) {
    if (ids[j] >= num_experts)
      return;
    const W *const row = weights + (ids[j] * size_t(hidden) + i) * intermediate;
    float term = 0;
    for (uint32_t c = lane; c < intermediate; c += 32)
      term = fmaf(widen(activated[j * size_t(intermediate) + c]), widen(row[c]), term);
    sum = fmaf(widen(factors[j]), rounded<T>(sum_lanes(term, 32)), sum);
  });
  if (lane == 0)
    y[value] = narrow<T>(sum);
}

#define ANY(name, T, W)                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      moe_gate_up_any_##name(const T *x, const W *weights, const uint32_t *ids, T *activated, uint32_t pairs,          \
                             uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {               \
    gate_up_any<T, W>(x, weights, ids, activated, pairs, num_experts, hidden, intermediate, k);                        \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      moe_down_any_##name(const T *activated, const W *weights, const uint32_t *ids, const T *factors, T *y,           \
                          uint32_t n, uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {      \
    down_any<T, W>(activated, weights, ids, factors, y, n, num_experts, hidden, intermediate, k);                      \
  }
ANY(f32_f32, float, float)
ANY(f32_f16, float, __half)
ANY(f32_bf16, float, __nv_bfloat16)
ANY(f16_f32, __half, float)
ANY(f16_f16, __half, __half)
ANY(f16_bf16, __half, __nv_bfloat16)
ANY(bf16_f32, __nv_bfloat16, float)
ANY(bf16_f16, __nv_bfloat16, __half)
ANY(bf16_bf16, __nv_bfloat16, __nv_bfloat16)
