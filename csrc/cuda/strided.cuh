// The kernel for any strides; see apply.cuh.
#pragma once

#include "apply.cuh"
#include "positions.cuh"

namespace dropout_ext::cuda {

template <typename T, class Op, typename Index>
struct StridedParams {
  Common<T, Op> common;
  uint64_t items;   // threads' worth of work
  OuterDim inner;   // across the lanes: the output's innermost dimension
  OuterDim walked;  // size: runs of `windows` windows; strides of one element. Mask stride 1
  int64_t length;   // of the walked dimension
  int windows;      // per run
  OuterDims<Index> outer;
};

template <typename T, class Op, typename Index>
__global__ void __launch_bounds__(kMaxThreads, 2)
    strided_kernel(const __grid_constant__ StridedParams<T, Op, Index> p) {
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (int64_t slice = blockIdx.y; slice < p.common.slices; slice += gridDim.y) {
    const Key key = p.common.keys.of(slice);
    for (uint64_t item = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
         item < p.items; item += step) {
      Index n = static_cast<Index>(item);
      Position at = slice_begin(p.common, slice);
      at.add(p.inner, split(n, p.inner.size));
      const int64_t begin = static_cast<int64_t>(split(n, p.walked.size)) * p.windows * kBlock;
      at.add(p.walked, begin);
      p.outer.locate(n, at);
      // Lanes may stand at different places in their blocks. All of them walk the same positions,
      // so that accesses stay side by side, and cut each window of eight out of two blocks.
      const int before = at.index % kBlock;
      uint32_t last = 0;
      if (before != 0) {
        last = keep_bits(block_words(key, at.index / kBlock), p.common.threshold);
      }
      for (int w = 0; w < p.windows; ++w) {
        const int64_t left = p.length - begin - w * kBlock;
        if (left <= 0) break;
        const int count = left < kBlock ? static_cast<int>(left) : kBlock;
        uint32_t next = 0;
        if (before == 0 || before + count > kBlock) {
          const uint64_t index = at.index + (before == 0 ? 0 : kBlock);
          next = keep_bits(block_words(key, index / kBlock), p.common.threshold);
        }
        const uint32_t bits = (last | next << kBlock) >> (before == 0 ? kBlock : before);
        last = next;
        const uint32_t exist = 0xffu >> (kBlock - count);
        Chunk<T, 1, false> x[kBlock], x2[kBlock];
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          if constexpr (Common<T, Op>::kReads) {
            if (bits & exist & 1u << j) x[j].load(p.common.in + at.in + j * p.walked.in_stride);
          }
          if constexpr (Common<T, Op>::kReadsSecond) {
            if (exist & 1u << j) x2[j].load(p.common.in2 + at.in2 + j * p.walked.in2_stride);
          }
        }
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          if (exist & 1u << j) {
            apply_op<1>(p.common.op, x[j], x2[j], 0, [&](int) { return bits >> j & 1; });
            x[j].store(p.common.out + at.out + j * p.walked.out_stride);
          }
        }
        at.add(p.walked, static_cast<int64_t>(kBlock));
      }
    }
  }
}

}  // namespace dropout_ext::cuda
