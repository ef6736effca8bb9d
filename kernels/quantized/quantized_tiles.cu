// Products of several rows with weights packed to 8 or 4 bits, on the matrix units: weights become floats in registers, once
// for all rows of a block.
#include "linear/behind.cuh"
#include "quantized/packed.cuh"

struct Sizes {
  uint32_t rows, inner; // x [rows, inner]
  uint32_t x_stride;
};

// Two ones.
template <typename T> constexpr uint32_t ONES = 0x3f803f80;
template <> constexpr uint32_t ONES<__half> = 0x3c003c00;

// Rows of x for the products of a group.
template <typename T, typename Q, int TILES> struct Inputs {
  Pack<uint32_t, EACH<Q> / 2> of[TILES][CHUNKS<Q>];

  // Of row lane / 4 of each tile, from `rows` on.
  __device__ void load(const T *const (&rows)[TILES], uint32_t group, uint32_t inner) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS<Q>; chunk++) {
      const uint32_t column = group * GROUP + (chunk * 4 + threadIdx.x % 4) * EACH<Q>;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        of[tile][chunk] = {};
        if (column < inner)
          of[tile][chunk] = *reinterpret_cast<const Pack<uint32_t, EACH<Q> / 2> *>(rows[tile] + column);
      }
    }
  }
};

// A block has panels of 32 outputs, or one of gates and one of what they multiply, and 8 TILES rows; its warps share the
// groups. gridDim.y blocks have the same panels and other rows.
template <typename T, typename Q, bool GATED, int TILES>
__device__ void multiply_tiles(const T *x, const uint32_t *weight, Behind<T> behind, Sizes s) {
  constexpr int KINDS = GATED ? 2 : 1, ROWS = 8 * TILES;
  extern __shared__ float partial[]; // [KINDS, WARPS, ROWS, OUTS + 1]
  const uint32_t groups = (s.inner - 1) / GROUP + 1, panels = (behind.outer - 1) / OUTS + 1;
  const uint32_t first_row = blockIdx.y * ROWS;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T *own[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    own[tile] = x + min(first_row + tile * 8 + g, s.rows - 1) * size_t(s.x_stride);
  let_next_start();
  Stream<Q, KINDS> stream(weight, panels, groups); // weights are there before the step's first kernel
  wait_for_inputs();
  Inputs<T, Q, TILES> ahead;
  ahead.load(own, warp, s.inner);

  float total[TILES][2][4] = {};
  stream.each([&](const Part<Q> &part, uint32_t panel, uint32_t kind, uint32_t group, bool is_last) {
    const auto inputs = ahead;
    ahead.load(own, is_last ? warp : group + WARPS, s.inner);
    if (group < groups) {
      float products[TILES][2][4] = {}, sums[TILES][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS<Q>; chunk++) {
        part.template steps<T>(chunk, [&](int half, int step, const uint32_t(&a)[4]) {
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const auto &b = inputs.of[tile][chunk].values;
            multiply_add(products[tile][half], a, b[step * 2], b[step * 2 + 1], T());
          }
        });
        if (Q::HAS_MINIMA) {
          constexpr uint32_t ones[4] = {ONES<T>, ONES<T>, ONES<T>, ONES<T>};
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int step = 0; step < EACH<Q> / 4; step++) {
              const auto &b = inputs.of[tile][chunk].values;
              multiply_add(sums[tile], ones, b[step * 2], b[step * 2 + 1], T());
            }
        }
      }
      // A lane has outputs 4 g + 2 half and the next, rows 2 t and 2 t + 1 of a tile.
#pragma unroll
      for (int of = 0; of < 4; of++) {
        const float scale = part.factor(part.scales, of), minimum = part.factor(part.minima, of);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float &sum = total[tile][of / 2][of % 2 * 2 + i];
            sum = fmaf(scale, products[tile][of / 2][of % 2 * 2 + i], sum);
            if (Q::HAS_MINIMA)
              sum = fmaf(minimum, sums[tile][i], sum);
          }
      }
    }
    if (!is_last)
      return;
    float *const own_sums = partial + (kind * WARPS + warp) * ROWS * (OUTS + 1);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          own_sums[(tile * 8 + 2 * t + i % 2) * (OUTS + 1) + g * 4 + half * 2 + i / 2] = total[tile][half][i];
          total[tile][half][i] = 0;
        }
    if (kind + 1 < KINDS)
      return;
    __syncthreads();
    const uint32_t out = panel * OUTS + lane;
    static_assert(ROWS <= WARPS, "a warp finishes a row");
    if (warp < ROWS && first_row + warp < s.rows && out < behind.outer) {
      float both[KINDS] = {};
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++)
#pragma unroll
        for (int of = 0; of < WARPS; of++)
          both[kind] += partial[((kind * WARPS + of) * ROWS + warp) * (OUTS + 1) + lane];
      behind.finish(first_row + warp, out, both[0], both[KINDS - 1]);
    }
    __syncthreads(); // the sums have been read
  });
}

#define TILES(name, T, Q, GATED, COUNT)                                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                             \
      name(const T *x, uint32_t x_stride, const uint32_t *weight, const T *bias, const T *onto, uint32_t onto_stride,  \
           T *y, uint32_t rows, uint32_t inner, uint32_t outer, uint32_t activation) {                                 \
    multiply_tiles<T, Q, GATED, COUNT>(                                                                                \
        x, weight, {y, bias, onto, onto_stride, GATED ? outer / 2 : outer, activation}, {rows, inner, x_stride});      \
  }
#define COUNTS(T, Q, suffix)                                                                                           \
  TILES(quantized_tiles_8_##suffix, T, Q, false, 1)                                                                    \
  TILES(quantized_tiles_8_gated_##suffix, T, Q, true, 1)                                                               \
  TILES(quantized_tiles_16_##suffix, T, Q, false, 2)                                                                   \
  TILES(quantized_tiles_16_gated_##suffix, T, Q, true, 2)
COUNTS(__half, Q8, q8_f16)
COUNTS(__nv_bfloat16, Q8, q8_bf16)
COUNTS(__half, Q4, q4_f16)
COUNTS(__nv_bfloat16, Q4, q4_bf16)
