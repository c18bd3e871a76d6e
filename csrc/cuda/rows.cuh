// The kernel for an inner run with mask stride 1 or 0; see apply.cuh.
#pragma once

#include "apply.cuh"
#include "positions.cuh"

namespace dropout_ext::cuda {

template <typename T, class Op, typename Index>
struct RowsParams {
  Common<T, Op> common;
  uint64_t items;  // rows times blocks per row, one for each thread
  Divisor blocks;  // per row, with room for rows that do not begin at a block
  int64_t length, in_stride, out_stride, in2_stride;
  bool one_decision;  // the row shares one keep decision (mask stride 0)
  OuterDims<Index> outer;
};

// A thread owns eight elements of a row: a block of the element index, or, where the row shares one
// decision, eight that begin at a chunk of the output's memory.
template <typename T, class Op, bool kVector, typename Index>
__global__ void __launch_bounds__(kMaxThreads, 2)
    rows_kernel(const __grid_constant__ RowsParams<T, Op, Index> p) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  constexpr int V = kVector ? (kFull < kBlock ? kFull : kBlock) : 1;
  constexpr int kChunks = kBlock / V;
  const int lane = threadIdx.x % kWarp;
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  const uint64_t start = static_cast<uint64_t>(blockIdx.x) * blockDim.x + warp_of_block() * kWarp;
  for (int64_t slice = blockIdx.y; slice < p.common.slices; slice += gridDim.y) {
    const Key key = p.common.keys.of(slice);
    // Whole warps go round, because the shuffles need every lane.
    for (uint64_t base = start; base < p.items; base += step) {
      const uint64_t item = base + lane;
      Position at = slice_begin(p.common, slice);
      uint32_t bits = 0;  // keep decisions, and above them which of the eight elements exist
      if (item < p.items) {
        Index row = static_cast<Index>(item);
        const int64_t block = split(row, p.blocks);
        p.outer.locate(row, at);
        int before;  // elements of the row's first eight that precede the row
        if (p.one_decision) {
          before = reinterpret_cast<uintptr_t>(p.common.out + at.out) / sizeof(T) % V;
        } else {
          before = at.index % kBlock;
        }
        const int64_t begin = block * kBlock - before;
        const int low = begin < 0 ? before : 0;
        const int64_t left = p.length - begin;
        const int high = left < kBlock ? static_cast<int>(left < 0 ? 0 : left) : kBlock;
        if (low < high) bits = ((0xffu >> (kBlock - high)) & (0xffu << low)) << kBlock;
        at.in += begin * p.in_stride;
        at.out += begin * p.out_stride;
        at.in2 += begin * p.in2_stride;
        const uint64_t index = p.one_decision ? at.index : at.index + begin;
        const uint32_t keep = keep_bits(block_words(key, index / kBlock), p.common.threshold);
        if (!p.one_decision) {
          bits |= keep;
        } else if (keep >> (index % kBlock) & 1) {
          bits |= 0xff;
        }
      }
      Chunk<T, V, kVector> x[kChunks], x2[kChunks];
      int64_t out[kChunks];
      uint32_t keep[kChunks], exist[kChunks];
#pragma unroll
      for (int q = 0; q < kChunks; ++q) {
        int64_t in = at.in, in2 = at.in2;
        out[q] = at.out;
        uint32_t mine = bits;
        if constexpr (kChunks > 1) {
          const int owner = q * (kWarp / kChunks) + lane / kChunks;
          const int part = lane % kChunks * V;
          mine = __shfl_sync(kAllLanes, bits, owner) >> part;
          in = __shfl_sync(kAllLanes, at.in, owner) + part * p.in_stride;
          if constexpr (Common<T, Op>::kReadsSecond) {
            in2 = __shfl_sync(kAllLanes, at.in2, owner) + part * p.in2_stride;
          }
          out[q] = __shfl_sync(kAllLanes, at.out, owner) + part * p.out_stride;
        }
        constexpr uint32_t kWhole = (1u << V) - 1;
        keep[q] = mine & kWhole;
        exist[q] = mine >> kBlock & kWhole;
        const auto load = [&](Chunk<T, V, kVector>& to, const T* from, int64_t stride,
                              uint32_t wanted) {
          if (wanted == 0) return;
          if (kVector && exist[q] == kWhole && stride == 1) {
            to.load(from);
          } else {
            to.load_some(from, stride, wanted);
          }
        };
        // What is dropped is not read: half the traffic of a dropped row.
        if constexpr (Common<T, Op>::kReads) {
          load(x[q], p.common.in + in, p.in_stride, keep[q] & exist[q]);
        }
        if constexpr (Common<T, Op>::kReadsSecond) {
          load(x2[q], p.common.in2 + in2, p.in2_stride, exist[q]);
        }
      }
#pragma unroll
      for (int q = 0; q < kChunks; ++q) {
        apply_op<V>(p.common.op, x[q], x2[q], 0, [&](int j) { return keep[q] >> j & 1; });
        if (kVector && exist[q] == (1u << V) - 1) {
          x[q].store(p.common.out + out[q]);
        } else {
          x[q].store_some(p.common.out + out[q], p.out_stride, exist[q]);
        }
      }
    }
  }
}

}  // namespace dropout_ext::cuda
