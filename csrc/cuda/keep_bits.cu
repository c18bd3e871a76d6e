// Keep decisions as bits: of the row-major positions of a mask, position i is bit i & 7 of byte
// i >> 3. Nothing is read, and an eighth of a byte written for each, so Philox is the price.

#include "launch.cuh"

namespace dropout_ext::cuda {

namespace {

struct KeepBitsParams {
  unsigned char* out;
  Keys keys;
  uint32_t threshold;
  uint64_t mask_offset;
  int64_t slices, slice_bytes;
  uint64_t slice_mask_stride;
  int64_t positions;          // of a slice
  uint64_t items;             // threads' worth of work in a slice
  Divisor of_run;             // items of a run of consecutive element indices
  OuterDims<uint64_t> outer;  // around the runs
};

// A thread has kBytes bytes, whose positions are in one run. kAligned: they begin at a multiple of
// as many in the element index, so that they have one upper half of the block number and the
// products that depend on it alone are shared.
template <int kBytes, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 3)
    keep_bits_kernel(const __grid_constant__ KeepBitsParams p) {
  constexpr int kPositions = kBytes * kBlock;
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (int64_t slice = blockIdx.y; slice < p.slices; slice += gridDim.y) {
    const Key key = p.keys.of(slice);
    unsigned char* out = p.out + slice * p.slice_bytes;
#pragma unroll 1
    for (uint64_t item = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
         item < p.items; item += step) {
      Position at{0, 0, p.mask_offset + slice * p.slice_mask_stride, 0};
      if (p.outer.count == 0) {
        at.index += item * kPositions;
      } else {
        uint64_t run = item;
        at.index += split(run, p.of_run) * kPositions;
        p.outer.locate(run, at);
      }
      const int before = kAligned ? 0 : at.index % kBlock;
      uint32_t last = 0;
      if (before != 0) last = keep_bits(block_words(key, at.index / kBlock), p.threshold);
      uint32_t word[(kBytes + 3) / 4] = {};
#pragma unroll
      for (int b = 0; b < kBytes; ++b) {
        uint32_t bits;
        if constexpr (kAligned) {
          const uint64_t first = at.index / kBlock;
          bits = keep_bits(philox4x32_10(lo32(key.offset), hi32(key.offset), lo32(first) + b,
                                         hi32(first), lo32(key.seed), hi32(key.seed)),
                           p.threshold);
        } else {
          const uint64_t index = at.index + b * kBlock + (before == 0 ? 0 : kBlock);
          const uint32_t next = keep_bits(block_words(key, index / kBlock), p.threshold);
          bits = before == 0 ? next : (last | next << kBlock) >> before & 0xff;
          last = next;
        }
        word[b / 4] |= bits << b % 4 * kBlock;
      }
      unsigned char* to = out + item * kBytes;
      const int64_t left = p.positions - static_cast<int64_t>(item) * kPositions;
      if constexpr (kBytes == 1) {
        *to = static_cast<unsigned char>(word[0]);
      } else if (left >= kPositions) {
        store_vector(reinterpret_cast<uint4*>(to), uint4{word[0], word[1], word[2], word[3]});
      } else {
#pragma unroll
        for (int b = 0; b < kBytes; ++b) {
          const int64_t exist = left - b * kBlock;
          const uint32_t wanted = exist < kBlock ? (1u << (exist & 7)) - 1 : 0xff;
          if (exist > 0) to[b] = static_cast<unsigned char>(word[b / 4] >> b % 4 * kBlock & wanted);
        }
      }
    }
  }
}

// Zeros and ones, a byte each, to bits.
__global__ void pack_kernel(const unsigned char* bytes, int64_t positions, unsigned char* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t to = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       to * kBlock < positions; to += step) {
    const int64_t left = positions - to * kBlock;
    uint32_t bits = 0;
    if (left >= kBlock) {
      // The j-th byte to bit 56 + j; no two products of a one and a one meet.
      bits = reinterpret_cast<const uint64_t*>(bytes)[to] * 0x0102040810204080 >> 56;
    } else {
      for (int j = 0; j < left; ++j) bits |= uint32_t{bytes[to * kBlock + j]} << j;
    }
    out[to] = static_cast<unsigned char>(bits);
  }
}

template <int kBytes, bool kAligned>
void launch_direct(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                   CUstream_st* stream) {
  const IndexMap& map = args.map;
  const int inner = map.ndim - 1;
  const int64_t positions = map.numel();
  const int64_t items = ceil_div(positions, kBytes * kBlock);
  const KeepBitsParams params{static_cast<unsigned char*>(args.out),
                              {keys},
                              args.threshold,
                              map.mask_offset,
                              args.slices,
                              positions / kBlock,
                              args.slice_mask_stride,
                              positions,
                              static_cast<uint64_t>(items),
                              divisor_of<uint64_t>(ceil_div(map.dims[inner].size, kBytes * kBlock)),
                              outer_dims<uint64_t>(map, inner, -1)};
  const Launch shape(geometry, items, 1, args.slices);
  DROPOUT_EXT_LAUNCH((keep_bits_kernel<kBytes, kAligned>), shape.grid, shape.threads, stream,
                     params);
}

}  // namespace

void launch_keep_bits(const ApplyArgs& args, void* bytes, const KeySource& keys,
                      const Geometry& geometry, CUstream_st* stream) {
  constexpr int kMost = kBitsVector / kBlock;
  if (bytes != nullptr) {
    ApplyArgs stored = args;
    stored.out = bytes;
    launch_affine(stored, keys, geometry, stream);
    const int64_t positions = args.slices * args.map.numel();
    const Launch shape(geometry, ceil_div(positions, kBlock), 1, 1);
    DROPOUT_EXT_LAUNCH(pack_kernel, shape.grid, shape.threads, stream,
                       static_cast<const unsigned char*>(bytes), positions,
                       static_cast<unsigned char*>(args.out));
  } else if (!in_vectors_of_bits(args)) {
    launch_direct<1, false>(args, keys, geometry, stream);
  } else if (most_before({args, args.map.ndim - 1}, kBitsVector) == 0) {
    launch_direct<kMost, true>(args, keys, geometry, stream);
  } else {
    launch_direct<kMost, false>(args, keys, geometry, stream);
  }
}

}  // namespace dropout_ext::cuda
