// Enough of CUDA to run csrc/cuda/*.cu as plain C++, one lane after the other. Each
// lane is a coroutine on a stack of its own, so that a shuffle really exchanges values among the
// lanes of a warp, and aborts where they have diverged. Vector accesses abort on misalignment.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>

#include "half.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)  // what clang says in place of GCC's macro
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

#if defined(__x86_64__)
// swapcontext changes the signal mask, two system calls for every switch. This keeps what a call
// must keep.
extern "C" void cuda_shim_switch(void** save, void* load);
asm(R"(
.text
.weak cuda_shim_switch
.type cuda_shim_switch, @function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
using Context = void*;
inline void switch_context(Context& save, Context& load) { cuda_shim_switch(&save, load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // the entry sees a stack that is 8 off a multiple of 16, as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = kStack};
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { kReady, kShuffle, kBarrier, kDone };

struct Warp {
  Context scheduler;
  Context lanes[kWarp];
  State state[kWarp];
  uint64_t posted[kWarp], published[kWarp];
  std::unique_ptr<char[]> stacks{new char[kWarp * kStack]};
  int current = 0;
  unsigned first_thread = 0;
  std::function<void()> body;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;

  Warp();

  void resume(int lane) {
    current = lane;
    threadIdx.x = first_thread + static_cast<unsigned>(lane);
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stacks.get() + lane * kStack, kStack);
#endif
    switch_context(scheduler, lanes[lane]);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void suspend(State why) {
    state[current] = why;
    const int lane = current;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
#endif
    switch_context(lanes[lane], scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
  }

  // Runs to the next barrier or to the end, and says which.
  State run() {
    for (;;) {
      for (int lane = 0; lane < kWarp; ++lane) resume(lane);
      for (int lane = 1; lane < kWarp; ++lane) {
        if (state[lane] != state[0]) fail("lanes of a warp that have diverged");
      }
      if (state[0] != State::kShuffle) return state[0];
      std::memcpy(published, posted, sizeof(posted));
    }
  }
};

constexpr unsigned kMaxWarps = 16;
inline unsigned current_warp = 0;

inline Warp& warp() {
  static std::unique_ptr<Warp> warps[kMaxWarps];
  auto& instance = warps[current_warp];
  if (instance == nullptr) instance = std::make_unique<Warp>();
  return *instance;
}

// The warps of a thread block, one after the other from barrier to barrier.
inline void run_block(unsigned threads, const std::function<void()>& body) {
  const unsigned warps = threads / kWarp;
  for (current_warp = 0; current_warp < warps; ++current_warp) {
    warp().first_thread = current_warp * kWarp;
    warp().body = body;
  }
  for (unsigned done = 0; done == 0;) {
    for (current_warp = 0; current_warp < warps; ++current_warp) {
      done += warp().run() == State::kDone;
    }
    if (done != 0 && done != warps) fail("a barrier that some warps of the block never reach");
  }
  current_warp = 0;
}

inline void lane_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &warp().scheduler_stack, &warp().scheduler_size);
#endif
  for (;;) {
    warp().body();
    warp().suspend(State::kDone);
  }
}

inline Warp::Warp() {
  for (int lane = 0; lane < kWarp; ++lane) {
    make_context(lanes[lane], stacks.get() + lane * kStack, lane_entry);
  }
}

inline int64_t launches = 0;

template <typename Kernel, typename... Args>
void launch(Kernel* kernel, dim3 grid, unsigned threads, const Args&... args) {
  // The limits of every GPU since sm_30, and of the kernels' launch bounds.
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535) fail("grid");
  if (threads == 0 || threads > kMaxWarps * kWarp) fail("threads");
  if ((sizeof(args) + ... + 0) > 4096) fail("more than 4 KiB of arguments");
  ++launches;
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      if (threads < kWarp) {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(args...);
        continue;
      }
      run_block(threads, [&] { kernel(args...); });
    }
  }
}

}  // namespace shim

#define DROPOUT_EXT_LAUNCH(kernel, grid, threads, stream, ...) \
  (static_cast<void>(stream), shim::launch(kernel, grid, threads, __VA_ARGS__))

inline void __syncthreads() { shim::warp().suspend(shim::State::kBarrier); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  shim::Warp& warp = shim::warp();
  if (mask != 0xffffffff || source < 0 || source >= shim::kWarp) shim::fail("shuffle arguments");
  std::memcpy(&warp.posted[warp.current], &value, sizeof(T));
  warp.suspend(shim::State::kShuffle);
  std::memcpy(&value, &warp.published[source], sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, shim::warp().current ^ lanes);
}

template <typename V>
V load_vector(const V* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(V) != 0) shim::fail("misaligned vector load");
  return *at;
}
template <typename V>
void store_vector(V* at, V value) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(V) != 0) shim::fail("misaligned vector store");
  *at = value;
}

template <typename T>
T* one_address(T* at) {
  return at;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
}
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// 16-bit types: conversions round to nearest even.
struct __half {
  uint16_t bits;
};
struct __half2 {
  uint16_t x, y;
};
using __nv_bfloat16 = __half;
using __nv_bfloat162 = __half2;

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __half2float(__half x) { return half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {float_to_half(x)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x).bits, __float2half_rn(y).bits};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x).bits, __float2bfloat16_rn(y).bits};
}
