// The CUDA kernels: raw pointers and a stream, no torch.
#pragma once

#include "../epilogue/apply_args.h"

struct CUstream_st;

namespace dropout_ext::cuda {

// One key from the host, for a single slice, or words 2j and 2j + 1 of device memory for slice j.
struct KeySource {
  Key host;
  const uint64_t* device;  // null: `host`
};

// 0 and false leave the choice to the launch. No choice changes bits.
struct Geometry {
  int64_t blocks = 0;
  int64_t threads = 0;  // a multiple of 32, at most 256
  bool wide = false;    // 64-bit arithmetic on positions
};

void launch_apply(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                  CUstream_st* stream);

// Copies keys to the device as launch arguments: no staging memory that must outlive the call, and
// under graph capture constants of the graph.
void launch_store_keys(const uint64_t* host_words, int64_t keys, uint64_t* device_words,
                       CUstream_st* stream);

// Under graph capture a generator's state is on the device: the key becomes (seed, offset / 4),
// with offset = *offset + intragraph.
void launch_unpack_key(const int64_t* seed, const int64_t* offset, uint64_t intragraph,
                       uint64_t* key, CUstream_st* stream);

}  // namespace dropout_ext::cuda
