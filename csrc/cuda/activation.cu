// Dropout of an activation, and the gradient of that.

#include "launch.cuh"

namespace dropout_ext::cuda {

namespace {

template <class Op>
void launch_op(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
               CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::kFloat32: return launch<float, Op>(args, keys, geometry, stream);
    case Dtype::kFloat16: return launch<Float16, Op>(args, keys, geometry, stream);
    case Dtype::kBFloat16: return launch<BFloat16, Op>(args, keys, geometry, stream);
    default: break;
  }
}

}  // namespace

void launch_activation(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                       CUstream_st* stream) {
  if (args.epilogue == Epilogue::kActivation) {
    launch_op<Activations<Activated, 1>>(args, keys, geometry, stream);
  } else {
    launch_op<Activations<ActivatedBackward, 2>>(args, keys, geometry, stream);
  }
}

}  // namespace dropout_ext::cuda
