// How large the blocks are and where they lie in the scratch memory.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace dropout_ext::cpu::attention {

// Rows of scores at a time: few, so that with a panel of keys they stay in the first-level cache;
// a multiple of the rows of every variant's tiles.
inline constexpr int64_t kForwardRows = 48;
inline constexpr int64_t kBackwardRows = 96;

// Keys at a time: their blocks of keys and values (in the backward pass also both transposed, and
// both gradients) stay in a second-level cache of 512 KiB.
constexpr int64_t keys_at_a_time(int64_t elements, const Problem& problem) {
  const int64_t wider = std::max(problem.head_size, problem.value_size);
  return std::clamp(elements / std::max<int64_t>(wider, 1) / kLanes * kLanes, int64_t{32},
                    int64_t{512});
}
constexpr int64_t forward_keys(const Problem& problem) { return keys_at_a_time(16384, problem); }
constexpr int64_t backward_keys(const Problem& problem) { return keys_at_a_time(8192, problem); }

// Carves arrays out of one piece of memory, or counts their bytes where there is none.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t n) {
    T* array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return array;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Layouts: rows, [row][round_up(columns)]; panels, [column / 16][row][16]; both padded with zeros.
// Scores have 16 columns more than they need: at a power of two, rows would share cache lines'
// sets.

template <class T>
struct ForwardBlocks {
  int64_t block, score_stride, words;
  T *keys, *values;  // panels: of the transposed keys, of the values
  T *query, *scores, *mask;
  T *out, *maximum, *sum;  // of all rows of the call
  uint64_t* bits;

  ForwardBlocks(const Problem& p, int64_t n_queries, Scratch& scratch)
      : block(forward_keys(p)), score_stride(block + kLanes), words((block + 63) / 64) {
    keys = scratch.take<T>(block * p.head_size);
    values = scratch.take<T>(block * round_up(p.value_size));
    query = scratch.take<T>(kForwardRows * round_up(p.head_size));
    scores = scratch.take<T>(kForwardRows * score_stride);
    mask = scratch.take<T>(block);
    out = scratch.take<T>(n_queries * round_up(p.value_size));
    maximum = scratch.take<T>(n_queries);
    sum = scratch.take<T>(n_queries);
    bits = scratch.take<uint64_t>(kForwardRows * words);
  }
};

template <class T>
struct BackwardBlocks {
  int64_t block, score_stride, words;
  T *keys, *values, *key_panels;  // panels: both transposed; the keys, scaled
  T *query, *query_panels, *grad, *grad_panels;
  T *scores, *grad_scores, *mask;
  T* dots;  // sum of out * grad_out of all rows of all heads of the call
  uint64_t* bits;

  BackwardBlocks(const Problem& p, int64_t n_heads, int64_t n_queries, Scratch& scratch)
      : block(backward_keys(p)), score_stride(block + kLanes), words((block + 63) / 64) {
    const int64_t size = round_up(p.head_size), value_size = round_up(p.value_size);
    keys = scratch.take<T>(block * p.head_size);
    values = scratch.take<T>(block * p.value_size);
    key_panels = scratch.take<T>(block * size);
    query = scratch.take<T>(kBackwardRows * size);
    query_panels = scratch.take<T>(kBackwardRows * size);
    grad = scratch.take<T>(kBackwardRows * value_size);
    grad_panels = scratch.take<T>(kBackwardRows * value_size);
    scores = scratch.take<T>(kBackwardRows * score_stride);
    grad_scores = scratch.take<T>(kBackwardRows * score_stride);
    mask = scratch.take<T>(block);
    dots = scratch.take<T>(n_heads * n_queries);
    bits = scratch.take<uint64_t>(kBackwardRows * words);
  }
};

}  // namespace dropout_ext::cpu::attention
