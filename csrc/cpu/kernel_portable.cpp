#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "kernel.h"
#include "philox_schedule.h"

namespace dropout_ext::cpu {
namespace {
namespace portable {
#include "simd_portable.h"
//
#include "kernel_body.h"
}  // namespace portable
}  // namespace

const Kernels kernels_portable = portable::make_kernels("portable");

}  // namespace dropout_ext::cpu
