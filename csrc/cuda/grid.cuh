// Launches and their limits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DROPOUT_EXT_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace dropout_ext::cuda {

constexpr int kThreads = 128;
constexpr int kMaxThreads = 256;
constexpr int64_t kMaxGridX = 0x7fffffff;

// Thread blocks of kMaxThreads that a multiprocessor holds: for 1024 threads before sm_80, for 1536
// or more since. nvcc refuses launch bounds of more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMaxBlocks = 4;
#else
constexpr int kMaxBlocks = 6;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace dropout_ext::cuda
