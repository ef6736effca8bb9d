// Values in an order of integers.
#pragma once

#include "cuda.cuh"

constexpr uint32_t NOTHING = 0xffffffff;
constexpr uint64_t UNFIT = ~uint64_t(0); // the key of what forbids a choice

// Orders values as integers, equal ones by index from the back; what cannot be chosen among comes out on top, and zero
// is below all.
__device__ inline uint64_t key(float value, uint32_t index) {
  const uint32_t bits = __float_as_uint(value), ordered = bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
  return isnan(value) || value == INFINITY ? UNFIT : uint64_t(ordered) << 32 | ~index;
}

__device__ inline uint32_t index_of(uint64_t key) { return ~uint32_t(key); }

__device__ inline float value_of(uint64_t key) {
  const uint32_t ordered = key >> 32;
  return __uint_as_float(ordered >> 31 ? ordered ^ 0x80000000 : ~ordered);
}

// Whether the key is of a finite value.
__device__ inline bool is_fit(uint64_t key) { return key != UNFIT && key >> 32 > ~__float_as_uint(-INFINITY); }
