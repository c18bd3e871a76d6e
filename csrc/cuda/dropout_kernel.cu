// Three kernels, one contract (../mask.h). Every warp owns blocks of eight consecutive element
// indices, one per lane, so that one Philox call serves eight elements; which warp owns which block
// changes nothing. Memory is then accessed in chunks of 16 bytes that lie side by side across the
// lanes. A chunk of a 16-bit type is a whole block; of wider types it is a part of one, and the
// lane that needs the keep bits gets them from the block's owner by a shuffle.
//
//   flat     input, output and element index are one dense run
//   rows     an inner run with mask stride 1 or 0, any strides around it
//   strided  anything else: lanes along the output's innermost dimension, eight-element windows
//            along the dimension where the element index is contiguous
//
// tests/native/cuda_shim.h runs this file as plain C++.

#include "dropout_kernel.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DROPOUT_EXT_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace dropout_ext::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kMaxThreads = 256;
constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridY = 65535;
constexpr uint32_t kAllLanes = 0xffffffff;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <typename Real>
struct Complex {  // aligned as its parts: views of real tensors need no more
  Real real, imag;
};

__device__ __forceinline__ float to_float(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ Float16 to_float16(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
__device__ __forceinline__ BFloat16 to_bfloat16(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
// Two at a time is one instruction; element 0 goes into the lower half.
__device__ __forceinline__ uint32_t pack(Float16, float x0, float x1) {
  const __half2 packed = __floats2half2_rn(x0, x1);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
__device__ __forceinline__ uint32_t pack(BFloat16, float x0, float x1) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(x0, x1);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// keep ? fma(x, scale, bias) : dropped. A bias of -0 makes it a plain multiply, signed zeros and
// all: one kernel for both epilogues.
template <typename Real>
struct Affine {
  Real scale, bias, dropped;

  // Computed outside the choice, so that it is a select and no branch.
  __device__ __forceinline__ float apply(float x, bool keep) const {
    const float y = fmaf(x, scale, bias);
    return keep ? y : dropped;
  }
  __device__ __forceinline__ double apply(double x, bool keep) const {
    const double y = fma(x, scale, bias);
    return keep ? y : dropped;
  }
  __device__ __forceinline__ Complex<Real> apply(Complex<Real> x, bool keep) const {
    return {apply(x.real, keep), apply(x.imag, keep)};
  }
  __device__ __forceinline__ Float16 apply(Float16 x, bool keep) const {
    return to_float16(apply(to_float(x), keep));
  }
  __device__ __forceinline__ BFloat16 apply(BFloat16 x, bool keep) const {
    return to_bfloat16(apply(to_float(x), keep));
  }
};

// The warp's number in its thread block: a broadcast, so that the compiler knows what follows from
// it to be the same in every lane, keeps it in uniform registers, and sees that the lanes that meet
// in a shuffle have not diverged.
__device__ __forceinline__ uint32_t warp_of_block() {
  return __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
}

// What the kernels know of each dtype. kUnroll: groups of blocks per lane in a flat tile, for four
// independent 16-byte loads in flight (complex128 has eight in one group).
template <typename RealType, typename VectorType, int unroll, int bits = 0>
struct TraitsOf {
  using Real = RealType;
  using Vector = VectorType;
  static constexpr int kUnroll = unroll;
  static constexpr bool kIs16Bit = bits == 16;
  static constexpr bool kReadsInput = bits != 1;
};
template <typename T>
struct Traits;
template <>
struct Traits<double> : TraitsOf<double, double2, 1> {};
template <>
struct Traits<Complex<double>> : TraitsOf<double, double2, 1> {};
template <>
struct Traits<Complex<float>> : TraitsOf<float, float4, 1> {};
template <>
struct Traits<float> : TraitsOf<float, float4, 2> {};
template <>
struct Traits<Float16> : TraitsOf<float, uint4, 4, 16> {};
template <>
struct Traits<BFloat16> : TraitsOf<float, uint4, 4, 16> {};
template <>
struct Traits<bool> : TraitsOf<float, uint4, 1, 1> {};

// Plain accesses of 16 bytes. In C++ the compiler splits some of them, and __ldca and __stwb, which
// it does not, are ordered ones. tests/native/cuda_shim.h has its own.
#if defined(__CUDACC__)
__device__ __forceinline__ uint4 load_vector(const uint4* at) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at));
  return x;
}
__device__ __forceinline__ float4 load_vector(const float4* at) {
  float4 x;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(at));
  return x;
}
__device__ __forceinline__ double2 load_vector(const double2* at) {
  double2 x;
  asm volatile("ld.global.v2.f64 {%0, %1}, [%2];" : "=d"(x.x), "=d"(x.y) : "l"(at));
  return x;
}
__device__ __forceinline__ void store_vector(uint2* at, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store_vector(uint4* at, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_vector(float4* at, float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_vector(double2* at, double2 x) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(at), "d"(x.x), "d"(x.y) : "memory");
}
// Keeps the compiler from taking an address apart, so that constants added to it become part of the
// instructions.
template <typename T>
__device__ __forceinline__ T* one_address(T* at) {
  asm("" : "+l"(at));
  return at;
}
#endif

// V elements: a vector access of 16 bytes (8 for eight bools), or one element at its own alignment.
template <typename T, int V, bool kVector>
struct Chunk {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  using Vector = typename Traits<T>::Vector;
  static_assert(kVector ? kBytes == 16 || kBytes == 8 : V == 1);

  union {
    Vector vector;
    T element[V];
    uint32_t word[4];
  };

  __device__ __forceinline__ Chunk() {}

  __device__ __forceinline__ void load(const T* at) {
    if constexpr (kVector) {
      vector = load_vector(reinterpret_cast<const Vector*>(at));
    } else {
      element[0] = *at;
    }
  }

  __device__ __forceinline__ void store(T* at) const {
    if constexpr (!kVector) {
      *at = element[0];
    } else if constexpr (kBytes == 16) {
      store_vector(reinterpret_cast<Vector*>(at), vector);
    } else {
      store_vector(reinterpret_cast<uint2*>(at), make_uint2(word[0], word[1]));
    }
  }

  // Elements `begin` to `begin + N`; keep(j) decides about the j-th of them.
  template <int N, typename Keep>
  __device__ __forceinline__ void apply(const Affine<typename Traits<T>::Real>& affine, int begin,
                                        Keep keep) {
    if constexpr (Traits<T>::kIs16Bit && N > 1) {
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        uint32_t& pair = word[(begin + j) / 2];
        const T x0{static_cast<uint16_t>(pair)}, x1{static_cast<uint16_t>(pair >> 16)};
        pair =
            pack(T{}, affine.apply(to_float(x0), keep(j)), affine.apply(to_float(x1), keep(j + 1)));
      }
    } else if constexpr (!Traits<T>::kReadsInput && N > 1) {
#pragma unroll
      for (int j = 0; j < N; j += 4) {
        word[(begin + j) / 4] = (keep(j) ? 1u : 0u) | (keep(j + 1) ? 1u << 8 : 0u) |
                                (keep(j + 2) ? 1u << 16 : 0u) | (keep(j + 3) ? 1u << 24 : 0u);
      }
    } else if constexpr (!Traits<T>::kReadsInput) {
      element[begin] = keep(0);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        element[begin + j] = affine.apply(element[begin + j], keep(j));
      }
    }
  }
};

