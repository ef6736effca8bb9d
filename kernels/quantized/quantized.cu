// Weights packed to 8 or 4 bits (layout: quantized/mod.rs): products of one row on the matrix units, rows, and the whole
// weight as floats.
#include "linear/behind.cuh"
#include "quantized/packed.cuh"

// Which of several weights, one after the other, row blockIdx.y of the result is of: that of its id, and row
// blockIdx.y / share of x. Nothing is written for an id beyond them.
struct Choice {
  const uint32_t *ids;
  uint32_t count, share;
};

// Products of x [inner], normalised if there is a norm. A block has panels of 32 outputs, or one of gates and one of what
// they multiply, gridDim.x apart; its warps share the groups. Of the eight columns of a product of 16 by 16 by 8 x is one.
template <typename T, typename Q, bool GATED, bool CHOSEN>
__device__ void quantized_linear(const T *x, const float *norm, float eps, const uint32_t *weight, Behind<T> behind,
                                 uint32_t inner, Choice choice) {
  constexpr int KINDS = GATED ? 2 : 1;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ __align__(16) float partial[2][KINDS][WARPS][OUTS], squares_of[WARPS];
  const uint32_t groups = (inner - 1) / GROUP + 1, padded = groups * GROUP, panels = (behind.outer - 1) / OUTS + 1;
  T *const xs = reinterpret_cast<T *>(shared);
  float *const sums = reinterpret_cast<float *>(xs + padded); // [groups]
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  let_next_start();
  if (CHOSEN) {
    wait_for_inputs();
    const uint32_t id = choice.ids[blockIdx.y];
    if (id >= choice.count)
      return;
    weight += id * (KINDS * panels * size_t(groups)) * BLOCK<Q>;
    x += blockIdx.y / choice.share * size_t(inner);
    behind.y += blockIdx.y * size_t(behind.outer);
  }
  // Weights are there before the step's first kernel.
  Stream<Q, KINDS> stream(weight, panels, groups);
  if (!CHOSEN)
    wait_for_inputs();

  const auto each = [&](const auto &visit) {
    for (uint32_t first = 0; first < padded; first += WARPS * 32 * 8) {
      const uint32_t column = first + threadIdx.x * 8;
      visit(column, column < inner);
    }
  };
  float scale = 1;
  if (norm) {
    float squares = 0;
    each([&](uint32_t column, bool is_inside) {
      if (is_inside) {
        const auto pack = *reinterpret_cast<const Pack<T, 8> *>(x + column);
        *reinterpret_cast<Pack<T, 8> *>(xs + column) = pack;
#pragma unroll
        for (int j = 0; j < 8; j++)
          squares = fmaf(widen(pack.values[j]), widen(pack.values[j]), squares);
      }
    });
    squares = sum_lanes(squares, 32);
    if (lane == 0)
      squares_of[warp] = squares;
    __syncthreads();
    squares = 0;
    for (int i = 0; i < WARPS; i++)
      squares += squares_of[i];
    scale = 1 / sqrtf(squares / inner + eps);
  }
  each([&](uint32_t column, bool is_inside) {
    Pack<T, 8> pack = {};
    if (is_inside)
      pack = *reinterpret_cast<const Pack<T, 8> *>((norm ? xs : x) + column);
    if (is_inside && norm) {
      const auto factors = *reinterpret_cast<const Pack<float, 8> *>(norm + column);
#pragma unroll
      for (int j = 0; j < 8; j++) // rounded as a norm by itself would round
        pack.values[j] = narrow<T>(widen(pack.values[j]) * scale * factors.values[j]);
    }
    if (column < padded)
      *reinterpret_cast<Pack<T, 8> *>(xs + column) = pack;
    if (Q::HAS_MINIMA) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; j++)
        sum += widen(pack.values[j]);
      sum = sum_lanes(sum, 8); // the eight packs of a group
      if (column < padded && column % GROUP == 0)
        sums[column / GROUP] = sum;
    }
  });
  __syncthreads();

  float total[4] = {}; // of outputs 4 g to 4 g + 3
  uint32_t turn_of_panel = 0;
  stream.each([&](const Part<Q> &part, uint32_t panel, uint32_t kind, uint32_t group, bool is_last) {
    if (group < groups) {
      float products[2][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS<Q>; chunk++) {
        Pack<uint32_t, EACH<Q> / 2> inputs = {};
        if (g == 0)
          inputs = *reinterpret_cast<const decltype(inputs) *>(xs + group * GROUP + (chunk * 4 + t) * EACH<Q>);
        part.template steps<T>(chunk, [&](int half, int step, const uint32_t(&a)[4]) {
          multiply_add(products[half], a, inputs.values[step * 2], inputs.values[step * 2 + 1], T());
        });
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        total[i] = fmaf(part.factor(part.scales, i), products[i / 2][i % 2 * 2], total[i]);
        if (Q::HAS_MINIMA)
          total[i] = fmaf(part.factor(part.minima, i), sums[group], total[i]);
      }
    }
    if (!is_last)
      return;
    const uint32_t buffer = turn_of_panel % 2; // the one before is still read
    if (t == 0)
      *reinterpret_cast<float4 *>(&partial[buffer][kind][warp][g * 4]) = make_float4(total[0], total[1], total[2], total[3]);
#pragma unroll
    for (int i = 0; i < 4; i++)
      total[i] = 0;
    if (kind + 1 < KINDS)
      return;
    __syncthreads();
    const uint32_t out = panel * OUTS + lane;
    if (turn_of_panel++ % WARPS == warp && out < behind.outer) {
      float both[KINDS] = {};
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
        for (int i = 0; i < WARPS; i++)
          both[kind] += partial[buffer][kind][i][lane];
      behind.finish(0, out, both[0], both[KINDS - 1]);
    }
  });
}

