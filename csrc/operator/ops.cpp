#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../cpu/plan.h"
#include "../epilogue/apply_args.h"
#include "checks.h"
#include "kernels.h"

#ifdef DROPOUT_EXT_WITH_CUDA
#include <ATen/cuda/EmptyTensor.h>

#include "../cuda/launcher.h"
#endif

namespace dropout_ext {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kComplexDouble: return Dtype::kComplex128;
    case at::kComplexFloat: return Dtype::kComplex64;
    case at::kBool:
    case at::kByte: return Dtype::kBool;  // 0 or 1 in a byte
    default: TORCH_INTERNAL_ASSERT(false);
  }
}

namespace {

void set_map(ApplyArgs& args, const Tensor& in, const Tensor& in2, const Tensor& out, bool batched,
             SymIntArrayRef mask_strides, const SymInt& mask_offset) {
  IndexMap& map = args.map;
  map.mask_offset = bits_of(mask_offset);
  if (!batched && mask_strides.empty() && out.is_contiguous() &&
      (!in.defined() || in.is_contiguous()) && (!in2.defined() || in2.is_contiguous())) {
    map.ndim = 1;
    map.dims[0] = {out.numel(), 1, 1, 1, 1};
    return;
  }
  const int64_t ndim = out.dim();
  TORCH_CHECK_VALUE(ndim <= kMaxDims, "dropout(): argument 'input' has ", ndim,
                    " dimensions, but at most ", kMaxDims, " are accepted");
  uint64_t row_major = 1;
  map.ndim = static_cast<int>(ndim);
  for (int64_t d = ndim - 1; d >= 0; --d) {
    map.dims[d] = {out.size(d), in.defined() ? in.stride(d) : out.stride(d), out.stride(d),
                   mask_strides.empty() ? row_major : bits_of(mask_strides[d]),
                   in2.defined() ? in2.stride(d) : 0};
    row_major *= static_cast<uint64_t>(out.size(d));
  }
  if (batched) {
    const Dim slice = map.dims[0];
    args.slices = slice.size;
    args.slice_in_stride = slice.in_stride;
    args.slice_out_stride = slice.out_stride;
    args.slice_mask_stride = slice.mask_stride;
    args.slice_in2_stride = slice.in2_stride;
    std::copy(map.dims + 1, map.dims + ndim, map.dims);
    --map.ndim;
  }
  normalize(map);
}

void run_cpu(const ApplyArgs& args, const Tensor& key) {
  static_assert(sizeof(Key) == 2 * sizeof(uint64_t));
  const Tensor words = key.contiguous();
  const cpu::Plan plan(args, static_cast<const Key*>(words.const_data_ptr()));
  // Below 32 Ki elements (some 10 us) a second thread costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 32768 / plan.unit_elements());
  if (plan.units() <= grain) return plan.run(0, plan.units());
  at::parallel_for(0, plan.units(), grain,
                   [&plan](int64_t begin, int64_t end) { plan.run(begin, end); });
}

#ifndef DROPOUT_EXT_WITH_CUDA
[[noreturn]] void fail_without_cuda() {
  TORCH_CHECK_VALUE(false,
                    "dropout(): got a CUDA tensor, but dropout_ext was built without CUDA: install "
                    "a torch with CUDA and the CUDA toolkit, then build again with "
                    "DROPOUT_EXT_CUDA=1 pip install --no-build-isolation --force-reinstall .");
}
void cuda_kernel_missing(const c10::OperatorHandle&, torch::jit::Stack*) { fail_without_cuda(); }
#endif

}  // namespace

void run(const Tensor& in, const Tensor& in2, const Tensor& out, const Call& call,
         Epilogue epilogue, const EpilogueParams& params) {
  if (out.numel() == 0) return;
  if (keeps_nothing(threshold(call.p))) {
    out.fill_(params.dropped);
    return;
  }
  ApplyArgs args;
  args.in = in.defined() ? in.const_data_ptr() : nullptr;
  args.in2 = in2.defined() ? in2.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.dtype = dtype_of(out);
  args.epilogue = epilogue;
  args.params = params;
  args.threshold = static_cast<uint32_t>(threshold(call.p));
  set_map(args, in, in2, out, call.key.dim() == 2, call.mask_strides, call.mask_offset);
#ifdef DROPOUT_EXT_WITH_CUDA
  if (out.is_cuda()) return cuda::apply(args, call.key.contiguous(), out.device());
#else
  if (out.is_cuda()) fail_without_cuda();
#endif
  run_cpu(args, call.key);
}

