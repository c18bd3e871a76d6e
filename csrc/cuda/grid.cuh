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

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace dropout_ext::cuda
