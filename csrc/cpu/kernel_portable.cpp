#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../epilogue/activation.h"
#include "../epilogue/add.h"
#include "../epilogue/affine.h"
#include "half.h"
#include "kernel.h"
#include "philox_schedule.h"
#include "row_kernel.h"

namespace dropout_ext::cpu {
namespace {
namespace portable {
#include "simd_portable.h"
//
#include "keep_source.h"
//
#include "row_kernel_body.h"
//
#include "kernel_body.h"
}  // namespace portable
}  // namespace

const Kernels kernels_portable = portable::make_kernels("portable");

void keep_bits_one_by_one(uint64_t* bits, int64_t n, Key key, uint64_t index, uint64_t stride,
                          uint32_t threshold) {
  for (int64_t j = 0; j < n; ++j) {
    if (j % 64 == 0) bits[j / 64] = 0;
    bits[j / 64] |= static_cast<uint64_t>(keep(key, index, threshold)) << j % 64;
    index += stride;
  }
}

}  // namespace dropout_ext::cpu
