// The gates of a Gated DeltaNet layer, one value a thread.

struct GateSizes {
  Rows a, b;
  uint rows, heads;
};

// gates [2, rows, heads]: g, then beta; a and b [rows, heads] in rows; a_log and dt_bias [heads].
template <typename T>
[[kernel]] void gates(device float *gates [[buffer(0)]], device const T *a [[buffer(1)]],
                      device const T *b [[buffer(2)]], device const float *a_log [[buffer(3)]],
                      device const float *dt_bias [[buffer(4)]], constant GateSizes &sizes [[buffer(5)]],
                      uint3 at [[thread_position_in_grid]]) {
  const uint row = at.x / sizes.heads, head = at.x % sizes.heads;
  if (row >= sizes.rows)
    return;
  const float x = float(a[row_start(sizes.a, row) + head]) + dt_bias[head];
  // ln(1 + e^x), of which a small e^x would be lost in the sum: ln(u) e^x / (u - 1) with the rounded u has its digits.
  const float e = exp(min(x, 20.0f)), u = 1 + e;
  const float softplus = x > 20 ? x : u == 1 ? e : log(u) * (e / (u - 1));
  gates[at.x] = -exp(a_log[head]) * softplus;
  gates[sizes.rows * sizes.heads + at.x] = 1 / (1 + exp(-float(b[row_start(sizes.b, row) + head])));
}

#define GATES(variant, T) INSTANTIATE("gates_" variant, gates<T>)
FOR_FLOATS(GATES)
