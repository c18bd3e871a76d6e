#include "kernel.h"

#include <cstdlib>
#include <stdexcept>

#ifdef DROPOUT_EXT_CPU_X86
#include <cpuid.h>
#endif

namespace dropout_ext::cpu {

#ifdef DROPOUT_EXT_CPU_X86
namespace {

// By hand: the builtin of older clang does not know this name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> all;
#ifdef DROPOUT_EXT_CPU_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    all.push_back(&kernels_avx512);
  }
  if (avx2) all.push_back(&kernels_avx2);
#endif
  all.push_back(&kernels_portable);
  return all;
}

namespace {

const Kernels& choose() {
  const std::vector<const Kernels*> all = available_kernels();
  const char* wanted = std::getenv("DROPOUT_EXT_CPU_VARIANT");
  if (wanted == nullptr || *wanted == '\0') return *all.front();
  std::string names;
  for (const Kernels* k : all) {
    if (std::string(wanted) == k->name) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("DROPOUT_EXT_CPU_VARIANT is '" + std::string(wanted) +
                           "', but this CPU and this build have: " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dropout_ext::cpu
