// The gated delta rule of prompts, CHUNK tokens at a time, on tensor cores; K = V = 128. With the rows of q and k
// divided by their norms, G the running sum of g within the chunk and D[i, j] = exp(G[i] - G[j]) for i >= j, else 0:
//
//   T = (I + strictly_lower(beta (k k^T) D))^-1 beta           P = (q k^T) D
//   X = T (v - exp(G) k S^T)                                   what the chunk's tokens add to the state
//   y = exp(G) q S^T + P X
//   S = exp(G[last]) S + X^T (exp(G[last] - G) k)
//
// T and P do not depend on the state: `prepare` finds them for all chunks at once. `scan` then takes the chunks of a
// sequence one after the other, for 16 rows of the state a group of two warps. One keeps S [16, 128] in its registers,
// in f32, where the accumulators of one product are the operand of the next; the other finds y, one chunk behind.
// LOADERS more threads fetch operands ahead. Compute capability 9.0 has a scan of its own: `gated_delta_scan_wgmma.cu`.
//
// Norms and decays enter as factors of f32 results: products see q, k and v as they are stored.
#include "gated_delta/chunked.cuh"

// Threads of a block that fetch operands.
constexpr int LOADERS = 128;

// The first of `left` rows of CHUNK, the others zero.
template <typename T, int PIECES>
__device__ inline void fetch_rows(Tile<T, PIECES> tile, const T *from, uint32_t stride, uint32_t left, int loader) {
  constexpr int ROWS = LOADERS / PIECES;
  const uint32_t row = loader / PIECES, piece = loader % PIECES;
  from += row * size_t(stride) + piece * 8;
  if (left >= CHUNK) {
#pragma unroll
    for (int n = 0; n < CHUNK / ROWS; n++)
      copy_async(tile.at(row + n * ROWS, piece), from + n * ROWS * size_t(stride));
  } else {
#pragma unroll 1
    for (int n = 0; n < CHUNK / ROWS; n++)
      if (row + n * ROWS < left)
        copy_async(tile.at(row + n * ROWS, piece), from + n * ROWS * size_t(stride));
      else
        *reinterpret_cast<uint4 *>(tile.at(row + n * ROWS, piece)) = {};
  }
}
template <typename T> __device__ inline void fetch_lower(Lower<T> &to, const Lower<T> &from, int loader) {
#pragma unroll
  for (int n = 0; n < CHUNK * Lower<T>::PIECES / LOADERS; n++)
    copy_async(to.values[n * LOADERS + loader], from.values[n * LOADERS + loader]);
}

constexpr int PREPARE_THREADS = LOADERS;
constexpr int PREPARE_BLOCKS = 5; // on a multiprocessor
constexpr int ROW = CHUNK + 4; // of a matrix of f32 in shared memory, rows in different banks

template <typename T> struct PrepareShared {
  union {
    struct {
      T k[CHUNK * D], q[CHUNK * D];
    };
    struct {
      float a[CHUNK][ROW], t[CHUNK][ROW];
    };
  };
  float sum[CHUNK], sum_rest[CHUNK], beta[CHUNK], k_scale[CHUNK], q_scale[CHUNK];
};

