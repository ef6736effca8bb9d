// Values in an order of integers, as pairs of words.

constant constexpr uint NOTHING = 0xffffffff;

// Orders values as integers, equal ones by index from the back; what cannot be chosen among comes out on top, and zeros
// are below all.
inline uint2 key_of(float value, uint index) {
  const uint bits = as_type<uint>(value + 0.0f), ordered = bits ^ (bits >> 31 != 0 ? 0xffffffff : 0x80000000);
  return isnan(value) || value == INFINITY ? uint2(NOTHING, NOTHING) : uint2(ordered, ~index);
}

inline bool is_greater(uint2 a, uint2 b) { return a.x > b.x || (a.x == b.x && a.y > b.y); }

inline uint2 greater(uint2 a, uint2 b) { return is_greater(a, b) ? a : b; }

// Whether the key is of a finite value: none is as large as that of -INFINITY.
inline bool is_fit(uint2 key) { return key.x != NOTHING && key.x > 0x007fffff; }

inline float value_of(uint2 key) { return as_type<float>(key.x >> 31 != 0 ? key.x ^ 0x80000000 : ~key.x); }

inline uint index_of(uint2 key) { return ~key.y; }
