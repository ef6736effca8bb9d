// Products of few rows with a weight matrix, at the speed of reading the matrix once: what comes before the product (a
// norm of x) and behind it (a bias, the gate of an MLP, the residual stream) is done on the way.
#include "cuda.cuh"

constexpr int WARPS = 8;

enum Activation : uint32_t { NONE, SILU, GELU_TANH };

__device__ float activate(float x, uint32_t activation) {
  // 0.5 (1 + tanh(z)) = sigmoid(2 z)
  return x / (1 + expf(-(activation == SILU ? x : 1.5957691216f * fmaf(0.044715f * x * x, x, x))));
}

struct Operands {
  uint32_t rows, inner, outer; // x [rows, inner], y [rows, outer]
  uint32_t x_stride, residual_stride;
  uint32_t activation; // not NONE: weight is [2 outer, inner], gates before what they multiply
  float eps;
};

// What an output becomes behind its sums.
template <typename T>
__device__ void finish(T *y, const T *bias, const T *residual, const Operands &o, uint32_t row, uint32_t output,
                       float sum, float up) {
  if (o.activation != NONE) {
    sum = activate(sum, o.activation) * up;
  } else {
    if (bias)
      sum += widen(bias[output]);
    if (residual)
      sum += widen(residual[row * size_t(o.residual_stride) + output]);
  }
  y[row * size_t(o.outer) + output] = narrow<T>(sum);
}

// A warp has OUTPUTS outputs of each of ROWS rows; those of a gate and what it multiplies are two. Its lanes take
// packs of N values, 32 N apart, UNROLL of them in flight for each output before the first is used: they do not depend on
// x, so they are under way while the kernel before this one ends.
template <typename T, int ROWS, int OUTPUTS, int UNROLL, int N, bool GATED, bool NORMED>
__device__ void stream(const T *x, const float *norm, const T *weight, const T *bias, const T *residual, T *y,
                       Operands o) {
  constexpr int DISTINCT = GATED ? OUTPUTS / 2 : OUTPUTS;
  const uint32_t lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32;
  const uint32_t first = warp * DISTINCT, packs = o.inner / N;
  if (first >= o.outer)
    return;
  let_next_start();
  const Pack<T, N> *from[OUTPUTS];
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++) {
    const uint32_t output = min(first + i % DISTINCT, o.outer - 1) + (i / DISTINCT) * o.outer;
    from[i] = reinterpret_cast<const Pack<T, N> *>(weight + output * size_t(o.inner));
  }

  float sums[ROWS][OUTPUTS] = {}, squares[ROWS] = {};
  bool waited = false;
  for (uint32_t base = lane; base < packs; base += 32 * UNROLL) {
    Pack<T, N> w[OUTPUTS][UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int i = 0; i < OUTPUTS; i++)
        if (base + 32 * u < packs)
          w[i][u] = load_once(from[i] + base + 32 * u);
    if (!waited) {
      wait_for_inputs();
      waited = true;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const uint32_t pack = base + 32 * u;
      if (pack >= packs)
        break;
      Pack<float, N> factors;
      if (NORMED)
        factors = reinterpret_cast<const Pack<float, N> *>(norm)[pack];
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        const auto values = *reinterpret_cast<const Pack<T, N> *>(x + row * size_t(o.x_stride) + pack * N);
#pragma unroll
        for (int j = 0; j < N; j++) {
          float value = widen(values.values[j]);
          if (NORMED) {
            squares[row] = fmaf(value, value, squares[row]);
            value *= factors.values[j];
          }
#pragma unroll
          for (int i = 0; i < OUTPUTS; i++)
            sums[row][i] = fmaf(value, widen(w[i][u].values[j]), sums[row][i]);
        }
      }
    }
  }
  wait_for_inputs(); // of a lane without a pack
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const float scale = NORMED ? 1 / sqrtf(sum_lanes(squares[row], 32) / o.inner + o.eps) : 1;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++)
      sums[row][i] = sum_lanes(sums[row][i], 32) * scale;
#pragma unroll
    for (int i = 0; i < DISTINCT; i++)
      if (lane == i && first + i < o.outer)
        finish(y, bias, residual, o, row, first + i, sums[row][i], GATED ? sums[row][i + DISTINCT] : 0);
  }
}

