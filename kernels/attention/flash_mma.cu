// Attention of prompts on the tensor cores of compute capability 8.0, f16 and bf16: online softmax over tiles of keys.
//
// A warp has 16 rows. Keys of the next tile arrive while the values of this one are added, and values while scores are
// formed. For D above 256 two warps share rows: both form all their scores, each adds half of the columns.
#include "attention/flash.cuh"

constexpr int ROWS = 64;
template <int D> constexpr int KEYS_OF = D > 256 ? 32 : 64;
template <int D> constexpr int PARTS_OF = D > 256 ? 2 : 1;

// blockIdx.x counts tiles from the last, .y is the key head. Shared memory holds the queries, a tile of keys, one of
// values and two tiles' slots.
template <typename T, int D> __device__ void flash(const Step &step) {
  constexpr int KEYS = KEYS_OF<D>, COLUMNS = D / PARTS_OF<D>, THREADS = ROWS * 2 * PARTS_OF<D>, CHUNKS = D / 8;
  extern __shared__ __align__(1024) uint8_t shared[];
  // Last first: with a causal mask these take longest.
  const FlashTile<ROWS, KEYS> tile(step, gridDim.x - 1 - blockIdx.x, blockIdx.y);
  if (tile.first_row < 0)
    return;
  const uint32_t q = shared_address(shared), k = q + ROWS * D * sizeof(T), v = k + KEYS * D * sizeof(T);
  int *slots = reinterpret_cast<int *>(shared + (ROWS + 2 * KEYS) * D * sizeof(T)); // [2, KEYS]
  const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16, column = threadIdx.x / 128 * COLUMNS;

  const auto find_slots = [&](int i) {
    const int key = i * KEYS + int(threadIdx.x);
    if (threadIdx.x < KEYS && i < tile.end)
      slots[i % 2 * KEYS + threadIdx.x] = tile.has_key(key) ? int(tile.sequence.slot(step, key)) : -1;
  };
  const auto copy = [&](uint32_t to, const void *from, uint32_t token_stride, uint32_t head_stride, int i) {
    const T *data = static_cast<const T *>(from) + tile.head * size_t(head_stride);
#pragma unroll 4
    for (int at = threadIdx.x; at < KEYS * CHUNKS; at += THREADS) {
      const int key = at / CHUNKS, chunk = at % CHUNKS, slot = slots[i % 2 * KEYS + key];
      copy_async(to + swizzled<D>(key, chunk), data + size_t(max(slot, 0)) * token_stride + chunk * 8, slot >= 0);
    }
  };

  for (int at = threadIdx.x; at < ROWS * CHUNKS; at += THREADS) {
    const int i = at / CHUNKS, chunk = at % CHUNKS;
    copy_async(q + swizzled<D>(i, chunk), tile.template query<T>(step, min(i, tile.num_rows - 1)) + chunk * 8,
               i < tile.num_rows);
  }
  find_slots(tile.begin);
  __syncthreads();
  if (tile.begin < tile.end)
    copy(k, step.k, step.k_token, step.k_head, tile.begin);
  commit_copies();

  Softmax softmax(step, tile, row + lane / 4);
  float sums[COLUMNS / 8][4] = {};
  for (int i = tile.begin; i < tile.end; i++) {
    // The keys are there, and nobody reads the values of the tile before.
    wait_for_copies<0>();
    find_slots(i + 1);
    __syncthreads();
    copy(v, step.v, step.v_token, step.v_head, i);
    commit_copies();

    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t queries[4];
      load_matrices(queries, q + swizzled<D>(row + lane % 16, n * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) {
        uint32_t keys[4];
        load_matrices(keys, k + swizzled<D>(j * 16 + lane % 8 + lane / 16 * 8, n * 2 + lane / 8 % 2));
        multiply_add(scores[2 * j], queries, keys[0], keys[1], T());
        multiply_add(scores[2 * j + 1], queries, keys[2], keys[3], T());
      }
    }
    float kept[2];
    softmax.update(step, scores, i * KEYS, tile.is_full(i), kept);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sums[n][j] *= kept[j / 2];

    // The values are there, and nobody reads the keys.
    wait_for_copies<0>();
    __syncthreads();
    if (i + 1 < tile.end)
      copy(k, step.k, step.k_token, step.k_head, i + 1);
    commit_copies();
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
      uint32_t weights[4];
      Softmax::narrow<T>(scores, j, weights);
#pragma unroll
      for (int n = 0; n < COLUMNS / 16; n++) {
        uint32_t values[4];
        load_transposed(values, v + swizzled<D>(j * 16 + lane % 16, column / 8 + n * 2 + lane / 16));
        multiply_add(sums[2 * n], weights, values[0], values[1], T());
        multiply_add(sums[2 * n + 1], weights, values[2], values[3], T());
      }
    }
  }
  wait_for_copies<0>();
  softmax.template store<T>(step, tile, row + lane / 4, column, sums);
}

#define FLASH(D, T, name)                                                                                              \
  extern "C" __global__ void __launch_bounds__(ROWS * 2 * PARTS_OF<D>) name(const __grid_constant__ Step step) {       \
    flash<T, D>(step);                                                                                                 \
  }
#define FLASH_OF(D)                                                                                                    \
  FLASH(D, __half, flash_mma_d##D##_f16)                                                                               \
  FLASH(D, __nv_bfloat16, flash_mma_d##D##_bf16)
FLASH_OF(64)
FLASH_OF(128)
FLASH_OF(256)
FLASH_OF(512)
