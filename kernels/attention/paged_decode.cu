// Attention of sequences of one token, whose keys and values are read once, at the speed of memory.
//
// A block takes up to eight rows of one key head and one split of the context. Its warps take tiles of 16 keys in turn,
// each with a pipeline of its own, and meet at the end. Products are transposed, so that keys and columns fill the 16
// rows of a matrix and the heads of a group its 8 columns:
//   scores [16 keys, 8 rows] = K Q^T        sums [D columns, 8 rows] += V^T weights
// Queries may come as a projection gives them, with the token's key and value, which are not in their pages yet.
//
// The time of a short context is that of one thing after the other. So keys and values of earlier tokens are fetched
// before the kernel ahead has ended; and blocks that share a context form a cluster and merge what they have in each
// other's shared memory, where a merge of many splits has a kernel of its own.
#include "attention/attention.cuh"
#include "heads/heads.cuh"
#include "mma.cuh"

constexpr int ROWS = 8, KEYS = 16;
// Of a warp's pipeline; and the warps of a block of a cluster, few, so that it fits beside other kernels' blocks.
template <int D, bool IN_CLUSTER> constexpr int STAGES_OF = IN_CLUSTER && D > 128 ? 2 : 3;
template <int D> constexpr int CLUSTER_WARPS = D > 256 ? 2 : 4;
// Rows of the sums of a warp are as far apart as this many more values than they are long, to lie in different banks.
constexpr int PADDING = 4;

// The way of a step's heads to attention, as `Entering` in cuda.rs.
struct Entering {
  const void *k, *v; // [N, hk, d] in rows, null if the pages hold them
  const float *cos, *sin;
  HeadNorm q_norm, k_norm, v_norm;
  uint32_t k_token, k_head, v_token, v_head;
  uint32_t half;
};

// A slot of a key that is not there, whose place is filled with zeros, and of one that another warp brings.
constexpr int NO_KEY = -1, ENTERS = -2;

// What the block of that rank has where this one has `own`.
template <typename V> __device__ inline const V &in_block(const V &own, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(&own), "r"(rank));
  return *reinterpret_cast<const V *>(address);
}

constexpr uint32_t MOST_BLOCKS = 8; // of a cluster

// The mean of values by their weights, `total` in all.
template <typename T, int N>
__device__ void store(const Step &step, size_t at, const Pack<float, N> &sum, float total, T) {
  Pack<T, N> y;
#pragma unroll
  for (int j = 0; j < N; j++)
    y.values[j] = narrow<T>(total == 0 ? 0 : sum.values[j] / total);
  *reinterpret_cast<Pack<T, N> *>(static_cast<T *>(step.y) + at) = y;
}

