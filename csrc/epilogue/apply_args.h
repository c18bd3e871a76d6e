// One call of the operator as the CPU and the CUDA kernels take it: raw pointers, no torch.
#pragma once

#include "../contract/index_map.h"
#include "epilogue.h"

namespace dropout_ext {

struct ApplyArgs {
  const void* in;  // null for Epilogue::kKeepMask
  void* out;       // may be `in` itself: in place; otherwise it overlaps no input
  Dtype dtype;     // of inputs and output; kBool for Epilogue::kKeepMask
  Epilogue epilogue;
  EpilogueParams params;
  uint32_t threshold;         // see mask.h; what keeps nothing needs no kernel
  IndexMap map;               // of one slice, normalized; numel() > 0
  const void* in2 = nullptr;  // of the epilogues that has_second_input names

  // Keys of shape (n, 2) give each slice of dimension 0 its own key. Slice j begins at in + j *
  // slice_in_stride, in2 + j * slice_in2_stride and out + j * slice_out_stride elements and at
  // element index map.mask_offset + j * slice_mask_stride. A single key is one slice.
  int64_t slices = 1;
  int64_t slice_in_stride = 0;
  int64_t slice_out_stride = 0;
  uint64_t slice_mask_stride = 0;
  int64_t slice_in2_stride = 0;
};

}  // namespace dropout_ext
