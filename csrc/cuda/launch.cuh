// From a call to a kernel and its grid. What the .cu files launch, tests/native/cuda_shim.h runs as
// plain C++.
#pragma once

#include "alignment.h"
#include "flat.cuh"
#include "rows.cuh"
#include "strided.cuh"

namespace dropout_ext::cuda {

constexpr int64_t kMaxGridY = 65535;

struct Launch {
  dim3 grid;
  unsigned threads;

  // Enough blocks for one pass, where the device's limits allow; the kernels loop over the rest.
  Launch(const Geometry& geometry, int64_t work, int64_t per_thread, int64_t slices) {
    threads = static_cast<unsigned>(geometry.threads != 0 ? geometry.threads : kThreads);
    const int64_t needed = ceil_div(work, static_cast<int64_t>(threads) * per_thread);
    const int64_t limit = geometry.blocks != 0 ? geometry.blocks : kMaxGridX;
    grid = dim3(static_cast<unsigned>(needed < limit ? needed : limit),
                static_cast<unsigned>(slices < kMaxGridY ? slices : kMaxGridY), 1);
  }
};

template <typename T, class Op>
void launch_flat(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                 CUstream_st* stream) {
  const FlatParams<T, Op> params{{args, keys}, args.map.dims[0].size};
  const auto launch = [&](auto kernel, int64_t tile) {
    const int64_t before = most_before({args, 0}, tile);
    const Launch shape(geometry, params.size + before, tile / kWarp, args.slices);
    DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
  };
  if (in_chunks(args, FlatTile<T, Op, true>::V)) {
    launch(flat_kernel<T, Op, true>, FlatTile<T, Op, true>::kSize);
  } else {
    launch(flat_kernel<T, Op, false>, FlatTile<T, Op, false>::kSize);
  }
}

template <typename T, class Op>
void launch_rows(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                 CUstream_st* stream) {
  const IndexMap& map = args.map;
  const Dim& inner = map.dims[map.ndim - 1];
  const Anchor anchor{args, map.ndim - 1};
  constexpr int64_t kFull = 16 / static_cast<int64_t>(sizeof(T));
  constexpr int64_t V = kFull < kBlock ? kFull : kBlock;
  const bool vector = in_chunks(args, V);
  const int64_t before = most_before(anchor, anchor.of_output ? V : kBlock);
  const int64_t blocks = ceil_div(inner.size + before, kBlock);
  const int64_t items = map.numel() / inner.size * blocks;
  with_positions<Op>(geometry, items, map.ndim - 1, [&](auto position) {
    using Index = decltype(position);
    const RowsParams<T, Op, Index> params{{args, keys},
                                          static_cast<uint64_t>(items),
                                          divisor_of<Index>(blocks),
                                          inner.size,
                                          inner.in_stride,
                                          inner.out_stride,
                                          inner.in2_stride,
                                          anchor.of_output,
                                          outer_dims<Index>(map, map.ndim - 1, -1)};
    auto* kernel = vector ? rows_kernel<T, Op, true, Index> : rows_kernel<T, Op, false, Index>;
    const Launch shape(geometry, items, 1, args.slices);
    DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
  });
}

template <typename T, class Op>
void launch_strided(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                    CUstream_st* stream) {
  const IndexMap& map = args.map;
  const int inner = map.ndim - 1;
  int walked = -1;
  for (int d = 0; d < inner; ++d) {
    if (map.dims[d].mask_stride == 1) walked = d;
  }
  Dim dim = walked < 0 ? Dim{1, 0, 0, 1} : map.dims[walked];
  // A window that begins inside a block needs a second one; four windows in a row need five.
  const int windows = most_before({args, walked}, kBlock) == 0 ? 1 : 4;
  const int64_t length = dim.size;
  dim.size = ceil_div(length, windows * kBlock);
  const int64_t items = map.numel() / length * dim.size;
  with_positions<Op>(geometry, items, walked < 0 ? inner : inner - 1, [&](auto position) {
    using Index = decltype(position);
    const StridedParams<T, Op, Index> params{{args, keys},
                                             static_cast<uint64_t>(items),
                                             outer_dim<Index>(map.dims[inner]),
                                             outer_dim<Index>(dim),
                                             length,
                                             windows,
                                             outer_dims<Index>(map, inner, walked)};
    auto* kernel = strided_kernel<T, Op, Index>;
    const Launch shape(geometry, items, 1, args.slices);
    DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
  });
}

template <typename T, class Op>
void launch(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
            CUstream_st* stream) {
  if (args.map.dims[args.map.ndim - 1].mask_stride > 1) {
    launch_strided<T, Op>(args, keys, geometry, stream);
  } else if (is_flat(args.map) && (args.in2 == nullptr || args.map.dims[0].in2_stride == 1)) {
    launch_flat<T, Op>(args, keys, geometry, stream);
  } else {
    launch_rows<T, Op>(args, keys, geometry, stream);
  }
}

}  // namespace dropout_ext::cuda
