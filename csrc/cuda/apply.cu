// Dropout and the keep mask.

#include "launch.cuh"

namespace dropout_ext::cuda {

void launch_affine(const ApplyArgs& args, const KeySource& keys, const Geometry& geometry,
                   CUstream_st* stream) {
  using Op = One<Affine, 1>;
  switch (args.dtype) {
    case Dtype::kFloat64: return launch<double, Op>(args, keys, geometry, stream);
    case Dtype::kFloat32: return launch<float, Op>(args, keys, geometry, stream);
    case Dtype::kFloat16: return launch<Float16, Op>(args, keys, geometry, stream);
    case Dtype::kBFloat16: return launch<BFloat16, Op>(args, keys, geometry, stream);
    case Dtype::kComplex128: return launch<Complex<double>, Op>(args, keys, geometry, stream);
    case Dtype::kComplex64: return launch<Complex<float>, Op>(args, keys, geometry, stream);
    case Dtype::kBool: return launch<bool, Op>(args, keys, geometry, stream);
  }
}

}  // namespace dropout_ext::cuda
