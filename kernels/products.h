// What products with weight matrices share: weights as they are stored or packed, four inputs of an output at a time.

// [outer, inner], of the activations' type.
template <typename T> struct Dense {
  device const T *values;
  uint inner;

  static Dense of(device const void *weights, ulong matrix, uint outer, uint inner) {
    return {(device const T *)weights + matrix * outer * inner, inner};
  }
  float4 four(uint out, uint column) const {
    float4 result = 0;
    for (uint i = 0; i < 4; i++)
      if (column + i < inner)
        result[i] = float(values[ulong(out) * inner + column + i]);
    return result;
  }
};

// Packed weights: thirty-two outputs make a panel, a panel and a group of inputs a block, and blocks lie panel by panel.
// A word holds the codes of one output, so that the lanes of a simdgroup, an output each, read neighbouring words.
constant constexpr uint PANEL = 32;

inline float factor(device const uint *words, uint i) { // of bf16
  return as_type<float>(uint(((device const ushort *)words)[i]) << 16);
}

// Groups of 64 inputs: sixteen words of four codes, and a scale, for each output.
struct Q8 {
  static constexpr constant uint GROUP = 64, BLOCK = 16 * PANEL + PANEL / 2;
  device const uint *blocks;
  uint groups;

  static Q8 of(device const void *weights, ulong matrix, uint outer, uint inner) {
    const uint groups = (inner + GROUP - 1) / GROUP, panels = (outer + PANEL - 1) / PANEL;
    return {(device const uint *)weights + matrix * panels * groups * BLOCK, groups};
  }
  device const uint *block(uint panel, uint group) const { return blocks + (ulong(panel) * groups + group) * BLOCK; }
  static float scale(device const uint *block, uint lane) { return factor(block + 16 * PANEL, lane); }
  static float minimum(device const uint *, uint) { return 0; }
  // Codes of inputs 4 i and on.
  static float4 codes(device const uint *block, uint lane, uint i) {
    return float4(as_type<char4>(block[i * PANEL + lane]));
  }
  float4 four(uint out, uint column) const {
    device const uint *at = block(out / PANEL, column / GROUP);
    return scale(at, out % PANEL) * codes(at, out % PANEL, column % GROUP / 4);
  }
};

// Groups of 64 inputs: eight words of eight codes, four in the lower halves of their bytes and the next four in the upper,
// a scale and a minimum.
struct Q4 {
  static constexpr constant uint GROUP = 64, BLOCK = 8 * PANEL + PANEL;
  device const uint *blocks;
  uint groups;

  static Q4 of(device const void *weights, ulong matrix, uint outer, uint inner) {
    const uint groups = (inner + GROUP - 1) / GROUP, panels = (outer + PANEL - 1) / PANEL;
    return {(device const uint *)weights + matrix * panels * groups * BLOCK, groups};
  }
  device const uint *block(uint panel, uint group) const { return blocks + (ulong(panel) * groups + group) * BLOCK; }
  static float scale(device const uint *block, uint lane) { return factor(block + 8 * PANEL, lane); }
  static float minimum(device const uint *block, uint lane) { return factor(block + 8 * PANEL, PANEL + lane); }
  static float4 codes(device const uint *block, uint lane, uint i) {
    const uint pairs = block[i / 2 * PANEL + lane] >> (i % 2 * 4) & 0x0f0f0f0f;
    return float4(as_type<uchar4>(pairs));
  }
  float4 four(uint out, uint column) const {
    device const uint *at = block(out / PANEL, column / GROUP);
    return fma(float4(scale(at, out % PANEL)), codes(at, out % PANEL, column % GROUP / 4),
               float4(minimum(at, out % PANEL)));
  }
};

// Whether each row has a matrix of its own, an expert's.
constant bool IS_ROUTED [[function_constant(0)]];
