// Positions to addresses and element indices. Every member of the dropout family is one affine map,
//   index = offset + sum_d position[d] * mask_stride[d],
// beside the strides of input and output in memory.
#pragma once

#include <cstdint>

#include "mask.h"

namespace dropout_ext {

inline constexpr int kMaxDims = 64;  // of a PyTorch tensor

struct Dim {
  int64_t size;
  int64_t in_stride;  // in elements, as out_stride; 0 where the input is expanded
  int64_t out_stride;
  uint64_t mask_stride;    // modulo 2^64; 0 along dimensions that share the mask
  int64_t in2_stride = 0;  // of the second input, where there is one
};

// Dimensions from the outermost to the innermost in the output's memory.
struct IndexMap {
  int ndim = 0;
  uint64_t mask_offset = 0;
  Dim dims[kMaxDims];

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= dims[d].size;
    return n;
  }
};

// Sorts the dimensions by the output's strides and merges neighbours that are one run in inputs,
// output and mask alike. Changes no element's address or index. A single element becomes one
// dimension of size 1.
inline void normalize(IndexMap& map) {
  int n = 0;
  for (int d = 0; d < map.ndim; ++d) {
    if (map.dims[d].size == 1) continue;
    const Dim dim = map.dims[d];
    int at = n++;
    // Insertion sort: stable, and linear for the row-major tensors that are the common case.
    for (; at > 0 && map.dims[at - 1].out_stride < dim.out_stride; --at) {
      map.dims[at] = map.dims[at - 1];
    }
    map.dims[at] = dim;
  }
  int merged = 0;
  for (int d = 0; d < n; ++d) {
    const Dim dim = map.dims[d];
    if (merged > 0) {
      Dim& outer = map.dims[merged - 1];
      if (outer.in_stride == dim.in_stride * dim.size &&
          outer.out_stride == dim.out_stride * dim.size &&
          outer.in2_stride == dim.in2_stride * dim.size &&
          outer.mask_stride == dim.mask_stride * static_cast<uint64_t>(dim.size)) {
        outer = {outer.size * dim.size, dim.in_stride, dim.out_stride, dim.mask_stride,
                 dim.in2_stride};
        continue;
      }
    }
    map.dims[merged++] = dim;
  }
  if (merged == 0) map.dims[merged++] = {1, 1, 1, 1, 1};
  map.ndim = merged;
}

// Of a normalized map: first input, output and mask are one and the same dense run.
inline bool is_flat(const IndexMap& map) {
  const Dim& inner = map.dims[map.ndim - 1];
  return map.ndim == 1 && inner.in_stride == 1 && inner.out_stride == 1 && inner.mask_stride == 1;
}

}  // namespace dropout_ext
