// From the number of a thread's work to a place in every tensor and in the mask.
#pragma once

#include "../contract/index_map.h"
#include "divisor.cuh"
#include "kernels.h"

namespace dropout_ext::cuda {

struct OuterDim {
  Divisor size;
  int64_t in_stride, out_stride;
  uint64_t mask_stride;
  int64_t in2_stride;
};

struct Position {
  int64_t in, out;
  uint64_t index;
  int64_t in2;

  template <typename Index>
  __device__ __forceinline__ void add(const OuterDim& dim, Index at) {
    in += static_cast<int64_t>(at) * dim.in_stride;
    out += static_cast<int64_t>(at) * dim.out_stride;
    index += static_cast<uint64_t>(at) * dim.mask_stride;
    in2 += static_cast<int64_t>(at) * dim.in2_stride;
  }
};

// Positions of 32 bits go with few dimensions: the common case, in half a kilobyte of launch
// arguments. Whatever exceeds one or the other takes the 64-bit kernel, with three.
constexpr int kFewDims = 8;

// Dimensions around the innermost one (rows) or around the two that a thread walks (strided), from
// the innermost outwards.
template <typename Index>
struct OuterDims {
  int count;
  OuterDim dims[sizeof(Index) == 4 ? kFewDims : kMaxDims];

  __device__ __forceinline__ void locate(Index n, Position& position) const {
    for (int d = 0; d < count; ++d) position.add(dims[d], split(n, dims[d].size));
  }
};

template <class CommonParams>
__device__ __forceinline__ Position slice_begin(const CommonParams& common, int64_t slice) {
  return {slice * common.slice_in_stride, slice * common.slice_out_stride,
          common.mask_offset + slice * common.slice_mask_stride, slice * common.slice_in2_stride};
}

template <typename Index>
Divisor divisor_of(int64_t size) {
  return divisor(static_cast<uint64_t>(size), sizeof(Index) == 8);
}

template <typename Index>
OuterDim outer_dim(const Dim& dim) {
  return {divisor_of<Index>(dim.size), dim.in_stride, dim.out_stride, dim.mask_stride,
          dim.in2_stride};
}

// All of `map` but the dimensions `skip` and `skip2`.
template <typename Index>
OuterDims<Index> outer_dims(const IndexMap& map, int skip, int skip2) {
  OuterDims<Index> outer;
  outer.count = 0;
  for (int d = map.ndim - 1; d >= 0; --d) {
    if (d != skip && d != skip2) outer.dims[outer.count++] = outer_dim<Index>(map.dims[d]);
  }
  return outer;
}

// Calls `launch` with the type of positions that `items` of them in `dims` outer dimensions need.
// With two inputs that is always the wide one, for half as many kernels to compile.
template <class Op, typename Function>
void with_positions(const Geometry& geometry, int64_t items, int dims, Function launch) {
  if constexpr (Op::kInputs == 1) {
    if (!geometry.wide && items >> 31 == 0 && dims <= kFewDims) return launch(uint32_t{});
  }
  launch(uint64_t{});
}

}  // namespace dropout_ext::cuda
