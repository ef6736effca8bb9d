// The chunks of the gated delta rule one after the other on compute capability 9.0: `gated_delta_chunked.cu` says what
// they are, and prepares them. A block has 64 rows of the state of a head.
//
// A warpgroup keeps them in its registers, in f32, where the accumulators of one product are the operand of the next.
// Of the chain S k^T, X, S each product waits for the one before and for what is done to its sums in between; there the
// tensor cores have those of y to do. One more warp has copies fetch chunks ahead.
//
// ptxas lets products overlap only where it sees through everything between the first and the wait for the last: no
// branch, one width of accumulators, and none that a product left in the turn of the loop before. It says so if not.
#include "gated_delta/chunked.cuh"
#include "wgmma.cuh"

// Images for other GPUs have none of these kernels.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int THREADS = 128 + 32, ROWS = 64, STAGES = 3;

// A stage in shared memory, from a multiple of 1024 on: k and q in two columns of 64 values, v in one, swizzled.
template <typename T> struct Stage {
  static constexpr uint32_t ROW = 128, COLUMN = CHUNK * ROW, K = 0, Q = 2 * COLUMN, V = 4 * COLUMN;
  // Behind what is prepared of the chunk, the decay over the next.
  static constexpr uint32_t PREPARED = 5 * COLUMN, DECAY = PREPARED + sizeof(Prepared<T>);
  static constexpr uint32_t BYTES = (DECAY + 16 + 1023) / 1024 * 1024;
};

// A warp fetches chunks.
template <typename T>
__device__ void fetch(const CUtensorMap &q, const CUtensorMap &k, const CUtensorMap &v, const Prepared<T> *prepared,
                      const Steps &steps, uint32_t memory, uint32_t full, uint32_t empty, int chunks, uint32_t token,
                      uint32_t head, uint32_t first_row) {
  using S = Stage<T>;
  const int lane = threadIdx.x % 32;
  const uint32_t shared_head = head * steps.hk / steps.hv;
  wait_for_inputs();
  for (int chunk = 0; chunk < chunks; chunk++, token += CHUNK, prepared += steps.hv) {
    const int stage = chunk % STAGES;
    const uint32_t to = memory + stage * S::BYTES, barrier = full + stage * 8;
    wait_for_phase(empty + stage * 8, chunk / STAGES % 2 ^ 1);
    if (lane == 0)
      arrive_expecting(barrier, S::DECAY + 16);
    __syncwarp();
    if (lane < 2)
      copy_box(to + S::K + lane * S::COLUMN, k, lane * 64, shared_head, token, barrier);
    else if (lane < 4)
      copy_box(to + S::Q + (lane - 2) * S::COLUMN, q, (lane - 2) * 64, shared_head, token, barrier);
    else if (lane == 4)
      copy_box(to + S::V, v, first_row, head, token, barrier);
    else if (lane == 5)
      copy_bulk(to + S::PREPARED, prepared, sizeof(Prepared<T>), barrier);
    else if (lane == 6)
      copy_bulk(to + S::DECAY, prepared[chunk + 1 < chunks ? steps.hv : 0].decay, 16, barrier);
  }
}

// s narrowed, as the operand of a product.
template <typename T> __device__ inline void narrow_rows(uint32_t (&rows)[D / 16][4], const float (&s)[D / 8][4]) {
#pragma unroll
  for (int i = 0; i < D / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      rows[i][j] = narrow_pair(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1], T());
}

template <int N> __device__ inline void scale(float (&c)[N][4], float factor) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      c[n][i] *= factor;
}

// c [64, CHUNK] (+)= a b^T of a lower triangle b.
template <typename T>
__device__ inline void multiply_lower(float (&c)[CHUNK / 8][4], const uint32_t (&a)[CHUNK / 16][4], uint32_t b,
                                      bool is_added) {
#pragma unroll
  for (int i = 0; i < CHUNK / 16; i++)
    Products<T, CHUNK / 8>::registers_by_rows(c, a[i], describe_columns(b + i * 2 * CHUNK * 16, CHUNK * 16),
                                              is_added || i > 0);
}

