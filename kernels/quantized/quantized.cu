// Weights packed to 8 or 4 bits (layout: quantized/mod.rs): products of up to 8 rows on the matrix units, rows, and the
// whole weight as floats.
#include "linear/behind.cuh"
#include "mma.cuh"

constexpr int OUTS = 32, GROUP = 64; // of a block
constexpr int WARPS = 16, ROWS = 8;
constexpr int PAD = 8; // values between rows of x, so that lanes meet in no bank

struct Q8 {
  static constexpr int WORDS = 16 * OUTS, FACTORS = OUTS / 2; // of codes and of factors, in a block
  static constexpr bool HAS_MINIMA = false;
};
struct Q4 {
  static constexpr int WORDS = 8 * OUTS, FACTORS = OUTS;
  static constexpr bool HAS_MINIMA = true;
};

template <typename Q> constexpr int BLOCK = Q::WORDS + Q::FACTORS; // words

__device__ inline uint16_t factor_bits(const uint32_t *words, int i) {
  return reinterpret_cast<const uint16_t *>(words)[i];
}
__device__ inline float factor(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

// Two small integers as floats of 16 bits: in the lowest bits of a large power of two they are its mantissa, and the
// difference of two such numbers is exact.
template <typename T> struct Magic;
template <> struct Magic<__nv_bfloat16> {
  static constexpr uint32_t BASE = 0x43004300; // 128
  __device__ static uint32_t difference(uint32_t a, uint32_t b) {
    const __nv_bfloat162 y =
        __hsub2(reinterpret_cast<const __nv_bfloat162 &>(a), reinterpret_cast<const __nv_bfloat162 &>(b));
    return reinterpret_cast<const uint32_t &>(y);
  }
};
template <> struct Magic<__half> {
  static constexpr uint32_t BASE = 0x64006400; // 1024
  __device__ static uint32_t difference(uint32_t a, uint32_t b) {
    const __half2 y = __hsub2(reinterpret_cast<const __half2 &>(a), reinterpret_cast<const __half2 &>(b));
    return reinterpret_cast<const uint32_t &>(y);
  }
};

// The first or the last two bytes of a word, each in 16 bits.
__device__ inline uint32_t spread(uint32_t word, bool last) { return __byte_perm(word, 0, last ? 0x4342 : 0x4140); }

// Two signed bytes: their lower seven bits, less 128 where the highest is set.
template <typename T> __device__ uint32_t of_bytes(uint32_t pair) {
  constexpr uint32_t BASE = Magic<T>::BASE;
  return Magic<T>::difference(pair & 0x007f007f | BASE, pair & 0x00800080 | BASE);
}
// Two codes of four bits.
template <typename T> __device__ uint32_t of_halves(uint32_t pair) {
  constexpr uint32_t BASE = Magic<T>::BASE;
  return Magic<T>::difference(pair & 0x000f000f | BASE, BASE);
}

struct Sizes {
  uint32_t rows, inner, outer; // x [rows, inner], the weight [outer, inner]
  uint32_t x_stride;
};

// Which of several weights, one after the other, row blockIdx.y of the result is of: that of its id, and row
// blockIdx.y / share of x. Nothing is written for an id beyond them.
struct Choice {
  const uint32_t *ids;
  uint32_t count, share;
};

// Products of x [rows, inner], up to 8 rows, normalised if there is a norm and one row. A block has a panel of 32
// outputs, or one of gates and one of what they multiply; its warps share the groups. In a product of 16 by 8 by 16 a
// lane has four inputs of an output side by side, so inputs stand in another order than in memory, the same on both
// sides.
template <typename T, typename Q, bool GATED, bool CHOSEN>
__device__ void quantized_linear(const T *x, const float *norm, float eps, const uint32_t *weight, Behind<T> behind,
                                 Sizes s, Choice choice) {
  constexpr int KINDS = GATED ? 2 : 1, FACTORS = Q::HAS_MINIMA ? 2 : 1;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float partial[KINDS][WARPS][ROWS][OUTS + 1], squares_of[WARPS];
  const uint32_t groups = (s.inner - 1) / GROUP + 1, padded = groups * GROUP, stride = padded + PAD;
  T *const xs = reinterpret_cast<T *>(shared);
  float *const sums = reinterpret_cast<float *>(xs + s.rows * stride); // [rows, groups]
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // A lane's part of a group: words of outputs g, g + 8, g + 16 and g + 24, at steps t, t + 4, ..., and their factors.
  constexpr int HELD = Q::WORDS / 32;
  struct Part {
    uint32_t words[HELD];
    uint16_t factors[FACTORS][4];
  } next;
  const auto load = [&](uint32_t kind, uint32_t group) {
    if (kind >= KINDS || group >= groups)
      return;
    const uint32_t *const block = weight + ((kind * gridDim.x + blockIdx.x) * size_t(groups) + group) * BLOCK<Q>;
#pragma unroll
    for (int i = 0; i < HELD; i++)
      next.words[i] = __ldcs(block + (i / 4 * 4 + t) * OUTS + i % 4 * 8 + g);
#pragma unroll
    for (int of = 0; of < FACTORS; of++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        next.factors[of][i] = factor_bits(block + Q::WORDS, of * OUTS + i * 8 + g);
  };
  let_next_start();
  if (CHOSEN) {
    wait_for_inputs();
    const uint32_t id = choice.ids[blockIdx.y];
    if (id >= choice.count)
      return;
    weight += id * (KINDS * gridDim.x * size_t(groups)) * BLOCK<Q>;
    x += blockIdx.y / choice.share * size_t(s.x_stride);
    behind.y += blockIdx.y * size_t(behind.outer);
  }
  // Weights are there before the step's first kernel.
  load(0, warp);
  if (!CHOSEN)
    wait_for_inputs();

  const uint32_t row_packs = padded / 8;
  const auto each = [&](const auto &visit) {
    for (uint32_t first = 0; first < s.rows * row_packs; first += WARPS * 32) {
      const uint32_t at = first + threadIdx.x, row = at / row_packs, column = at % row_packs * 8;
      visit(at, row, column, row < s.rows && column < s.inner);
    }
  };
  const auto keep = [&](uint32_t at, uint32_t row, uint32_t column, const Pack<T, 8> &pack) {
    if (row < s.rows)
      *reinterpret_cast<Pack<T, 8> *>(xs + row * stride + column) = pack;
    if (Q::HAS_MINIMA) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; j++)
        sum += widen(pack.values[j]);
      sum = sum_lanes(sum, 8); // the eight packs of a group
      if (row < s.rows && at % 8 == 0)
        sums[row * groups + column / GROUP] = sum;
    }
  };
  float scale = 1;
  if (norm) {
    float squares = 0;
    each([&](uint32_t, uint32_t, uint32_t column, bool is_inside) {
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
    scale = 1 / sqrtf(squares / s.inner + eps);
  }
  each([&](uint32_t at, uint32_t row, uint32_t column, bool is_inside) {
    Pack<T, 8> pack = {};
    if (is_inside)
      pack = *reinterpret_cast<const Pack<T, 8> *>(norm ? xs + column : x + row * size_t(s.x_stride) + column);
    if (is_inside && norm) {
      const auto factors = *reinterpret_cast<const Pack<float, 8> *>(norm + column);
#pragma unroll
      for (int j = 0; j < 8; j++) // rounded as a norm by itself would round
        pack.values[j] = narrow<T>(widen(pack.values[j]) * scale * factors.values[j]);
    }
    keep(at, row, column, pack);
  });
  __syncthreads();

#pragma unroll
  for (int kind = 0; kind < KINDS; kind++) {
    float total[2][4] = {};
    for (uint32_t group = warp; group < groups; group += WARPS) {
      const Part part = next;
      if (const uint32_t after = group + WARPS; after < groups)
        load(kind, after);
      else
        load(kind + 1, warp);
      float products[2][4] = {};
      const auto multiply = [&](int tile, uint32_t first, uint32_t second, uint32_t third, uint32_t fourth,
                                const uint32_t(&b)[2]) {
        const uint32_t a[4] = {first, second, third, fourth};
        multiply_add(products[tile], a, b[0], b[1], T());
      };
#pragma unroll
      for (int chunk = 0; chunk < HELD / 4; chunk++) {
        constexpr int EACH = Q::HAS_MINIMA ? 8 : 4; // inputs of a lane
        uint32_t inputs[EACH / 2] = {};
        if (g < s.rows) {
          const T *const from = xs + g * stride + group * GROUP + (chunk * 4 + t) * EACH;
#pragma unroll
          for (int i = 0; i < EACH / 2; i++)
            inputs[i] = reinterpret_cast<const uint32_t *>(from)[i];
        }
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          const uint32_t upper = part.words[chunk * 4 + tile * 2], lower = part.words[chunk * 4 + tile * 2 + 1];
          const uint32_t u0 = spread(upper, false), u1 = spread(upper, true);
          const uint32_t l0 = spread(lower, false), l1 = spread(lower, true);
          if constexpr (Q::HAS_MINIMA) {
            multiply(tile, of_halves<T>(u0), of_halves<T>(l0), of_halves<T>(u1), of_halves<T>(l1),
                     {inputs[0], inputs[1]});
            multiply(tile, of_halves<T>(u0 >> 4), of_halves<T>(l0 >> 4), of_halves<T>(u1 >> 4), of_halves<T>(l1 >> 4),
                     {inputs[2], inputs[3]});
          } else {
            multiply(tile, of_bytes<T>(u0), of_bytes<T>(l0), of_bytes<T>(u1), of_bytes<T>(l1), {inputs[0], inputs[1]});
          }
        }
      }
      // A lane has outputs g and g + 8 of a tile, rows 2 t and 2 t + 1 of x.
#pragma unroll
      for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint32_t row = 2 * t + i % 2;
          const int of = tile * 2 + i / 2;
          total[tile][i] = fmaf(factor(part.factors[0][of]), products[tile][i], total[tile][i]);
          if (Q::HAS_MINIMA && row < s.rows)
            total[tile][i] = fmaf(factor(part.factors[FACTORS - 1][of]), sums[row * groups + group], total[tile][i]);
        }
    }
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        partial[kind][warp][2 * t + i % 2][tile * 16 + i / 2 * 8 + g] = total[tile][i];
  }
  __syncthreads();
  const uint32_t row = threadIdx.x / OUTS, out = blockIdx.x * OUTS + threadIdx.x % OUTS;
  if (row >= s.rows || out >= behind.outer)
    return;
  float both[KINDS] = {};
#pragma unroll
  for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
    for (int i = 0; i < WARPS; i++)
      both[kind] += partial[kind][i][row][threadIdx.x % OUTS];
  behind.finish(row, out, both[0], both[KINDS - 1]);
}

#define LINEAR(name, T, Q, GATED)                                                                                      \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, uint32_t x_stride, const float *norm, float eps, const uint32_t *weight, const T *bias,         \
           const T *onto, uint32_t onto_stride, T *y, uint32_t rows, uint32_t inner, uint32_t outer,                   \
           uint32_t activation) {                                                                                      \
    quantized_linear<T, Q, GATED, false>(x, norm, eps, weight,                                                         \
                                         {y, bias, onto, onto_stride, GATED ? outer / 2 : outer, activation},          \
                                         {rows, inner, outer, x_stride}, {});                                          \
  }
#define CHOSEN(name, T, Q, GATED)                                                                                      \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, const uint32_t *weights, const uint32_t *ids, T *y, uint32_t inner, uint32_t outer,             \
           uint32_t count, uint32_t share, uint32_t activation) {                                                      \
    quantized_linear<T, Q, GATED, true>(x, nullptr, 0, weights,                                                        \
                                        {y, nullptr, nullptr, 0, GATED ? outer / 2 : outer, activation},               \
                                        {1, inner, outer, inner}, {ids, count, share});                                \
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
