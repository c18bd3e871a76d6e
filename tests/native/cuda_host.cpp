// The CUDA kernels on the CPU as a shared library, for tests/test_cuda_host.py.

#include "cuda_kernels.h"
//
#include <vector>

namespace cuda = dropout_ext::cuda;

// `dims`: size and strides of input, output, mask and second input for each dimension. `slice`: the
// same for the dimension that chooses the key, for keys of shape (n, 2); null for a single key.
extern "C" __attribute__((visibility("default"))) void cuda_host_apply(
    const void* in, const void* in2, void* out, int dtype, int epilogue, const double* params,
    int activation, uint32_t threshold, int ndim, const int64_t* dims, const int64_t* slice,
    uint64_t mask_offset, const uint64_t* key) {
  dropout_ext::ApplyArgs args;
  args.in = in;
  args.in2 = in2;
  args.out = out;
  args.dtype = static_cast<dropout_ext::Dtype>(dtype);
  args.epilogue = static_cast<dropout_ext::Epilogue>(epilogue);
  args.params = {params[0], params[1], params[2], static_cast<dropout_ext::Activation>(activation)};
  args.threshold = threshold;
  args.map.mask_offset = mask_offset;
  args.map.ndim = ndim;
  for (int d = 0; d < ndim; ++d) {
    const int64_t* dim = dims + 5 * d;
    args.map.dims[d] = {dim[0], dim[1], dim[2], static_cast<uint64_t>(dim[3]), dim[4]};
  }
  normalize(args.map);
  cuda::KeySource keys{{key[0], key[1]}, nullptr};
  if (slice != nullptr) {
    args.slices = slice[0];
    args.slice_in_stride = slice[1];
    args.slice_out_stride = slice[2];
    args.slice_mask_stride = static_cast<uint64_t>(slice[3]);
    args.slice_in2_stride = slice[4];
    keys.device = key;
  }
  cuda::launch_apply(args, keys, {}, nullptr);
}

namespace {

using dropout_ext::Dtype;

dropout_ext::RowMask mask_of(const uint64_t* key, const bool* stored, uint32_t threshold,
                             uint64_t mask_offset, int dims, const int64_t* extents) {
  dropout_ext::RowMask mask;
  mask.key = {key[0], key[1]};
  mask.keys = nullptr;
  mask.rows_per_slice = 1;
  mask.stored = stored;
  mask.threshold = threshold;
  mask.mask_offset = mask_offset;
  mask.row_dims = dims - 1;
  mask.column_dims = 1;
  for (int d = 0; d < dims; ++d) {
    mask.dims[d] = {extents[2 * d], static_cast<uint64_t>(extents[2 * d + 1])};
  }
  return mask;
}

}  // namespace

// `pointers`: input, residual, input_bias, colscale, rowscale, sum, weight, bias, out, mean, rstd.
// `extents`: size and mask stride of each dimension around a row, and of the row.
extern "C" __attribute__((visibility("default"))) void cuda_host_add_norm(
    void* const* pointers, int input_dtype, int sum_dtype, int out_dtype, int norm, double eps,
    double scale, const uint64_t* key, const bool* stored, uint32_t threshold, uint64_t mask_offset,
    int dims, const int64_t* extents) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < dims; ++d) rows *= extents[2 * d];
  const int64_t columns = extents[2 * (dims - 1)];
  const dropout_ext::RowArgs args{rows,
                                  columns,
                                  mask_of(key, stored, threshold, mask_offset, dims, extents),
                                  scale,
                                  pointers[0],
                                  static_cast<Dtype>(input_dtype),
                                  columns,
                                  pointers[1],
                                  columns,
                                  pointers[2],
                                  pointers[3],
                                  pointers[4],
                                  pointers[5],
                                  static_cast<Dtype>(sum_dtype),
                                  static_cast<dropout_ext::Norm>(norm),
                                  eps,
                                  pointers[6],
                                  pointers[7],
                                  pointers[8],
                                  static_cast<Dtype>(out_dtype),
                                  pointers[9],
                                  pointers[10]};
  cuda::launch_add_norm(args, {}, nullptr);
}

// `pointers`: grad_out, grad_sum_in, sum, mean, rstd, weight, grad_sum, grad_input, grad_weight,
// grad_bias.
extern "C" __attribute__((visibility("default"))) void cuda_host_add_norm_backward(
    void* const* pointers, int dtype, int sum_dtype, int norm, double scale, const uint64_t* key,
    const bool* stored, uint32_t threshold, uint64_t mask_offset, int dims,
    const int64_t* extents) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < dims; ++d) rows *= extents[2 * d];
  const int64_t columns = extents[2 * (dims - 1)];
  const dropout_ext::RowBackwardArgs args{
      rows,
      columns,
      mask_of(key, stored, threshold, mask_offset, dims, extents),
      scale,
      static_cast<dropout_ext::Norm>(norm),
      static_cast<Dtype>(dtype),
      pointers[0],
      pointers[1],
      pointers[2],
      static_cast<Dtype>(sum_dtype),
      pointers[3],
      pointers[4],
      pointers[5],
      pointers[6],
      pointers[7],
      pointers[8],
      pointers[9]};
  const auto room = static_cast<size_t>(cuda::row_chunks(rows) * columns);
  std::vector<double> weight_sums(room, NAN), bias_sums(room, NAN);
  cuda::launch_add_norm_backward(args, pointers[8] == nullptr ? nullptr : weight_sums.data(),
                                 pointers[9] == nullptr ? nullptr : bias_sums.data(), {}, nullptr);
}