struct Keys {
  KeySource source;

  __device__ __forceinline__ Key of(int64_t slice) const {
    if (source.device == nullptr) return source.host;
    return {source.device[2 * slice], source.device[2 * slice + 1]};
  }
};

// The keep decisions of a block, lane 0 in the lowest bit.
__device__ __forceinline__ uint32_t keep_bits(const PhiloxWords& words, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kBlock; ++j) bits |= (lane_word(words, j) >= threshold ? 1u : 0u) << j;
  return bits;
}

template <typename T>
struct Common {
  const T* in;
  T* out;
  Keys keys;
  uint64_t mask_offset;
  int64_t slices, slice_in_stride, slice_out_stride;
  uint64_t slice_mask_stride;
  uint32_t threshold;
  Affine<typename Traits<T>::Real> affine;
};

template <typename T>
struct FlatParams {
  Common<T> common;
  int64_t size;
};

// A tile is what a warp does at a time: kUnroll groups of 32 lanes times kBlocks blocks. Tiles are
// aligned in the element index, so that a tile has one upper half of the block number and the
// products that depend on it alone are shared.
template <typename T, bool kVector>
struct FlatTile {
  static constexpr int V = kVector ? 16 / static_cast<int>(sizeof(T)) : 1;
  static constexpr int kBlocks = V > kBlock ? V / kBlock : 1;  // of a lane, in one chunk
  static constexpr int kChunks = V < kBlock ? kBlock / V : 1;  // of a lane, in one group
  static constexpr int kUnroll = kVector ? Traits<T>::kUnroll : 1;
  static constexpr int kGroup = kWarp * kBlock * kBlocks;
  static constexpr int kSize = kGroup * kUnroll;

