// Products of many rows with the activation of an MLP behind them, on compute capability 9.0, f16 and bf16.
//
// A block has tiles of 128 rows by 256 rows of the weight in turn. One warp copies both into a ring of stages, two
// warpgroups form sums and leave them in shared memory, rounded, and seven warps activate those and have them copied out
// while the sums of the next tile are formed. Two blocks of a cluster have the same rows of the weight: each copies half
// of them to both.
#include "activation/activation.cuh"
#include "wgmma.cuh"

// Images for other GPUs have none of these kernels.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t ROWS = 128, WEIGHT_ROWS = 256, INNER = 64; // of a stage
constexpr uint32_t STAGES = 3, CLUSTER = 2, CONSUMERS = 2, ACTIVATORS = 224;
constexpr uint32_t THREADS = (2 + CONSUMERS) * 128;
// Tiles that run at about the same time share rows of x, of so many clusters, while the weight streams by.
constexpr uint32_t HIGH = 16;

// y [rows, outer]; of a gated MLP the weight is [2 outer, inner], gates before what they multiply, and a tile has half as
// many outputs.
struct Shape {
  uint32_t rows, inner, outer;
};

struct Gelu {
  static constexpr bool IS_GATED = false;
  __device__ static float of(float x, float) { return gelu_rounded(x); }
};
struct Silu {
  static constexpr bool IS_GATED = true;
  __device__ static float of(float gate, float up) { return silu_rounded(gate) * up; }
};
struct GeluTanh {
  static constexpr bool IS_GATED = true;
  __device__ static float of(float gate, float up) { return gelu_tanh_rounded(gate) * up; }
};

// Shared memory, from a multiple of 1024 on: stages of x and of the weight, in rows of 128 bytes; sums of each
// warpgroup's 64 rows in columns of 64; barriers.
struct Memory {
  static constexpr uint32_t ROW = 128, X = ROWS * ROW, WEIGHT = WEIGHT_ROWS * ROW;
  static constexpr uint32_t COLUMN = 64 * ROW, SUMS = WEIGHT_ROWS / 64 * COLUMN;

  uint32_t x, weight, sums, full, empty, sums_full, sums_empty;

  __device__ explicit Memory(const void *shared) {
    x = (shared_address(shared) + 1023) / 1024 * 1024;
    weight = x + STAGES * X;
    sums = weight + STAGES * WEIGHT;
    full = sums + CONSUMERS * SUMS;
    empty = full + STAGES * 8;
    sums_full = empty + STAGES * 8;
    sums_empty = sums_full + CONSUMERS * 8;
  }