// blockIdx.x is the split, .y the key head and which rows of it, .z the sequence. Shared memory holds a pipeline for
// each warp. The splits are blocks of a cluster, or there is one, or their sums go to memory.
template <typename T, int D, bool IN_CLUSTER> __device__ void decode(const Step &step, const Entering *entering) {
  constexpr int CHUNKS = D / 8, TILE = KEYS * D * sizeof(T), STAGES = STAGES_OF<D, IN_CLUSTER>;
  extern __shared__ __align__(1024) uint8_t shared[];
  let_next_start();
  const Sequence sequence(step, blockIdx.z);
  if (sequence.tokens != 1)
    return;
  const uint32_t group = step.group(), parts = (group + ROWS - 1) / ROWS;
  const uint32_t head = blockIdx.y / parts, first_row = blockIdx.y % parts * ROWS, rows = min(ROWS, group - first_row);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const size_t first_place = sequence.start * size_t(step.hq) + head * group + first_row;
  float *statistics = step.partial + size_t(step.num_tokens) * step.hq * step.splits * D;

  // The split's tiles; a tile lies at a multiple of KEYS.
  const int first_seen = sequence.first_seen(step, sequence.past), first_tile = first_seen / KEYS;
  const int tiles = (sequence.context + KEYS - 1) / KEYS - first_tile;
  const int begin = first_tile + int(int64_t(tiles) * blockIdx.x / step.splits);
  const int end = first_tile + int(int64_t(tiles) * (blockIdx.x + 1) / step.splits);
  // What the step says of its sequences was there before its first kernel.
  const T *keys = static_cast<const T *>(step.k) + head * step.k_head;
  const T *values = static_cast<const T *>(step.v) + head * step.v_head;
  const uint32_t pipeline = shared_address(shared) + warp * STAGES * 2 * TILE;
  // Keys of earlier tokens were there before the step. The new one may be on its way through this kernel.
  const bool fetches_early = entering && entering->k;
  // The lane's key of a tile: half of the lanes do for all 16.
  const auto place_of = [&](int tile, bool is_early) {
    const int position = tile * KEYS + int(lane % KEYS);
    if (tile >= end || position < first_seen || position >= sequence.context)
      return NO_KEY;
    return is_early && position == sequence.past ? ENTERS : int(sequence.slot(step, position));
  };
  const auto copy = [&](int stage, int place) {
    constexpr int ROWS_OF_COPY = CHUNKS < 32 ? 32 / CHUNKS : 1;
    const uint32_t to = pipeline + stage * 2 * TILE;
    // A short context runs this once or twice: fetching instructions would take longer than running them.
#pragma unroll 4
    for (int i = 0; i < KEYS; i += ROWS_OF_COPY) {
      const int row = i + lane / CHUNKS % ROWS_OF_COPY;
      const int slot = __shfl_sync(0xffffffff, place, row);
      const size_t k_row = size_t(max(slot, 0)) * step.k_token, v_row = size_t(max(slot, 0)) * step.v_token;
      if (slot != ENTERS)
#pragma unroll
        for (int chunk = lane % CHUNKS; chunk < CHUNKS; chunk += 32) {
          copy_async(to + swizzled<D>(row, chunk), keys + k_row + chunk * 8, slot >= 0);
          copy_async(to + TILE + swizzled<D>(row, chunk), values + v_row + chunk * 8, slot >= 0);
        }
    }
  };
  const int first = begin + int(warp), stride = warps;
  // Tiles are copied STAGES - 1 turns before they are used.
  const auto fetch_first = [&] {
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) {
      if (const int tile = first + i * stride; tile < end)
        copy(i, place_of(tile, fetches_early));
      commit_copies();
    }
  };
  if (fetches_early)
    fetch_first();
  int place = place_of(first + (STAGES - 1) * stride, false);
  const size_t new_page = sequence.slot(step, sequence.past);
  wait_for_inputs();
  if (!IN_CLUSTER && begin >= end && step.splits > 1) {
    if (threadIdx.x < rows) {
      float *empty = statistics + ((first_place + threadIdx.x) * step.splits + blockIdx.x) * 2;
      empty[0] = -INFINITY;
      empty[1] = 0;
    }
    return;
  }
  if (!fetches_early)
    fetch_first();

  T *const entered = reinterpret_cast<T *>(shared + warps * STAGES * 2 * TILE); // [ROWS, D]
  if (entering) {
    // The block that has the last tile brings the new key and value to their pages, and to the tile if that was fetched
    // without them.
    constexpr int N = D / 32, PIECE = N < 8 ? N : 8, AT_ONCE = 2;
    const Turning<N> turning(entering->cos, entering->sin, sequence.start, entering->half);
    const bool writes = entering->k && end == first_tile + tiles;
    const uint32_t count = rows + (writes ? 2 : 0), column = lane * N;
    const uint32_t last_tile = end - 1 - begin, last_row = sequence.past % KEYS;
    uint8_t *const tile = last_tile / warps < STAGES - 1
                              ? shared + (last_tile % warps * STAGES + last_tile / warps) * 2 * TILE
                              : nullptr;
    for (uint32_t base = warp; base < count; base += AT_ONCE * warps) {
      Pack<T, N> heads[AT_ONCE];
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++)
        if (const uint32_t i = base + n * warps; i < count) {
          const T *from = i < rows ? static_cast<const T *>(step.q) + sequence.start * size_t(step.q_token) +
                                         (head * group + first_row + i) * step.q_head
                          : i == rows ? static_cast<const T *>(entering->k) +
                                            sequence.start * size_t(entering->k_token) + head * entering->k_head
                                      : static_cast<const T *>(entering->v) +
                                            sequence.start * size_t(entering->v_token) + head * entering->v_head;
          heads[n] = *reinterpret_cast<const Pack<T, N> *>(from + column);
        }
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++)
        if (const uint32_t i = base + n * warps; i < count) {
          const bool is_query = i < rows, is_key = i == rows;
          const HeadNorm norm = is_query ? entering->q_norm : is_key ? entering->k_norm : entering->v_norm;
          const auto from_lane = enter_head<T, N>(heads[n], norm, turning, !is_query && !is_key);
          T *const to = is_query ? entered + i * D
                        : is_key ? const_cast<T *>(keys) + new_page * step.k_token
                                 : const_cast<T *>(values) + new_page * step.v_token;
          *reinterpret_cast<Pack<T, N> *>(to + column) = from_lane;
          if (!is_query && tile)
#pragma unroll
            for (int at = 0; at < N; at += PIECE) {
              const uint32_t into = swizzled<D>(last_row, (column + at) / 8) + (column + at) % 8 * sizeof(T);
              *reinterpret_cast<Pack<T, PIECE> *>(tile + (is_key ? 0 : TILE) + into) =
                  reinterpret_cast<const Pack<T, PIECE> *>(&from_lane)[at / PIECE];
            }
        }
    }
    __syncthreads();
  }

  // Row lane / 4 of the queries, as the second operand of a product; rows beyond the group are zero.
  uint32_t queries[D / 16][2];
  const uint32_t row = first_row + lane / 4;
  const T *q = entering ? entered + min(lane / 4, rows - 1) * D
                        : static_cast<const T *>(step.q) + sequence.start * size_t(step.q_token) +
                              (head * group + min(row, group - 1)) * step.q_head;
