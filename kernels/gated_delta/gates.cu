// The gates of the gated delta rule, a thread for one head of one token.
#include "cuda.cuh"

// a, b [N, hv] in rows, a_log, dt_bias [hv]; gates [2, N, hv]: g, then beta.
template <typename T>
__device__ void gates(const T *a, uint32_t a_stride, const T *b, uint32_t b_stride, const float *a_log,
                      const float *dt_bias, float *gates, uint32_t n, uint32_t hv) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, token = i / hv, head = i % hv;
  if (token >= n)
    return;
  let_next_start();
  wait_for_inputs();
  const float x = widen(a[token * size_t(a_stride) + head]) + dt_bias[head];
  // Above 20, ln(1 + e^x) rounds to x, and e^x would overflow in the end.
  gates[i] = -expf(a_log[head]) * (x > 20 ? x : log1pf(expf(x)));
  gates[size_t(n) * hv + i] = 1 / (1 + expf(-widen(b[token * size_t(b_stride) + head])));
}

#define GATES(name, T)                                                                                                 \
  extern "C" __global__ void name(const T *a, uint32_t a_stride, const T *b, uint32_t b_stride, const float *a_log,    \
                                  const float *dt_bias, float *out, uint32_t n, uint32_t hv) {                         \
    gates<T>(a, a_stride, b, b_stride, a_log, dt_bias, out, n, hv);                                                    \
  }
FOR_FLOATS(GATES, gated_delta_gates)
