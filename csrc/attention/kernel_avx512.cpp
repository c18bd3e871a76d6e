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

namespace dropout_ext::cpu::attention {
namespace {
namespace avx512 {
#include "../cpu/simd_avx512.h"
//
#include "vector_avx512.h"
//
#include "transpose_avx2.h"
//
#include "kernel_body.h"
}  // namespace avx512
}  // namespace

const Kernels kernels_avx512 = avx512::make_kernels();

}  // namespace dropout_ext::cpu::attention

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