  __device__ void init_barriers() const {
    for (uint32_t i = 0; i < STAGES * 8; i += 8) {
      init_barrier(full + i, 1);
      init_barrier(empty + i, CONSUMERS * CLUSTER);
    }
    for (uint32_t i = 0; i < CONSUMERS * 8; i += 8) {
      init_barrier(sums_full + i, 128);
      init_barrier(sums_empty + i, 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_shared();
  }
};

// Counts uses of a ring: which stage is next, and the parity of the phase in which it is filled.
struct Turn {
  uint32_t stage = 0, parity = 0;
  __device__ void next() {
    if (++stage == STAGES)
      stage = 0, parity ^= 1;
  }
};

// The first row of each tile of this block, and its first output.
template <typename F, typename Visit> __device__ void for_each_tile(const Shape &shape, Visit visit) {
  constexpr uint32_t OUTPUTS = F::IS_GATED ? WEIGHT_ROWS / 2 : WEIGHT_ROWS;
  const uint32_t columns = (shape.outer + OUTPUTS - 1) / OUTPUTS;
  const uint32_t pairs = (shape.rows + CLUSTER * ROWS - 1) / (CLUSTER * ROWS);
  for (uint32_t i = blockIdx.x / CLUSTER; i < columns * pairs; i += gridDim.x / CLUSTER) {
    const uint32_t first = i / (HIGH * columns) * HIGH, high = min(HIGH, pairs - first), at = i - first * columns;
    visit(((first + at % high) * CLUSTER + blockIdx.x % CLUSTER) * ROWS, at / high * OUTPUTS);
  }
}

template <typename F>
__device__ void fetch(const Shape &shape, const Memory &memory, const CUtensorMap &x, const CUtensorMap &weight) {
  constexpr uint32_t HALF = WEIGHT_ROWS / CLUSTER;
  const uint32_t rank = rank_in_cluster();
  Turn turn;
  for_each_tile<F>(shape, [&](uint32_t row, uint32_t output) {
    const uint32_t weight_row = output + rank * (F::IS_GATED ? shape.outer : HALF);
    for (uint32_t k = 0; k < shape.inner; k += INNER, turn.next()) {
      const uint32_t full = memory.full + turn.stage * 8;
      wait_for_phase(memory.empty + turn.stage * 8, turn.parity ^ 1);
      arrive_expecting(full, Memory::X + Memory::WEIGHT);
      copy_box(memory.x + turn.stage * Memory::X, x, k, 0, row, full);
      copy_box_to_all(memory.weight + turn.stage * Memory::WEIGHT + rank * HALF * Memory::ROW, weight, k, 0, weight_row,
                      full, (1 << CLUSTER) - 1);
    }
  });
}

// Four matrices of 8 x 8 values: lane i brings the address of row i % 8 of matrix i / 8.
__device__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// A warpgroup forms the sums of 64 rows and adds the bias.
template <typename T, typename F> __device__ void multiply(const Shape &shape, const Memory &memory, const T *bias) {
  const uint32_t group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const auto release = [&](uint32_t stage) {
    if (lane == 0 && warp < CLUSTER)
      arrive_in(warp, memory.empty + stage * 8);
  };
  Turn turn;
  uint32_t parity = 1;
  for_each_tile<F>(shape, [&](uint32_t, uint32_t output) {
    float sums[WEIGHT_ROWS / 8][4];
    uint32_t biases[WEIGHT_ROWS / 8];
    const uint32_t first = output + lane % 4 * 2;
    if (bias)
#pragma unroll
      for (uint32_t j = 0; j < WEIGHT_ROWS / 8; j++)
        biases[j] = first + j * 8 < shape.outer ? *reinterpret_cast<const uint32_t *>(bias + first + j * 8) : 0;
    for (uint32_t k = 0; k < shape.inner; k += INNER) {
      const uint32_t x = memory.x + turn.stage * Memory::X + group * 64 * Memory::ROW;
      const uint32_t weight = memory.weight + turn.stage * Memory::WEIGHT;
      wait_for_phase(memory.full + turn.stage * 8, turn.parity);
      begin_products();
#pragma unroll
      for (uint32_t i = 0; i < INNER / 16; i++)
#pragma unroll
        for (uint32_t part = 0; part < 2; part++)
          Products<T, WEIGHT_ROWS / 16>::rows_by_rows(
              reinterpret_cast<float(&)[WEIGHT_ROWS / 16][4]>(sums[part * WEIGHT_ROWS / 16]), describe(x + i * 32, 16),
              describe(weight + part * WEIGHT_ROWS / 2 * Memory::ROW + i * 32, 16), k + i > 0);
      commit_products();
      wait_for_products<0>();
      release(turn.stage);
      turn.next();
    }
    pin(sums);
    wait_for_phase(memory.sums_empty + group * 8, parity);
    // Matrices of rows 0 and 8 of eight columns, and of the next eight.
    const uint32_t row = warp * 16 + lane % 16;
#pragma unroll
    for (uint32_t j = 0; j < WEIGHT_ROWS / 8; j += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; i++) {
        const float2 of_bias = bias ? unpair(biases[j + i / 2], T()) : float2{0, 0};
        const float *sum = sums[j + i / 2] + i % 2 * 2;
        pairs[i] = narrow_pair(sum[0] + of_bias.x, sum[1] + of_bias.y, T());
      }
      const uint32_t chunk = j % 8 + lane / 16;
      store_matrices(memory.sums + group * Memory::SUMS + j / 8 * Memory::COLUMN + row * Memory::ROW +
                         (chunk ^ row % 8) * 16,
                     pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    arrive(memory.sums_full + group * 8);
    parity ^= 1;
  });
}

// Seven warps activate the sums where they are, and have them copied out.
template <typename T, typename F>
__device__ void activate(const Shape &shape, const Memory &memory, uint8_t *shared, const CUtensorMap &y) {
  constexpr uint32_t OUT = Memory::SUMS / (F::IS_GATED ? 2 : 1);
  uint8_t *sums = shared + (memory.sums - shared_address(shared));
  // The warps are those beside the one that copies, and the last ones.
  const uint32_t first = threadIdx.x < 128 ? threadIdx.x - 32 : threadIdx.x - CONSUMERS * 128 - 32;
  uint32_t parity = 0;
  for_each_tile<F>(shape, [&](uint32_t row, uint32_t output) {
#pragma unroll
    for (uint32_t group = 0; group < CONSUMERS; group++) {
      wait_for_phase(memory.sums_full + group * 8, parity);
      auto *packs = reinterpret_cast<Pack<T, 8> *>(sums + group * Memory::SUMS);
      for (uint32_t i = first; i < OUT / 16; i += ACTIVATORS) {
        Pack<T, 8> pack = packs[i];
        const Pack<T, 8> ups = packs[F::IS_GATED ? i + OUT / 16 : i];
#pragma unroll
        for (int j = 0; j < 8; j++)
          pack.values[j] = narrow<T>(F::of(widen(pack.values[j]), widen(ups.values[j])));
        packs[i] = pack;
      }
      fence_shared();
      synchronize(1, ACTIVATORS);
      if (first == 0) {
        for (uint32_t column = 0; column < OUT / Memory::COLUMN; column++)
          store_box(y, output + column * 64, 0, row + group * 64,
                    memory.sums + group * Memory::SUMS + column * Memory::COLUMN);
        commit_stores();
        wait_for_stores_to_read();
        arrive(memory.sums_empty + group * 8);
      }
    }
    parity ^= 1;
  });
}

template <typename T, typename F>
__device__ void linear_activated(const Shape &shape, const CUtensorMap &x, const CUtensorMap &weight,
                                 const CUtensorMap &y, const T *bias) {
  extern __shared__ uint8_t shared[];
  const Memory memory(shared);
  if (threadIdx.x == 0)
    memory.init_barriers();
  synchronize_cluster();
  // As many registers together as the launch has given the block: 128 a thread.
  if (threadIdx.x / 128 % 3 != 0) {
    grow_registers<200>();
    multiply<T, F>(shape, memory, bias);
  } else {
    shrink_registers<56>();
    if (threadIdx.x == 0)
      fetch<F>(shape, memory, x, weight);
    else if (threadIdx.x >= 32)
      activate<T, F>(shape, memory, shared, y);
  }
  __syncwarp();
  synchronize_cluster(); // nothing comes from the other block any more
}

#define LINEAR_ACTIVATED(name, T, F)                                                                                   \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)                             \
      name(const Shape shape, const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,       \
           const __grid_constant__ CUtensorMap y, const T *bias) {                                                     \
    linear_activated<T, F>(shape, x, weight, y, bias);                                                                 \
  }
LINEAR_ACTIVATED(linear_gelu_f16, __half, Gelu)
LINEAR_ACTIVATED(linear_gelu_bf16, __nv_bfloat16, Gelu)
LINEAR_ACTIVATED(linear_silu_gated_f16, __half, Silu)
LINEAR_ACTIVATED(linear_silu_gated_bf16, __nv_bfloat16, Silu)
LINEAR_ACTIVATED(linear_gelu_tanh_gated_f16, __half, GeluTanh)
LINEAR_ACTIVATED(linear_gelu_tanh_gated_bf16, __nv_bfloat16, GeluTanh)
#endif