// Two values of a token, and two of eight rows further down; without a branch.
template <typename T> __device__ inline void store_if(bool is_stored, T *to, uint32_t upper, uint32_t lower) {
  asm volatile("{\n.reg .pred stored;\nsetp.ne.b32 stored, %3, 0;\n"
               "@stored st.global.b32 [%0], %1;\n@stored st.global.b32 [%0 + 16], %2;\n}" ::"l"(to), "r"(upper),
               "r"(lower), "r"(int(is_stored))
               : "memory");
}

// A warpgroup has the rows of the state.
template <typename T>
__device__ void scan(float *slot, bool is_fresh, T *out, const Steps &steps, const uint8_t *shared, uint32_t full,
                     uint32_t empty, int chunks, int left) {
  using S = Stage<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const uint32_t memory = shared_address(shared);
  slot += (warp * 16 + lane / 4) * D + pair;
  out += warp * 16 + pair;
  float s[D / 8][4] = {}, y[CHUNK / 8][4] = {};
  if (!is_fresh)
    load_state(s, slot);
  uint32_t rows[D / 16][4];
  narrow_rows<T>(rows, s);

  const size_t token_stride = size_t(steps.hv) * D;
  uint32_t narrowed_y[CHUNK / 8][2]; // of the chunk before, while products run for this one
  const auto store_output = [&](int first) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
      const uint32_t upper = transpose(narrowed_y[n][0]), lower = transpose(narrowed_y[n][1]);
      const int token = first + n * 8 + lane / 4;
      store_if(token >= 0 && token < left, out + token * token_stride, upper, lower);
    }
  };
  wait_for_phase(full, 0);
  scale(s, reinterpret_cast<const Prepared<T> *>(shared + S::PREPARED)->decay[0]);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    const int stage = chunk % STAGES;
    const uint32_t at = memory + stage * S::BYTES, k = at + S::K, q = at + S::Q;
    const auto &prepared = *reinterpret_cast<const Prepared<T> *>(shared + stage * S::BYTES + S::PREPARED);
    const uint32_t t = shared_address(&prepared.t), p = shared_address(&prepared.p);
    wait_for_phase(full + stage * 8, chunk / STAGES % 2);
    if (left - chunk * CHUNK < CHUNK) {
      // Tokens of others: a factor of zero times them might not be zero.
      for (int i = threadIdx.x; i < CHUNK * 24; i += 128)
        if (const int row = i % CHUNK, piece = i / CHUNK; chunk * CHUNK + row >= left)
          clear(at + (piece < 16 ? S::K + piece / 8 * S::COLUMN : S::V) + row * S::ROW + piece % 8 * 16);
      fence_shared();
      synchronize(1, 128);
    }

    float sk[CHUNK / 8][4]; // S k^T
    begin_products();
#pragma unroll
    for (int i = 0; i < D / 16; i++)
      Products<T, CHUNK / 8>::registers_by_rows(sk, rows[i], describe(k + i / 4 * S::COLUMN + i % 4 * 32, 16), i > 0);
    commit_products();
    const auto multiply_q = [&](int first) {
      begin_products();
#pragma unroll
      for (int i = first; i < first + D / 32; i++)
        Products<T, CHUNK / 8>::registers_by_rows(y, rows[i], describe(q + i / 4 * S::COLUMN + i % 4 * 32, 16), i > 0);
      commit_products();
    };
    multiply_q(0);
    store_output((chunk - 1) * CHUNK);
    wait_for_products<1>();
    pin(sk);
    uint32_t rest[CHUNK / 16][4]; // v - exp(G) S k^T
    const Tile<const T, 8> v{reinterpret_cast<const T *>(shared + stage * S::BYTES + S::V)};