Tensor new_output(const Tensor& input) {
  if (input.is_non_overlapping_and_dense()) {
    if (input.is_cpu()) {
      return at::detail::empty_strided_cpu(input.sizes(), input.strides(), input.scalar_type());
    }
#ifdef DROPOUT_EXT_WITH_CUDA
    if (input.is_cuda()) {
      return at::detail::empty_strided_cuda(input.sizes(), input.strides(), input.scalar_type(),
                                            input.device());
    }
#endif
  }
  return at::empty_like(input);
}

namespace {

// Kernels, for the CPU and for CUDA alike.

Tensor apply_kernel(const Tensor& input, const Tensor& key, double p, double scale,
                    SymIntArrayRef mask_strides, SymInt mask_offset, std::optional<double> bias,
                    double dropped) {
  const Call call{key, p, scale, mask_strides, std::move(mask_offset), bias, dropped};
  check(input, call);
  Tensor out = new_output(input);
  run(input, {}, out, call, Epilogue::kAffine, {scale, bias.value_or(-0.0), dropped});
  return out;
}

void apply_kernel_(Tensor& input, const Tensor& key, double p, double scale,
                   SymIntArrayRef mask_strides, SymInt mask_offset, std::optional<double> bias,
                   double dropped) {
  const Call call{key, p, scale, mask_strides, std::move(mask_offset), bias, dropped};
  check(input, call);
  check_writable(input);
  run(input, {}, input, call, Epilogue::kAffine, {scale, bias.value_or(-0.0), dropped});
}

// Keep decisions, each a byte of this dtype.
Tensor decisions(const Tensor& key, double p, SymIntArrayRef size, SymIntArrayRef mask_strides,
                 SymInt mask_offset, at::ScalarType dtype, at::Device device) {
  Tensor out = at::empty_symint(size, at::TensorOptions().dtype(dtype).device(device));
  check_probability(p);
  check_key(key, out);
  check_mask_strides(out, static_cast<int64_t>(mask_strides.size()));
  run({}, {}, out, {key, p, 0, mask_strides, std::move(mask_offset)}, Epilogue::kKeepMask, {});
  return out;
}

// A device without a kernel gets the CPU's mask.
at::Device with_kernel(at::Device device) {
  return device.is_cpu() || device.is_cuda() ? device : at::Device(at::kCPU);
}

Tensor keep_mask_kernel(const Tensor& key, double p, SymIntArrayRef size,
                        SymIntArrayRef mask_strides, SymInt mask_offset,
                        std::optional<at::Device> device) {
  const at::Device to = device.value_or(key.device());
  return decisions(key, p, size, mask_strides, std::move(mask_offset), at::kBool, with_kernel(to))
      .to(to);
}

// Bit i & 7 of byte i >> 3 is decision i, and bits after the last are 0.
#ifdef DROPOUT_EXT_WITH_CUDA
Tensor bits_on_cuda(const Tensor& key, double p, SymIntArrayRef size, SymIntArrayRef mask_strides,
                    const SymInt& mask_offset, at::Device device) {
  // Stands for the mask, which is not stored.
  const Tensor mask =
      at::empty_symint(size, at::TensorOptions().dtype(at::kBool).device(at::kMeta));
  const Tensor bits = at::empty({mask.numel() / 8 + (mask.numel() % 8 != 0)},
                                at::TensorOptions().dtype(at::kByte).device(device));
  check_probability(p);
  check_key(key, size, bits.device());
  check_mask_strides(mask, static_cast<int64_t>(mask_strides.size()));
  if (mask.numel() == 0) return bits;
  if (keeps_nothing(threshold(p))) return bits.zero_();
  ApplyArgs args;
  args.in = nullptr;
  args.out = bits.mutable_data_ptr();
  args.dtype = Dtype::kBool;
  args.epilogue = Epilogue::kKeepMask;
  args.threshold = static_cast<uint32_t>(threshold(p));
  set_map(args, {}, {}, mask, key.dim() == 2, mask_strides, mask_offset);
  cuda::keep_bits(args, key.contiguous(), bits.device());
  return bits;
}
#endif

Tensor packed(const Tensor& bytes) {
  const int64_t rest = -bytes.numel() & 7;
  const Tensor blocks = at::constant_pad_nd(bytes.flatten(), {0, rest}).view({-1, 8});
  const Tensor lanes = at::arange(8, blocks.options());
  return blocks.bitwise_left_shift(lanes).sum(1, /*keepdim=*/false, at::kByte);
}

Tensor keep_bits_kernel(const Tensor& key, double p, SymIntArrayRef size,
                        SymIntArrayRef mask_strides, SymInt mask_offset,
                        std::optional<at::Device> device) {
  const at::Device to = device.value_or(key.device());
#ifdef DROPOUT_EXT_WITH_CUDA
  if (to.is_cuda()) return bits_on_cuda(key, p, size, mask_strides, mask_offset, to);
#endif
  const Tensor bytes =
      decisions(key, p, size, mask_strides, std::move(mask_offset), at::kByte, with_kernel(to));
  return to.is_cpu() ? bytes : packed(bytes).to(to);
}

// Deriving keys, on the CPU. Other devices run the reference.

// keys: shape (..., 2).
Tensor fold_in_kernel(const Tensor& key, int64_t n) {
  check_fold_in(key, n);
  Tensor out = at::empty_like(key, at::MemoryFormat::Contiguous);
  auto* to = static_cast<Key*>(out.mutable_data_ptr());
  const Tensor words = key.contiguous();
  const auto* from = static_cast<const Key*>(words.const_data_ptr());
  for (int64_t j = 0; j < words.numel() / 2; ++j)
    to[j] = fold_in(from[j], static_cast<uint64_t>(n));
  return out;
}

Tensor split_kernel(const Tensor& key, int64_t n) {
  check_split(key, n);
  Tensor out = at::empty({n, 2}, key.options());
  auto* to = static_cast<Key*>(out.mutable_data_ptr());
  const Tensor words = key.contiguous();
  const Key from = *static_cast<const Key*>(words.const_data_ptr());
  for (int64_t j = 0; j < n; ++j) to[j] = fold_in(from, static_cast<uint64_t>(j));
  return out;
}

}  // namespace

