// RMS normalisation, plain, gated and added, and layer normalisation of a residual sum. blockDim.x threads (a power of two)
// share a row, blockDim.y rows share a block; a row of more than a warp has the block to itself.
#include "cuda.cuh"

constexpr int KEPT = 2;

// The sum over the threads of a row. A kernel's sums are numbered, so that each has memory of its own to meet in.
template <int NUMBER> __device__ float sum_row(float x) {
  x = sum_lanes(x, min(blockDim.x, 32));
  if (blockDim.x <= 32)
    return x;
  __shared__ float warps[32];
  if (threadIdx.x % 32 == 0)
    warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < blockDim.x / 32; warp++)
    x += warps[warp];
  return x;
}

// The quotient is off by a few units in the last place, far below the op's limit in f32.
__device__ inline float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }

// What is done with the norm: nothing, silu(other) is multiplied by it, or it is added to the other operand and the sum
// multiplied by a factor, each rounded as an op by itself would round.
enum class Then { NOTHING, GATE, ADD };

// x, and other, [rows, d] in rows of two strides; weight [d]; y [rows, d]; N divides d, and all rows start at
// multiples of 16 bytes if N is not 1.
template <typename T, int N, Then THEN>
__device__ void rms_norm(const T *x, Rows x_rows, const T *other, Rows other_rows, const float *weight, T *y,
                         uint32_t rows, uint32_t d, float eps, float multiplier = 1) {
  constexpr bool HAS_OTHER = THEN != Then::NOTHING;
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  const bool inside = row < rows; // the others still take part in the sums of their warp
  const auto *from = reinterpret_cast<const Pack<T, N> *>(x + x_rows.start(inside ? row : 0));
  const auto *others =
      reinterpret_cast<const Pack<T, N> *>(HAS_OTHER && inside ? other + other_rows.start(row) : nullptr);
  const auto *factor = reinterpret_cast<const Pack<float, N> *>(weight);
  auto *to = reinterpret_cast<Pack<T, N> *>(y + row * size_t(d));

  let_next_start();
  wait_for_inputs();
  float squares = 0;
  const auto add = [&](const Pack<T, N> &pack) {
#pragma unroll
    for (int j = 0; j < N; j++)
      squares += widen(pack.values[j]) * widen(pack.values[j]);
  };
  // A row of up to KEPT packs a thread is read once, all loads in flight together.
  Pack<T, N> kept[KEPT] = {}, kept_others[KEPT] = {};
#pragma unroll
  for (int n = 0; n < KEPT; n++)
    if (const uint32_t i = n * blockDim.x + threadIdx.x; i < d / N) {
      kept[n] = from[i];
      if (HAS_OTHER && inside)
        kept_others[n] = others[i];
    }
#pragma unroll
  for (int n = 0; n < KEPT; n++)
    add(kept[n]);
  for (uint32_t i = KEPT * blockDim.x + threadIdx.x; i < d / N; i += blockDim.x)
    add(from[i]);
  const float scale = 1 / sqrtf(sum_row<0>(squares) / d + eps);
  if (!inside)
    return;

  const auto store = [&](uint32_t i, Pack<T, N> pack, const Pack<T, N> &other) {
    const Pack<float, N> weights = factor[i];
#pragma unroll
    for (int j = 0; j < N; j++) {
      float value = widen(pack.values[j]) * scale * weights.values[j];
      const float with = widen(other.values[j]);
      if (THEN == Then::GATE)
        value *= silu(with);
      if (THEN == Then::ADD)
        value = widen(narrow<T>(__fadd_rn(with, widen(narrow<T>(value))))) * multiplier;
      pack.values[j] = narrow<T>(value);
    }
    to[i] = pack;
  };
#pragma unroll
  for (int n = 0; n < KEPT; n++)
    if (const uint32_t i = n * blockDim.x + threadIdx.x; i < d / N)
      store(i, kept[n], kept_others[n]);
  for (uint32_t i = KEPT * blockDim.x + threadIdx.x; i < d / N; i += blockDim.x)
    store(i, from[i], HAS_OTHER ? others[i] : Pack<T, N>());
}

#define RMS_NORM(name, T, N)                                                                                           \
  extern "C" __global__ void name(const T *x, uint32_t heads, uint32_t token_stride, uint32_t head_stride,             \
                                  const float *weight, T *y, uint32_t rows, uint32_t d, float eps) {                   \
    rms_norm<T, N, Then::NOTHING>(x, {heads, token_stride, head_stride}, nullptr, {}, weight, y, rows, d, eps);        \
  }
#define RMS_NORM_SCALAR(name, T) RMS_NORM(name, T, 1)
#define RMS_NORM_VECTOR(name, T) RMS_NORM(name, T, 16 / sizeof(T))
FOR_FLOATS(RMS_NORM_SCALAR, rms_norm_scalar)
FOR_FLOATS(RMS_NORM_VECTOR, rms_norm_vector)

#define RMS_NORM_GATED(name, T, N)                                                                                     \
  extern "C" __global__ void name(const T *x, uint32_t x_heads, uint32_t x_token, uint32_t x_head, const T *gate,      \
                                  uint32_t gate_heads, uint32_t gate_token, uint32_t gate_head, const float *weight,   \
                                  T *y, uint32_t rows, uint32_t d, float eps) {                                        \
    rms_norm<T, N, Then::GATE>(x, {x_heads, x_token, x_head}, gate, {gate_heads, gate_token, gate_head}, weight, y,    \
                               rows, d, eps);                                                                          \
  }
