// What the kernels of apply.cu, add.cu and activation.cu have in common: every warp owns blocks of
// eight consecutive element indices, one per lane, so that one Philox call serves eight elements;
// which warp owns which block changes nothing. Memory is then accessed in chunks of 16 bytes that
// lie side by side across the lanes. A chunk of a 16-bit type is a whole block; of wider types it
// is a part of one, and the lane that needs the keep bits gets them from the block's owner by a
// shuffle.
//
//   flat.cuh     inputs, output and element index are one dense run
//   rows.cuh     an inner run with mask stride 1 or 0, any strides around it
//   strided.cuh  anything else: lanes along the output's innermost dimension, eight-element windows
//                along the dimension where the element index is contiguous
#pragma once

#include <algorithm>

#include "../epilogue/activation.h"
#include "../epilogue/add.h"
#include "../epilogue/affine.h"
#include "../epilogue/apply_args.h"
#include "access.cuh"
#include "decisions.cuh"
#include "grid.cuh"

namespace dropout_ext::cuda {

// Ops: the functor of csrc/epilogue for a call, which `visit` hands to its argument. kMinBlocks:
// thread blocks of kMaxThreads on a multiprocessor, in the flat kernel. The fewer registers that
// this leaves have the compiler keep less across a tile, which also saves ALU instructions; more
// would spill.
template <template <class> class Functor, int inputs>
struct One {
  static constexpr int kInputs = inputs;
  static constexpr int kMinBlocks = inputs == 1 ? std::min(5, kMaxBlocks) : 3;

  template <class V>
  struct Of {
    Functor<V> functor;
    explicit Of(const EpilogueParams& params) : functor(params) {}
    template <class Use>
    __device__ __forceinline__ void visit(Use use) const {
      use(functor);
    }
  };
};

// One of the activations, the same for all lanes.
template <template <class, class> class Functor, int inputs>
struct Activations {
  static constexpr int kInputs = inputs;
  static constexpr int kMinBlocks = 2;

  template <class V>
  struct Of {
    V scale;
    Activation function;
    explicit Of(const EpilogueParams& params)
        : scale(splat(params.scale, V{})), function(params.activation) {}
    template <class Use>
    __device__ __forceinline__ void visit(Use use) const {
      if (function == Activation::kGelu) {
        use(Functor<Gelu, V>(scale));
      } else if (function == Activation::kGeluTanh) {
        use(Functor<GeluTanh, V>(scale));
      } else if (function == Activation::kSilu) {
        use(Functor<Silu, V>(scale));
      } else {
        use(Functor<Relu, V>(scale));
      }
    }
  };
};

template <typename T>
using LaneOf = Lane<typename Traits<T>::Real>;

template <class Functor, typename T>
__device__ __forceinline__ void apply_to(const Functor& f, bool keep, T& x, const T& x2) {
  if constexpr (std::is_invocable_v<Functor, bool, LaneOf<T>>) {
    from_lane(x, f(keep, to_lane(x)));
  } else {
    from_lane(x, f(keep, to_lane(x), to_lane(x2)));
  }
}
template <class Functor, typename Real>
__device__ __forceinline__ void apply_to(const Functor& f, bool keep, Complex<Real>& x,
                                         const Complex<Real>& x2) {
  apply_to(f, keep, x.real, x2.real);
  apply_to(f, keep, x.imag, x2.imag);
}

// Elements `begin` to `begin + N` of x become those of the op; keep(j) decides about the j-th of
// them.
template <int N, typename T, int V, bool kVector, class Op, typename Keep>
__device__ __forceinline__ void apply_op(const Op& op, Chunk<T, V, kVector>& x,
                                         const Chunk<T, V, kVector>& x2, int begin, Keep keep) {
  if constexpr (!Traits<T>::kReadsInput && N > 1) {
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      x.word[(begin + j) / 4] = (keep(j) ? 1u : 0u) | (keep(j + 1) ? 1u << 8 : 0u) |
                                (keep(j + 2) ? 1u << 16 : 0u) | (keep(j + 3) ? 1u << 24 : 0u);
    }
  } else if constexpr (!Traits<T>::kReadsInput) {
    x.element[begin] = keep(0);
  } else {
    op.visit([&](const auto& f) {
      if constexpr (Traits<T>::kIs16Bit && N > 1) {
        const auto low = [](uint32_t pair) { return to_lane(T{static_cast<uint16_t>(pair)}); };
        const auto high = [](uint32_t pair) {
          return to_lane(T{static_cast<uint16_t>(pair >> 16)});
        };
#pragma unroll
        for (int j = 0; j < N; j += 2) {
          uint32_t& pair = x.word[(begin + j) / 2];
          if constexpr (std::is_invocable_v<decltype(f), bool, LaneOf<T>>) {
            pair = pack(T{}, f(keep(j), low(pair)), f(keep(j + 1), high(pair)));
          } else {
            const uint32_t pair2 = x2.word[(begin + j) / 2];
            pair = pack(T{}, f(keep(j), low(pair), low(pair2)),
                        f(keep(j + 1), high(pair), high(pair2)));
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          apply_to(f, keep(j), x.element[begin + j], x2.element[begin + j]);
        }
      }
    });
  }
}

template <typename T, class Op>
struct Common {
  static constexpr bool kReads = Traits<T>::kReadsInput;
  static constexpr bool kReadsSecond = kReads && Op::kInputs == 2;

  const T* in;
  const T* in2;
  T* out;
  Keys keys;
  uint64_t mask_offset;
  int64_t slices, slice_in_stride, slice_out_stride;
  uint64_t slice_mask_stride;
  int64_t slice_in2_stride;
  uint32_t threshold;
  typename Op::template Of<LaneOf<T>> op;

  // Where there is no input no address is formed from null all the same.
  Common(const ApplyArgs& args, const KeySource& keys)
      : in(static_cast<const T*>(kReads ? args.in : args.out)),
        in2(static_cast<const T*>(kReadsSecond ? args.in2 : args.out)),
        out(static_cast<T*>(args.out)),
        keys{keys},
        mask_offset(args.map.mask_offset),
        slices(args.slices),
        slice_in_stride(args.slice_in_stride),
        slice_out_stride(args.slice_out_stride),
        slice_mask_stride(args.slice_mask_stride),
        slice_in2_stride(args.slice_in2_stride),
        threshold(args.threshold),
        op(args.params) {}
};

}  // namespace dropout_ext::cuda
