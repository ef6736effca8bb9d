// Activations. A thread takes one value; of rows, group.y is the row.

constant bool IS_GELU [[function_constant(0)]];

struct ActivationSizes {
  Rows gate_up;
  uint width;
};

// gate_up [N, 2 width] in rows; y [N, width].
template <typename T>
[[kernel]] void gated_activation(device T *y [[buffer(0)]], device const T *gate_up [[buffer(1)]],
                                 constant ActivationSizes &sizes [[buffer(2)]],
                                 uint3 at [[thread_position_in_grid]]) {
  const uint width = sizes.width, i = at.x, row = at.y;
  if (i >= width)
    return;
  device const T *from = gate_up + row_start(sizes.gate_up, row, 0);
  const float gate = float(from[i]), up = float(from[width + i]);
  // (1 + tanh(u)) / 2 is sigmoid(2 u), with u = sqrt(2 / pi) (gate + 0.044715 gate^3).
  const float u = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
  const float x = IS_GELU ? 2 * u : gate;
  y[ulong(row) * width + i] = T(gate / (1 + exp(-x)) * up);
}

struct SigmoidSizes {
  Rows x, gate;
  uint width;
};

// x and gate [N, width] in rows; y [N, width].
template <typename T>
[[kernel]] void sigmoid_gated(device T *y [[buffer(0)]], device const T *x [[buffer(1)]],
                              device const T *gate [[buffer(2)]], constant SigmoidSizes &sizes [[buffer(3)]],
                              uint3 at [[thread_position_in_grid]]) {
  const uint i = at.x, row = at.y;
  if (i >= sizes.width)
    return;
  const float value = float(x[row_start(sizes.x, row) + i]), logit = float(gate[row_start(sizes.gate, row) + i]);
  y[ulong(row) * sizes.width + i] = T(value / (1 + exp(-logit)));
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

#define GATED_ACTIVATION(variant, T) INSTANTIATE("gated_activation_" variant, gated_activation<T>)
#define SIGMOID_GATED(variant, T) INSTANTIATE("sigmoid_gated_" variant, sigmoid_gated<T>)
#define GELU(variant, T) INSTANTIATE("gelu_" variant, each<T, Gelu>)
#define SOFTCAP(variant, T) INSTANTIATE("softcap_" variant, each<T, Softcap>)
FOR_FLOATS(GATED_ACTIVATION)
FOR_FLOATS(SIGMOID_GATED)
FOR_FLOATS(GELU)
FOR_FLOATS(SOFTCAP)
