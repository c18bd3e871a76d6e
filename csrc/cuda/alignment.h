// Where runs begin within blocks of the element index and chunks of memory: what the launches
// decide by, on the host, without a dtype.
//
// A run's eights begin at blocks of the element index, or, where it shares one keep decision, at
// chunks of the output's memory. Below, that is its anchor, in elements.
#pragma once

#include "../epilogue/apply_args.h"

namespace dropout_ext::cuda {

// `along`: the dimension of the run, or -1 for one element.
struct Anchor {
  const ApplyArgs& args;
  int along;
  int64_t bytes = element_size(args.dtype);
  bool of_output = along >= 0 && args.map.dims[along].mask_stride == 0;

  uint64_t base() const {
    return of_output ? reinterpret_cast<uintptr_t>(args.out) / static_cast<uint64_t>(bytes)
                     : args.map.mask_offset;
  }
  uint64_t slice_stride() const {
    return of_output ? static_cast<uint64_t>(args.slice_out_stride) : args.slice_mask_stride;
  }
  uint64_t stride(const Dim& dim) const {
    return of_output ? static_cast<uint64_t>(dim.out_stride) : dim.mask_stride;
  }
};

// The most elements by which the first `unit` of a run can begin before the run: exact where all
// runs are alike, as where their length is a multiple of the unit.
inline int64_t most_before(const Anchor& anchor, int64_t unit) {
  const auto u = static_cast<uint64_t>(unit);
  const IndexMap& map = anchor.args.map;
  bool alike = anchor.args.slices == 1 || anchor.slice_stride() % u == 0;
  for (int d = 0; d < map.ndim; ++d) {
    if (d != anchor.along) alike = alike && anchor.stride(map.dims[d]) % u == 0;
  }
  return alike ? static_cast<int64_t>(anchor.base() % u) : unit - 1;
}

// Whether chunks of `v` elements of every tensor begin where the anchor has chunks, in every run
// along the innermost dimension. An input may also have one element for the whole run.
inline bool in_chunks(const ApplyArgs& args, int64_t v) {
  const IndexMap& map = args.map;
  const Anchor anchor{args, map.ndim - 1};
  const auto fits = [&](const void* base, int64_t slice_stride, int64_t Dim::* stride) {
    const auto address = reinterpret_cast<uintptr_t>(base);
    const auto bytes = static_cast<uint64_t>(anchor.bytes);
    const auto same = [&](uint64_t a, uint64_t b) {
      return (a - b) % static_cast<uint64_t>(v) == 0;
    };
    bool all =
        map.dims[map.ndim - 1].*stride == 1 && address % bytes == 0 &&
        same(address / bytes, anchor.base()) &&
        (args.slices == 1 || same(static_cast<uint64_t>(slice_stride), anchor.slice_stride()));
    for (int d = 0; d + 1 < map.ndim; ++d) {
      const Dim& dim = map.dims[d];
      all = all && same(static_cast<uint64_t>(dim.*stride), anchor.stride(dim));
    }
    return all;
  };
  const auto input_fits = [&](const void* base, int64_t slice_stride, int64_t Dim::* stride) {
    return base == nullptr || map.dims[map.ndim - 1].*stride == 0 ||
           fits(base, slice_stride, stride);
  };
  return fits(args.out, args.slice_out_stride, &Dim::out_stride) &&
         input_fits(args.in, args.slice_in_stride, &Dim::in_stride) &&
         input_fits(args.in2, args.slice_in2_stride, &Dim::in2_stride);
}

}  // namespace dropout_ext::cuda
