// The gated MLPs of experts. A pair is one of the k experts of one token; pairs stand side by side by token, or grouped by
// expert.
//
// Few tokens for an expert: what counts is to stream its weights once, at the speed of memory. Rows of weights are the
// operand of 16 rows, tokens that of 8 columns, and weights go from memory to registers 16 bytes at a time: which four
// values a lane has does not matter to a sum as long as it has the same four of weights and tokens.
#include "mma.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

constexpr uint32_t TILE = 64; // pairs of a tile of the product of many
constexpr uint32_t NONE = UINT32_MAX;

// One block. starts [num_experts + 1]: where the pairs of an expert start in `order` [pairs], in which their order
// within an expert is any: no result depends on it. Ids beyond the experts are left out. tiles [pairs / TILE +
// num_experts]: the expert of each tile of pairs, the first at starts / TILE + the expert's number.
extern "C" __global__ void __launch_bounds__(1024)
    moe_group(const uint32_t *ids, uint32_t *starts, uint32_t *order, uint32_t *tiles, uint32_t pairs,
              uint32_t num_experts) {
  constexpr int AHEAD = 8;
  extern __shared__ uint32_t counts[];
  const auto each = [&](auto take) {
    for (uint32_t first = threadIdx.x; first < pairs; first += AHEAD * blockDim.x) {
      uint32_t id[AHEAD];
#pragma unroll
      for (int a = 0; a < AHEAD; a++)
        id[a] = first + a * blockDim.x < pairs ? ids[first + a * blockDim.x] : NONE;
#pragma unroll
      for (int a = 0; a < AHEAD; a++)
        if (id[a] < num_experts)
          take(id[a], first + a * blockDim.x);
    }
  };
  for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x)
    counts[e] = 0;
  __syncthreads();
  each([&](uint32_t id, uint32_t) { atomicAdd(&counts[id], 1); });
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
      if (e < num_experts) {
        const uint32_t start = before + sum - count, end = start + count;
        starts[e] = counts[e] = start;
        for (uint32_t tile = start / TILE + e; tile <= end / TILE + e; tile++)
          if (tile < pairs / TILE + num_experts)
            tiles[tile] = (tile - start / TILE - e) * TILE < count ? e : NONE;
      }
      before += __shfl_sync(0xffffffff, sum, 31);
    }
    if (threadIdx.x == 0)
      starts[num_experts] = before;
    for (uint32_t tile = before / TILE + num_experts + threadIdx.x; tile < pairs / TILE + num_experts; tile += 32)
      tiles[tile] = NONE;
  }
  __syncthreads();
  each([&](uint32_t id, uint32_t pair) { order[atomicAdd(&counts[id], 1)] = pair; });
}

__device__ inline float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }

template <typename T> __device__ inline float rounded(float x) { return widen(narrow<T>(x)); }

template <typename T> __device__ inline float activate(float gate, float up) {
  return rounded<T>(silu(rounded<T>(gate)) * rounded<T>(up));
}

// sums [HALVES][COUNT][4] += weights [HALVES x 16 rows, columns] tokens [8 COUNT, columns]^T over every `step`-th 32
// columns from `first` on. Each lane brings its rows: weights' lane / 4 and 8 more of each half, tokens' lane / 4 of
// each tile, all at column 8 (lane % 4). What a lane needs passes through shared memory of its own, DEPTH steps ahead:
// in registers the compiler would not keep as much in flight.
template <int DEPTH, int HALVES, int COUNT, typename T>
__device__ inline void stream(float (&sums)[HALVES][COUNT][4], const T *const (&rows)[HALVES][2],
                              const T *const (&tokens)[COUNT], uint32_t columns, uint32_t first, uint32_t step) {
  constexpr int ENTRIES = 2 * HALVES + COUNT;
  extern __shared__ uint4 memory[];
  uint4 *const ring = memory + threadIdx.x / 32 * (DEPTH * ENTRIES * 32) + threadIdx.x % 32;
  const int steps = columns / 32 > first ? (columns / 32 - first + step - 1) / step : 0;
  const auto fetch = [&](int i) {
    if (i < steps) {
      const uint32_t column = (first + i * step) * 32;
      uint4 *const to = ring + i % DEPTH * (ENTRIES * 32);
#pragma unroll
      for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int r = 0; r < 2; r++)
          copy_async(to + (half * 2 + r) * 32, rows[half][r] + column);
#pragma unroll
      for (int tile = 0; tile < COUNT; tile++)
        copy_async(to + (2 * HALVES + tile) * 32, tokens[tile] + column);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < DEPTH - 1; i++)
    fetch(i);
#pragma unroll 1
  for (int i = 0; i < steps; i++) {
    fetch(i + DEPTH - 1);
    wait_for_copies<DEPTH - 1>();
    const uint4 *const from = ring + i % DEPTH * (ENTRIES * 32);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      const uint4 upper = from[half * 64], lower = from[half * 64 + 32];
      const uint32_t left[4] = {upper.x, lower.x, upper.y, lower.y}, right[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int tile = 0; tile < COUNT; tile++) {
        const uint4 x = from[(2 * HALVES + tile) * 32];
        multiply_add(sums[half][tile], left, x.x, x.y, T());
        multiply_add(sums[half][tile], right, x.z, x.w, T());
      }
    }
  }
}
// Bytes of shared memory of a block that streams.
template <int DEPTH, int HALVES, int COUNT>
constexpr int RING = WARPS * DEPTH * (2 * HALVES + COUNT) * 32 * sizeof(uint4);

