#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#include "../cpu/half.h"
#include "../cpu/philox_schedule.h"
#include "blocks.h"

namespace dropout_ext::cpu::attention {
namespace {
namespace portable {
#include "../cpu/simd_portable.h"
//
#include "vector_portable.h"
//
#include "kernel_body.h"
}  // namespace portable
}  // namespace

const Kernels kernels_portable = portable::make_kernels();

}  // namespace dropout_ext::cpu::attention