// In `inverse`, columns `first` to `first + 32` of (I + a)^-1 at the same rows: lane i has column i of this block.
__device__ inline void invert_block(const float (&a)[CHUNK][ROW], float (&inverse)[CHUNK][ROW], int first) {
  const int lane = threadIdx.x % 32;
  float x[32];
#pragma unroll
  for (int i = 0; i < 32; i++) {
    float sums[4] = {i == lane ? 1.f : 0.f, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 row = *reinterpret_cast<const float4 *>(&a[first + i][first + j]);
      sums[0] = fmaf(-row.x, x[j], sums[0]);
      if (j + 1 < i)
        sums[1] = fmaf(-row.y, x[j + 1], sums[1]);
      if (j + 2 < i)
        sums[2] = fmaf(-row.z, x[j + 2], sums[2]);
      if (j + 3 < i)
        sums[3] = fmaf(-row.w, x[j + 3], sums[3]);
    }
    x[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    inverse[first + i][first + lane] = x[i];
  }
}

// to [32, 32] = factor * a [32, 32] b [32, 32] at their rows and columns; a warp has eight rows.
__device__ inline void multiply_blocks(float (&to)[CHUNK][ROW], int to_row, float factor, const float (&a)[CHUNK][ROW],
                                       int a_row, int a_column, const float (&b)[CHUNK][ROW], int b_row) {
  const int row = threadIdx.x / 32 * 8, lane = threadIdx.x % 32;
  float sums[8] = {};
#pragma unroll
  for (int j = 0; j < 32; j += 4) {
    float column[4];
#pragma unroll
    for (int n = 0; n < 4; n++)
      column[n] = b[b_row + j + n][lane];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float4 values = *reinterpret_cast<const float4 *>(&a[a_row + row + i][a_column + j]);
      sums[i] = fmaf(values.x, column[0], sums[i]);
      sums[i] = fmaf(values.y, column[1], sums[i]);
      sums[i] = fmaf(values.z, column[2], sums[i]);
      sums[i] = fmaf(values.w, column[3], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    to[to_row + row + i][lane] = factor * sums[i];
}

template <typename T>
__device__ void prepare(const T *q, const T *k, const float *g, const float *beta, Prepared<T> *all, Steps steps,
                        Rows q_rows, Rows k_rows) {
  extern __shared__ uint4 memory[];
  auto &shared = *reinterpret_cast<PrepareShared<T> *>(memory);
  const uint32_t chunk = blockIdx.x / steps.hv, head = blockIdx.x % steps.hv;
  uint32_t sequence = 0;
  for (uint32_t high = steps.sequences; high - sequence > 1;) {
    const uint32_t middle = (sequence + high) / 2;
    (steps.first_chunk(middle) <= chunk ? sequence : high) = middle;
  }
  const uint32_t end = steps.cu_seqlens[sequence + 1];
  const uint32_t first = steps.cu_seqlens[sequence] + (chunk - steps.first_chunk(sequence)) * CHUNK;
  if (first >= end || steps.is_short(sequence))
    return;
  Prepared<T> &prepared = all[blockIdx.x];
  const uint32_t shared_head = head * steps.hk / steps.hv;
  const Tile<T, D / 8> k_tile{shared.k}, q_tile{shared.q};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  fetch_rows(k_tile, k + k_rows.start(first, shared_head), k_rows.token_stride, end - first, threadIdx.x);
  fetch_rows(q_tile, q + q_rows.start(first, shared_head), q_rows.token_stride, end - first, threadIdx.x);
  commit_copies();
  // Sums in f64, kept as two f32: of the difference of two large ones, the small gates between them remain.
  if (warp == 0) {
    double before = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t token = first + half * 32 + lane;
      const bool has = token < end;
      const float gate = has ? g[token * size_t(steps.hv) + head] : 0;
      double sum = gate < -1e4f ? -1e4f : gate; // exp of either is 0, but infinite ones have no difference
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const double other = __shfl_up_sync(0xffffffff, sum, offset);
        sum += lane >= offset ? other : 0;
      }
      sum += before;
      before = __shfl_sync(0xffffffff, sum, 31);
      const float rounded = float(sum);
      shared.sum[half * 32 + lane] = rounded;
      shared.sum_rest[half * 32 + lane] = float(sum - rounded);
      shared.beta[half * 32 + lane] = has ? beta[token * size_t(steps.hv) + head] : 0;
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  // Rows 16 * warp to 16 * warp + 15, up to the diagonal; of q q^T, the squares on it.
  float kk[8][4] = {}, qk[8][4] = {}, qq[2][4] = {};
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t k_values[4], q_values[4], columns[4];
    load_matrices(k_values, k_tile.at(warp * 16 + lane % 16, step * 2 + lane / 16));
    load_matrices(q_values, q_tile.at(warp * 16 + lane % 16, step * 2 + lane / 16));
    multiply_add(qq[0], q_values, q_values[0], q_values[2], T());
    multiply_add(qq[1], q_values, q_values[1], q_values[3], T());
#pragma unroll
    for (int n = 0; n < 4; n++)
      if (n <= warp) {
        load_matrices(columns, k_tile.at(n * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        multiply_add(kk[2 * n], k_values, columns[0], columns[1], T());
        multiply_add(kk[2 * n + 1], k_values, columns[2], columns[3], T());
        multiply_add(qk[2 * n], q_values, columns[0], columns[1], T());
        multiply_add(qk[2 * n + 1], q_values, columns[2], columns[3], T());
      }
  }
  // The lane that has row lane / 4 of column lane / 4, and both 8 further.
  if (lane % 4 == lane / 8) {
    float squares[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int n = 0; n < 4; n++)
        if (n == warp)
          squares[half] = lane / 4 % 2 ? kk[2 * n + half][half * 2 + 1] : kk[2 * n + half][half * 2];
      const int row = warp * 16 + half * 8 + lane / 4;
      const float q_squares = lane / 4 % 2 ? qq[half][half * 2 + 1] : qq[half][half * 2];
      const float k_scale = 1 / sqrtf(squares[half] + 1e-6f);
      const float q_scale = 1 / (sqrtf(q_squares + 1e-6f) * sqrtf(D));
      shared.k_scale[row] = k_scale;
      shared.q_scale[row] = q_scale;
      const float sum = shared.sum[row], last = shared.sum[CHUNK - 1];
      const float left = (last - sum) + (shared.sum_rest[CHUNK - 1] - shared.sum_rest[row]);
      prepared.from_state[row] = expf(sum) * k_scale;
      prepared.to_state[row] = expf(left) * k_scale;
      prepared.to_output[row] = expf(sum) * q_scale;
      if (row == 0)
        *reinterpret_cast<float4 *>(prepared.decay) = make_float4(expf(last), 0, 0, 0); // whole, as it is copied
    }
  }
  __syncthreads();

  const int upper = warp * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < 8; n++)
    if (n / 2 <= warp) {
      const int column = n * 8 + lane % 4 * 2;
      const float2 sums = *reinterpret_cast<const float2 *>(&shared.sum[column]);
      const float2 rests = *reinterpret_cast<const float2 *>(&shared.sum_rest[column]);
      const float2 scales = *reinterpret_cast<const float2 *>(&shared.k_scale[column]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = upper + half * 8;
        const float sum = shared.sum[row], rest = shared.sum_rest[row];
        const float k_factor = shared.beta[row] * shared.k_scale[row], q_factor = shared.q_scale[row];
        const float x = __expf((sum - sums.x) + (rest - rests.x)) * scales.x;
        const float y = __expf((sum - sums.y) + (rest - rests.y)) * scales.y;
        const float *const a = &kk[n][half * 2], *const p = &qk[n][half * 2];
        *reinterpret_cast<float2 *>(&shared.a[row][column]) = {column < row ? k_factor * x * a[0] : 0,
                                                               column + 1 < row ? k_factor * y * a[1] : 0};
        *reinterpret_cast<uint32_t *>(prepared.p.at(row, n) + lane % 4 * 2) =
            narrow_pair(column <= row ? q_factor * x * p[0] : 0, column + 1 <= row ? q_factor * y * p[1] : 0, T());
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<uint32_t *>(prepared.p.at(upper + half * 8, n) + lane % 4 * 2) = 0;
    }
  __syncthreads();

  // The inverse by blocks of 32: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]].
  if (warp < 2)
    invert_block(shared.a, shared.t, warp * 32);
  __syncthreads();
  multiply_blocks(shared.a, 0, 1, shared.a, 32, 0, shared.t, 0);
  __syncthreads();
  multiply_blocks(shared.t, 32, -1, shared.t, 32, 32, shared.a, 0);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < CHUNK * Lower<T>::PIECES / PREPARE_THREADS; n++) {
    const int i = n * PREPARE_THREADS + threadIdx.x, row = i % CHUNK, piece = i / CHUNK, column = piece * 8;
    Pack<T, 8> pack = {};
    if (column / 32 <= row / 32)
#pragma unroll
      for (int c = 0; c < 8; c++)
        pack.values[c] = narrow<T>(shared.t[row][column + c] * shared.beta[column + c]);
    *reinterpret_cast<Pack<T, 8> *>(prepared.t.at(row, piece)) = pack;
  }
}

#define PREPARE(name, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(PREPARE_THREADS, PREPARE_BLOCKS)                                        \
      name(const T *q, uint32_t q_token, uint32_t q_head, const T *k, uint32_t k_token, uint32_t k_head,               \
           const float *g, const float *beta, Prepared<T> *prepared, const uint32_t *cu_seqlens, uint32_t sequences,   \
           uint32_t hk, uint32_t hv, uint32_t shortest) {                                                              \
    prepare<T>(q, k, g, beta, prepared, {cu_seqlens, nullptr, nullptr, sequences, hk, hv, shortest},                   \
               {hk, q_token, q_head}, {hk, k_token, k_head});                                                          \
  }
PREPARE(gated_delta_prepare_f16, __half)
PREPARE(gated_delta_prepare_bf16, __nv_bfloat16)

// Groups of 16 rows of a block, and chunks whose operands it holds.
constexpr int GROUPS = 2;
constexpr int STAGES = 2;
constexpr int SCAN_THREADS = GROUPS * 64 + LOADERS;

// Operands of a chunk: those of the state, and those of the output, which are needed one chunk later.
template <typename T> struct StateOperands {
  T k[CHUNK * D], v[CHUNK * GROUPS * 16];
  Lower<T> t;
  float from_state[CHUNK], to_state[CHUNK], decay[4];
};
template <typename T> struct OutputOperands {
  T q[CHUNK * D];
  Lower<T> p;
  float to_output[CHUNK];
};
// What a state's warp leaves for its output's: S as it was before the chunk, and X.
struct Handed {
  uint4 s[D / 16][32], x[CHUNK / 16][32];
};
template <typename T> struct ScanShared {
  StateOperands<T> state[STAGES];
  OutputOperands<T> output[STAGES];
  Handed handed[2][GROUPS];
};

template <typename T>
__device__ void scan(const T *q, const T *k, const T *v, const Prepared<T> *all, float *state, T *out, Steps steps,
                     Rows q_rows, Rows k_rows, Rows v_rows) {
  constexpr int TILES = D / 16 / GROUPS, V = GROUPS * 16;
  extern __shared__ uint4 memory[];
  auto &shared = *reinterpret_cast<ScanShared<T> *>(memory);
  const uint32_t head = blockIdx.x / TILES % steps.hv, sequence = blockIdx.x / TILES / steps.hv;
  const uint32_t first_row = blockIdx.x % TILES * V;
  if (steps.is_short(sequence))
    return;
  const uint32_t begin = steps.cu_seqlens[sequence], end = steps.cu_seqlens[sequence + 1];
  const int chunks = (end - begin + CHUNK - 1) / CHUNK;
  const Prepared<T> *const prepared = all + size_t(steps.first_chunk(sequence)) * steps.hv + head;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % GROUPS;
  const uint32_t row = first_row + group * 16;
  // Of a matrix that ldmatrix reads for an operand of columns, as it is stored and transposed.
  const int column_row = lane / 16 * 8 + lane % 8, column_piece = lane / 8 % 2;

  if (warp < GROUPS) {
    // Thread: rows lane / 4 and 8 more, columns 8 n + 2 (lane % 4) and the next.
    float *const slot = state + ((steps.state_slots[sequence] * size_t(steps.hv) + head) * D + row + lane / 4) * D +
                        lane % 4 * 2;
    float s[D / 8][4] = {};
    if (steps.context_lens[sequence] != end - begin)
      load_state(s, slot);
    __syncthreads();
    for (int chunk = 0; chunk < chunks; chunk++) {
      const auto &operands = shared.state[chunk % STAGES];
      auto &handed = shared.handed[chunk % 2][group];
      const Tile<const T, D / 8> k_tile{operands.k};
      const Tile<const T, GROUPS * 2> v_tile{operands.v};

      float sk[CHUNK / 8][4] = {}; // S k^T
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        const uint32_t rows[4] = {narrow_pair(s[2 * step][0], s[2 * step][1], T()),
                                  narrow_pair(s[2 * step][2], s[2 * step][3], T()),
                                  narrow_pair(s[2 * step + 1][0], s[2 * step + 1][1], T()),
                                  narrow_pair(s[2 * step + 1][2], s[2 * step + 1][3], T())};
        handed.s[step][lane] = {rows[0], rows[1], rows[2], rows[3]};
#pragma unroll
        for (int n = 0; n < CHUNK / 16; n++) {
          uint32_t columns[4];
          load_matrices(columns, k_tile.at(n * 16 + column_row, step * 2 + column_piece));
          multiply_add(sk[2 * n], rows, columns[0], columns[1], T());
          multiply_add(sk[2 * n + 1], rows, columns[2], columns[3], T());
        }
      }
      uint32_t rest[CHUNK / 16][4]; // v - exp(G) S k^T
#pragma unroll
      for (int n = 0; n < CHUNK / 16; n++) {
        load_transposed(rest[n], v_tile.at(n * 16 + column_row, group * 2 + column_piece));
        subtract_products<T>(rest[n], &sk[2 * n], &operands.from_state[n * 16 + lane % 4 * 2]);
      }
      float x[CHUNK / 8][4] = {};
#pragma unroll
      for (int step = 0; step < CHUNK / 16; step++)
#pragma unroll
        for (int n = step; n < CHUNK / 16; n++) {
          uint32_t columns[4];
          load_matrices(columns, operands.t.at(n * 16 + column_row, step * 2 + column_piece));
          multiply_add(x[2 * n], rest[step], columns[0], columns[1], T());
          multiply_add(x[2 * n + 1], rest[step], columns[2], columns[3], T());
        }
      const float decay = operands.decay[0];
#pragma unroll
      for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          s[n][c] *= decay;
#pragma unroll
      for (int step = 0; step < CHUNK / 16; step++) {
        uint32_t rows[4], scaled[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float2 factor =
              *reinterpret_cast<const float2 *>(&operands.to_state[step * 16 + half * 8 + lane % 4 * 2]);
          const float *const value = x[2 * step + half];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            rows[half * 2 + r] = narrow_pair(value[r * 2], value[r * 2 + 1], T());
            scaled[half * 2 + r] = narrow_pair(value[r * 2] * factor.x, value[r * 2 + 1] * factor.y, T());
          }
        }
        handed.x[step][lane] = {rows[0], rows[1], rows[2], rows[3]};
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
          uint32_t columns[4];
          load_transposed(columns, k_tile.at(step * 16 + lane % 16, n * 2 + lane / 16));
          multiply_add(s[2 * n], scaled, columns[0], columns[1], T());
          multiply_add(s[2 * n + 1], scaled, columns[2], columns[3], T());
        }
      }
      __syncthreads();
    }
    store_state(slot, s);
    return;
  }

  if (warp < 2 * GROUPS) {
    __syncthreads();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      __syncthreads();
      const auto &operands = shared.output[chunk % STAGES];
      const auto &handed = shared.handed[chunk % 2][group];
      const Tile<const T, D / 8> q_tile{operands.q};
      float y[CHUNK / 8][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; step++) {
        const uint4 s = handed.s[step][lane];
        const uint32_t rows[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int n = 0; n < CHUNK / 16; n++) {
          uint32_t columns[4];
          load_matrices(columns, q_tile.at(n * 16 + column_row, step * 2 + column_piece));
          multiply_add(y[2 * n], rows, columns[0], columns[1], T());
          multiply_add(y[2 * n + 1], rows, columns[2], columns[3], T());
        }
      }
#pragma unroll
      for (int n = 0; n < CHUNK / 8; n++) {
        const float2 factor = *reinterpret_cast<const float2 *>(&operands.to_output[n * 8 + lane % 4 * 2]);
        y[n][0] *= factor.x, y[n][1] *= factor.y, y[n][2] *= factor.x, y[n][3] *= factor.y;
      }
#pragma unroll
      for (int step = 0; step < CHUNK / 16; step++) {
        const uint4 x = handed.x[step][lane];
        const uint32_t rows[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int n = step; n < CHUNK / 16; n++) {
          uint32_t columns[4];
          load_matrices(columns, operands.p.at(n * 16 + column_row, step * 2 + column_piece));
          multiply_add(y[2 * n], rows, columns[0], columns[1], T());
          multiply_add(y[2 * n + 1], rows, columns[2], columns[3], T());
        }
      }
      const uint32_t token = begin + chunk * CHUNK + lane / 4;
      T *const to = out + (token * size_t(steps.hv) + head) * D + row + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < CHUNK / 8; n++) {
        const uint32_t upper = transpose(narrow_pair(y[n][0], y[n][1], T()));
        const uint32_t lower = transpose(narrow_pair(y[n][2], y[n][3], T()));
        if (token + n * 8 < end) {
          *reinterpret_cast<uint32_t *>(to + size_t(n) * 8 * steps.hv * D) = upper;
          *reinterpret_cast<uint32_t *>(to + size_t(n) * 8 * steps.hv * D + 8) = lower;
        }
      }
    }
    return;
  }

  const int loader = threadIdx.x - GROUPS * 64;
  const uint32_t shared_head = head * steps.hk / steps.hv;
  const T *k_next = k + k_rows.start(begin, shared_head), *q_next = q + q_rows.start(begin, shared_head);
  const T *v_next = v + v_rows.start(begin, head) + first_row;
  const Prepared<T> *from = prepared;
  const auto fetch = [&](int chunk) {
    if (const int last = chunk - 1; last >= 0 && last < chunks) {
      auto &to = shared.output[last % STAGES];
      fetch_rows(Tile<T, D / 8>{to.q}, q_next, q_rows.token_stride, end - begin - last * CHUNK, loader);
      fetch_lower(to.p, from->p, loader);
      if (loader < CHUNK / 4)
        copy_async(to.to_output + loader * 4, from->to_output + loader * 4);
      q_next += CHUNK * size_t(q_rows.token_stride);
      from += steps.hv;
    }
    if (chunk < chunks) {
      auto &to = shared.state[chunk % STAGES];
      const uint32_t left = end - begin - chunk * CHUNK;
      fetch_rows(Tile<T, D / 8>{to.k}, k_next, k_rows.token_stride, left, loader);
      fetch_lower(to.t, from->t, loader);
      fetch_rows(Tile<T, GROUPS * 2>{to.v}, v_next, v_rows.token_stride, left, loader);
      if (loader < CHUNK / 4) {
        copy_async(to.from_state + loader * 4, from->from_state + loader * 4);
        copy_async(to.to_state + loader * 4, from->to_state + loader * 4);
      }
      if (loader == 0)
        copy_async(to.decay, from->decay);
      k_next += CHUNK * size_t(k_rows.token_stride);
      v_next += CHUNK * size_t(v_rows.token_stride);
    }
    commit_copies();
  };