// Of eight tokens, that share a block's stream of weights: an expert of more streams them again.
constexpr int TILES = 1;

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
template <typename T>
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
      const uint32_t present = group.first + (place < group.count ? place : 0);
      tokens[tile] = x + (starts ? order[present] : present) / k * size_t(hidden) + lane % 4 * 8;
    }
    float sums[2][TILES][4] = {};
    stream<4>(sums, rows, tokens, hidden, warp, WARPS);
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
template <typename T>
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
      const uint32_t present = group.first + (place < group.count ? place : 0);
      tokens[tile] = activated + present * size_t(intermediate) + lane % 4 * 8;
    }
    float sums[2][TILES][4] = {};
    stream<4>(sums, rows, tokens, intermediate, 0, 1);
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

// Calls `add` with each j below k in the order of ids[j]. All lanes of the warp call it.
template <typename Add> __device__ inline void in_order(const uint32_t *ids, uint32_t k, Add add) {
  if (k <= 32) {
    const uint32_t lane = threadIdx.x % 32, id = lane < k ? ids[lane] : NONE;
    uint32_t rank = 0;
    for (uint32_t j = 0; j < k; j++) {
      const uint32_t other = __shfl_sync(0xffffffff, id, j);
      rank += other < id || (other == id && j < lane);
    }
#pragma unroll 8
    for (uint32_t i = 0; i < k; i++)
      add(__ffs(__ballot_sync(0xffffffff, lane < k && rank == i)) - 1);
    return;
  }
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
  const bool inside = column < hidden; // the other lanes still take part in the order
  ids += token * size_t(k), weights += token * size_t(k), terms += token * size_t(k) * hidden + column;
  float sums[N] = {};
  in_order(ids, k, [&](uint32_t j) {
    if (!inside || ids[j] >= num_experts)
      return;
    const auto term = *reinterpret_cast<const Pack<T, N> *>(terms + j * size_t(hidden));
#pragma unroll
    for (int i = 0; i < N; i++)
      sums[i] = fmaf(widen(weights[j]), widen(term.values[i]), sums[i]);
  });
  if (!inside)
    return;
  Pack<T, N> sum;
#pragma unroll
  for (int i = 0; i < N; i++)
    sum.values[i] = narrow<T>(sums[i]);
  *reinterpret_cast<Pack<T, N> *>(y + token * size_t(hidden) + column) = sum;
}

constexpr uint32_t MOST_EXPERTS = 32; // of a token, k

