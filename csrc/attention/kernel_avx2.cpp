#include "kernel.h"

#ifdef DROPOUT_EXT_CPU_X86

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#include "../cpu/half.h"
#include "../cpu/philox_schedule.h"
#include "blocks.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dropout_ext::cpu::attention {
namespace {
namespace avx2 {
#include "../cpu/simd_avx2.h"
//
#include "vector_avx2.h"
//
#include "transpose_avx2.h"
//
#include "kernel_body.h"
}  // namespace avx2
}  // namespace

const Kernels kernels_avx2 = avx2::make_kernels();

}  // namespace dropout_ext::cpu::attention

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