#pragma unroll 1
  for (int chunk = 0; chunk < STAGES - 1; chunk++)
    fetch(chunk);
  wait_for_copies<STAGES - 2>();
  __syncthreads();
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    fetch(chunk + STAGES - 1);
    wait_for_copies<STAGES - 2>();
    __syncthreads();
  }
}

#define SCAN(name, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(SCAN_THREADS, 1)                                                        \
      name(const T *q, uint32_t q_token, uint32_t q_head, const T *k, uint32_t k_token, uint32_t k_head, const T *v,   \
           uint32_t v_token, uint32_t v_head, const Prepared<T> *prepared, float *state, T *out,                       \
           const uint32_t *cu_seqlens, const uint32_t *context_lens, const uint32_t *state_slots, uint32_t sequences,  \
           uint32_t hk, uint32_t hv, uint32_t shortest) {                                                              \
    scan<T>(q, k, v, prepared, state, out, {cu_seqlens, context_lens, state_slots, sequences, hk, hv, shortest},       \
            {hk, q_token, q_head}, {hk, k_token, k_head}, {hv, v_token, v_head});                                      \
  }
SCAN(gated_delta_scan_f16, __half)
SCAN(gated_delta_scan_bf16, __nv_bfloat16)
// As the host allocates them.
static_assert(sizeof(Prepared<__half>) == 17280);
static_assert(sizeof(PrepareShared<__half>) == 36096);
static_assert(sizeof(ScanShared<__half>) == 132640);
