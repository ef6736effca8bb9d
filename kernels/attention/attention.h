// What the kernels of attention share: their sizes, and where queries and keys lie.

// Whether keys and values lie in pages, or by their tokens like queries.
constant bool IS_PAGED [[function_constant(0)]];

struct AttentionSizes {
  Rows q, k, v; // of k and v the rows of a page's slot if paged, else of a token
  uint sequences, hq, hk, d, block_size, max_blocks, splits, is_causal, window;
  uint tiled; // tokens of a sequence from which tiles take it
  float scale, softcap; // 0 for none
};

// The sequence that holds a token.
inline uint find_sequence(device const uint *cu_seqlens, uint sequences, uint token) {
  uint low = 0, high = sequences;
  while (high - low > 1) {
    const uint middle = (low + high) / 2;
    if (cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Keys that a query sees: from `first` up to `last`.
struct Visible {
  uint first, last;
};
inline Visible visible(constant AttentionSizes &sizes, uint position, uint context) {
  return {position + 1 > sizes.window ? position + 1 - sizes.window : 0,
          sizes.is_causal != 0 ? position + 1 : context};
}

// Where a sequence's keys lie: its pages, or the token of its first key.
struct Keys {
  device const uint *blocks;
  uint block_size, begin;

  uint at(uint key) const { return IS_PAGED ? blocks[key / block_size] * block_size + key % block_size : begin + key; }
};

inline float capped(float score, float softcap) {
  return softcap != 0 ? softcap * precise::tanh(score / softcap) : score;
}

// What a part weighs whose scores reach `part`, beside one that reaches `largest`. A part without keys reaches
// -INFINITY.
inline float weight_of(float part, float largest) { return part == -INFINITY ? 0 : exp(part - largest); }
