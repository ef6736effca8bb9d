// Attention of prompts on compute capability 9.0, f16 and bf16: online softmax over tiles of keys.
//
// One warp has tensor copies fetch tiles of keys and values, page by page, into rings of stages. Two warpgroups form
// scores and add values: those of the tile before, while they weigh the scores of this one. For D above 256 they share
// rows: both form all scores, each adds half of the columns.
#include "attention/flash.cuh"
#include "wgmma.cuh"

// Images for other GPUs have none of these kernels.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Warpgroups that compute, and threads that fetch queries.
constexpr int CONSUMERS = 2, LOADERS = 96, THREADS = (1 + CONSUMERS) * 128;

// A block's share of the tiles of all key heads, the longest first: with a causal mask a tile is the longer the later
// it is. Blocks take turns, in an order that turns round every time, so that all have about as much to do.
template <typename Tile, typename Visit> __device__ void for_each_tile(const Step &step, Visit visit) {
  const uint32_t tiles = step.num_tokens * step.group() / Tile::NUM_ROWS + step.num_sequences;
  for (uint32_t first = 0, turn = 0; first < tiles * step.hk; first += gridDim.x, turn++) {
    const uint32_t i = first + (turn % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    if (i >= tiles * step.hk)
      continue;
    const Tile tile(step, tiles - 1 - i / step.hk, i % step.hk);
    if (tile.first_row >= 0)
      visit(tile);
  }
}

// Shared memory, from a multiple of 1024 on: stages of queries, of keys and of values, and barriers. Each operand lies
// in columns of 64 values, swizzled. Beside them, the tiles that the queries are of.
template <typename T, int D> struct Memory {
  static constexpr int PARTS = D > 256 ? 2 : 1, COLUMNS = D / PARTS; // of the sums of a warpgroup
  static constexpr int ROWS = 64 * CONSUMERS / PARTS, KEYS = D > 128 ? 64 : 128;
  static constexpr int Q_STAGES = D > 128 ? 1 : 2, STAGES = D > 256 ? 1 : 2;
  static constexpr uint32_t ROW = 128, Q_COLUMN = ROWS * ROW, Q_STAGE = ROWS * D * sizeof(T);
  static constexpr uint32_t COLUMN = KEYS * ROW, STAGE = KEYS * D * sizeof(T);
  using Tile = FlashTile<ROWS, KEYS>;

  uint32_t q, k, v, q_full, q_empty, k_full, v_full, k_empty, v_empty; // a barrier for each stage
  Tile *tiles;

  __device__ Memory(const void *shared, Tile *tiles) : tiles(tiles) {
    q = (shared_address(shared) + 1023) / 1024 * 1024;
    k = q + Q_STAGES * Q_STAGE;
    v = k + STAGES * STAGE;
    q_full = v + STAGES * STAGE;
    q_empty = q_full + Q_STAGES * 8;
    k_full = q_empty + Q_STAGES * 8;
    v_full = k_full + STAGES * 8;
    k_empty = v_full + STAGES * 8;
    v_empty = k_empty + STAGES * 8;
  }

  __device__ void init_barriers() const {
    for (int i = 0; i < Q_STAGES * 8; i += 8) {
      init_barrier(q_full + i, LOADERS);
      init_barrier(q_empty + i, CONSUMERS * 4);
    }
    for (int i = 0; i < STAGES * 8; i += 8) {
      init_barrier(k_full + i, 1);
      init_barrier(v_full + i, 1);
      init_barrier(k_empty + i, CONSUMERS * 4);
      init_barrier(v_empty + i, CONSUMERS * 4);
    }
    fence_shared();
  }
};

// Counts uses of a ring: which stage is next, and the parity of the phase in which it is filled.
template <int STAGES> struct Turn {
  uint32_t count = 0;
  __device__ uint32_t stage() const { return count % STAGES; }
  __device__ uint32_t parity() const { return count / STAGES % 2; }
};

// A warp fetches keys and values. The boxes of the maps are 64 values wide and as many rows high as both a tile and a
// page hold; a lane fetches the boxes of a page.
template <typename T, int D>
__device__ void fetch_keys(const Step &step, const Memory<T, D> &memory, const CUtensorMap &k_map,
                           const CUtensorMap &v_map) {
  using M = Memory<T, D>;
  const int rows = step.block_size == 0 ? M::KEYS : min(M::KEYS, step.block_size), lane = threadIdx.x % 32;
  const auto fetch = [&](const CUtensorMap &map, uint32_t head, uint32_t to, uint32_t full, int slot) {
    const uint32_t pages = __popc(__ballot_sync(0xffffffff, slot >= 0));
    if (lane == 0)
      arrive_expecting(full, pages * rows * D * sizeof(T));
    __syncwarp();
    if (slot >= 0)
#pragma unroll
      for (int column = 0; column < D / 64; column++)
        copy_box(to + column * M::COLUMN + lane * rows * M::ROW, map, column * 64, head, slot, full);
  };
  Turn<M::STAGES> turn;
  for_each_tile<typename M::Tile>(step, [&](const auto &tile) {
    for (int i = tile.begin; i < tile.end; i++, turn.count++) {
      const int key = i * M::KEYS + lane * rows, stage = turn.stage();
      const bool is_inside = lane * rows < M::KEYS && key < tile.sequence.context && key + rows > tile.first_seen;
      const int slot = is_inside ? int(tile.sequence.slot(step, key)) : -1;
      wait_for_phase(memory.k_empty + stage * 8, turn.parity() ^ 1);
      fetch(k_map, tile.head, memory.k + stage * M::STAGE, memory.k_full + stage * 8, slot);
      wait_for_phase(memory.v_empty + stage * 8, turn.parity() ^ 1);
      fetch(v_map, tile.head, memory.v + stage * M::STAGE, memory.v_full + stage * 8, slot);
    }
  });
}

// The other warps of the first warpgroup fetch queries, whose rows are those of a group's heads, and say of which tile
// they are. A tile without rows is the end.
template <typename T, int D> __device__ void fetch_queries(const Step &step, const Memory<T, D> &memory) {
  using M = Memory<T, D>;
  Turn<M::Q_STAGES> turn;
  const auto fetch = [&](const auto &tile) {
    wait_for_phase(memory.q_empty + turn.stage() * 8, turn.parity() ^ 1);
    const uint32_t to = memory.q + turn.stage() * M::Q_STAGE;
    if (threadIdx.x == 32)
      memory.tiles[turn.stage()] = tile;
#pragma unroll 2
    for (int at = threadIdx.x - 32; tile.first_row >= 0 && at < M::ROWS * D / 8; at += LOADERS) {
      const int row = at / (D / 8), chunk = at % (D / 8);
      copy_async(to + chunk / 8 * M::Q_COLUMN + row * M::ROW + (chunk % 8 ^ row % 8) * 16,
                 tile.template query<T>(step, min(row, tile.num_rows - 1)) + chunk * 8, row < tile.num_rows);
    }
    commit_copies();
    wait_for_copies<0>();
    fence_shared();
    arrive(memory.q_full + turn.stage() * 8);
    turn.count++;
  };
  for_each_tile<typename M::Tile>(step, fetch);
  typename M::Tile end;
  end.first_row = -1;
  fetch(end);
}

// A warpgroup has 64 rows of queries. While it weighs the scores of a tile, the tensor cores add the values of the tile
// before; and warpgroups take turns at giving them work, so that one weighs while they work for the other.
template <typename T, int D> __device__ void attend(const Step &step, const Memory<T, D> &memory) {
  using M = Memory<T, D>;
  constexpr int KEYS = M::KEYS, COLUMNS = M::COLUMNS, WIDE = COLUMNS < 128 ? COLUMNS : 128; // of a product
  const uint32_t group = threadIdx.x / 128 - 1, first = M::PARTS == 1 ? group * 64 : 0, lane = threadIdx.x % 32;
  const uint32_t column = M::PARTS == 1 ? 0 : group * COLUMNS, row = first + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const auto release = [&](uint32_t empty) {
    __syncwarp(); // one lane speaks for what all have read
    if (lane == 0)
      arrive(empty);
  };
  constexpr uint32_t TURNS = 1 + CONSUMERS, ALL = CONSUMERS * 128;
  if (group == 1)
    arrive_at(TURNS, ALL);
  Turn<M::STAGES> turn; // of keys; values are one behind
  for (Turn<M::Q_STAGES> q_turn;; q_turn.count++) {
    wait_for_phase(memory.q_full + q_turn.stage() * 8, q_turn.parity());
    const typename M::Tile tile = memory.tiles[q_turn.stage()];
    if (tile.first_row < 0)
      return;
    float scores[KEYS / 8][4], sums[COLUMNS / 8][4] = {}, kept[2];
    uint32_t weights[KEYS / 16][4];
    const auto form_scores = [&] {
      wait_for_phase(memory.k_full + turn.stage() * 8, turn.parity());
      synchronize(TURNS + group, ALL);
      begin_products();
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        const uint32_t within = i % 4 * 32, k = memory.k + turn.stage() * M::STAGE + i / 4 * M::COLUMN + within;
        const uint32_t q =
            memory.q + q_turn.stage() * M::Q_STAGE + i / 4 * M::Q_COLUMN + first * M::ROW + within;
        Products<T, KEYS / 8>::rows_by_rows(scores, describe(q, 16), describe(k, 16), i > 0);
      }
      commit_products();
    };
    const auto add_values = [&](Turn<M::STAGES> turn, int i) {
      const uint32_t v = memory.v + turn.stage() * M::STAGE;
      wait_for_phase(memory.v_full + turn.stage() * 8, turn.parity());
      if (tile.is_edge(i)) {
        // A weight of zero times what nobody wrote might not be zero. Both warpgroups write these zeros, neither waits.
        for (int at = threadIdx.x % 128; at < KEYS * D / 8; at += 128)
          if (const int row = at % KEYS; !tile.has_key(i * KEYS + row))
            clear(v + at / KEYS / 8 * M::COLUMN + row * M::ROW + at / KEYS % 8 * 16);
        fence_shared();
        synchronize(1 + group, 128);
      }
      begin_products();
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c += WIDE)
          Products<T, WIDE / 8>::registers_by_columns(
              reinterpret_cast<float(&)[WIDE / 8][4]>(sums[c / 8]), weights[i],
              describe(v + (column + c) / 64 * M::COLUMN + i * 16 * M::ROW, M::COLUMN));
      commit_products();
    };
    Softmax softmax(step, tile, row);
    const auto weigh = [&](int i) { softmax.update(step, scores, i * KEYS, tile.is_full(i), kept); };
    const auto narrow = [&] {
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++)
        Softmax::narrow<T>(scores, i, weights[i]);
    };

    if (tile.begin < tile.end) {
      form_scores();
      arrive_at(TURNS + 1 - group, ALL);
      wait_for_products<0>();
      pin(scores);
      release(memory.k_empty + turn.stage() * 8);
      weigh(tile.begin);
      narrow();
    }
    for (int i = tile.begin + 1; i < tile.end; i++) {
      const Turn<M::STAGES> before = turn;
      turn.count++;
      form_scores();
      add_values(before, i - 1);
      arrive_at(TURNS + 1 - group, ALL);
      wait_for_products<1>();
      pin(scores);
      release(memory.k_empty + turn.stage() * 8);
      weigh(i);
      wait_for_products<0>();
      pin(sums);
      release(memory.v_empty + before.stage() * 8);
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          sums[n][j] *= kept[j / 2];
      narrow();
    }
    release(memory.q_empty + q_turn.stage() * 8);
    if (tile.begin < tile.end) {
      add_values(turn, tile.end - 1);
      wait_for_products<0>();
      pin(sums);
      release(memory.v_empty + turn.stage() * 8);
      turn.count++;
    }
    softmax.template store<T>(step, tile, row, column, sums);
  }
}

