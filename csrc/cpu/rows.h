// Dropout with residual and norm on the CPU, split into work that any thread may do in any order.
// The split changes no bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "row_kernel.h"

namespace dropout_ext::cpu {

// Memory of this file's own is made of cache lines, so that it begins where one does: a vector that
// crosses two lines takes twice the time.
struct alignas(64) Line {
  std::byte bytes[64];
};

// What stands in for arguments that are left out: a row each of -0 (which added changes nothing),
// ones, and keep bits that keep everything.
class Defaults {
 public:
  explicit Defaults(int64_t columns) : columns_(columns) {}
  const void* minus_zeros(Dtype dtype);
  const void* ones(Dtype dtype);
  const uint64_t* all_kept();

 private:
  const void* row(std::vector<Line>& memory, Dtype dtype, double value);

  int64_t columns_;
  std::vector<Line> minus_zeros_[2], ones_;
  std::vector<uint64_t> all_kept_;
};

// The keep decisions of rows, one after the other.
class RowMasks {
 public:
  explicit RowMasks(const RowMask& mask, const uint64_t* all_kept);
  RowKernels::Mask of(int64_t row);

 private:
  uint64_t index_of(int64_t row) const;
  void store_bits(Key key, uint64_t index);

  const RowMask& mask_;
  const uint64_t* all_kept_;
  bool computed_;  // by the row kernels: the columns are one dimension of mask stride 1
  std::vector<uint64_t> bits_, run_;
};

class Rows {
 public:
  explicit Rows(const RowArgs& args);  // which outlives it
  void run(int64_t begin, int64_t end) const;

 private:
  RowArgs args_;
  const RowKernels::Of& of_;
  RowKernels::Moments (*moments_)(const void*, int64_t, bool);
  Defaults defaults_;
  const uint64_t* all_kept_ = nullptr;
  bool sum_streams_ = false, out_streams_ = false;
};

// Chunks of rows, each with column sums of its own, whose number depends on the sizes alone.
class RowsBackward {
 public:
  explicit RowsBackward(const RowBackwardArgs& args);
  int64_t chunks() const { return chunks_; }
  void run(int64_t begin, int64_t end);
  void finish();  // after all chunks: the column sums

 private:
  void* sums_of(std::vector<Line>& sums, int64_t chunk, std::vector<Line>& unwanted) const;
  template <class C>
  void add_up(const std::vector<Line>& partial, void* out) const;

  RowBackwardArgs args_;
  const RowKernels::Of& of_;
  Defaults defaults_;
  const uint64_t* all_kept_ = nullptr;
  bool streaming_;
  int64_t chunks_, chunk_rows_;
  size_t row_lines_;
  std::vector<Line> weight_sums_, bias_sums_;
};

}  // namespace dropout_ext::cpu