// As `stream`, for more rows, on the matrix units: sums of 16 outputs and 8 TILES rows of x in a block, whose warps share
// the inner dimension. A lane's 16 bytes of a row, 8 values, are what two steps of 16 take from it; which values meet in
// a step does not matter as long as both operands agree.
template <typename T, int TILES, bool GATED>
__device__ void stream_tiles(const T *x, const T *weight, const T *bias, const T *residual, T *y, Operands o) {
  constexpr int KINDS = GATED ? 2 : 1, UNROLL = GATED ? 2 : 4;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t group = lane / 4, part = lane % 4, first = blockIdx.x * 16;
  let_next_start();
  const T *from[KINDS][2];
#pragma unroll
  for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t output = min(first + half * 8 + group, o.outer - 1) + kind * o.outer;
      from[kind][half] = weight + output * size_t(o.inner) + part * 8;
    }
  float sums[KINDS][TILES][4] = {};
  bool waited = false;
  for (uint32_t base = warp * 32 * UNROLL; base < o.inner; base += WARPS * 32 * UNROLL) {
    uint4 w[KINDS][UNROLL][2];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          w[kind][u][half] = base + u * 32 < o.inner
                                 ? load_once(reinterpret_cast<const uint4 *>(from[kind][half] + base + u * 32))
                                 : uint4{};
    if (!waited) {
      wait_for_inputs();
      waited = true;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (base + u * 32 >= o.inner)
        break;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const uint32_t row = tile * 8 + group;
        const uint4 values =
            row < o.rows ? *reinterpret_cast<const uint4 *>(x + row * size_t(o.x_stride) + base + u * 32 + part * 8)
                         : uint4{};
#pragma unroll
        for (int kind = 0; kind < KINDS; kind++) {
          const uint4 a = w[kind][u][0], b = w[kind][u][1];
          multiply_add<T>(sums[kind][tile], a.x, b.x, a.y, b.y, values.x, values.y);
          multiply_add<T>(sums[kind][tile], a.z, b.z, a.w, b.w, values.z, values.w);
        }
      }
    }
  }
  wait_for_inputs(); // of a warp without a share

  __shared__ float parts[WARPS][KINDS][TILES * 8][17];
#pragma unroll
  for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        parts[warp][kind][tile * 8 + part * 2 + i % 2][group + i / 2 * 8] = sums[kind][tile][i];
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < TILES * 8 * 16; i += WARPS * 32) {
    const uint32_t row = i / 16, output = i % 16;
    if (row >= o.rows || first + output >= o.outer)
      continue;
    float total[2] = {};
#pragma unroll
    for (int kind = 0; kind < KINDS; kind++)
      for (int w = 0; w < WARPS; w++)
        total[kind] += parts[w][kind][row][output];
    finish(y, bias, residual, o, row, first + output, total[0], total[1]);
  }
}

#define ARGUMENTS(T)                                                                                                   \
  const T *x, uint32_t x_stride, const float *norm, float eps, const T *weight, const T *bias, const T *residual,      \
      uint32_t residual_stride, T *y, uint32_t rows, uint32_t inner, uint32_t outer, uint32_t activation
#define OPERANDS {rows, inner, outer, x_stride, residual_stride, activation, eps}

#define STREAM(name, T, ROWS, OUTPUTS, UNROLL, N, GATED, NORMED)                                                       \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(ARGUMENTS(T)) {                                        \
    stream<T, ROWS, OUTPUTS, UNROLL, N, GATED, NORMED>(x, norm, weight, bias, residual, y, OPERANDS);                  \
  }
// Kinds of a kernel: plain or gated, with the norm of x or without; plain with one output a warp or two.
#define KINDS(name, T, ROWS, N)                                                                                        \
  STREAM(name##_one, T, ROWS, 1, 8, N, false, false)                                                                   \
  STREAM(name##_two, T, ROWS, 2, 4, N, false, false)                                                                   \
  STREAM(name##_gated, T, ROWS, 2, 4, N, true, false)
#define NORMED(name, T, ROWS, N)                                                                                       \
  STREAM(name##_one_normed, T, ROWS, 1, 8, N, false, true)                                                             \
  STREAM(name##_two_normed, T, ROWS, 2, 4, N, false, true)                                                             \
  STREAM(name##_gated_normed, T, ROWS, 2, 4, N, true, true)
#define WIDE(T) (16 / sizeof(T))
#define ROWS_1(name, T) KINDS(name, T, 1, WIDE(T)) NORMED(name, T, 1, WIDE(T))
#define ROWS_2(name, T) KINDS(name, T, 2, WIDE(T)) NORMED(name, T, 2, WIDE(T))
#define ROWS_3(name, T) KINDS(name, T, 3, WIDE(T))
#define ROWS_4(name, T) KINDS(name, T, 4, WIDE(T))
FOR_FLOATS(ROWS_1, linear_1)
FOR_FLOATS(ROWS_2, linear_2)
FOR_FLOATS(ROWS_3, linear_3)
FOR_FLOATS(ROWS_4, linear_4)

#define TILED(name, T, TILES, GATED)                                                                                   \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) name(ARGUMENTS(T)) {                                        \
    stream_tiles<T, TILES, GATED>(x, weight, bias, residual, y, OPERANDS);                                             \
  }
#define TILES(name, T)                                                                                                 \
  TILED(name##_8, T, 1, false)                                                                                         \
  TILED(name##_8_gated, T, 1, true)                                                                                    \
  TILED(name##_16, T, 2, false)                                                                                        \
  TILED(name##_16_gated, T, 2, true)
TILES(linear_tiles_f16, __half)
TILES(linear_tiles_bf16, __nv_bfloat16)
