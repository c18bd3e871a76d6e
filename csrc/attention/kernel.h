// Attention with dropout on the CPU, over blocks of queries and keys, without the matrix of
// weights:
//   scores = scale * query @ key^T + mask,  weights = softmax(scores),
//   out = (keep ? weights / (1 - p) : 0) @ value
// Per instruction set, as cpu/kernel.h. Nothing here depends on torch or on threads: callers split
// the work, and the split that they choose for the backward pass is the order of its sums.
//
// Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. The
// recomputing backward pass: Dao, Fu, Ermon, Rudra and Re, "FlashAttention", NeurIPS 2022.
#pragma once

#include <optional>

#include "../cpu/kernel.h"

namespace dropout_ext::cpu::attention {

// Strides in elements.
struct Matrix {
  const void* data;
  int64_t row_stride, col_stride;
};

struct Problem {
  Dtype dtype;                // float64, float32, float16 or bfloat16; sums are float64 or float32
  int64_t queries;            // L
  int64_t keys;               // S
  int64_t head_size;          // E, of queries and keys
  int64_t value_size;         // Ev
  double scale;               // of the scores
  double keep_scale;          // of kept weights, 1 / (1 - p)
  uint32_t threshold;         // of dropped ones
  bool causal;                // query i sees keys 0 to i
  std::optional<Dtype> mask;  // kBool: which keys are seen; a floating type: added to the scores
};

// One head of one example.
struct Head {
  Matrix query;  // L x E
  Matrix key;    // S x E
  Matrix value;  // S x Ev
  Matrix mask;   // L x S, strides of 0 where it is shared
  Key dropout_key;
  uint64_t index;  // of weight (0, 0) in the dropout mask; weights are row-major
};

// `Sum` below is double for float64, else float. Instead of two numbers per row the logsumexp would
// do, but at the price of its rounding error in every weight.
struct Forward {
  void* out;           // of dtype, L x Ev, rows contiguous
  void* remainder;     // what rounding took from `out`, likewise; unused where dtype is that of Sum
  int64_t out_stride;  // between rows, of both
  void* statistics;    // of Sum, L x 2: each row's largest score and 1 / sum of e^(score - largest)
};

// Gradients are of Sum, are added to, and have rows of round_up(E) or round_up(Ev) elements.
struct Backward {
  Head head;
  Matrix out, remainder, grad_out;  // L x Ev
  const void* statistics;           // of Sum, L x 2
  void* grad_query;                 // L x E
  int64_t grad_query_stride;
};
struct KeyGradients {
  void* grad_key;    // S x E
  void* grad_value;  // S x Ev
  int64_t grad_key_stride, grad_value_stride;
};

inline constexpr int64_t kLanes = 16;
constexpr int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A range of queries or keys.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Kernels {
  struct Of {
    // Rows `queries` of a head's output.
    void (*forward)(const Problem& problem, const Head& head, const Forward& forward, Range queries,
                    void* scratch);
    // What `queries` of the heads that share a key head add to the gradients through `keys`.
    void (*backward)(const Problem& problem, const Backward* heads, int64_t n_heads,
                     const KeyGradients& gradients, Range queries, Range keys, void* scratch);
  };
  Of of[4];  // by Dtype
};

// Of the instruction set of cpu::kernels().
const Kernels& kernels();

// Bytes that the kernels need at `scratch`, which is aligned to 64.
int64_t forward_scratch(const Problem& problem, int64_t n_queries);
int64_t backward_scratch(const Problem& problem, int64_t n_heads, int64_t n_queries);

extern const Kernels kernels_portable;
#ifdef DROPOUT_EXT_CPU_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace dropout_ext::cpu::attention