#define RMS_NORM_GATED_SCALAR(name, T) RMS_NORM_GATED(name, T, 1)
#define RMS_NORM_GATED_VECTOR(name, T) RMS_NORM_GATED(name, T, 16 / sizeof(T))
FOR_FLOATS(RMS_NORM_GATED_SCALAR, rms_norm_gated_scalar)
FOR_FLOATS(RMS_NORM_GATED_VECTOR, rms_norm_gated_vector)

#define ADD_RMS_NORM(name, T, N)                                                                                       \
  extern "C" __global__ void name(const T *x, uint32_t x_heads, uint32_t x_token, uint32_t x_head, const T *residual,  \
                                  uint32_t r_heads, uint32_t r_token, uint32_t r_head, const float *weight, T *y,      \
                                  uint32_t rows, uint32_t d, float eps, float factor) {                                \
    rms_norm<T, N, Then::ADD>(x, {x_heads, x_token, x_head}, residual, {r_heads, r_token, r_head}, weight, y, rows, d, \
                              eps, factor);                                                                            \
  }
#define ADD_RMS_NORM_SCALAR(name, T) ADD_RMS_NORM(name, T, 1)
#define ADD_RMS_NORM_VECTOR(name, T) ADD_RMS_NORM(name, T, 16 / sizeof(T))
FOR_FLOATS(ADD_RMS_NORM_SCALAR, add_rms_norm_scalar)
FOR_FLOATS(ADD_RMS_NORM_VECTOR, add_rms_norm_vector)

// y = layer_norm(x + residual); rows as for rms_norm.
template <typename T, int N>
__device__ void add_layer_norm(const T *x, Rows x_rows, const T *residual, Rows residual_rows, const float *weight,
                               const float *bias, T *y, uint32_t rows, uint32_t d, float eps) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  const bool inside = row < rows;
  const auto *from = reinterpret_cast<const Pack<T, N> *>(x + x_rows.start(inside ? row : 0));
  const auto *others = reinterpret_cast<const Pack<T, N> *>(residual + residual_rows.start(inside ? row : 0));
  const auto *factor = reinterpret_cast<const Pack<float, N> *>(weight);
  const auto *offset = reinterpret_cast<const Pack<float, N> *>(bias);
  auto *to = reinterpret_cast<Pack<T, N> *>(y + row * size_t(d));

  let_next_start();
  wait_for_inputs();
  const auto load = [&](uint32_t i) {
    const Pack<T, N> pack = from[i], other = others[i];
    Pack<float, N> sum;
#pragma unroll
    for (int j = 0; j < N; j++)
      sum.values[j] = widen(pack.values[j]) + widen(other.values[j]);
    return sum;
  };
  // Runs over the row: what a thread keeps, and what it reads again.
  Pack<float, N> kept[KEPT];
#pragma unroll
  for (int n = 0; n < KEPT; n++)
    if (const uint32_t i = n * blockDim.x + threadIdx.x; i < d / N)
      kept[n] = load(i);
  const auto each = [&](const auto &f) {
#pragma unroll
    for (int n = 0; n < KEPT; n++)
      if (const uint32_t i = n * blockDim.x + threadIdx.x; i < d / N)
        f(i, kept[n]);
    for (uint32_t i = KEPT * blockDim.x + threadIdx.x; i < d / N; i += blockDim.x)
      f(i, load(i));
  };
  float total = 0, squares = 0;
  each([&](uint32_t, const Pack<float, N> &sum) {
#pragma unroll
    for (int j = 0; j < N; j++)
      total += sum.values[j];
  });
  const float mean = sum_row<0>(total) / d;
  each([&](uint32_t, const Pack<float, N> &sum) {
#pragma unroll
    for (int j = 0; j < N; j++)
      squares += (sum.values[j] - mean) * (sum.values[j] - mean);
  });
  const float scale = 1 / sqrtf(sum_row<1>(squares) / d + eps);
  if (!inside)
    return;
  each([&](uint32_t i, const Pack<float, N> &sum) {
    const Pack<float, N> factors = factor[i], offsets = offset[i];
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; j++)
      pack.values[j] = narrow<T>(fmaf((sum.values[j] - mean) * scale, factors.values[j], offsets.values[j]));
    to[i] = pack;
  });
}

#define ADD_LAYER_NORM(name, T, N)                                                                                     \
  extern "C" __global__ void name(const T *x, uint32_t x_heads, uint32_t x_token, uint32_t x_head, const T *residual,  \
                                  uint32_t r_heads, uint32_t r_token, uint32_t r_head, const float *weight,            \
                                  const float *bias, T *y, uint32_t rows, uint32_t d, float eps) {                     \
    add_layer_norm<T, N>(x, {x_heads, x_token, x_head}, residual, {r_heads, r_token, r_head}, weight, bias, y, rows,   \
                         d, eps);                                                                                      \
  }
#define ADD_LAYER_NORM_SCALAR(name, T) ADD_LAYER_NORM(name, T, 1)
#define ADD_LAYER_NORM_VECTOR(name, T) ADD_LAYER_NORM(name, T, 16 / sizeof(T))
FOR_FLOATS(ADD_LAYER_NORM_SCALAR, add_layer_norm_scalar)
FOR_FLOATS(ADD_LAYER_NORM_VECTOR, add_layer_norm_vector)
