#include "launcher.h"

#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>

#include "dropout_kernel.h"

namespace dropout_ext::cuda {

namespace {

Geometry forced_geometry;

c10::Device with_index(c10::Device device) {
  return device.has_index() ? device : c10::Device(c10::kCUDA, c10::cuda::current_device());
}

at::Tensor empty_keys(at::IntArrayRef sizes, c10::Device device) {
  return at::empty(sizes, at::TensorOptions().dtype(at::kUInt64).device(device));
}

}  // namespace

void apply(const ApplyArgs& args, const at::Tensor& key, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  const auto* words = static_cast<const uint64_t*>(key.const_data_ptr());
  KeySource keys{{0, 0}, nullptr};
  at::Tensor on_device;  // until after the launch: memory is reused in the order of the stream
  if (!key.is_cpu()) {
    keys.device = words;
  } else if (args.slices == 1) {
    keys.host = {words[0], words[1]};
  } else {
    on_device = empty_keys(key.sizes(), device);
    auto* copy = static_cast<uint64_t*>(on_device.mutable_data_ptr());
    launch_store_keys(words, args.slices, copy, stream.stream());
    keys.device = copy;
  }
  launch_apply(args, keys, forced_geometry, stream.stream());
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
