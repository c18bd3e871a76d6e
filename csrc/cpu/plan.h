// One call of the operator on the CPU, split into units of work that any thread may run in any
// order. The split changes no bit.
#pragma once

#include "../epilogue/apply_args.h"
#include "kernel.h"

namespace dropout_ext::cpu {

class Plan {
 public:
  // `keys` holds args.slices keys and, like args, outlives the plan.
  Plan(const ApplyArgs& args, const Key* keys);

  int64_t units() const { return units_; }
  int64_t unit_elements() const { return unit_elements_; }  // of a full unit
  void run(int64_t begin, int64_t end) const;

 private:
  // How the keep decisions of a unit come about, by the mask stride along the inner dimension.
  enum class Mode {
    kFused,     // 1: computed and applied in one pass over a contiguous run
    kRow,       // 1: computed into bits, applied to every position of a dimension that shares them
    kConstant,  // 0: one decision for the whole run
    kTransposed,  // other, while some outer dimension has 1: computed along that one, transposed
    kElement,     // other: element by element
  };
  struct Loop {
    int64_t count, in_step, out_step;
    uint64_t mask_step;
    int64_t in2_step;
  };
  struct Unit {
    const char* in;
    char* out;
    uint64_t index;
    int64_t inner, second;  // elements of the inner and of the second dimension
    Key key;
    uint64_t* tile_bits;  // room for the bits of a transposed unit
    const char* in2;      // null where there is no second input
  };

  void run_unit(const Unit& unit) const;
  void run_rows(const Unit& unit) const;
  void run_constant(const Unit& unit) const;
  void run_transposed(const Unit& unit) const;
  // Whether the inner dimension, in full, and the second one are a single run in memory.
  bool is_dense() const {
    return inner_.in_stride == 1 && inner_.out_stride == 1 && second_.in_stride == inner_.size &&
           second_.out_stride == inner_.size &&
           (args_.in2 == nullptr || (inner_.in2_stride == 1 && second_.in2_stride == inner_.size));
  }
  void keep_bits(uint64_t* bits, int64_t n, Key key, uint64_t index, int64_t rows = 1,
                 uint64_t row_stride = 0, int64_t row_words = 0) const;
  void apply_inner(const Unit& unit, int64_t second, int64_t n, const uint64_t* bits) const;
  void apply_run(const char* in, const char* in2, char* out, int64_t n, const uint64_t* bits) const;
  const char* in2_at(const Unit& unit, int64_t elements) const {
    return unit.in2 == nullptr ? nullptr : unit.in2 + elements * element_size_;
  }

  const ApplyArgs& args_;
  const Key* keys_;
  const Kernels& kernels_;
  const Kernels::Of& of_;
  int64_t element_size_;
  bool complex_;
  Mode mode_;
  bool streaming_;
  Dim inner_;
  Dim second_ = {1, 0, 0, 0, 0};
  int64_t inner_step_;
  int64_t second_step_ = 1;
  int n_loops_ = 0;  // slices, the remaining dimensions, steps of the second, steps of the inner
  Loop loops_[kMaxDims + 2];
  int64_t units_ = 1;
  int64_t unit_elements_;
};

}  // namespace dropout_ext::cpu