  // `in` and `out` are where the tile begins; of its elements only those in [low, high) exist.
  template <bool kWhole>
  static __device__ __forceinline__ void run(const T* in, T* out, int low, int high, Key key,
                                             uint64_t first_block, uint32_t threshold,
                                             const Affine<typename Traits<T>::Real>& affine) {
    const int lane = threadIdx.x % kWarp;
    in = one_address(in + lane * V);
    out = one_address(out + lane * V);
    low -= lane * V;
    high -= lane * V;
    Chunk<T, V, kVector> x[kUnroll][kChunks];
    if constexpr (Traits<T>::kReadsInput) {
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
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      uint32_t bits = 0;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t block = lo32(first_block) + (u * kWarp + lane) * kBlocks + b;
        const PhiloxWords words = philox4x32_10(lo32(key.offset), hi32(key.offset), block,
                                                hi32(first_block), lo32(key.seed), hi32(key.seed));
        if constexpr (V >= kBlock) {
          x[u][0].template apply<kBlock>(affine, b * kBlock,
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
          x[u][q].template apply<V>(affine, 0, [&](int j) { return mine >> j & 1; });
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

template <typename T, bool kVector>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 16 ? 2 : 3)
    flat_kernel(const __grid_constant__ FlatParams<T> p) {
  using Tile = FlatTile<T, kVector>;
  const auto affine = p.common.affine;
  const uint32_t threshold = p.common.threshold;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp) * Tile::kSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp_of_block();
  for (int64_t slice = blockIdx.y; slice < p.common.slices; slice += gridDim.y) {
    const Key key = p.common.keys.of(slice);
    const uint64_t index = p.common.mask_offset + slice * p.common.slice_mask_stride;
    // The first tile begins before the first element, by what the element index is past a tile.
    int64_t begin = warp * Tile::kSize - static_cast<int64_t>(index % Tile::kSize);
    const T* in = p.common.in + slice * p.common.slice_in_stride;
    T* out = p.common.out + slice * p.common.slice_out_stride;
#pragma unroll 1
    for (; begin < p.size; begin += step) {
      const uint64_t first_block = (index + begin) / kBlock;
      if (begin >= 0 && begin + Tile::kSize <= p.size) {
        Tile::template run<true>(in + begin, out + begin, 0, Tile::kSize, key, first_block,
                                 threshold, affine);
      } else {
        const int low = begin < 0 ? static_cast<int>(-begin) : 0;
        const int64_t left = p.size - begin;
        const int high = left < Tile::kSize ? static_cast<int>(left) : Tile::kSize;
        Tile::template run<false>(in + begin, out + begin, low, high, key, first_block, threshold,
                                  affine);
      }
    }
  }
}

// Division of positions by a dimension's size, by multiplication: for dividends below 2^31 or
// 2^63, as Index is wide. A 64-bit division would be a call with a stack frame.
struct Divisor {
  uint64_t size, magic;
  uint32_t shift;
};

template <typename Index>
__device__ __forceinline__ Index split(Index& n, const Divisor& divisor) {
  const Index magic = static_cast<Index>(divisor.magic);
  Index quotient;
  if constexpr (sizeof(Index) == 4) {
    quotient = (__umulhi(n, magic) + n) >> divisor.shift;
  } else {
    quotient = (__umul64hi(n, magic) + n) >> divisor.shift;
  }
  const Index remainder = n - quotient * static_cast<Index>(divisor.size);
  n = quotient;
  return remainder;
}

struct OuterDim {
  Divisor size;
  int64_t in_stride, out_stride;
  uint64_t mask_stride;
};

struct Position {
  int64_t in, out;
  uint64_t index;

  template <typename Index>
  __device__ __forceinline__ void add(const OuterDim& dim, Index at) {
    in += static_cast<int64_t>(at) * dim.in_stride;
    out += static_cast<int64_t>(at) * dim.out_stride;
    index += static_cast<uint64_t>(at) * dim.mask_stride;
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

template <typename T, typename Index>
struct RowsParams {
  Common<T> common;
  uint64_t items;  // rows times blocks per row, one for each thread
  Divisor blocks;  // per row, with room for rows that do not begin at a block
  int64_t length, in_stride, out_stride;
  bool one_decision;  // the row shares one keep decision (mask stride 0)
  OuterDims<Index> outer;
};

// A thread owns eight elements of a row: a block of the element index, or, where the row shares one
// decision, eight that begin at a chunk of the output's memory.
template <typename T, bool kVector, typename Index>
__global__ void __launch_bounds__(kMaxThreads, 2)
    rows_kernel(const __grid_constant__ RowsParams<T, Index> p) {
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
      Position at{slice * p.common.slice_in_stride, slice * p.common.slice_out_stride,
                  p.common.mask_offset + slice * p.common.slice_mask_stride};
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
        const uint64_t index = p.one_decision ? at.index : at.index + begin;
        const uint32_t keep = keep_bits(block_words(key, index / kBlock), p.common.threshold);
        if (!p.one_decision) {
          bits |= keep;
        } else if (keep >> (index % kBlock) & 1) {
          bits |= 0xff;
        }
      }
      Chunk<T, V, kVector> x[kChunks];
      int64_t out[kChunks];
      uint32_t keep[kChunks], exist[kChunks];
#pragma unroll
      for (int q = 0; q < kChunks; ++q) {
        int64_t in = at.in;
        out[q] = at.out;
        uint32_t mine = bits;
        if constexpr (kChunks > 1) {
          const int owner = q * (kWarp / kChunks) + lane / kChunks;
          const int part = lane % kChunks * V;
          mine = __shfl_sync(kAllLanes, bits, owner) >> part;
          in = __shfl_sync(kAllLanes, at.in, owner) + part * p.in_stride;
          out[q] = __shfl_sync(kAllLanes, at.out, owner) + part * p.out_stride;
        }
        constexpr uint32_t kWhole = (1u << V) - 1;
        keep[q] = mine & kWhole;
        exist[q] = mine >> kBlock & kWhole;
        // What is dropped is not read: half the traffic of a dropped row.
        const uint32_t wanted = keep[q] & exist[q];
        if constexpr (Traits<T>::kReadsInput) {
          if (wanted != 0) {
            if (kVector && exist[q] == kWhole && p.in_stride == 1) {
              x[q].load(p.common.in + in);
            } else {
#pragma unroll
              for (int j = 0; j < V; ++j) {
                if (wanted >> j & 1) x[q].element[j] = p.common.in[in + j * p.in_stride];
              }
            }
          }
        }
      }
#pragma unroll
      for (int q = 0; q < kChunks; ++q) {
        x[q].template apply<V>(p.common.affine, 0, [&](int j) { return keep[q] >> j & 1; });
        if (kVector && exist[q] == (1u << V) - 1) {
          x[q].store(p.common.out + out[q]);
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (exist[q] >> j & 1) p.common.out[out[q] + j * p.out_stride] = x[q].element[j];
          }
        }
      }
    }
  }
}

template <typename T, typename Index>
struct StridedParams {
  Common<T> common;
  uint64_t items;   // threads' worth of work
  OuterDim inner;   // across the lanes: the output's innermost dimension
  OuterDim walked;  // size: runs of `windows` windows; strides of one element. Mask stride 1
  int64_t length;   // of the walked dimension
  int windows;      // per run
  OuterDims<Index> outer;
};

template <typename T, typename Index>
__global__ void __launch_bounds__(kMaxThreads, 2)
    strided_kernel(const __grid_constant__ StridedParams<T, Index> p) {
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (int64_t slice = blockIdx.y; slice < p.common.slices; slice += gridDim.y) {
    const Key key = p.common.keys.of(slice);
    for (uint64_t item = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
         item < p.items; item += step) {
      Index n = static_cast<Index>(item);
      Position at{slice * p.common.slice_in_stride, slice * p.common.slice_out_stride,
                  p.common.mask_offset + slice * p.common.slice_mask_stride};
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
        T x[kBlock];
        if constexpr (Traits<T>::kReadsInput) {
#pragma unroll
          for (int j = 0; j < kBlock; ++j) {
            if (j < count && (bits >> j & 1)) x[j] = p.common.in[at.in + j * p.walked.in_stride];
          }
        }
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          if (j < count) {
            const bool keep = bits >> j & 1;
            T& y = p.common.out[at.out + j * p.walked.out_stride];
            if constexpr (Traits<T>::kReadsInput) {
              y = p.common.affine.apply(x[j], keep);
            } else {
              y = keep;
            }
          }
        }
        at.add(p.walked, static_cast<int64_t>(kBlock));
      }
    }
  }
}

