// The CUDA kernels: raw pointers and a stream, no torch.
#pragma once

#include "../epilogue/apply_args.h"
#include "../epilogue/row_args.h"

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

// kAffine and kKeepMask.
void launch_affine(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                   CUstream_st* stream);
// kAdd.
void launch_add(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                CUstream_st* stream);
// kActivation and kActivationBackward.
void launch_activation(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                       CUstream_st* stream);

inline void launch_apply(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                         CUstream_st* stream) {
  switch (args.epilogue) {
    case Epilogue::kAffine:
    case Epilogue::kKeepMask: return launch_affine(args, keys, geometry, stream);
    case Epilogue::kAdd: return launch_add(args, keys, geometry, stream);
    case Epilogue::kActivation:
    case Epilogue::kActivationBackward: return launch_activation(args, keys, geometry, stream);
  }
}

// The keep mask of a dense row-major tensor as bits: position i in bit i & 7 of byte i >> 3, zeros
// after the last; args.out is aligned to 16 bytes. Where needs_bytes(args), `bytes` has room for a
// byte for each position, aligned likewise, else it is null.
void launch_keep_bits(const ApplyArgs& args, void* bytes, const KeySource& keys,
                      const Geometry& geometry, CUstream_st* stream);

constexpr int64_t kBitsVector = 128;  // in 16 bytes

// Whether the 128 positions of 16 bytes, or the 8 of a byte, are in one run of consecutive element
// indices, but for the last of a single run.
inline bool in_vectors_of_bits(const ApplyArgs& args, int64_t positions = kBitsVector) {
  const Dim& inner = args.map.dims[args.map.ndim - 1];
  const bool one_run = args.map.ndim == 1 && args.slices == 1;
  return inner.mask_stride == 1 && (one_run || inner.size % positions == 0);
}
inline bool needs_bytes(const ApplyArgs& args) { return !in_vectors_of_bits(args, kBlock); }

// Keys and decisions of the mask are on the device, but for the single key of a mask without
// `keys`.
void launch_add_norm(const RowArgs& args, const Geometry& geometry, CUstream_st* stream);

// Sums over columns belong to chunks of rows, whose number depends on that of the rows alone.
// `weight_sums` and `bias_sums` have room for a row of the compute type for each of them; null
// where args.grad_weight or args.grad_bias is.
inline int64_t rows_of_chunk(int64_t rows) {
  constexpr int64_t kLeast = 4, kMostChunks = 1024;
  const int64_t evenly = (rows + kMostChunks - 1) / kMostChunks;
  return evenly > kLeast ? evenly : kLeast;
}
inline int64_t row_chunks(int64_t rows) {
  return (rows + rows_of_chunk(rows) - 1) / rows_of_chunk(rows);
}
void launch_add_norm_backward(const RowBackwardArgs& args, void* weight_sums, void* bias_sums,
                              const Geometry& geometry, CUstream_st* stream);

// Copies keys to the device as launch arguments: no staging memory that must outlive the call, and
// under graph capture constants of the graph.
void launch_store_keys(const uint64_t* host_words, int64_t keys, uint64_t* device_words,
                       CUstream_st* stream);

// Under graph capture a generator's state is on the device: the key becomes (seed, offset / 4),
// with offset = *offset + intragraph.
void launch_unpack_key(const int64_t* seed, const int64_t* offset, uint64_t intragraph,
                       uint64_t* key, CUstream_st* stream);

}  // namespace dropout_ext::cuda
