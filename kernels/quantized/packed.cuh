// Weights packed to 8 or 4 bits (layout: quantized/mod.rs) as operands of products of 16 by 16 by 8, and their way there.
#pragma once

#include "mma.cuh"

constexpr int OUTS = 32, GROUP = 64; // of a block
constexpr int WARPS = 16;             // that share the groups of a panel

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

// Inputs of an output that a lane has side by side, and how many such chunks in a group.
template <typename Q> constexpr int EACH = Q::HAS_MINIMA ? 8 : 4;
template <typename Q> constexpr int CHUNKS = GROUP / 4 / EACH<Q>;

// A lane's part of a group: words of outputs 4 g to 4 g + 3 (g = lane / 4), and their factors. In a product a lane has inputs
// that lie side by side, and rows g and g + 8 are outputs side by side: both stand in another order than in memory.
template <typename Q> struct Part {
  uint4 words[CHUNKS<Q>];
  uint2 scales, minima;

  __device__ void load(const uint32_t *block, uint32_t lane) {
    const uint32_t g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < CHUNKS<Q>; i++)
      words[i] = __ldcg(reinterpret_cast<const uint4 *>(block + (i * 4 + t) * OUTS) + g);
    const auto *const factors = reinterpret_cast<const uint2 *>(block + Q::WORDS) + g;
    scales = __ldcg(factors);
    if (Q::HAS_MINIMA)
      minima = __ldcg(factors + OUTS / 4);
  }

  // Of output 4 g + i.
  __device__ static float factor(uint2 factors, int i) {
    const uint32_t word = i < 2 ? factors.x : factors.y;
    return __uint_as_float(i % 2 ? word & 0xffff0000 : word << 16);
  }

  // Calls multiply(half, step, a) for the operands of a chunk: 16 outputs, four of its inputs a lane.
  template <typename T, typename F> __device__ void steps(int chunk, const F &multiply) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t upper = half ? words[chunk].z : words[chunk].x, lower = half ? words[chunk].w : words[chunk].y;
      const uint32_t u0 = spread(upper, false), u1 = spread(upper, true);
      const uint32_t l0 = spread(lower, false), l1 = spread(lower, true);
#pragma unroll
      for (int step = 0; step < EACH<Q> / 4; step++)
        if constexpr (Q::HAS_MINIMA)
          multiply(half, step,
                   {of_halves<T>(u0 >> step * 4), of_halves<T>(l0 >> step * 4), of_halves<T>(u1 >> step * 4),
                    of_halves<T>(l1 >> step * 4)});
        else
          multiply(half, step, {of_bytes<T>(u0), of_bytes<T>(l0), of_bytes<T>(u1), of_bytes<T>(l1)});
    }
  }
};

// What a warp has of the panels of a block, blocks apart: group after group, KINDS weights in turn, two parts under way.
template <typename Q, int KINDS> struct Stream {
  static constexpr int DEPTH = 2;

  struct Place {
    uint32_t panel, kind, turn;

    __device__ void advance(uint32_t turns) {
      if (++turn < turns)
        return;
      turn = 0;
      if (++kind < KINDS)
        return;
      kind = 0;
      panel += gridDim.x;
    }
  };
  const uint32_t *weight;
  uint32_t panels, groups, turns;
  Place fetched = {blockIdx.x, 0, 0};
  Part<Q> parts[DEPTH] = {};

  __device__ Stream(const uint32_t *weight, uint32_t panels, uint32_t groups)
      : weight(weight), panels(panels), groups(groups), turns((groups - 1) / WARPS + 1) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
      fetch(parts[i]);
  }

  __device__ static uint32_t group_of(uint32_t turn) { return turn * WARPS + threadIdx.x / 32; }

  __device__ void fetch(Part<Q> &part) {
    const uint32_t group = group_of(fetched.turn);
    if (fetched.panel < panels && group < groups)
      part.load(weight + ((fetched.kind * panels + fetched.panel) * size_t(groups) + group) * BLOCK<Q>,
                threadIdx.x % 32);
    fetched.advance(turns);
  }

  // Calls visit(part, panel, kind, group, is_last) of each turn, is_last in the last of a kind. All warps of the block take
  // the same turns; where a group is not there, its part is another's.
  template <typename F> __device__ void each(const F &visit) {
    Place place = {blockIdx.x, 0, 0};
    while (place.panel < panels) {
#pragma unroll
      for (int i = 0; i < DEPTH; i++) {
        if (place.panel >= panels)
          return;
        const Part<Q> part = parts[i];
        fetch(parts[i]);
        visit(part, place.panel, place.kind, group_of(place.turn), place.turn + 1 == turns);
        place.advance(turns);
      }
    }
  }
};
