// Dropout added to a residual.

#include "launch.cuh"

namespace dropout_ext::cuda {

void launch_add(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                CUstream_st* stream) {
  using Op = One<Add, 2>;
  switch (args.dtype) {
    case Dtype::kFloat64: return launch<double, Op>(args, keys, geometry, stream);
    case Dtype::kFloat32: return launch<float, Op>(args, keys, geometry, stream);
    case Dtype::kFloat16: return launch<Float16, Op>(args, keys, geometry, stream);
    case Dtype::kBFloat16: return launch<BFloat16, Op>(args, keys, geometry, stream);
    default: break;
  }
}

}  // namespace dropout_ext::cuda
