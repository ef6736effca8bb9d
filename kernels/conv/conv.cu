// Depthwise causal convolution with SiLU. A thread takes N neighbouring channels through the tokens of a tile, with
// their windows in registers.
//
// Tiles are cut from the packed tokens, whatever sequences they belong to. The tile that has a sequence's first token
// also runs what follows as long as it needs the old window, and writes the new one: no other thread touches either.
#include "cuda.cuh"

constexpr int THREADS = 128;
// Tokens whose loads are in flight together.
constexpr int AHEAD = 4;

struct Steps {
  const uint32_t *cu_seqlens, *context_lens, *state_slots;
  uint32_t tokens, sequences;

  // The sequence of a token.
  __device__ uint32_t find(uint32_t token) const {
    if (tokens == sequences)
      return token;
    uint32_t low = 0, high = sequences;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (cu_seqlens[middle] <= token ? low : high) = middle;
    }
    return low;
  }
};

// M values for each of N channels, as weights and windows lie.
template <int N, int M> struct alignas(N == 1 ? 4 : 16) Taps {
  float values[N * M];
};

// exp and the quotient are off by a few units in the last place, far below the op's limit in f32.
__device__ inline float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }

// x [N, channels] in rows, weight [channels, WIDTH], state [S, channels, WIDTH - 1], y [N, channels]; N divides
// channels, and all rows start at multiples of 16 bytes if N is not 1.
template <typename T, int WIDTH, int N>
__device__ void causal_conv1d(const T *x, uint32_t x_stride, const float *weight, float *state, T *y, Steps steps,
                              uint32_t channels, uint32_t tile) {
  constexpr int PAST = WIDTH - 1;
  using Values = Pack<T, N>;
  using Window = Taps<N, PAST>;
  const uint32_t groups = (channels / N + THREADS - 1) / THREADS;
  const uint32_t channel = (blockIdx.x % groups * THREADS + threadIdx.x) * N;
  if (channel >= channels)
    return;
  const uint32_t first = blockIdx.x / groups * tile, last = min(first + tile, steps.tokens);
  const auto weights = *reinterpret_cast<const Taps<N, WIDTH> *>(weight + size_t(channel) * WIDTH);
  let_next_start();
  wait_for_inputs();
  const auto input = [&](uint32_t token) {
    return *reinterpret_cast<const Values *>(x + token * size_t(x_stride) + channel);
  };

  uint32_t sequence = steps.find(first);
  for (uint32_t next = first; next < last; sequence++) {
    const uint32_t begin = steps.cu_seqlens[sequence], end = next = steps.cu_seqlens[sequence + 1];
    const bool starts = begin >= first;
    const uint32_t from = starts ? begin : max(first, min(begin + PAST, end));
    const uint32_t to = min(starts ? max(last, begin + PAST) : last, end);
    const uint32_t context = steps.context_lens[sequence];
    auto *const slot = reinterpret_cast<Window *>(
        state + (steps.state_slots[sequence] * size_t(channels) + channel) * PAST);

    // Inputs of the last PAST tokens, for each channel oldest first.
    Window window = {};
    const auto keep = [&](const Values &values, int j) {
#pragma unroll
      for (int n = 0; n < N; n++)
        window.values[n * PAST + j] = widen(values.values[n]);
    };
    const auto load = [&](uint32_t token) {
#pragma unroll
      for (int j = 0; j < PAST; j++)
        keep(input(token - PAST + j), j);
    };
    if (!starts && from < to)
      load(from);
    else if (starts && context > end - begin)
      window = *slot;

    for (uint32_t token = from; token < to; token += AHEAD) {
      Values inputs[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (token + i < to)
          inputs[i] = input(token + i);
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (token + i < to) {
          Values outputs;
#pragma unroll
          for (int n = 0; n < N; n++) {
            float *const past = window.values + n * PAST;
            const float *const taps = weights.values + n * WIDTH;
            const float value = widen(inputs[i].values[n]);
            float sum = value * taps[PAST];
#pragma unroll
            for (int j = 0; j < PAST; j++)
              sum = fmaf(past[j], taps[j], sum);
            outputs.values[n] = narrow<T>(silu(sum));
#pragma unroll
            for (int j = 0; j + 1 < PAST; j++)
              past[j] = past[j + 1];
            past[PAST - 1] = value;
          }
          *reinterpret_cast<Values *>(y + (token + i) * size_t(channels) + channel) = outputs;
        }
    }

    // A sequence that pads a step has no context, and no slot.
    if (starts && context > 0) {
      if (to < end)
        load(end);
      *slot = window;
    }
  }
}

#define CAUSAL_CONV1D(name, T, WIDTH, N)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      name(const T *x, uint32_t x_stride, const float *weight, float *state, T *y, const uint32_t *cu_seqlens,         \
           const uint32_t *context_lens, const uint32_t *state_slots, uint32_t tokens, uint32_t sequences,             \
           uint32_t channels, uint32_t tile) {                                                                         \
    causal_conv1d<T, WIDTH, N>(x, x_stride, weight, state, y,                                                          \
                               {cu_seqlens, context_lens, state_slots, tokens, sequences}, channels, tile);            \
  }
#define SCALAR_2(name, T) CAUSAL_CONV1D(name, T, 2, 1)
#define SCALAR_3(name, T) CAUSAL_CONV1D(name, T, 3, 1)
#define SCALAR_4(name, T) CAUSAL_CONV1D(name, T, 4, 1)
#define VECTOR_2(name, T) CAUSAL_CONV1D(name, T, 2, 16 / sizeof(T))
#define VECTOR_3(name, T) CAUSAL_CONV1D(name, T, 3, 16 / sizeof(T))
#define VECTOR_4(name, T) CAUSAL_CONV1D(name, T, 4, 16 / sizeof(T))
FOR_FLOATS(SCALAR_2, causal_conv1d_scalar_2)
FOR_FLOATS(SCALAR_3, causal_conv1d_scalar_3)
FOR_FLOATS(SCALAR_4, causal_conv1d_scalar_4)
FOR_FLOATS(VECTOR_2, causal_conv1d_vector_2)
FOR_FLOATS(VECTOR_3, causal_conv1d_vector_3)
FOR_FLOATS(VECTOR_4, causal_conv1d_vector_4)
