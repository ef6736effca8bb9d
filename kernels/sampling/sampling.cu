// A token of each row, drawn from its most likely ones: blocks of a row find theirs, then a block has the last word.
#include "sampling/key.cuh"

constexpr int THREADS = 512, CHUNK = 4096, BEST = 64;

// One step of a bitonic sort over the first `count` keys: pairs at a distance. Runs of `size` keys fall and rise in turn.
__device__ void compare(uint64_t *keys, int count, int distance, int size) {
  __syncthreads();
  for (int at = threadIdx.x; at < count / 2; at += THREADS) {
    const int i = 2 * at - (at & (distance - 1)); // a power of two
    const uint64_t a = keys[i], b = keys[i + distance];
    if ((a < b) == ((i & size) == 0)) {
      keys[i] = b;
      keys[i + distance] = a;
    }
  }
}

// Leaves the BEST largest of CHUNK keys, the largest first.
__device__ void keep_best(uint64_t *keys) {
  for (int size = 2; size <= BEST; size *= 2)
    for (int distance = size / 2; distance > 0; distance /= 2)
      compare(keys, CHUNK, distance, size < BEST ? size : 0);
  // The larger ones of two runs, one of them backwards, are the best of both, falling and then rising.
  for (int runs = CHUNK / BEST; runs > 1; runs /= 2) {
    constexpr int EACH = CHUNK / 2 / THREADS;
    uint64_t larger[EACH];
    __syncthreads();
    for (int n = 0; n < EACH; n++)
      if (const int at = n * THREADS + threadIdx.x; at < runs * BEST / 2) {
        const uint64_t *run = keys + at / BEST * 2 * BEST;
        larger[n] = max(run[at % BEST], run[2 * BEST - 1 - at % BEST]);
      }
    __syncthreads();
    for (int n = 0; n < EACH; n++)
      if (const int at = n * THREADS + threadIdx.x; at < runs * BEST / 2)
        keys[at] = larger[n];
    for (int distance = BEST / 2; distance > 0; distance /= 2)
      compare(keys, runs * BEST / 2, distance, 0);
  }
  __syncthreads();
}

// x [rows, stride], of which `count` take part; best [rows, blocks of a row, BEST].
template <typename T> __device__ void best_of_chunks(const T *x, uint32_t stride, uint32_t count, uint64_t *best) {
  __shared__ uint64_t keys[CHUNK];
  let_next_start();
  wait_for_inputs();
  const T *from = x + blockIdx.y * size_t(stride);
  for (int at = threadIdx.x; at < CHUNK; at += THREADS) {
    const uint32_t i = blockIdx.x * CHUNK + at;
    keys[at] = i < count ? key(widen(from[i]), i) : 0;
  }
  keep_best(keys);
  if (threadIdx.x < BEST)
    best[(blockIdx.y * size_t(gridDim.x) + blockIdx.x) * BEST + threadIdx.x] = keys[threadIdx.x];
}

struct Draw {
  float temperature;
  uint32_t top_k;
  float top_p, min_p, position;
};

// best [rows, chunks, BEST], at most CHUNK of a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    draw_of_best(const uint64_t *best, uint32_t chunks, const Draw *draws, uint32_t *indices) {
  __shared__ uint64_t keys[CHUNK];
  __shared__ float weights[BEST];
  let_next_start();
  const Draw draw = draws[blockIdx.x]; // there before the step's first kernel
  wait_for_inputs();
  for (int at = threadIdx.x; at < CHUNK; at += THREADS)
    keys[at] = at < chunks * BEST ? best[blockIdx.x * size_t(chunks) * BEST + at] : 0;
  keep_best(keys);
  if (threadIdx.x >= 32)
    return;
  if (!is_fit(keys[0])) {
    if (threadIdx.x == 0)
      indices[blockIdx.x] = NOTHING;
    return;
  }
  constexpr int EACH = BEST / 32;
  const auto each = [&](const auto &f) {
#pragma unroll
    for (int n = 0; n < EACH; n++)
      f(n * 32 + threadIdx.x);
    __syncwarp();
  };
  each([&](int i) {
    const bool takes_part = i < draw.top_k && is_fit(keys[i]);
    weights[i] = takes_part ? expf((value_of(keys[i]) - value_of(keys[0])) / draw.temperature) : 0;
  });
  const auto sum = [&](const auto &is_counted) {
    double total = 0;
#pragma unroll 4
    for (int j = 0; j < BEST; j++)
      total += is_counted(j) ? weights[j] : 0;
    return total;
  };
  const double wanted = draw.top_p * sum([](int) { return true; });
  bool is_kept[EACH];
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int i = n * 32 + threadIdx.x;
    const bool is_wanted = i == 0 || draw.top_p >= 1 || sum([i](int j) { return j < i; }) < wanted;
    is_kept[n] = is_wanted && weights[i] >= draw.min_p;
  }
  __syncwarp(); // all have read the weights
#pragma unroll
  for (int n = 0; n < EACH; n++)
    if (!is_kept[n])
      weights[n * 32 + threadIdx.x] = 0;
  __syncwarp();
  // The first by index that reaches the target; if rounding leaves none, the last one.
  const double target = draw.position * sum([](int) { return true; });
  uint32_t first = NOTHING, last = 0;
  each([&](int i) {
    if (weights[i] == 0)
      return;
    const uint32_t index = index_of(keys[i]);
    last = max(last, index);
    if (sum([&](int j) { return index_of(keys[j]) <= index; }) > target)
      first = min(first, index);
  });
  first = __reduce_min_sync(0xffffffff, first);
  last = __reduce_max_sync(0xffffffff, last);
  if (threadIdx.x == 0)
    indices[blockIdx.x] = first == NOTHING ? last : first;
}

#define BEST_OF_CHUNKS(name, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *x, uint32_t stride, uint32_t count, uint64_t *best) {                                              \
    best_of_chunks<T>(x, stride, count, best);                                                                         \
  }
FOR_FLOATS(BEST_OF_CHUNKS, best_of_chunks)