constexpr int kKeysPerLaunch = 240;  // 3840 of the 4096 bytes of launch arguments

struct KeyWords {
  uint64_t words[2 * kKeysPerLaunch];
};

__global__ void store_keys_kernel(const __grid_constant__ KeyWords keys, int words, uint64_t* out) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = keys.words[i];
}

__global__ void unpack_key_kernel(const int64_t* seed, const int64_t* offset, uint64_t intragraph,
                                  uint64_t* key) {
  key[0] = static_cast<uint64_t>(*seed);
  key[1] = (static_cast<uint64_t>(*offset) + intragraph) / 4;
}

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

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

// Granlund, Montgomery, "Division by invariant integers using multiplication", 1994: the magic
// number is floor(2^w * (2^shift - size) / size) + 1, w the width of the dividend.
Divisor divisor(uint64_t size, bool wide) {
  uint32_t shift = 0;
  while (shift < 63 && uint64_t{1} << shift < size) ++shift;
  uint64_t remainder = (uint64_t{1} << shift) - size;
  uint64_t quotient = 0;
  for (int bit = wide ? 64 : 32; bit > 0; --bit) {  // size <= 2^63: no overflow
    remainder <<= 1;
    quotient = quotient << 1 | (remainder >= size);
    if (remainder >= size) remainder -= size;
  }
  return {size, quotient + 1, shift};
}

