// Memory in vectors of 16 bytes.
#pragma once

#include "dtypes.cuh"

namespace dropout_ext::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// The warp's number in its thread block: a broadcast, so that the compiler knows what follows from
// it to be the same in every lane, keeps it in uniform registers, and sees that the lanes that meet
// in a shuffle have not diverged.
__device__ __forceinline__ uint32_t warp_of_block() {
  return __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
}

// Plain accesses of 16 bytes. In C++ the compiler splits some of them, and __ldca and __stwb, which
// it does not, are ordered ones. tests/native/cuda_shim.h has its own.
#if defined(__CUDACC__)
__device__ __forceinline__ uint4 load_vector(const uint4* at) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at));
  return x;
}
__device__ __forceinline__ float4 load_vector(const float4* at) {
  float4 x;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(at));
  return x;
}
__device__ __forceinline__ double2 load_vector(const double2* at) {
  double2 x;
  asm volatile("ld.global.v2.f64 {%0, %1}, [%2];" : "=d"(x.x), "=d"(x.y) : "l"(at));
  return x;
}
__device__ __forceinline__ void store_vector(uint2* at, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store_vector(uint4* at, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_vector(float4* at, float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_vector(double2* at, double2 x) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(at), "d"(x.x), "d"(x.y) : "memory");
}
// Keeps the compiler from taking an address apart, so that constants added to it become part of the
// instructions.
template <typename T>
__device__ __forceinline__ T* one_address(T* at) {
  asm("" : "+l"(at));
  return at;
}
#endif

// V elements: a vector access of 16 bytes (8 for eight bools), or one element at its own alignment.
template <typename T, int V, bool kVector>
struct Chunk {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  using Vector = typename Traits<T>::Vector;
  static_assert(kVector ? kBytes == 16 || kBytes == 8 : V == 1);

  union {
    Vector vector;
    T element[V];
    uint32_t word[4];
  };

  __device__ __forceinline__ Chunk() {}

  __device__ __forceinline__ void load(const T* at) {
    if constexpr (kVector) {
      vector = load_vector(reinterpret_cast<const Vector*>(at));
    } else {
      element[0] = *at;
    }
  }

  __device__ __forceinline__ void store(T* at) const {
    if constexpr (!kVector) {
      *at = element[0];
    } else if constexpr (kBytes == 16) {
      store_vector(reinterpret_cast<Vector*>(at), vector);
    } else {
      store_vector(reinterpret_cast<uint2*>(at), make_uint2(word[0], word[1]));
    }
  }

  // Those elements alone whose bit is set.
  __device__ __forceinline__ void load_some(const T* at, int64_t stride, uint32_t wanted) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (wanted >> j & 1) element[j] = at[j * stride];
    }
  }
  __device__ __forceinline__ void store_some(T* at, int64_t stride, uint32_t wanted) const {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (wanted >> j & 1) at[j * stride] = element[j];
    }
  }
};

}  // namespace dropout_ext::cuda
