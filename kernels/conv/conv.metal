// Depthwise causal convolution with SiLU. position.x is the channel in its tile, and the threads along y share the
// tokens of a sequence in parts; group.x is the tile, group.y the sequence. A part's window is in registers; all are
// read before the last part writes the sequence's window.

struct ConvSizes {
  Rows x;
  uint channels;
};

// state [S, channels, WIDTH - 1]; y [N, channels]; x [N, channels] in rows; weight [channels, WIDTH] in f32.
template <typename T, uint WIDTH>
[[kernel]] void causal_conv1d(device float *state [[buffer(0)]], device T *y [[buffer(1)]],
                              device const T *x [[buffer(2)]], device const float *weight [[buffer(3)]],
                              device const uint *cu_seqlens [[buffer(4)]],
                              device const uint *context_lens [[buffer(5)]],
                              device const uint *state_slots [[buffer(6)]],
                              constant ConvSizes &sizes [[buffer(7)]],
                              uint3 group [[threadgroup_position_in_grid]],
                              uint3 position [[thread_position_in_threadgroup]],
                              uint3 threads [[threads_per_threadgroup]]) {
  constexpr uint PAST = WIDTH - 1;
  const uint channel = group.x * threads.x + position.x, sequence = group.y;
  const uint begin = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
  const bool fresh = context_lens[sequence] == end - begin;
  const uint share = (end - begin + threads.y - 1) / threads.y;
  const uint first = begin + position.y * share, last = min(first + share, end);
  const bool inside = channel < sizes.channels && first < end;
  device float *slot = state + (ulong(state_slots[sequence]) * sizes.channels + channel) * PAST;

  // Inputs of the last PAST tokens, oldest first.
  float window[PAST];
  float weights[WIDTH];
  for (uint j = 0; j < PAST; j++) {
    window[j] = 0;
    if (inside && first + j >= begin + PAST)
      window[j] = float(x[row_start(sizes.x, first + j - PAST, 0) + channel]);
    else if (inside && !fresh)
      window[j] = slot[first + j - begin];
  }
  for (uint j = 0; j < WIDTH; j++)
    weights[j] = inside ? weight[channel * WIDTH + j] : 0;
  threadgroup_barrier(mem_flags::mem_device);
  if (!inside)
    return;

  for (uint token = first; token < last; token++) {
    const float input = float(x[row_start(sizes.x, token, 0) + channel]);
    float sum = input * weights[PAST];
    for (uint j = 0; j < PAST; j++)
      sum = fma(window[j], weights[j], sum);
    y[ulong(token) * sizes.channels + channel] = T(sum / (1 + exp(-sum)));
    for (uint j = 0; j + 1 < PAST; j++)
      window[j] = window[j + 1];
    window[PAST - 1] = input;
  }
  if (last == end)
    for (uint j = 0; j < PAST; j++)
      slot[j] = window[j];
}

#define WIDTH_2(variant, T) INSTANTIATE("causal_conv1d_2_" variant, causal_conv1d<T, 2>)
#define WIDTH_3(variant, T) INSTANTIATE("causal_conv1d_3_" variant, causal_conv1d<T, 3>)
#define WIDTH_4(variant, T) INSTANTIATE("causal_conv1d_4_" variant, causal_conv1d<T, 4>)
FOR_FLOATS(WIDTH_2)
FOR_FLOATS(WIDTH_3)
FOR_FLOATS(WIDTH_4)