template <typename T, int D>
__device__ void flash(const Step &step, const CUtensorMap &k_map, const CUtensorMap &v_map) {
  extern __shared__ uint8_t shared[];
  __shared__ __align__(16) uint8_t tiles[Memory<T, D>::Q_STAGES * sizeof(typename Memory<T, D>::Tile)];
  const Memory<T, D> memory(shared, reinterpret_cast<typename Memory<T, D>::Tile *>(tiles));
  if (threadIdx.x == 0)
    memory.init_barriers();
  __syncthreads();
  // As many registers together as the launch has given the block: 168 a thread.
  if (threadIdx.x < 128) {
    shrink_registers<40>();
    if (threadIdx.x < 32)
      fetch_keys<T, D>(step, memory, k_map, v_map);
    else
      fetch_queries<T, D>(step, memory);
  } else {
    grow_registers<232>();
    attend<T, D>(step, memory);
  }
}

#define FLASH(D, T, name)                                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                             \
      name(const __grid_constant__ Step step, const __grid_constant__ CUtensorMap k_map,                               \
           const __grid_constant__ CUtensorMap v_map) {                                                                \
    flash<T, D>(step, k_map, v_map);                                                                                   \
  }
#define FLASH_OF(D)                                                                                                    \
  FLASH(D, __half, flash_wgmma_d##D##_f16)                                                                             \
  FLASH(D, __nv_bfloat16, flash_wgmma_d##D##_bf16)
FLASH_OF(64)
FLASH_OF(128)
FLASH_OF(256)
FLASH_OF(512)
#endif
