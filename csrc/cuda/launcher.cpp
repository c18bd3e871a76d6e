#include "launcher.h"

#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>

#include "kernels.h"

namespace dropout_ext::cuda {

namespace {

Geometry forced_geometry;

c10::Device with_index(c10::Device device) {
  return device.has_index() ? device : c10::Device(c10::kCUDA, c10::cuda::current_device());
}

at::Tensor empty_keys(at::IntArrayRef sizes, c10::Device device) {
  return at::empty(sizes, at::TensorOptions().dtype(at::kUInt64).device(device));
}

// The keys of a tensor: one, or a tensor of several that `on_device` holds until after the launch,
// for memory is reused in the order of the stream.
KeySource key_source(const at::Tensor& key, c10::Device device, at::Tensor& on_device,
                     CUstream_st* stream) {
  const auto* words = static_cast<const uint64_t*>(key.const_data_ptr());
  if (!key.is_cpu()) return {{0, 0}, words};
  const int64_t keys = key.numel() / 2;
  if (keys == 1) return {{words[0], words[1]}, nullptr};
  on_device = empty_keys(key.sizes(), device);
  auto* copy = static_cast<uint64_t*>(on_device.mutable_data_ptr());
  launch_store_keys(words, keys, copy, stream);
  return {{0, 0}, copy};
}

void set_keys(RowMask& mask, int64_t rows, const at::Tensor& key, c10::Device device,
              at::Tensor& on_device, CUstream_st* stream) {
  static_assert(sizeof(Key) == 2 * sizeof(uint64_t));
  if (!key.defined()) return;
  const KeySource source = key_source(key, device, on_device, stream);
  mask.key = source.host;
  mask.keys = reinterpret_cast<const Key*>(source.device);
  if (key.dim() == 1 || key.size(0) == 1) mask.rows_per_slice = rows;
}

}  // namespace

void apply(const ApplyArgs& args, const at::Tensor& key, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  at::Tensor on_device;
  const KeySource keys = key_source(key, device, on_device, stream.stream());
  launch_apply(args, keys, forced_geometry, stream.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void keep_bits(const ApplyArgs& args, const at::Tensor& key, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  at::Tensor on_device, bytes;
  const KeySource keys = key_source(key, device, on_device, stream.stream());
  if (needs_bytes(args)) {
    bytes = at::empty({args.slices * args.map.numel()},
                      at::TensorOptions().dtype(at::kByte).device(device));
  }
  launch_keep_bits(args, bytes.defined() ? bytes.mutable_data_ptr() : nullptr, keys,
                   forced_geometry, stream.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void add_norm(RowArgs args, const at::Tensor& key, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  at::Tensor on_device;
  set_keys(args.mask, args.rows, key, device, on_device, stream.stream());
  if (args.norm != Norm::kNone && args.input_dtype != args.out_dtype) {
    RowArgs sum = args;
    sum.norm = Norm::kNone;
    launch_add_norm(sum, forced_geometry, stream.stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    args.input = nullptr;
  }
  launch_add_norm(args, forced_geometry, stream.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void add_norm_backward(RowBackwardArgs args, const at::Tensor& key, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  at::Tensor on_device;
  set_keys(args.mask, args.rows, key, device, on_device, stream.stream());
  const auto type = args.sum_dtype == Dtype::kFloat64 ? at::kDouble : at::kFloat;
  const auto sums = [&](const void* wanted) {
    return wanted == nullptr ? at::Tensor()
                             : at::empty({row_chunks(args.rows), args.columns},
                                         at::TensorOptions().dtype(type).device(device));
  };
  const at::Tensor weight_sums = sums(args.grad_weight), bias_sums = sums(args.grad_bias);
  const auto data = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  launch_add_norm_backward(args, data(weight_sums), data(bias_sums), forced_geometry,
                           stream.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor draw_key(const std::optional<at::Generator>& generator, c10::Device device,
                    at::Tensor host) {
  device = with_index(device);
  const c10::cuda::CUDAGuard guard(device);  // also for the capture state of the current stream
  auto* gen = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(device.index()));
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(gen->mutex_);
    state = gen->philox_cuda_state(4);
  }
  if (!state.captured_) {
    auto* words = static_cast<uint64_t*>(host.mutable_data_ptr());
    words[0] = state.seed_.val;
    words[1] = state.offset_.val / 4;
    return host;
  }
  at::Tensor key = empty_keys({2}, device);
  launch_unpack_key(state.seed_.ptr, state.offset_.ptr, state.offset_intragraph_,
                    static_cast<uint64_t*>(key.mutable_data_ptr()),
                    c10::cuda::getCurrentCUDAStream(device.index()).stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return key;
}

void force_geometry(int64_t blocks, int64_t threads, bool wide) {
  TORCH_CHECK_VALUE(blocks >= 0 && blocks <= 0x7fffffff, "force_geometry(): argument 'blocks' is ",
                    blocks, ", but accepted are 0 to 2^31 - 1");
  TORCH_CHECK_VALUE(threads >= 0 && threads <= 256 && threads % 32 == 0,
                    "force_geometry(): argument 'threads' is ", threads,
                    ", but accepted are multiples of 32 up to 256");
  forced_geometry = {blocks, threads, wide};
}

}  // namespace dropout_ext::cuda
