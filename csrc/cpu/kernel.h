// The CPU kernel: primitives over contiguous runs, compiled once per instruction set from
// kernel_body.h. All variants give the same bits.
#pragma once

#include <string>
#include <vector>

#include "../contract/mask.h"
#include "../epilogue/epilogue.h"

namespace dropout_ext::cpu {

// The mask of a run: element j of the run has index `index + j`.
struct MaskRun {
  Key key;
  uint64_t index;
  uint32_t threshold;
};

// Keep bits of n elements, computed one by one: bit j is that of element index + j * stride.
void keep_bits_one_by_one(uint64_t* bits, int64_t n, Key key, uint64_t index, uint64_t stride,
                          uint32_t threshold);

inline constexpr uintptr_t kStreamAlignment = 64;
// An output of this size has left the caches, with its input, before anybody reads it: stores past
// them save the read of every line that is written, a third of the traffic. 32 MiB for both is the
// last-level cache that a core of today's servers shares; what the system reports may be a
// machine's.
inline constexpr int64_t kStreamBytes = int64_t{16} << 20;

struct RowKernels;

struct Kernels {
  const char* name;

  // out[j] = epilogue(in[j], in2[j]) under the computed mask. `in` may be `out`; `in2` is null
  // where the epilogue has no second input.
  using Run = void (*)(const void* in, const void* in2, void* out, int64_t n, const MaskRun& mask,
                       const EpilogueParams& params);
  // The same under stored keep bits: element j is bit j & 63 of bits[j >> 6].
  using ApplyBits = void (*)(const void* in, const void* in2, void* out, int64_t n,
                             const uint64_t* bits, const EpilogueParams& params);
  struct Of {
    Run run;
    ApplyBits apply_bits;
    // The same with stores past the caches, or null. `out` is aligned to kStreamAlignment and is
    // no input, mask.index is a multiple of 8; `fence` comes after the last of them.
    Run run_streaming;
    ApplyBits apply_bits_streaming;
  };

  Of scale[4];   // by Dtype: float64, float32, float16, bfloat16
  Of affine[4];  // likewise
  Of add[4];
  Of activation[kActivations][4];  // none for float64
  Of activation_backward[kActivations][4];
  Of keep_mask;  // of bool; reads no input, and takes the output in its place

  // Keep bits of `rows` runs of n elements, row r from index mask.index + r * row_stride into
  // (n + 63) / 64 words at bits + r * row_words; bits from n on are unspecified.
  void (*keep_bits)(uint64_t* bits, int64_t n, const MaskRun& mask, int64_t rows,
                    uint64_t row_stride, int64_t row_words);
  void (*fence)();
  const RowKernels* rows;  // row_kernel.h

  const Of& of(Dtype dtype, Epilogue epilogue, const EpilogueParams& params) const {
    const int type = static_cast<int>(dtype), activated = static_cast<int>(params.activation);
    switch (epilogue) {
      case Epilogue::kAffine: return (params.is_scale() ? scale : affine)[type];
      case Epilogue::kKeepMask: return keep_mask;
      case Epilogue::kAdd: return add[type];
      case Epilogue::kActivation: return activation[activated][type];
      case Epilogue::kActivationBackward: break;
    }
    return activation_backward[activated][type];
  }
};

// The best variant this CPU has, or the one that the environment variable
// DROPOUT_EXT_CPU_VARIANT names; chosen once. Throws std::runtime_error if that one is unknown or
// not available here.
const Kernels& kernels();

// What this CPU and this build can run, best first.
std::vector<const Kernels*> available_kernels();

extern const Kernels kernels_portable;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DROPOUT_EXT_CPU_X86 1
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace dropout_ext::cpu