Tensor Call::apply(const Tensor& input) const {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, double, double, SymIntArrayRef,
                                     SymInt, std::optional<double>, double)>("dropout_ext::apply");
  return op.call(input, key, p, scale, mask_strides, mask_offset, bias, dropped);
}

void Call::apply_(Tensor& input) const {
  static const auto op = find<void(Tensor&, const Tensor&, double, double, SymIntArrayRef, SymInt,
                                   std::optional<double>, double)>("dropout_ext::apply_");
  op.call(input, key, p, scale, mask_strides, mask_offset, bias, dropped);
}

Tensor keep_mask(const Tensor& key, double p, SymIntArrayRef size, SymIntArrayRef mask_strides,
                 SymInt mask_offset, at::Device device) {
  static const auto op = find<Tensor(const Tensor&, double, SymIntArrayRef, SymIntArrayRef, SymInt,
                                     std::optional<at::Device>)>("dropout_ext::keep_mask");
  return op.call(key, p, size, mask_strides, std::move(mask_offset), device);
}

TORCH_LIBRARY(dropout_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // No default of -0 for the bias: graphs pool equal constants, and 0 is equal to it.
  m.def(
      "apply(Tensor input, Tensor key, float p, float scale, SymInt[] mask_strides, "
      "SymInt mask_offset, float? bias=None, float dropped=0.0) -> Tensor",
      tags);
  m.def(
      "apply_(Tensor(a!) input, Tensor key, float p, float scale, SymInt[] mask_strides, "
      "SymInt mask_offset, float? bias=None, float dropped=0.0) -> ()",
      tags);
  m.def(
      "keep_mask(Tensor key, float p, SymInt[] size, SymInt[] mask_strides, SymInt mask_offset, *, "
      "Device? device=None) -> Tensor",
      tags);
  // The same for kernels that a compiler writes: what they read fastest. On the CPU uint8 of shape
  // `size`, 0 or 1; elsewhere bits, element i of the row-major order in bit i & 7 of byte i >> 3.
  m.def(
      "keep_bits(Tensor key, float p, SymInt[] size, SymInt[] mask_strides, SymInt mask_offset, *, "
      "Device? device=None) -> Tensor",
      tags);
  m.def("fold_in(Tensor key, SymInt n) -> Tensor", tags);
  m.def("split(Tensor key, SymInt n) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(dropout_ext, CPU, m) {
  m.impl("apply", apply_kernel);
  m.impl("apply_", apply_kernel_);
  m.impl("keep_mask", keep_mask_kernel);
  m.impl("keep_bits", keep_bits_kernel);
  m.impl("fold_in", fold_in_kernel);
  m.impl("split", split_kernel);
}

TORCH_LIBRARY_IMPL(dropout_ext, CUDA, m) {
#ifdef DROPOUT_EXT_WITH_CUDA
  m.impl("apply", apply_kernel);
  m.impl("apply_", apply_kernel_);
  m.impl("keep_mask", keep_mask_kernel);
  m.impl("keep_bits", keep_bits_kernel);
#else
  for (const char* op : {"apply", "apply_", "keep_mask", "keep_bits"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&cuda_kernel_missing>());
  }
#endif
}

}  // namespace dropout_ext
