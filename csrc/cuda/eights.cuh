// Rows for add_norm.cu and add_norm_backward.cu. A thread has eight neighbouring elements at a
// time, the first a multiple of eight in its row, whatever the dtypes, so that one Philox call
// serves them all where rows begin at blocks of the element index, and two where not. Up to kHeld
// of these eights stay in registers between the passes over a row; what a row has beyond is read
// again.
#pragma once

#include "../epilogue/row_args.h"
#include "access.cuh"
#include "decisions.cuh"
#include "divisor.cuh"
#include "grid.cuh"

namespace dropout_ext::cuda {

// The warps that share a row, at most, and the eights that a thread holds. float64 has half as many
// of both, for the registers.
template <typename C>
constexpr int kMaxWarps = sizeof(C) == 8 ? 8 : 16;
template <typename C>
constexpr int kForwardEights = sizeof(C) == 8 ? 2 : 4;
template <typename C>
constexpr int kBackwardEights = sizeof(C) == 8 ? 1 : 2;

// Where the keep decisions of a row's elements come from.
struct RowDecisions {
  enum Kind { kAll, kBlocks, kOne, kStored } kind;
  uint32_t threshold;
  Key key;
  const Key* keys;  // null, or one for every `slice` rows, on the device
  Divisor slice;
  uint64_t mask_offset;
  const bool* stored;
  int dims;
  struct {
    Divisor size;
    uint64_t mask_stride;
  } dim[kRowDims];  // of the rows, from the innermost outwards

  explicit RowDecisions(const RowMask& mask)
      : kind(mask.keeps_all()                            ? kAll
             : mask.stored                               ? kStored
             : mask.dims[mask.row_dims].mask_stride == 0 ? kOne
                                                         : kBlocks),
        threshold(mask.threshold),
        key(mask.key),
        keys(mask.keys),
        slice(divisor(static_cast<uint64_t>(mask.rows_per_slice), true)),
        mask_offset(mask.mask_offset),
        stored(mask.stored),
        dims(kind == kBlocks || kind == kOne ? mask.row_dims : 0) {
    for (int d = 0; d < dims; ++d) {
      const auto& extent = mask.dims[dims - 1 - d];
      dim[d] = {divisor(static_cast<uint64_t>(extent.size), true), extent.mask_stride};
    }
  }
};

class RowKeep {
 public:
  __device__ __forceinline__ RowKeep(const RowDecisions& p, int64_t row, int64_t columns) : p_(p) {
    if (p.kind == RowDecisions::kStored) stored_ = p.stored + row * columns;
    if (p.kind == RowDecisions::kAll || p.kind == RowDecisions::kStored) return;
    key_ = p.key;
    auto rest = static_cast<uint64_t>(row);
    if (p.keys != nullptr) {
      uint64_t of_slice = rest;
      split(of_slice, p.slice);
      key_ = p.keys[of_slice];
    }
    index_ = p.mask_offset;
    for (int d = 0; d + 1 < p.dims; ++d)
      index_ += split(rest, p.dim[d].size) * p.dim[d].mask_stride;
    index_ += rest * p.dim[p.dims - 1].mask_stride;
    if (p.kind == RowDecisions::kOne) {
      one_ = block_bits(index_) >> (index_ % kBlock) & 1 ? 0xff : 0;
    }
  }

  // The decisions of elements `column` to `column + count`, in the lowest bits.
  __device__ __forceinline__ uint32_t bits(int64_t column, int count) const {
    if (p_.kind == RowDecisions::kAll) return 0xff;
    if (p_.kind == RowDecisions::kOne) return one_;
    if (p_.kind == RowDecisions::kStored) {
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        if (j < count) bits |= (stored_[column + j] ? 1u : 0u) << j;
      }
      return bits;
    }
    const uint64_t index = index_ + static_cast<uint64_t>(column);
    const uint32_t bits = block_bits(index);
    const int before = index % kBlock;
    return before == 0 ? bits : (bits | block_bits(index + kBlock) << kBlock) >> before;
  }

 private:
  __device__ __forceinline__ uint32_t block_bits(uint64_t index) const {
    return keep_bits(block_words(key_, index / kBlock), p_.threshold);
  }

  const RowDecisions& p_;
  Key key_{};
  uint64_t index_ = 0;
  uint32_t one_ = 0;
  const bool* stored_ = nullptr;
};

// Eight elements in the compute type.
template <typename C>
struct Eight {
  Lane<C> x[kBlock];
};

// The first `count` of eight elements, zeros beyond. `vector`: all eight, in 16-byte accesses.
template <typename C, typename T>
__device__ __forceinline__ Eight<C> load_eight(const T* at, int count, bool vector) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  Eight<C> eight;
  if (vector) {
#pragma unroll
    for (int q = 0; q < kBlock / V; ++q) {
      Chunk<T, V, true> chunk;
      chunk.load(at + q * V);
#pragma unroll
      for (int j = 0; j < V; ++j)
        eight.x[q * V + j] = {static_cast<C>(to_lane(chunk.element[j]).x)};
    }
  } else {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      eight.x[j] = {j < count ? static_cast<C>(to_lane(at[j]).x) : C{0}};
    }
  }
  return eight;
}

