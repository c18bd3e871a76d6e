// Keys on the device and the keep decisions of a block.
#pragma once

#include "kernels.h"

namespace dropout_ext::cuda {

struct Keys {
  KeySource source;

  __device__ __forceinline__ Key of(int64_t slice) const {
    if (source.device == nullptr) return source.host;
    return {source.device[2 * slice], source.device[2 * slice + 1]};
  }
};

// The keep decisions of a block, lane 0 in the lowest bit.
__device__ __forceinline__ uint32_t keep_bits(const PhiloxWords& words, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kBlock; ++j) bits |= (lane_word(words, j) >= threshold ? 1u : 0u) << j;
  return bits;
}

}  // namespace dropout_ext::cuda