#pragma unroll
  for (int i = 0; i < D / 16; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t pair = *reinterpret_cast<const uint32_t *>(q + i * 16 + half * 8 + lane % 4 * 2);
      queries[i][half] = row < group ? pair : 0;
    }

  // Of rows lane % 4 * 2 and the next; weights are those of the lane's keys until the end.
  float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {}, sums[D / 16][4] = {};
  for (int tile = first, i = STAGES - 1; tile < end; tile += stride, i++) {
    const int ahead = tile + (STAGES - 1) * stride, stage = (i + 1) % STAGES;
    if (ahead < end)
      copy(i % STAGES, place);
    commit_copies();
    place = place_of(ahead + stride, false);
    wait_for_copies<STAGES - 1>();
    __syncwarp();
    const uint32_t k = pipeline + stage * 2 * TILE, v = k + TILE;
    float scores[2][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      uint32_t fragment[4];
      load_matrices(fragment, k + swizzled<D>(lane % 16, i * 2 + lane / 16));
      multiply_add(scores[i % 2], fragment, queries[i][0], queries[i][1], T());
    }
    const int position = tile * KEYS + int(lane / 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = position + i / 2 * 8;
      const bool is_seen = key >= first_seen && key < sequence.context;
      scores[0][i] = is_seen ? step.score(scores[0][i] + scores[1][i]) : -INFINITY;
    }
    float kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      // A tile has a key that is seen.
      const float largest = fmaxf(maximum[i], max_lanes<4, 16>(fmaxf(scores[0][i], scores[0][i + 2])));
      kept[i] = power_of_two(maximum[i] - largest);
      maximum[i] = largest;
      scores[0][i] = power_of_two(scores[0][i] - largest);
      scores[0][i + 2] = power_of_two(scores[0][i + 2] - largest);
      weight[i] = weight[i] * kept[i] + scores[0][i] + scores[0][i + 2];
    }
    if (__any_sync(0xffffffff, kept[0] != 1 || kept[1] != 1))
#pragma unroll
      for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          sums[i][j] *= kept[j % 2];
    const uint32_t weights[2] = {transpose(narrow_pair(scores[0][0], scores[0][1], T())),
                                 transpose(narrow_pair(scores[0][2], scores[0][3], T()))};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      uint32_t fragment[4];
      load_transposed(fragment, v + swizzled<D>(lane % 8 + lane / 16 * 8, i * 2 + lane / 8 % 2));
      multiply_add(sums[i], fragment, weights[0], weights[1], T());
    }
    // The next turn fills this stage.
    __syncwarp();
  }

  // The warps meet in the memory of their pipelines.
  wait_for_copies<0>();
  __syncthreads();
  float *all_sums = reinterpret_cast<float *>(shared);             // [warps, ROWS, D + PADDING]
  float *all_statistics = all_sums + warps * ROWS * (D + PADDING); // [warps, ROWS, 2]
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float total = weight[i] + __shfl_xor_sync(0xffffffff, weight[i], 4);
    const float more = total + __shfl_xor_sync(0xffffffff, total, 8);
    weight[i] = more + __shfl_xor_sync(0xffffffff, more, 16);
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const uint32_t at = warp * ROWS + lane % 4 * 2 + j % 2;
    if (lane < 4 && j < 2) {
      all_statistics[at * 2] = maximum[j];
      all_statistics[at * 2 + 1] = weight[j];
    }
