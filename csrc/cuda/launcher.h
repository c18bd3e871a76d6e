// Where CUDA tensors enter the kernels: device guard, current stream and generator. Only a build
// with CUDA has it (DROPOUT_EXT_WITH_CUDA).
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <optional>

#include "../epilogue/apply_args.h"
#include "../epilogue/row_args.h"

namespace dropout_ext::cuda {

// Runs one call on `device`'s current stream; one launch, no synchronisation. `key` is contiguous,
// int64 or uint64, on the CPU or on `device`: shape (2,), or (args.slices, 2). A CPU key travels as
// launch arguments, so under graph capture it is a constant of the graph.
void apply(const ApplyArgs& args, const at::Tensor& key, c10::Device device);

// The same for the keep mask of a dense row-major tensor, into the bits of args.out. One launch, or
// two where the eight positions of a byte are not consecutive in the mask.
void keep_bits(const ApplyArgs& args, const at::Tensor& key, c10::Device device);

// As apply(), for whole rows, whose masks lack the keys; an undefined key keeps everything. One
// launch, or two where the dtypes of input and output differ.
void add_norm(RowArgs args, const at::Tensor& key, c10::Device device);
// Two launches where there are gradients of weight or bias, else one.
void add_norm_backward(RowBackwardArgs args, const at::Tensor& key, c10::Device device);

// Draws a key, uint64 of shape (2,), from `generator` (of `device`; its default one if none) and
// advances its Philox offset by 4. The key is `host`, on the CPU; under graph capture it is another
// one on the device, and every replay writes a fresh one.
at::Tensor draw_key(const std::optional<at::Generator>& generator, c10::Device device,
                    at::Tensor host);

// For tests, which bind it as _C._force_cuda_geometry: launch geometry changes no bits. 0 and false
// leave the choice to the launcher; `threads` is a multiple of 32; `wide` forces 64-bit arithmetic
// on positions. Not to be called while another thread launches.
void force_geometry(int64_t blocks, int64_t threads, bool wide);

}  // namespace dropout_ext::cuda
