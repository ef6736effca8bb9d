// The gated delta rule of prompts, CHUNK tokens at a time on the matrix units; K = 128, V a multiple of SLICE. With the
// rows of q and k divided by their norms, G the running sum of g within the chunk and D[i, j] = exp(G[i] - G[j]) for
// i >= j, else 0:
//
//   T = (I + strictly_lower(beta (k k^T) D))^-1 beta           P = (q k^T) D
//   X = T (v - exp(G) k S^T)                                   what the chunk's tokens add to the state
//   y = exp(G) q S^T + P X
//   S = exp(G[last]) S + X^T (exp(G[last] - G) k)
//
// T and P do not depend on the state: `prepare` finds them for all chunks at once. `scan` then takes the chunks of a
// sequence one after the other, for SLICE rows of the state a threadgroup. All of it is in f32; norms and decays enter
// as factors of results, so that products see q, k and v as they are stored.

constant constexpr uint CHUNK = 64;
constant constexpr uint K = 128;
constant constexpr uint SLICE = 32;
constant constexpr uint CHUNK_PARTS = CHUNK / SIDE;
constant constexpr uint CHUNK_SIMDGROUPS = 4;
constant constexpr uint CHUNK_THREADS = CHUNK_SIMDGROUPS * LANES;

struct ChunkSizes {
  Rows q, k, v;
  uint hk, hv, vd, shortest; // tokens of a sequence that goes by chunks, at least
};

// Of one head's chunk. Parts above the diagonals are not written.
struct Prepared {
  float t[CHUNK * CHUNK], p[CHUNK * CHUNK];
  // Factors of k S^T, of the update, of q S^T; the decay over the chunk.
  float from_state[CHUNK], to_state[CHUNK], to_output[CHUNK], decay[CHUNK];
};

// The scratch of a sequence's chunks begins here: enough for each lies between.
inline ulong chunk_of(device const uint *cu_seqlens, uint sequence, uint chunk) {
  return cu_seqlens[sequence] / CHUNK + sequence + chunk;
}

// The simdgroup's rows of parts, one from the top and one from the bottom, so that triangles are shared evenly.
inline uint own_part(uint simdgroup, uint i) { return i == 0 ? simdgroup : CHUNK_PARTS - 1 - simdgroup; }

constant constexpr uint STAGE = 32; // columns of q and k in threadgroup memory at a time
constant constexpr uint STAGE_STRIDE = STAGE + 2;
constant constexpr uint A_STRIDE = CHUNK + 4;

