// Activations. A thread takes one value; of rows, group.y is the row.

struct PairSizes {
  Rows a, b;
  uint width;
};

struct SiluGated {
  static float of(float gate, float up) { return gate / (1 + exp(-gate)) * up; }
};
struct GeluTanhGated {
  // (1 + tanh(u)) / 2 is sigmoid(2 u), with u = sqrt(2 / pi) (gate + 0.044715 gate^3).
  static float of(float gate, float up) {
    const float u = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1 + exp(-2 * u)) * up;
  }
};
struct SigmoidGated {
  static float of(float x, float gate) { return x / (1 + exp(-gate)); }
};

// a and b [N, width] in rows; y [N, width].
template <typename T, typename F>
[[kernel]] void paired(device T *y [[buffer(0)]], device const T *a [[buffer(1)]], device const T *b [[buffer(2)]],
                       constant PairSizes &sizes [[buffer(3)]], uint3 at [[thread_position_in_grid]]) {
  const uint i = at.x, row = at.y;
  if (i >= sizes.width)
    return;
  const float value = float(a[row_start(sizes.a, row) + i]), other = float(b[row_start(sizes.b, row) + i]);
  y[ulong(row) * sizes.width + i] = T(F::of(value, other));
}

// 1 - erf(x / sqrt(2)) for x from 0 up, by the Chebyshev fit of Press et al., "Numerical Recipes", 2nd edition, 6.2.
inline float erfc_of_root(float x) {
  const float t = 1 / fma(x, 0.35355339059f, 1.0f);
  float exponent = 0.17087277f;
  exponent = fma(exponent, t, -0.82215223f);
  exponent = fma(exponent, t, 1.48851587f);
  exponent = fma(exponent, t, -1.13520398f);
  exponent = fma(exponent, t, 0.27886807f);
  exponent = fma(exponent, t, -0.18628806f);
  exponent = fma(exponent, t, 0.09678418f);
  exponent = fma(exponent, t, 0.37409196f);
  exponent = fma(exponent, t, 1.00002368f);
  exponent = fma(exponent, t, -1.26551223f);
  return t * exp(fma(-0.5f * x, x, exponent));
}

struct EachSizes {
  uint count;
  float parameter;
};

struct Gelu {
  static float of(float x, float) {
    // What the unit keeps back, from 0 on the left and from x on the right: neither end loses digits.
    const float distance = max(-x, x);
    return max(x, 0.0f) - 0.5f * distance * erfc_of_root(distance);
  }
};
struct Softcap {
  static float of(float x, float cap) { return cap * precise::tanh(x / cap); }
};

// y and x [count].
template <typename T, typename F>
[[kernel]] void each(device T *y [[buffer(0)]], device const T *x [[buffer(1)]],
                     constant EachSizes &sizes [[buffer(2)]], uint3 at [[thread_position_in_grid]]) {
  if (at.x < sizes.count)
    y[at.x] = T(F::of(float(x[at.x]), sizes.parameter));
}

#define SILU_GATED(variant, T) INSTANTIATE("silu_gated_" variant, paired<T, SiluGated>)
#define GELU_TANH_GATED(variant, T) INSTANTIATE("gelu_tanh_gated_" variant, paired<T, GeluTanhGated>)
#define SIGMOID_GATED(variant, T) INSTANTIATE("sigmoid_gated_" variant, paired<T, SigmoidGated>)
#define GELU(variant, T) INSTANTIATE("gelu_" variant, each<T, Gelu>)
#define SOFTCAP(variant, T) INSTANTIATE("softcap_" variant, each<T, Softcap>)
FOR_FLOATS(SILU_GATED)
FOR_FLOATS(GELU_TANH_GATED)
FOR_FLOATS(SIGMOID_GATED)
FOR_FLOATS(GELU)
FOR_FLOATS(SOFTCAP)
