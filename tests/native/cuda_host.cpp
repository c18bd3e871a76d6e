// The CUDA kernels on the CPU as a shared library, for tests/test_cuda_host.py.

#include "cuda_shim.h"
//
#include "../../csrc/cuda/dropout_kernel.cu"

namespace cuda = dropout_ext::cuda;

// `dims`: size and strides of input, output and mask for each dimension. `slice`: the same for the
// dimension that chooses the key, for keys of shape (n, 2); null for a single key.
extern "C" __attribute__((visibility("default"))) void cuda_host_apply(
    const void* in, void* out, int dtype, int epilogue, const double* params, uint32_t threshold,
    int ndim, const int64_t* dims, const int64_t* slice, uint64_t mask_offset,
    const uint64_t* key) {
  dropout_ext::ApplyArgs args;
  args.in = in;
  args.out = out;
  args.dtype = static_cast<dropout_ext::Dtype>(dtype);
  args.epilogue = static_cast<dropout_ext::Epilogue>(epilogue);
  args.params = {params[0], params[1], params[2]};
  args.threshold = threshold;
  args.map.mask_offset = mask_offset;
  args.map.ndim = ndim;
  for (int d = 0; d < ndim; ++d) {
    const int64_t* dim = dims + 4 * d;
    args.map.dims[d] = {dim[0], dim[1], dim[2], static_cast<uint64_t>(dim[3])};
  }
  normalize(args.map);
  cuda::KeySource keys{{key[0], key[1]}, nullptr};
  if (slice != nullptr) {
    args.slices = slice[0];
    args.slice_in_stride = slice[1];
    args.slice_out_stride = slice[2];
    args.slice_mask_stride = static_cast<uint64_t>(slice[3]);
    keys.device = key;
  }
  cuda::launch_apply(args, keys, {}, nullptr);
}
