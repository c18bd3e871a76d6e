// The kernel for what is one dense run; see apply.cuh.
#pragma once

#include "apply.cuh"

namespace dropout_ext::cuda {

template <typename T, class Op>
struct FlatParams {
  Common<T, Op> common;
  int64_t size;
};

// A tile is what a warp does at a time: kUnroll groups of 32 lanes times kBlocks blocks. Tiles are
// aligned in the element index, so that a tile has one upper half of the block number and the
// products that depend on it alone are shared.
template <typename T, class Op, bool kVector>
struct FlatTile {
  static constexpr int V = kVector ? 16 / static_cast<int>(sizeof(T)) : 1;
  static constexpr int kBlocks = V > kBlock ? V / kBlock : 1;  // of a lane, in one chunk
  static constexpr int kChunks = V < kBlock ? kBlock / V : 1;  // of a lane, in one group
  // Of the loads in flight each input has its share.
  static constexpr int kUnroll =
      kVector && Traits<T>::kUnroll > Op::kInputs ? Traits<T>::kUnroll / Op::kInputs : 1;
  static constexpr int kGroup = kWarp * kBlock * kBlocks;
  static constexpr int kSize = kGroup * kUnroll;

  using Chunks = Chunk<T, V, kVector>[kUnroll][kChunks];

  template <bool kWhole>
  static __device__ __forceinline__ void load(const T* in, int low, int high, Chunks& x) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int q = 0; q < kChunks; ++q) {
        const int i = u * kGroup + q * kWarp * V;
        if (kWhole || (i >= low && i + V <= high)) {
          x[u][q].load(in + i);
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (i + j >= low && i + j < high) x[u][q].element[j] = in[i + j];
          }
        }
      }
    }
  }

  // `in`, `in2` and `out` are where the tile begins; of its elements only those in [low, high)
  // exist.
  template <bool kWhole>
  static __device__ __forceinline__ void run(const T* in, const T* in2, T* out, int low, int high,
                                             Key key, uint64_t first_block,
                                             const Common<T, Op>& common) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t threshold = common.threshold;
    const auto op = common.op;
    in = one_address(in + lane * V);
    out = one_address(out + lane * V);
    low -= lane * V;
    high -= lane * V;
    Chunks x, x2;
    if constexpr (Common<T, Op>::kReads) load<kWhole>(in, low, high, x);
    if constexpr (Common<T, Op>::kReadsSecond) {
      load<kWhole>(one_address(in2 + lane * V), low, high, x2);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      uint32_t bits = 0;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t block = lo32(first_block) + (u * kWarp + lane) * kBlocks + b;
        const PhiloxWords words = philox4x32_10(lo32(key.offset), hi32(key.offset), block,
                                                hi32(first_block), lo32(key.seed), hi32(key.seed));
        if constexpr (V >= kBlock) {
          apply_op<kBlock>(op, x[u][0], x2[u][0], b * kBlock,
                           [&](int j) { return lane_word(words, j) >= threshold; });
        } else {
          bits = keep_bits(words, threshold);
        }
      }
#pragma unroll
      for (int q = 0; q < kChunks; ++q) {
        if constexpr (V < kBlock) {
          const int owner = q * (kWarp / kChunks) + lane / kChunks;
          const uint32_t mine = __shfl_sync(kAllLanes, bits, owner) >> (lane % kChunks * V);
          apply_op<V>(op, x[u][q], x2[u][q], 0, [&](int j) { return mine >> j & 1; });
        }
        const int i = u * kGroup + q * kWarp * V;
        if (kWhole || (i >= low && i + V <= high)) {
          x[u][q].store(out + i);
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (i + j >= low && i + j < high) out[i + j] = x[u][q].element[j];
          }
        }
      }
    }
  }
};

template <typename T, class Op, bool kVector>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) * Op::kInputs >= 16 ? 2 : Op::kMinBlocks)
    flat_kernel(const __grid_constant__ FlatParams<T, Op> p) {
  using Tile = FlatTile<T, Op, kVector>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp) * Tile::kSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp_of_block();
  for (int64_t slice = blockIdx.y; slice < p.common.slices; slice += gridDim.y) {
    const Key key = p.common.keys.of(slice);
    const uint64_t index = p.common.mask_offset + slice * p.common.slice_mask_stride;
    // The first tile begins before the first element, by what the element index is past a tile.
    int64_t begin = warp * Tile::kSize - static_cast<int64_t>(index % Tile::kSize);
    const T* in = p.common.in + slice * p.common.slice_in_stride;
    const T* in2 = p.common.in2 + slice * p.common.slice_in2_stride;
    T* out = p.common.out + slice * p.common.slice_out_stride;
#pragma unroll 1
    for (; begin < p.size; begin += step) {
      const uint64_t first_block = (index + begin) / kBlock;
      if (begin >= 0 && begin + Tile::kSize <= p.size) {
        Tile::template run<true>(in + begin, in2 + begin, out + begin, 0, Tile::kSize, key,
                                 first_block, p.common);
      } else {
        const int low = begin < 0 ? static_cast<int>(-begin) : 0;
        const int64_t left = p.size - begin;
        const int high = left < Tile::kSize ? static_cast<int>(left) : Tile::kSize;
        Tile::template run<false>(in + begin, in2 + begin, out + begin, low, high, key, first_block,
                                  p.common);
      }
    }
  }
}

}  // namespace dropout_ext::cuda
