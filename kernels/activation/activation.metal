// The gated activation. A thread takes one value; group.y is the row.

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

#define GATED_ACTIVATION(variant, T) INSTANTIATE("gated_activation_" variant, gated_activation<T>)
FOR_FLOATS(GATED_ACTIVATION)
