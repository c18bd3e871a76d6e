// Keys on the device.

#include "grid.cuh"
#include "kernels.h"

namespace dropout_ext::cuda {

namespace {

constexpr int kKeysPerLaunch = 240;  // 3840 of the 4096 bytes of launch arguments

struct KeyWords {
  uint64_t words[2 * kKeysPerLaunch];
};

__global__ void store_keys_kernel(const __grid_constant__ KeyWords keys, int words, uint64_t* out) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = keys.words[i];
}

__global__ void unpack_key_kernel(const int64_t* seed, const int64_t* offset, uint64_t intragraph,
                                  uint64_t* key) {
  key[0] = static_cast<uint64_t>(*seed);
  key[1] = (static_cast<uint64_t>(*offset) + intragraph) / 4;
}

}  // namespace

void launch_store_keys(const uint64_t* host_words, int64_t keys, uint64_t* device_words,
                       CUstream_st* stream) {
  KeyWords chunk;
  for (int64_t begin = 0; begin < keys; begin += kKeysPerLaunch) {
    const int64_t left = keys - begin;
    const int words = 2 * static_cast<int>(left < kKeysPerLaunch ? left : kKeysPerLaunch);
    for (int i = 0; i < words; ++i) chunk.words[i] = host_words[2 * begin + i];
    DROPOUT_EXT_LAUNCH(store_keys_kernel, dim3(1), kThreads, stream, chunk, words,
                       device_words + 2 * begin);
  }
}

void launch_unpack_key(const int64_t* seed, const int64_t* offset, uint64_t intragraph,
                       uint64_t* key, CUstream_st* stream) {
  DROPOUT_EXT_LAUNCH(unpack_key_kernel, dim3(1), 1, stream, seed, offset, intragraph, key);
}

}  // namespace dropout_ext::cuda
