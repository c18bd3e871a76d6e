#include "blocks.h"

namespace dropout_ext::cpu::attention {

const Kernels& kernels() {
#ifdef DROPOUT_EXT_CPU_X86
  if (&cpu::kernels() == &cpu::kernels_avx512) return kernels_avx512;
  if (&cpu::kernels() == &cpu::kernels_avx2) return kernels_avx2;
#endif
  return kernels_portable;
}

int64_t forward_scratch(const Problem& problem, int64_t n_queries) {
  Scratch bytes(nullptr);
  if (problem.dtype == Dtype::kFloat64) {
    ForwardBlocks<double>(problem, n_queries, bytes);
  } else {
    ForwardBlocks<float>(problem, n_queries, bytes);
  }
  return bytes.bytes();
}

int64_t backward_scratch(const Problem& problem, int64_t n_heads, int64_t n_queries) {
  Scratch bytes(nullptr);
  if (problem.dtype == Dtype::kFloat64) {
    BackwardBlocks<double>(problem, n_heads, n_queries, bytes);
  } else {
    BackwardBlocks<float>(problem, n_heads, n_queries, bytes);
  }
  return bytes.bytes();
}

}  // namespace dropout_ext::cpu::attention
