// All CUDA kernels as one plain C++ source.
#pragma once

#include "cuda_shim.h"
//
#include "../../csrc/cuda/activation.cu"
#include "../../csrc/cuda/add.cu"
#include "../../csrc/cuda/add_norm.cu"
#include "../../csrc/cuda/add_norm_backward.cu"
#include "../../csrc/cuda/apply.cu"
#include "../../csrc/cuda/keep_bits.cu"
#include "../../csrc/cuda/keys.cu"