// Down and the sum in one, a block for 16 rows of one token, its pairs shared by warps.
template <typename T>
__device__ void down_few(const T *activated, const T *weights, const uint32_t *ids, const T *factors, T *y,
                         uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {
  __shared__ float terms[MOST_EXPERTS][16];
  const uint32_t tiles = hidden / 16, row = blockIdx.x % tiles * 16, token = blockIdx.x / tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ids += token * size_t(k), factors += token * size_t(k);
  for (uint32_t j = warp; j < k; j += WARPS) {
    float sums[1][1][4] = {};
    if (ids[j] < num_experts) {
      const T *const first =
          weights + (ids[j] * size_t(hidden) + row + lane / 4) * intermediate + lane % 4 * 8;
      const T *const rows[1][2] = {{first, first + 8 * size_t(intermediate)}};
      const T *const tokens[1] = {activated + (token * size_t(k) + j) * intermediate + lane % 4 * 8};
      stream<8>(sums, rows, tokens, intermediate, 0, 1);
    }
    if (lane % 4 == 0) {
      terms[j][lane / 4] = rounded<T>(sums[0][0][0]);
      terms[j][lane / 4 + 8] = rounded<T>(sums[0][0][2]);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float sum = 0;
    in_order(ids, k, [&](uint32_t j) { sum = fmaf(widen(factors[j]), terms[j][lane % 16], sum); });
    if (lane < 16)
      y[token * size_t(hidden) + row + lane] = narrow<T>(sum);
  }
}

// Many tokens for an expert: tiles of TILE pairs by 128 rows of weights, a warp having 32 by 64 of it; 64 columns at a
// time of both are fetched into shared memory, STAGES ahead.
constexpr int TILE_THREADS = 128;
constexpr int TILE_ROWS = 128;
constexpr int STAGES = 3;
template <typename T> struct TileShared {
  T tokens[STAGES][TILE * 64], weights[STAGES][TILE_ROWS * 64];
};

// `token` gives the start of a pair's row by its place, `matrix` that of row 16 n + i of the weights from (n, i). Calls
// `store` with a place, the lane's sums of 16 places, and which of their two rows is the place's.
template <typename T, typename Token, typename Matrix, typename Store>
__device__ inline void tile_product(Token token, Matrix matrix, uint32_t columns, Store store) {
  extern __shared__ uint4 memory[];
  auto &shared = *reinterpret_cast<TileShared<T> *>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, loader = threadIdx.x / 8, piece = threadIdx.x % 8;
  const T *tokens[TILE / 16], *rows[TILE_ROWS / 16];
#pragma unroll
  for (int n = 0; n < TILE / 16; n++)
    tokens[n] = token(n * 16 + loader) + piece * 8;
#pragma unroll
  for (int n = 0; n < TILE_ROWS / 16; n++)
    rows[n] = matrix(n, loader) + piece * 8;
  const int steps = columns / 64;
  const auto fetch = [&](int step) {
    if (step < steps) {
      const Tile<T, 8> token_tile{shared.tokens[step % STAGES]}, row_tile{shared.weights[step % STAGES]};
#pragma unroll
      for (int n = 0; n < TILE / 16; n++)
        copy_async(token_tile.at(n * 16 + loader, piece), tokens[n] + step * 64);
#pragma unroll
      for (int n = 0; n < TILE_ROWS / 16; n++)
        copy_async(row_tile.at(n * 16 + loader, piece), rows[n] + step * 64);
    }
    commit_copies();
  };
  const int first_token = warp % 2 * 32, first_row = warp / 2 * 64;
  float sums[2][8][4] = {};
  for (int step = 0; step < STAGES - 1; step++)
    fetch(step);
  for (int step = 0; step < steps; step++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    fetch(step + STAGES - 1);
    const Tile<T, 8> token_tile{shared.tokens[step % STAGES]}, row_tile{shared.weights[step % STAGES]};
#pragma unroll
    for (int part = 0; part < 4; part++) {
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++)
        load_matrices(left[m], token_tile.at(first_token + m * 16 + lane % 16, part * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < 4; n++) {
        uint32_t right[4];
        load_matrices(right, row_tile.at(first_row + n * 16 + lane / 16 * 8 + lane % 8, part * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < 2; m++) {
          multiply_add(sums[m][2 * n], left[m], right[0], right[1], T());
          multiply_add(sums[m][2 * n + 1], left[m], right[2], right[3], T());
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      store(first_token + m * 16 + half * 8 + lane / 4, sums[m], half);
}

struct TileGroup {
  uint32_t expert, first, count;

  __device__ TileGroup(const uint32_t *starts, const uint32_t *tiles) {
    expert = tiles[blockIdx.x];
    if (expert != NONE) {
      const uint32_t start = starts[expert];
      first = start + (blockIdx.x - start / TILE - expert) * TILE;
      count = min(starts[expert + 1] - first, TILE);
    }
  }
};

// A block's rows are 64 of the gate and the same of up, 32 of each for a warp.
template <typename T>
__device__ void gate_up_many(const T *x, const T *weights, const uint32_t *starts, const uint32_t *order,
                             const uint32_t *tiles, T *activated, uint32_t hidden, uint32_t intermediate, uint32_t k) {
  const TileGroup group(starts, tiles);
  if (group.expert == NONE)
    return;
  const uint32_t row = blockIdx.y * (TILE_ROWS / 2);
  const T *const matrix = weights + group.expert * size_t(2 * intermediate) * hidden;
  const auto token = [&](uint32_t place) {
    return x + order[group.first + (place < group.count ? place : 0)] / k * size_t(hidden);
  };
  const auto of = [&](int n, int loader) {
    return matrix + (n / 2 % 2 * intermediate + row + n / 4 * 32 + n % 2 * 16 + loader) * size_t(hidden);
  };
  tile_product<T>(token, of, hidden, [&](uint32_t place, const float(&sums)[8][4], int half) {
    if (place >= group.count)
      return;
    T *const to = activated + (group.first + place) * size_t(intermediate) + row + threadIdx.x / 64 * 32 +
                  threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const float *const gate = &sums[n][half * 2], *const up = &sums[n + 4][half * 2];
      *reinterpret_cast<uint32_t *>(to + n * 8) = narrow_pair(activate<T>(gate[0], up[0]), activate<T>(gate[1], up[1]), T());
    }
  });
}

template <typename T>
__device__ void down_many(const T *activated, const T *weights, const uint32_t *starts, const uint32_t *order,
                          const uint32_t *tiles, T *terms, uint32_t hidden, uint32_t intermediate) {
  const TileGroup group(starts, tiles);
  if (group.expert == NONE)
    return;
  const uint32_t row = blockIdx.y * TILE_ROWS;
  const T *const matrix = weights + (group.expert * size_t(hidden) + row) * intermediate;
  const auto token = [&](uint32_t place) {
    return activated + (group.first + (place < group.count ? place : 0)) * size_t(intermediate);
  };
  const auto of = [&](int n, int loader) { return matrix + (n * 16 + loader) * size_t(intermediate); };
  tile_product<T>(token, of, intermediate, [&](uint32_t place, const float(&sums)[8][4], int half) {
    if (place >= group.count)
      return;
    T *const to = terms + order[group.first + place] * size_t(hidden) + row + threadIdx.x / 64 * 64 +
                  threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; n++)
      *reinterpret_cast<uint32_t *>(to + n * 8) = narrow_pair(sums[n][half * 2], sums[n][half * 2 + 1], T());
  });
}

#define FOR_HALVES(DEFINE, name) DEFINE(name##_f16, __half) DEFINE(name##_bf16, __nv_bfloat16)
#define GATE_UP(name, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *x, const T *weights, const uint32_t *ids, const uint32_t *starts, const uint32_t *order,           \
           T *activated, uint32_t num_experts, uint32_t hidden, uint32_t intermediate, uint32_t k) {                   \
    gate_up<T>(x, weights, ids, starts, order, activated, num_experts, hidden, intermediate, k);                       \
  }
FOR_HALVES(GATE_UP, moe_gate_up)
#define DOWN(name, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *activated, const T *weights, const uint32_t *starts, const uint32_t *order, T *terms,              \
           uint32_t hidden, uint32_t intermediate) {                                                                   \
    down<T>(activated, weights, starts, order, terms, hidden, intermediate);                                           \
  }
FOR_HALVES(DOWN, moe_down)
#define DOWN_FEW(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *activated, const T *weights, const uint32_t *ids, const T *factors, T *y, uint32_t num_experts,    \
           uint32_t hidden, uint32_t intermediate, uint32_t k) {                                                       \
    down_few<T>(activated, weights, ids, factors, y, num_experts, hidden, intermediate, k);                            \
  }
FOR_HALVES(DOWN_FEW, moe_down_few)
#define GATE_UP_MANY(name, T)                                                                                          \
  extern "C" __global__ void __launch_bounds__(TILE_THREADS, 3)                                                        \
      name(const T *x, const T *weights, const uint32_t *starts, const uint32_t *order, const uint32_t *tiles,         \
           T *activated, uint32_t hidden, uint32_t intermediate, uint32_t k) {                                         \
    gate_up_many<T>(x, weights, starts, order, tiles, activated, hidden, intermediate, k);                             \
  }
FOR_HALVES(GATE_UP_MANY, moe_gate_up_many)
#define DOWN_MANY(name, T)                                                                                             \
  extern "C" __global__ void __launch_bounds__(TILE_THREADS, 3)                                                        \
      name(const T *activated, const T *weights, const uint32_t *starts, const uint32_t *order, const uint32_t *tiles, \
           T *terms, uint32_t hidden, uint32_t intermediate) {                                                         \
    down_many<T>(activated, weights, starts, order, tiles, terms, hidden, intermediate);                               \
  }
FOR_HALVES(DOWN_MANY, moe_down_many)
// As the host allocates them.
static_assert(RING<4, 2, TILES> == 81920 && RING<8, 1, 1> == 98304);
static_assert(sizeof(TileShared<__half>) == 73728);
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