#pragma unroll
    for (int n = 0; n < CHUNK / 16; n++) {
      load_transposed(rest[n], v.at(n * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
      subtract_products<T>(rest[n], &sk[2 * n], &prepared.from_state[n * 16 + pair]);
    }
    float x[CHUNK / 8][4];
    begin_products();
    multiply_lower<T>(x, rest, t, false);
    commit_products();
    multiply_q(D / 32);
    wait_for_products<1>();
    pin(x);
    uint32_t narrowed_x[CHUNK / 16][4], scaled_x[CHUNK / 16][4];
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
      const float2 factor = *reinterpret_cast<const float2 *>(&prepared.to_state[n * 8 + pair]);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float first = x[n][r * 2], second = x[n][r * 2 + 1];
        narrowed_x[n / 2][n % 2 * 2 + r] = narrow_pair(first, second, T());
        scaled_x[n / 2][n % 2 * 2 + r] = narrow_pair(first * factor.x, second * factor.y, T());
      }
    }
    begin_products();
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
      Products<T, D / 8>::registers_by_columns(s, scaled_x[i], describe(k + i * 16 * S::ROW, S::COLUMN));
    commit_products();
    wait_for_products<1>();
    pin(y);
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
      const float2 factor = *reinterpret_cast<const float2 *>(&prepared.to_output[n * 8 + pair]);
      y[n][0] *= factor.x, y[n][1] *= factor.y, y[n][2] *= factor.x, y[n][3] *= factor.y;
    }
    begin_products();
    multiply_lower<T>(y, narrowed_x, p, true);
    commit_products();
    wait_for_products<1>();
    pin(s);
    narrow_rows<T>(rows, s);
    const float *const decay = reinterpret_cast<const float *>(shared + stage * S::BYTES + S::DECAY);
    scale(s, chunk + 1 < chunks ? *decay : 1);
    wait_for_products<0>();
    pin(y);
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        narrowed_y[n][r] = narrow_pair(y[n][r * 2], y[n][r * 2 + 1], T());
    __syncwarp(); // one lane speaks for what all have read
    if (lane == 0)
      arrive(empty + stage * 8);
  }
  store_output((chunks - 1) * CHUNK);
  store_state(slot, s);
}

template <typename T>
__device__ void run(const CUtensorMap &q, const CUtensorMap &k, const CUtensorMap &v, const Prepared<T> *prepared,
                    float *state, T *out, const Steps &steps) {
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t barriers[2 * STAGES];
  uint8_t *const shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const uint32_t full = shared_address(barriers), empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, 4);
    }
    fence_shared();
  }
  __syncthreads();

  const uint32_t first_row = blockIdx.x % (D / ROWS) * ROWS, head = blockIdx.x / (D / ROWS) % steps.hv;
  const uint32_t sequence = blockIdx.x / (D / ROWS) / steps.hv;
  const uint32_t begin = steps.cu_seqlens[sequence], left = steps.cu_seqlens[sequence + 1] - begin;
  const int chunks = (left + CHUNK - 1) / CHUNK;
  if (left < steps.shortest)
    return;
  if (threadIdx.x >= 128)
    fetch<T>(q, k, v, prepared + size_t(steps.first_chunk(sequence)) * steps.hv + head, steps, shared_address(shared),
             full, empty, chunks, begin, head, first_row);
  else
    scan<T>(state + ((steps.state_slots[sequence] * size_t(steps.hv) + head) * D + first_row) * D,
            steps.context_lens[sequence] == left, out + (begin * size_t(steps.hv) + head) * D + first_row, steps,
            shared, full, empty, chunks, left);
}

#define SCAN(name, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                             \
      name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                               \
           const __grid_constant__ CUtensorMap v, const Prepared<T> *prepared, float *state, T *out,                   \
           const uint32_t *cu_seqlens, const uint32_t *context_lens, const uint32_t *state_slots, uint32_t sequences,  \
           uint32_t hk, uint32_t hv, uint32_t shortest) {                                                              \
    run<T>(q, k, v, prepared, state, out, {cu_seqlens, context_lens, state_slots, sequences, hk, hv, shortest});       \
  }
SCAN(gated_delta_scan_wgmma_f16, __half)
SCAN(gated_delta_scan_wgmma_bf16, __nv_bfloat16)
// As the host allocates it.
static_assert(1024 + STAGES * Stage<__half>::BYTES == 176128);
#endif