template <typename Index>
Divisor divisor_of(int64_t size) {
  return divisor(static_cast<uint64_t>(size), sizeof(Index) == 8);
}

template <typename Index>
OuterDim outer_dim(const Dim& dim) {
  return {divisor_of<Index>(dim.size), dim.in_stride, dim.out_stride, dim.mask_stride};
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
template <typename Function>
void with_positions(const Geometry& geometry, int64_t items, int dims, Function launch) {
  if (geometry.wide || items >> 31 != 0 || dims > kFewDims) {
    launch(uint64_t{});
  } else {
    launch(uint32_t{});
  }
}

template <typename T>
Common<T> common(const ApplyArgs& args, const KeySource& keys) {
  using Real = typename Traits<T>::Real;
  // A keep mask has no input; no address is formed from null all the same.
  return {static_cast<const T*>(Traits<T>::kReadsInput ? args.in : args.out),
          static_cast<T*>(args.out),
          {keys},
          args.map.mask_offset,
          args.slices,
          args.slice_in_stride,
          args.slice_out_stride,
          args.slice_mask_stride,
          args.threshold,
          {static_cast<Real>(args.params.scale), static_cast<Real>(args.params.bias),
           static_cast<Real>(args.params.dropped)}};
}

// Whether the elements at addresses (or indices) a and b lie equally within chunks of V, when both
// count elements of `bytes`. Addresses that are no multiple of `bytes` are never so.
bool same_phase(uint64_t a, uint64_t b, int v) { return (a - b) % static_cast<uint64_t>(v) == 0; }

uint64_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// In units of elements, for same_phase.
template <typename T>
bool on_element(const void* p) {
  return address(p) % sizeof(T) == 0;
}

template <typename T>
void launch_flat(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                 CUstream_st* stream) {
  constexpr int V = FlatTile<T, true>::V;
  auto aligned = [&](const void* p, int64_t slice_stride) {
    return on_element<T>(p) && same_phase(address(p) / sizeof(T), args.map.mask_offset, V) &&
           same_phase(static_cast<uint64_t>(slice_stride), args.slice_mask_stride, V);
  };
  const bool vector = aligned(args.out, args.slice_out_stride) &&
                      (!Traits<T>::kReadsInput || aligned(args.in, args.slice_in_stride));
  const FlatParams<T> params{common<T>(args, keys), args.map.dims[0].size};
  auto launch = [&](auto kernel, int64_t tile) {
    const int64_t before = args.slices == 1 ? args.map.mask_offset % tile : tile - 1;
    const Launch shape(geometry, params.size + before, tile / kWarp, args.slices);
    DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
  };
  if (vector) {
    launch(flat_kernel<T, true>, FlatTile<T, true>::kSize);
  } else {
    launch(flat_kernel<T, false>, FlatTile<T, false>::kSize);
  }
}

template <typename T>
void launch_rows(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                 CUstream_st* stream) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  constexpr int V = kFull < kBlock ? kFull : kBlock;
  const IndexMap& map = args.map;
  const Dim& inner = map.dims[map.ndim - 1];
  const bool one_decision = inner.mask_stride == 0;

  // Eights begin at blocks of the element index, or at chunks of the output's memory; chunks of
  // each tensor must begin there too, in every row.
  auto phase = [&](bool of_in, int d) {
    const Dim& dim = map.dims[d];
    return static_cast<uint64_t>(of_in ? dim.in_stride : dim.out_stride);
  };
  auto anchor = [&](int d) { return one_decision ? phase(false, d) : map.dims[d].mask_stride; };
  auto aligned = [&](bool of_in) {
    const void* p = of_in ? args.in : args.out;
    const uint64_t base = one_decision ? address(args.out) / sizeof(T) : map.mask_offset;
    const uint64_t slice =
        static_cast<uint64_t>(of_in ? args.slice_in_stride : args.slice_out_stride);
    const uint64_t slice_anchor =
        one_decision ? static_cast<uint64_t>(args.slice_out_stride) : args.slice_mask_stride;
    if (!on_element<T>(p) || !same_phase(address(p) / sizeof(T), base, V) ||
        !same_phase(slice, slice_anchor, V)) {
      return false;
    }
    for (int d = 0; d + 1 < map.ndim; ++d) {
      if (!same_phase(phase(of_in, d), anchor(d), V)) return false;
    }
    return true;
  };
  const bool vector =
      inner.out_stride == 1 && aligned(false) &&
      (!Traits<T>::kReadsInput || inner.in_stride == 0 || (inner.in_stride == 1 && aligned(true)));

  // The most elements that a row's first eight can begin before the row: exact where all rows are
  // alike, as in the common case of rows whose length is a multiple of eight.
  const int unit = one_decision ? V : kBlock;
  uint64_t before = one_decision ? address(args.out) / sizeof(T) : map.mask_offset;
  before %= unit;
  bool alike = same_phase(
      one_decision ? static_cast<uint64_t>(args.slice_out_stride) : args.slice_mask_stride, 0,
      unit);
  for (int d = 0; d + 1 < map.ndim; ++d) alike = alike && same_phase(anchor(d), 0, unit);
  if (!alike) before = unit - 1;
  const int64_t blocks = ceil_div(inner.size + static_cast<int64_t>(before), kBlock);

  const int64_t items = map.numel() / inner.size * blocks;
  with_positions(geometry, items, map.ndim - 1, [&](auto position) {
    using Index = decltype(position);
    const RowsParams<T, Index> params{common<T>(args, keys),
                                      static_cast<uint64_t>(items),
                                      divisor_of<Index>(blocks),
                                      inner.size,
                                      inner.in_stride,
                                      inner.out_stride,
                                      one_decision,
                                      outer_dims<Index>(map, map.ndim - 1, -1)};
    auto* kernel = vector ? rows_kernel<T, true, Index> : rows_kernel<T, false, Index>;
    const Launch shape(geometry, items, 1, args.slices);
    DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
  });
}

