#include "kernel.h"

#ifdef DROPOUT_EXT_CPU_X86

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "philox_schedule.h"
#include "row_kernel.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC 12 takes the deliberately undefined vectors of its own AVX-512 header for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "../epilogue/activation.h"
#include "../epilogue/add.h"
#include "../epilogue/affine.h"

namespace dropout_ext::cpu {
namespace {
namespace avx512 {
#include "simd_avx512.h"
//
#include "keep_source.h"
//
#include "row_kernel_body.h"
//
#include "kernel_body.h"
}  // namespace avx512
}  // namespace

const Kernels kernels_avx512 = avx512::make_kernels("avx512");

}  // namespace dropout_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