#define LINEAR(name, T, Q, GATED)                                                                                      \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, const float *norm, float eps, const uint32_t *weight, const T *bias, const T *onto, T *y,       \
           uint32_t inner, uint32_t outer, uint32_t activation) {                                                      \
    quantized_linear<T, Q, GATED, false>(                                                                              \
        x, norm, eps, weight, {y, bias, onto, 0, GATED ? outer / 2 : outer, activation}, inner, {});                   \
  }
#define CHOSEN(name, T, Q, GATED)                                                                                      \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, const uint32_t *weights, const uint32_t *ids, T *y, uint32_t inner, uint32_t outer,             \
           uint32_t count, uint32_t share, uint32_t activation) {                                                      \
    quantized_linear<T, Q, GATED, true>(x, nullptr, 0, weights,                                                        \
                                        {y, nullptr, nullptr, 0, GATED ? outer / 2 : outer, activation}, inner,        \
                                        {ids, count, share});                                                          \
  }
#define LINEARS(T, Q, suffix)                                                                                          \
  LINEAR(quantized_linear_##suffix, T, Q, false)                                                                       \
  LINEAR(quantized_linear_gated_##suffix, T, Q, true)                                                                  \
  CHOSEN(quantized_chosen_##suffix, T, Q, false)                                                                       \
  CHOSEN(quantized_chosen_gated_##suffix, T, Q, true)
LINEARS(__half, Q8, q8_f16)
LINEARS(__nv_bfloat16, Q8, q8_bf16)
LINEARS(__half, Q4, q4_f16)
LINEARS(__nv_bfloat16, Q4, q4_bf16)

// Weight (out, i) of a block's lane `out`.
template <typename Q> __device__ float weight_at(const uint32_t *block, uint32_t out, uint32_t i) {
  const float scale = factor(factor_bits(block + Q::WORDS, out));
  if constexpr (Q::HAS_MINIMA) {
    const uint32_t byte = block[i / 8 * OUTS + out] >> i % 4 * 8;
    return fmaf(scale, float(byte >> (i % 8 < 4 ? 0 : 4) & 15), factor(factor_bits(block + Q::WORDS, OUTS + out)));
  } else {
    return scale * float(int8_t(block[i / 4 * OUTS + out] >> i % 4 * 8));
  }
}

// y [ids, inner]: rows of a weight of `outer`, NaN for an id beyond.
template <typename T, typename Q>
__device__ void quantized_rows(const uint32_t *weight, const uint32_t *ids, T *y, uint32_t inner, uint32_t outer) {
  let_next_start();
  wait_for_inputs();
  const uint32_t groups = (inner - 1) / GROUP + 1, id = ids[blockIdx.y];
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < inner; i += gridDim.x * blockDim.x) {
    const uint32_t *block = weight + (id / OUTS * size_t(groups) + i / GROUP) * BLOCK<Q>;
    y[blockIdx.y * size_t(inner) + i] = narrow<T>(id < outer ? weight_at<Q>(block, id % OUTS, i % GROUP) : NAN);
  }
}

// The whole weight, y [outer, inner]. A warp turns a block in shared memory: lanes read outputs and write inputs.
template <typename T, typename Q>
__device__ void quantized_unpack(const uint32_t *weight, T *y, uint32_t inner, uint32_t outer) {
  constexpr int UNPACKING = 4; // warps
  __shared__ T tiles[UNPACKING][OUTS][GROUP + 2];
  const uint32_t groups = (inner - 1) / GROUP + 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t index = blockIdx.x * size_t(UNPACKING) + warp;
  const uint32_t panel = index / groups, group = index % groups;
  if (panel >= (outer - 1) / OUTS + 1)
    return;
  let_next_start();
  const uint32_t *const block = weight + index * BLOCK<Q>;
#pragma unroll 8
  for (int i = 0; i < GROUP; i++)
    tiles[warp][lane][i] = narrow<T>(weight_at<Q>(block, lane, i));
  wait_for_inputs(); // what y held before has been read
  __syncwarp();
  for (uint32_t out = 0; out < OUTS && panel * OUTS + out < outer; out++)
    for (uint32_t i = lane; i < GROUP && group * GROUP + i < inner; i += 32)
      y[(panel * OUTS + out) * size_t(inner) + group * GROUP + i] = tiles[warp][out][i];
}

#define UNPACKED(name, T, Q)                                                                                           \
  extern "C" __global__ void quantized_rows_##name(const uint32_t *weight, const uint32_t *ids, T *y, uint32_t inner,  \
                                                   uint32_t outer) {                                                   \
    quantized_rows<T, Q>(weight, ids, y, inner, outer);                                                                \
  }                                                                                                                    \
  extern "C" __global__ void quantized_unpack_##name(const uint32_t *weight, T *y, uint32_t inner, uint32_t outer) {   \
    quantized_unpack<T, Q>(weight, y, inner, outer);                                                                   \
  }
UNPACKED(q8_f32, float, Q8)
UNPACKED(q8_f16, __half, Q8)
UNPACKED(q8_bf16, __nv_bfloat16, Q8)
UNPACKED(q4_f32, float, Q4)
UNPACKED(q4_f16, __half, Q4)
UNPACKED(q4_bf16, __nv_bfloat16, Q4)