template <typename T>
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
  bool aligned = map.mask_offset % kBlock == 0 && args.slice_mask_stride % kBlock == 0;
  for (int d = 0; d < map.ndim; ++d) {
    if (d != walked) aligned = aligned && map.dims[d].mask_stride % kBlock == 0;
  }
  const int windows = aligned ? 1 : 4;
  const int64_t length = dim.size;
  dim.size = ceil_div(length, windows * kBlock);
  const int64_t items = map.numel() / length * dim.size;
  with_positions(geometry, items, walked < 0 ? inner : inner - 1, [&](auto position) {
    using Index = decltype(position);
    const StridedParams<T, Index> params{common<T>(args, keys),
                                         static_cast<uint64_t>(items),
                                         outer_dim<Index>(map.dims[inner]),
                                         outer_dim<Index>(dim),
                                         length,
                                         windows,
                                         outer_dims<Index>(map, inner, walked)};
    auto* kernel = strided_kernel<T, Index>;
    const Launch shape(geometry, items, 1, args.slices);
    DROPOUT_EXT_LAUNCH(kernel, shape.grid, shape.threads, stream, params);
  });
}

template <typename T>
void launch_dtype(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                  CUstream_st* stream) {
  const uint64_t inner_mask_stride = args.map.dims[args.map.ndim - 1].mask_stride;
  if (inner_mask_stride > 1) {
    launch_strided<T>(args, keys, geometry, stream);
  } else if (is_flat(args.map)) {
    launch_flat<T>(args, keys, geometry, stream);
  } else {
    launch_rows<T>(args, keys, geometry, stream);
  }
}

}  // namespace

