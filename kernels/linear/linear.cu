// Products of few rows with a weight matrix, at the speed of reading the matrix once: what comes before the product (a
// norm of x, if it is one row) and behind it (a bias, the gate of an MLP, the residual stream) is done on the way.
#include "linear/behind.cuh"
#include "mma.cuh"

constexpr int WARPS = 8;

struct Operands {
  uint32_t rows, inner, outer; // x [rows, inner], y [rows, outer]
  uint32_t x_stride;
};

// Bytes of weights that a warp has under way: a ring in shared memory of what its lanes will read, each what it fetched.
// They do not depend on x, so the first are fetched while the kernel before this one ends.
constexpr int RING_BYTES = 6 << 10;

// x [inner] to shared memory, normalised if norm is not null, rounded as a norm by itself would round. All threads of the
// block call it. What does not depend on x is fetched while the kernel before this one ends.
template <typename T, int N>
__device__ void take_row(Pack<T, N> *to, const T *x, const float *norm, float eps, uint32_t inner) {
  __shared__ float warps[WARPS];
  const uint32_t packs = inner / N;
  const bool has_first = threadIdx.x < packs;
  const auto factors_of = [&](uint32_t pack) { return reinterpret_cast<const Pack<float, N> *>(norm)[pack]; };
  Pack<float, N> first_factors = {};
  if (norm && has_first)
    first_factors = factors_of(threadIdx.x);
  wait_for_inputs();

  float squares = 0;
  const auto take = [&](uint32_t pack) {
    const auto values = reinterpret_cast<const Pack<T, N> *>(x)[pack];
#pragma unroll
    for (int j = 0; j < N; j++)
      squares = fmaf(widen(values.values[j]), widen(values.values[j]), squares);
    return values;
  };
  Pack<T, N> first = {};
  if (has_first)
    first = take(threadIdx.x);
#pragma unroll 4
  for (uint32_t pack = threadIdx.x + WARPS * 32; pack < packs; pack += WARPS * 32)
    to[pack] = take(pack);
  if (norm) {
    squares = sum_lanes(squares, 32);
    if (threadIdx.x % 32 == 0)
      warps[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0;
    for (int warp = 0; warp < WARPS; warp++)
      squares += warps[warp];
    const float scale = 1 / sqrtf(squares / inner + eps);
    const auto normalise = [&](Pack<T, N> &values, const Pack<float, N> &factors) {
#pragma unroll
      for (int j = 0; j < N; j++)
        values.values[j] = narrow<T>(widen(values.values[j]) * scale * factors.values[j]);
    };
    normalise(first, first_factors);
    for (uint32_t pack = threadIdx.x + WARPS * 32; pack < packs; pack += WARPS * 32)
      normalise(to[pack], factors_of(pack));
  }
  if (has_first)
    to[threadIdx.x] = first;
  __syncthreads();
}

// One row. A warp takes one output after the other, or a gate and what it multiplies. Its lanes take packs of N values,
// 32 N apart, turn by turn.
template <typename T, int N, bool GATED>
__device__ void stream(const T *x, const float *norm, float eps, const T *weight, Behind<T> behind, Operands o) {
  constexpr int PIECES = GATED ? 2 : 1, STAGES = RING_BYTES / 512 / PIECES;
  extern __shared__ uint4 shared[];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint4 *const ring = shared + warp * (RING_BYTES / 16) + lane;
  const uint32_t packs = o.inner / N, turns = (packs + 31) / 32, stride = gridDim.x * WARPS;
  let_next_start();

  uint32_t fetched_output = blockIdx.x * WARPS + warp, fetched_turn = 0;
  const auto fetch = [&](int stage) {
    if (fetched_output < o.outer) {
      const uint32_t pack = fetched_turn * 32 + lane;
#pragma unroll
      for (int i = 0; i < PIECES; i++)
        copy_async(ring + (stage * PIECES + i) * 32,
                   weight + (fetched_output + i * size_t(o.outer)) * o.inner + min(pack, packs - 1) * N, pack < packs);
      if (++fetched_turn == turns) {
        fetched_turn = 0;
        fetched_output += stride;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++)
    fetch(stage);
  auto *const row = reinterpret_cast<Pack<T, N> *>(shared + WARPS * (RING_BYTES / 16));
  take_row<T, N>(row, x, norm, eps, o.inner);

  int stage = 0;
  for (uint32_t output = blockIdx.x * WARPS + warp; output < o.outer; output += stride) {
    float sums[PIECES] = {};
    for (uint32_t turn = 0; turn < turns; turn++) {
      wait_for_copies<STAGES - 1>();
      Pack<T, N> w[PIECES];
#pragma unroll
      for (int i = 0; i < PIECES; i++)
        w[i] = *reinterpret_cast<const Pack<T, N> *>(ring + (stage * PIECES + i) * 32);
      fetch(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      // Weights beyond the end are zero, whatever they are multiplied by.
      const auto values = row[min(turn * 32 + lane, packs - 1)];
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          sums[i] = fmaf(widen(values.values[j]), widen(w[i].values[j]), sums[i]);
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++)
      sums[i] = sum_lanes(sums[i], 32);
    if (lane == 0)
      behind.finish(0, output, sums[0], sums[PIECES - 1]);
  }
}

// As `stream`, for up to 8 TILES rows, on the matrix units: a block takes groups of 16 outputs in turn, and its warps share
// the inner dimension. A lane's 16 bytes of a row, 8 values, are what two steps of 16 take from it;
// which values meet in a step does not matter as long as both operands agree.
template <typename T, bool GATED, int TILES>
__device__ void stream_tiles(const T *x, const T *weight, Behind<T> behind, Operands o) {
  constexpr int KINDS = GATED ? 2 : 1, PIECES = 2 * KINDS, STAGES = RING_BYTES / 512 / PIECES;
  extern __shared__ uint4 shared[];
  __shared__ float parts[WARPS][KINDS][TILES * 8][17];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_of_lane = lane / 4, part = lane % 4;
  uint4 *const ring = shared + warp * (RING_BYTES / 16) + lane;
  const uint32_t turns = (o.inner / 32 + WARPS - 1) / WARPS, groups = (o.outer + 15) / 16;
  let_next_start();

  uint32_t fetched_group = blockIdx.x, fetched_turn = 0;
  const auto fetch = [&](int stage) {
    if (fetched_group < groups) {
      const uint32_t first = (fetched_turn * WARPS + warp) * 32;
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const uint32_t output = min(fetched_group * 16 + i % 2 * 8 + row_of_lane, o.outer - 1) + i / 2 * o.outer;
        copy_async(ring + (stage * PIECES + i) * 32,
                   weight + output * size_t(o.inner) + min(first, o.inner - 32) + part * 8, first < o.inner);
      }
      if (++fetched_turn == turns) {
        fetched_turn = 0;
        fetched_group += gridDim.x;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++)
    fetch(stage);
  wait_for_inputs();

  // Those of a turn are asked for a turn ahead.
  const T *own_rows[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    own_rows[tile] = x + min(tile * 8 + row_of_lane, o.rows - 1) * size_t(o.x_stride) + part * 8;
  uint4 ahead[TILES];
  const auto take = [&](uint32_t turn) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      ahead[tile] =
          *reinterpret_cast<const uint4 *>(own_rows[tile] + min((turn * WARPS + warp) * 32, o.inner - 32));
  };
  take(0);
  int stage = 0;
  for (uint32_t group = blockIdx.x; group < groups; group += gridDim.x) {
    float sums[KINDS][TILES][4] = {};
    for (uint32_t turn = 0; turn < turns; turn++) {
      wait_for_copies<STAGES - 1>();
      uint4 w[PIECES];
#pragma unroll
      for (int i = 0; i < PIECES; i++)
        w[i] = ring[(stage * PIECES + i) * 32];
      fetch(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      // Weights beyond the end are zero.
      uint4 values[TILES];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        values[tile] = ahead[tile];
      take(turn + 1 < turns ? turn + 1 : 0);
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++) {
        const uint4 a = w[kind * 2], b = w[kind * 2 + 1];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          multiply_add(sums[kind][tile], {a.x, b.x, a.y, b.y}, values[tile].x, values[tile].y, T());
          multiply_add(sums[kind][tile], {a.z, b.z, a.w, b.w}, values[tile].z, values[tile].w, T());
        }
      }
    }
#pragma unroll
    for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          parts[warp][kind][tile * 8 + part * 2 + i % 2][row_of_lane + i / 2 * 8] = sums[kind][tile][i];
    __syncthreads();
    const uint32_t row = threadIdx.x / 16, output = group * 16 + threadIdx.x % 16;
    if (row < o.rows && output < o.outer) {
      float total[2] = {};
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++)
        for (int w = 0; w < WARPS; w++)
          total[kind] += parts[w][kind][row][threadIdx.x % 16];
      behind.finish(row, output, total[0], total[1]);
    }
    __syncthreads(); // the parts have been read
  }
}

#define ARGUMENTS(T)                                                                                                   \
  const T *x, uint32_t x_stride, const float *norm, float eps, const T *weight, const T *bias, const T *residual,      \
      uint32_t residual_stride, T *y, uint32_t rows, uint32_t inner, uint32_t outer, uint32_t activation
#define BEHIND {y, bias, residual, residual_stride, outer, activation}
#define OPERANDS {rows, inner, outer, x_stride}

#define STREAM(name, T, GATED)                                                                                         \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(ARGUMENTS(T)) {                                        \
    stream<T, 16 / sizeof(T), GATED>(x, norm, eps, weight, BEHIND, OPERANDS);                                          \
  }
#define PLAIN(name, T) STREAM(name, T, false)
#define GATED(name, T) STREAM(name, T, true)
FOR_FLOATS(PLAIN, linear)
FOR_FLOATS(GATED, linear_gated)

#define TILED(name, T, GATED, TILES)                                                                                   \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(ARGUMENTS(T)) {                                        \
    stream_tiles<T, GATED, TILES>(x, weight, BEHIND, OPERANDS);                                                        \
  }
#define ALL_TILED(T, suffix)                                                                                           \
  TILED(linear_tiles_8_##suffix, T, false, 1)                                                                          \
  TILED(linear_tiles_8_gated_##suffix, T, true, 1)                                                                     \
  TILED(linear_tiles_16_##suffix, T, false, 2)                                                                         \
  TILED(linear_tiles_16_gated_##suffix, T, true, 2)
ALL_TILED(__half, f16)
ALL_TILED(__nv_bfloat16, bf16)
