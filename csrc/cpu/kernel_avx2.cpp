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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../epilogue/activation.h"
#include "../epilogue/add.h"
#include "../epilogue/affine.h"

namespace dropout_ext::cpu {
namespace {
namespace avx2 {
#include "simd_avx2.h"
//
#include "keep_source.h"
//
#include "row_kernel_body.h"
//
#include "kernel_body.h"
}  // namespace avx2
}  // namespace

const Kernels kernels_avx2 = avx2::make_kernels("avx2");

}  // namespace dropout_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