void launch_apply(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                  CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::kFloat64: return launch_dtype<double>(args, keys, geometry, stream);
    case Dtype::kFloat32: return launch_dtype<float>(args, keys, geometry, stream);
    case Dtype::kFloat16: return launch_dtype<Float16>(args, keys, geometry, stream);
    case Dtype::kBFloat16: return launch_dtype<BFloat16>(args, keys, geometry, stream);
    case Dtype::kComplex128: return launch_dtype<Complex<double>>(args, keys, geometry, stream);
    case Dtype::kComplex64: return launch_dtype<Complex<float>>(args, keys, geometry, stream);
    case Dtype::kBool: return launch_dtype<bool>(args, keys, geometry, stream);
  }
}

void launch_store_keys(const uint64_t* host_words, int64_t keys, uint64_t* device_words,
                       CUstream_st* stream) {
  KeyWords chunk;
  for (int64_t begin = 0; begin < keys; begin += kKeysPerLaunch) {
    const int64_t left = keys - begin;
    const int words = 2 * static_cast<int>(left < kKeysPerLaunch ? left : kKeysPerLaunch);
    for (int i = 0; i < words; ++i) chunk.words[i] = host_words[2 * begin + i];
    DROPOUT_EXT_LAUNCH(store_keys_kernel, dim3(1), kThreads, stream, chunk, words,
                       device_words + 2 * begin);
  }
}

void launch_unpack_key(const int64_t* seed, const int64_t* offset, uint64_t intragraph,
                       uint64_t* key, CUstream_st* stream) {
  DROPOUT_EXT_LAUNCH(unpack_key_kernel, dim3(1), 1, stream, seed, offset, intragraph, key);
}

}  // namespace dropout_ext::cuda