#pragma unroll
    for (int i = 0; i < D / 16; i++)
      all_sums[at * (D + PADDING) + i * 16 + j / 2 * 8 + lane / 4] = sums[i][j];
  }
  __syncthreads();
  constexpr int VALUES = 4;
  float *const block_sums = all_statistics + warps * ROWS * 2; // [ROWS, D]
  float *const block_statistics = block_sums + ROWS * D;       // [ROWS, 2]
  for (uint32_t i = threadIdx.x; i < rows * D / VALUES; i += blockDim.x) {
    const uint32_t row = i / (D / VALUES), column = i % (D / VALUES) * VALUES;
    float largest = -INFINITY, total = 0;
    Pack<float, VALUES> sum = {};
    for (uint32_t w = 0; w < warps; w++)
      largest = fmaxf(largest, all_statistics[(w * ROWS + row) * 2]);
#pragma unroll 2
    for (uint32_t w = 0; w < warps; w++) {
      const uint32_t at = w * ROWS + row;
      const float factor = rescale(all_statistics[at * 2], largest);
      total += factor * all_statistics[at * 2 + 1];
      const auto part = *reinterpret_cast<const Pack<float, VALUES> *>(all_sums + at * (D + PADDING) + column);
#pragma unroll
      for (int j = 0; j < VALUES; j++)
        sum.values[j] += factor * part.values[j];
    }
    const size_t place = first_place + row, part = place * step.splits + blockIdx.x;
    if (IN_CLUSTER) {
      *reinterpret_cast<Pack<float, VALUES> *>(block_sums + row * D + column) = sum;
      if (column == 0) {
        block_statistics[row * 2] = largest;
        block_statistics[row * 2 + 1] = total;
      }
    } else if (step.splits == 1) {
      store(step, place * D + column, sum, total, T());
    } else {
      *reinterpret_cast<Pack<float, VALUES> *>(step.partial + part * D + column) = sum;
      if (column == 0) {
        statistics[part * 2] = largest;
        statistics[part * 2 + 1] = total;
      }
    }
  }
  if (!IN_CLUSTER)
    return;
  synchronize_cluster();
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < rows * D / VALUES; i += step.splits * blockDim.x) {
    const uint32_t row = i / (D / VALUES), column = i % (D / VALUES) * VALUES;
    float maxima[MOST_BLOCKS], weights[MOST_BLOCKS], largest = -INFINITY, total = 0;
    Pack<float, VALUES> parts[MOST_BLOCKS], sum = {};
#pragma unroll
    for (uint32_t b = 0; b < MOST_BLOCKS; b++)
      if (b < step.splits) {
        maxima[b] = in_block(block_statistics[row * 2], b);
        weights[b] = in_block(block_statistics[row * 2 + 1], b);
        parts[b] = in_block(*reinterpret_cast<const Pack<float, VALUES> *>(block_sums + row * D + column), b);
        largest = fmaxf(largest, maxima[b]);
      }
#pragma unroll
    for (uint32_t b = 0; b < MOST_BLOCKS; b++)
      if (b < step.splits) {
        const float factor = rescale(maxima[b], largest);
        total += factor * weights[b];
#pragma unroll
        for (int j = 0; j < VALUES; j++)
          sum.values[j] += factor * parts[b].values[j];
      }
    store(step, (first_place + row) * D + column, sum, total, T());
  }
  synchronize_cluster(); // others have read this block's sums
}

// Images for other GPUs have no clusters.
#if __CUDA_ARCH__ >= 900
#define PAGED_DECODE_CLUSTER(D, T, name)                                                                               \
  extern "C" __global__ void __launch_bounds__(CLUSTER_WARPS<D> * 32)                                                  \
      name(const __grid_constant__ Step step, const __grid_constant__ Entering entering) {                             \
    decode<T, D, true>(step, &entering);                                                                               \
  }
#else
#define PAGED_DECODE_CLUSTER(D, T, name)
#endif
#define PAGED_DECODE(D, T, name)                                                                                       \
  extern "C" __global__ void __launch_bounds__(1024 / D * 32) name(const __grid_constant__ Step step) {                \
    decode<T, D, false>(step, nullptr);                                                                                \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(1024 / D * 32)                                                          \
      name##_entering(const __grid_constant__ Step step, const __grid_constant__ Entering entering) {                  \
    decode<T, D, false>(step, &entering);                                                                              \
  }                                                                                                                    \
  PAGED_DECODE_CLUSTER(D, T, name##_entering_cluster)
#define PAGED_DECODE_OF(D)                                                                                             \
  PAGED_DECODE(D, __half, paged_decode_d##D##_f16)                                                                     \
  PAGED_DECODE(D, __nv_bfloat16, paged_decode_d##D##_bf16)
PAGED_DECODE_OF(64)
PAGED_DECODE_OF(128)
PAGED_DECODE_OF(256)
PAGED_DECODE_OF(512)