template <typename C, typename T>
__device__ __forceinline__ void store_eight(T* at, const Eight<C>& eight, int count, bool vector) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  if (vector) {
#pragma unroll
    for (int q = 0; q < kBlock / V; ++q) {
      Chunk<T, V, true> chunk;
      if constexpr (Traits<T>::kIs16Bit) {
#pragma unroll
        for (int j = 0; j < V; j += 2) chunk.word[j / 2] = pack(T{}, eight.x[j], eight.x[j + 1]);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) from_lane(chunk.element[j], eight.x[q * V + j]);
      }
      chunk.store(at + q * V);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (j < count) from_lane(at[j], eight.x[j]);
    }
  }
}

// The threads that share a row: a warp, or with more than one of them all of the thread block.
struct RowThreads {
  int64_t columns;
  int warps;
  bool vector;  // whole eights, aligned to 16 bytes in every tensor

  __device__ __forceinline__ int rows_of_block() const {
    return warps == 1 ? static_cast<int>(blockDim.x) / kWarp : 1;
  }
  __device__ __forceinline__ int64_t first_row() const {
    return static_cast<int64_t>(blockIdx.x) * rows_of_block() + (warps == 1 ? warp_of_block() : 0);
  }
  __device__ __forceinline__ int64_t row_step() const {
    return static_cast<int64_t>(gridDim.x) * rows_of_block();
  }
  __device__ __forceinline__ int thread() const {
    return static_cast<int>(warps == 1 ? threadIdx.x % kWarp : threadIdx.x);
  }
  // Where the thread's u-th eight begins.
  __device__ __forceinline__ int64_t column(int64_t u) const {
    return (thread() + u * warps * kWarp) * kBlock;
  }
  __device__ __forceinline__ int count(int64_t column) const {
    const int64_t left = columns - column;
    return left < kBlock ? static_cast<int>(left) : kBlock;
  }
};

// f(u, column) for those of the thread's eights that it holds and the row has, then g(column) for
// those beyond.
template <int kHeld, class Held, class Beyond>
__device__ __forceinline__ void for_each_eight(const RowThreads& row, Held f, Beyond g) {
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int64_t column = row.column(u);
    if (column < row.columns) f(u, column);
  }
  for (int64_t column = row.column(kHeld); column < row.columns;
       column += static_cast<int64_t>(row.warps) * kWarp * kBlock) {
    g(column);
  }
}

// Sums over the threads of a row, in an order that depends on its length alone.
template <typename C, int n>
class RowSum {
 public:
  explicit __device__ __forceinline__ RowSum(C (*shared)[n][kMaxWarps<C>]) : shared_(shared) {}

  __device__ __forceinline__ void operator()(const RowThreads& row, C (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes);
      }
    }
    if (row.warps == 1) return;
    // Two places in turn: who writes to one again has passed the barrier after it was last read.
    auto& place = shared_[turn_];
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) place[i][threadIdx.x / kWarp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = 0;
      for (int warp = 0; warp < row.warps; ++warp) x[i] += place[i][warp];
    }
  }

 private:
  C (*shared_)[n][kMaxWarps<C>];
  int turn_ = 0;
};

// On the host.

// Calls launch(call) with the two dtypes.
template <class Launch>
void with_row_pair(Dtype dtype, Dtype sum, Launch launch) {
  const auto with_sum = [&](auto t) {
    using T = decltype(t);
    switch (sum) {
      case Dtype::kFloat32: return launch(t, float{});
      default: return launch(t, T{});
    }
  };
  switch (dtype) {
    case Dtype::kFloat64: return launch(double{}, double{});
    case Dtype::kFloat16: return with_sum(Float16{});
    case Dtype::kBFloat16: return with_sum(BFloat16{});
    default:
      switch (sum) {
        case Dtype::kFloat16: return launch(float{}, Float16{});
        case Dtype::kBFloat16: return launch(float{}, BFloat16{});
        default: return launch(float{}, float{});
      }
  }
}

// Enough warps to hold a row, or the most there may be.
template <typename C>
int warps_for(int64_t columns, int held_eights) {
  int warps = 1;
  while (warps < kMaxWarps<C> && int64_t{warps} * kWarp * kBlock * held_eights < columns)
    warps *= 2;
  return warps;
}

template <class... Pointers>
bool in_vectors(int64_t columns, const Pointers*... pointers) {
  return columns % kBlock == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

struct RowLaunch {
  dim3 grid;
  unsigned threads;

  RowLaunch(const RowThreads& row, int64_t units, const Geometry& geometry)
      : threads(static_cast<unsigned>(row.warps == 1 ? kThreads : row.warps * kWarp)) {
    const int64_t needed = row.warps == 1 ? ceil_div(units, kThreads / kWarp) : units;
    const int64_t limit = geometry.blocks != 0 ? geometry.blocks : kMaxGridX;
    grid = dim3(static_cast<unsigned>(needed < limit ? needed : limit), 1, 1);
  }
};

}  // namespace dropout_ext::cuda