// group.x is the chunk, group.y the value head, group.z the sequence.
template <typename T>
[[kernel]] void gated_delta_prepare(device Prepared *prepared [[buffer(0)]], device const T *q [[buffer(1)]],
                                    device const T *k [[buffer(2)]], device const float *g [[buffer(3)]],
                                    device const float *beta [[buffer(4)]],
                                    device const uint *cu_seqlens [[buffer(5)]],
                                    constant ChunkSizes &sizes [[buffer(6)]],
                                    uint3 group [[threadgroup_position_in_grid]],
                                    uint index [[thread_index_in_threadgroup]],
                                    uint lane [[thread_index_in_simdgroup]],
                                    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  // q and k while they are multiplied, then A.
  threadgroup float shared[2 * CHUNK * STAGE_STRIDE];
  threadgroup float inverse[CHUNK * SIDE]; // of I + A in the parts on the diagonal
  threadgroup float sums[CHUNK];
  threadgroup float rests[CHUNK]; // what rounding took from the sums
  threadgroup float betas[CHUNK];
  threadgroup float q_scales[CHUNK];
  threadgroup float k_scales[CHUNK];

  const uint sequence = group.z, head = group.y, shared_head = head * sizes.hk / sizes.hv;
  const uint length = cu_seqlens[sequence + 1] - cu_seqlens[sequence], first = group.x * CHUNK;
  if (length < sizes.shortest || first >= length)
    return;
  const uint begin = cu_seqlens[sequence] + first, tokens = min(length - first, CHUNK);

  for (uint token = simdgroup; token < CHUNK; token += CHUNK_SIMDGROUPS) {
    float q_squares = 0, k_squares = 0;
    if (token < tokens)
      for (uint c = lane; c < K; c += LANES) {
        const float q_value = float(q[row_start(sizes.q, begin + token, shared_head) + c]);
        const float k_value = float(k[row_start(sizes.k, begin + token, shared_head) + c]);
        q_squares = fma(q_value, q_value, q_squares);
        k_squares = fma(k_value, k_value, k_squares);
      }
    q_squares = simd_sum(q_squares);
    k_squares = simd_sum(k_squares);
    if (lane == 0) {
      q_scales[token] = 1 / (sqrt(q_squares + 1e-6f) * sqrt(float(K)));
      k_scales[token] = 1 / sqrt(k_squares + 1e-6f);
    }
  }
  // Each sum with what rounding left of it, lest the difference of two large ones lose the small gates between them.
  if (index < CHUNK) {
    float sum = 0, rest = 0;
    for (uint token = 0; token <= min(index, tokens - 1); token++) {
      const float gate = g[ulong(begin + token) * sizes.hv + head], next = sum + gate, taken = next - sum;
      rest += (sum - (next - taken)) + (gate - taken);
      sum = next;
    }
    sums[index] = sum;
    rests[index] = rest;
    betas[index] = index < tokens ? beta[ulong(begin + index) * sizes.hv + head] : 0;
  }

  // Of each part of the lower triangles, products of k with k and of q with k.
  const uint part_y = part_row(lane), part_x = part_column(lane);
  threadgroup float *k_columns = shared, *q_columns = shared + CHUNK * STAGE_STRIDE;
  float2 kk[2][CHUNK_PARTS], qk[2][CHUNK_PARTS];
  UNROLL
  for (uint i = 0; i < 2; i++) {
    UNROLL
    for (uint j = 0; j < CHUNK_PARTS; j++)
      kk[i][j] = qk[i][j] = 0;
  }
  for (uint stage = 0; stage < K; stage += STAGE) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = index; i < CHUNK * STAGE; i += CHUNK_THREADS) {
      const uint token = i / STAGE, c = i % STAGE, to = token * STAGE_STRIDE + c;
      const bool inside = token < tokens;
      k_columns[to] = inside ? float(k[row_start(sizes.k, begin + token, shared_head) + stage + c]) : 0;
      q_columns[to] = inside ? float(q[row_start(sizes.q, begin + token, shared_head) + stage + c]) : 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint c = 0; c < STAGE; c += SIDE) {
      float2 k_part[2], q_part[2];
      UNROLL
      for (uint i = 0; i < 2; i++) {
        const uint at = (own_part(simdgroup, i) * SIDE + part_y) * STAGE_STRIDE + c + part_x;
        k_part[i] = float2(k_columns[at], k_columns[at + 1]);
        q_part[i] = float2(q_columns[at], q_columns[at + 1]);
      }
      UNROLL
      for (uint j = 0; j < CHUNK_PARTS; j++) {
        const uint at = (j * SIDE + part_x) * STAGE_STRIDE + c + part_y;
        const float2 across = float2(k_columns[at], k_columns[at + STAGE_STRIDE]);
        UNROLL
        for (uint i = 0; i < 2; i++)
          if (j <= own_part(simdgroup, i)) {
            multiply(kk[i][j], k_part[i], across);
            multiply(qk[i][j], q_part[i], across);
          }
      }
    }
  }

  device Prepared &out = prepared[chunk_of(cu_seqlens, sequence, group.x) * sizes.hv + head];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (uint i = 0; i < 2; i++) {
    const uint y = own_part(simdgroup, i) * SIDE + part_y;
    UNROLL
    for (uint j = 0; j < CHUNK_PARTS; j++)
      if (j <= own_part(simdgroup, i))
        for (uint n = 0; n < 2; n++) {
          const uint x = j * SIDE + part_x + n;
          const float decay = x <= y ? exp((sums[y] - sums[x]) + (rests[y] - rests[x])) : 0;
          out.p[y * CHUNK + x] = qk[i][j][n] * decay * q_scales[y] * k_scales[x];
          // Read below the diagonal alone.
          shared[y * A_STRIDE + x] = kk[i][j][n] * decay * betas[y] * k_scales[y] * k_scales[x];
        }
  }
  if (index < CHUNK) {
    const float decay = exp(sums[index] + rests[index]), last = sums[CHUNK - 1], last_rest = rests[CHUNK - 1];
    out.from_state[index] = decay * k_scales[index];
    out.to_state[index] = exp((last - sums[index]) + (last_rest - rests[index])) * k_scales[index];
    out.to_output[index] = decay * q_scales[index];
    out.decay[index] = exp(last + last_rest);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The parts on the diagonal from the top, a column of eight a thread.
  if (index < CHUNK) {
    const uint top = index / SIDE * SIDE, column = index % SIDE;
    float x[SIDE];
    UNROLL
    for (uint y = 0; y < SIDE; y++) {
      x[y] = y == column ? 1 : 0;
      UNROLL
      for (uint j = 0; j < y; j++)
        x[y] = fma(-shared[(top + y) * A_STRIDE + top + j], x[j], x[y]);
      inverse[(top + y) * SIDE + column] = x[y];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // T, a column of parts at a time, which needs no other: T[i, j] = -(I + A[i, i])^-1 sum(A[i, m] T[m, j], j <= m < i).
  for (uint i = 0; i < 2; i++) {
    const uint column = own_part(simdgroup, i);
    float2 t[CHUNK_PARTS];
    UNROLL
    for (uint y = 0; y < CHUNK_PARTS; y++) {
      if (y < column)
        continue;
      threadgroup const float *at = inverse + (y * SIDE + part_y) * SIDE + part_x;
      const float2 diagonal = float2(at[0], at[1]);
      t[y] = diagonal;
      if (y > column) {
        float2 sum = 0;
        UNROLL
        for (uint m = 0; m < y; m++)
          if (m >= column) {
            threadgroup const float *a = shared + (y * SIDE + part_y) * A_STRIDE + m * SIDE + part_x;
            multiply(sum, float2(a[0], a[1]), t[m]);
          }
        t[y] = 0;
        multiply(t[y], -diagonal, sum);
      }
      for (uint n = 0; n < 2; n++) {
        const uint x = column * SIDE + part_x + n;
        out.t[(y * SIDE + part_y) * CHUNK + x] = t[y][n] * betas[x];
      }
    }
  }
}

constant constexpr uint STATE_STRIDE = K + 4;
constant constexpr uint X_STRIDE = SLICE + 4;
constant constexpr uint SLICE_PARTS = SLICE / SIDE;
constant constexpr uint K_PARTS = K / SIDE / CHUNK_SIMDGROUPS; // of a simdgroup

// Two neighbours of a row of q or k, zero behind the last token.
template <typename T>
inline float2 neighbours(device const T *values, constant Rows &rows, uint token, uint head, uint column, bool inside) {
  if (!inside)
    return 0;
  device const T *at = values + row_start(rows, token, head) + column;
  return float2(float(at[0]), float(at[1]));
}

// state [S, hv, vd, K]; y [N, hv, vd]. group.x is the slice of the state's rows, group.y the value head, group.z the
// sequence.
template <typename T>
[[kernel]] void gated_delta_scan(device float *state [[buffer(0)]], device T *y [[buffer(1)]],
                                 device const Prepared *prepared [[buffer(2)]], device const T *q [[buffer(3)]],
                                 device const T *k [[buffer(4)]], device const T *v [[buffer(5)]],
                                 device const uint *cu_seqlens [[buffer(6)]],
                                 device const uint *context_lens [[buffer(7)]],
                                 device const uint *state_slots [[buffer(8)]],
                                 constant ChunkSizes &sizes [[buffer(9)]],
                                 uint3 group [[threadgroup_position_in_grid]],
                                 uint lane [[thread_index_in_simdgroup]],
                                 uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float states[SLICE * STATE_STRIDE];
  threadgroup float xs[CHUNK * X_STRIDE];

  const uint sequence = group.z, head = group.y, shared_head = head * sizes.hk / sizes.hv, first_row = group.x * SLICE;
  const uint begin = cu_seqlens[sequence], length = cu_seqlens[sequence + 1] - begin;
  if (length < sizes.shortest)
    return;
  const uint part_y = part_row(lane), part_x = part_column(lane);
  device float *slot = state + ((ulong(state_slots[sequence]) * sizes.hv + head) * sizes.vd + first_row) * K;

  // The simdgroup's columns of the state, in registers; all of it is in threadgroup memory for the others to read.
  const uint first_k = simdgroup * K_PARTS * SIDE;
  float2 s[SLICE_PARTS][K_PARTS];
  UNROLL
  for (uint r = 0; r < SLICE_PARTS; r++) {
    UNROLL
    for (uint c = 0; c < K_PARTS; c++)
      for (uint n = 0; n < 2; n++) {
        const uint row = r * SIDE + part_y, column = first_k + c * SIDE + part_x + n;
        s[r][c][n] = context_lens[sequence] != length ? slot[row * K + column] : 0;
        states[row * STATE_STRIDE + column] = s[r][c][n];
      }
  }

  for (uint first = 0; first < length; first += CHUNK) {
    device const Prepared &chunk = prepared[chunk_of(cu_seqlens, sequence, first / CHUNK) * sizes.hv + head];
    const uint tokens = min(length - first, CHUNK);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // v - exp(G) k S^T, and exp(G) q S^T.
    float2 out[2][SLICE_PARTS];
    UNROLL
    for (uint i = 0; i < 2; i++) {
      const uint row = own_part(simdgroup, i) * SIDE + part_y, token = begin + first + row;
      const bool inside = row < tokens;
      float2 memory[SLICE_PARTS];
      UNROLL
      for (uint n = 0; n < SLICE_PARTS; n++)
        out[i][n] = memory[n] = 0;
      for (uint c = 0; c < K; c += SIDE) {
        const float2 k_part = neighbours(k, sizes.k, token, shared_head, c + part_x, inside);
        const float2 q_part = neighbours(q, sizes.q, token, shared_head, c + part_x, inside);
        UNROLL
        for (uint n = 0; n < SLICE_PARTS; n++) {
          threadgroup const float *at = states + (n * SIDE + part_x) * STATE_STRIDE + c + part_y;
          const float2 across = float2(at[0], at[STATE_STRIDE]);
          multiply(memory[n], k_part, across);
          multiply(out[i][n], q_part, across);
        }
      }
      UNROLL
      for (uint n = 0; n < SLICE_PARTS; n++) {
        const float2 value = neighbours(v, sizes.v, token, head, first_row + n * SIDE + part_x, inside);
        const float2 rest = value - chunk.from_state[row] * memory[n];
        xs[row * X_STRIDE + n * SIDE + part_x] = rest[0];
        xs[row * X_STRIDE + n * SIDE + part_x + 1] = rest[1];
        out[i][n] *= chunk.to_output[row];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float2 x[2][SLICE_PARTS];
    UNROLL
    for (uint i = 0; i < 2; i++) {
      const uint own = own_part(simdgroup, i);
      UNROLL
      for (uint n = 0; n < SLICE_PARTS; n++)
        x[i][n] = 0;
      for (uint m = 0; m <= own; m++) {
        device const float *t = chunk.t + (own * SIDE + part_y) * CHUNK + m * SIDE + part_x;
        UNROLL
        for (uint n = 0; n < SLICE_PARTS; n++) {
          threadgroup const float *at = xs + (m * SIDE + part_y) * X_STRIDE + n * SIDE + part_x;
          multiply(x[i][n], float2(t[0], t[1]), float2(at[0], at[1]));
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (uint i = 0; i < 2; i++) {
      const uint row = own_part(simdgroup, i) * SIDE + part_y;
      UNROLL
      for (uint n = 0; n < SLICE_PARTS; n++) {
        xs[row * X_STRIDE + n * SIDE + part_x] = x[i][n][0];
        xs[row * X_STRIDE + n * SIDE + part_x + 1] = x[i][n][1];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (uint i = 0; i < 2; i++) {
      const uint own = own_part(simdgroup, i), row = own * SIDE + part_y;
      for (uint m = 0; m <= own; m++) {
        device const float *p = chunk.p + row * CHUNK + m * SIDE + part_x;
        UNROLL
        for (uint n = 0; n < SLICE_PARTS; n++) {
          threadgroup const float *at = xs + (m * SIDE + part_y) * X_STRIDE + n * SIDE + part_x;
          multiply(out[i][n], float2(p[0], p[1]), float2(at[0], at[1]));
        }
      }
      if (row < tokens) {
        device T *to = y + (ulong(begin + first + row) * sizes.hv + head) * sizes.vd + first_row + part_x;
        for (uint n = 0; n < SLICE_PARTS; n++) {
          to[n * SIDE] = T(out[i][n][0]);
          to[n * SIDE + 1] = T(out[i][n][1]);
        }
      }
    }
    UNROLL
    for (uint r = 0; r < SLICE_PARTS; r++) {
      UNROLL
      for (uint c = 0; c < K_PARTS; c++)
        s[r][c] *= chunk.decay[0];
    }
    for (uint m = 0; m < CHUNK_PARTS; m++) {
      const uint row = m * SIDE + part_y;
      float2 k_part[K_PARTS];
      UNROLL
      for (uint c = 0; c < K_PARTS; c++)
        k_part[c] = chunk.to_state[row] * neighbours(k, sizes.k, begin + first + row, shared_head,
                                                     first_k + c * SIDE + part_x, row < tokens);
      UNROLL
      for (uint r = 0; r < SLICE_PARTS; r++) {
        threadgroup const float *at = xs + (m * SIDE + part_x) * X_STRIDE + r * SIDE + part_y;
        const float2 across = float2(at[0], at[X_STRIDE]);
        UNROLL
        for (uint c = 0; c < K_PARTS; c++)
          multiply(s[r][c], across, k_part[c]);
      }
    }
    UNROLL
    for (uint r = 0; r < SLICE_PARTS; r++) {
      UNROLL
      for (uint c = 0; c < K_PARTS; c++)
        for (uint n = 0; n < 2; n++)
          states[(r * SIDE + part_y) * STATE_STRIDE + first_k + c * SIDE + part_x + n] = s[r][c][n];
    }
  }

  UNROLL
  for (uint r = 0; r < SLICE_PARTS; r++) {
    UNROLL
    for (uint c = 0; c < K_PARTS; c++)
      for (uint n = 0; n < 2; n++)
        slot[(r * SIDE + part_y) * K + first_k + c * SIDE + part_x + n] = s[r][c][n];
  }
}

#define PREPARE(variant, T) INSTANTIATE("gated_delta_prepare_" variant, gated_delta_prepare<T>)
#define SCAN(variant, T) INSTANTIATE("gated_delta_scan_" variant, gated_delta_scan<T>)
FOR_FLOATS(PREPARE)
FOR_FLOATS(SCAN)
