// The body of the attention kernel, included once per instruction set, inside that set's namespace
// and under its target attribute, behind cpu/simd_*.h and a vector_*.h that defines, of F32 and
// F64,
//   broadcast         one number in memory to all lanes
//   multiply_add      a * b + c, rounded once where the instruction set has that
//   maximum           b where a or b is NaN
//   power_of_two      2^n of 1.5 * 2^23 + 127 + n (float64: 1.5 * 2^52 + 1023 + n), n an integer
//   zero_where_less   a < b ? 0 : x
//   keep_or_zero      keep ? x : +0
//   transpose_16x16   of 16 rows of 16 numbers
//   kTileRows32, kTilePanels32, kTileRows64, kTilePanels64
//                     rows and panels of 16 columns of a product's sums in registers
// No include guard on purpose.

template <class V>
struct Traits;
template <>
struct Traits<F32> {
  using Sum = float;
  static constexpr int kRows = kTileRows32, kPanels = kTilePanels32;
};
template <>
struct Traits<F64> {
  using Sum = double;
  static constexpr int kRows = kTileRows64, kPanels = kTilePanels64;
};
template <class V>
using SumOf = typename Traits<V>::Sum;

template <class Elem>
struct VectorOf {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};

template <class V>
V splat(double x) {
  return splat(x, V{});
}

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Sums in a fixed order, the same for all variants.
template <class V>
SumOf<V> sum_of_lanes(V x) {
  alignas(64) SumOf<V> lane[kLanes];
  store(lane, x);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}
template <class V>
SumOf<V> maximum_of_lanes(V x) {
  alignas(64) SumOf<V> lane[kLanes];
  store(lane, x);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
  }
  return lane[0];
}

// e^x = 2^n e^r, n the integer next to x / ln 2, for x up to some 88 or 709; 0 where e^x is below
// 2^-125 or 2^-1021, NaN for NaN. Cody and Waite's reduction.
struct Exp32 {
  static constexpr double kMagic = 0x1.8p23 + 127, kLeast = -87;
  static constexpr double kLn2High = 0x1.62e4p-1, kLn2Low = 0x1.7f7d1cf79abcap-20;
  // (e^r - 1 - r) / r^2 by weighted least squares, for |r| <= ln 2 / 2: 3.7e-9 off e^r.
  static constexpr double kPolynomial[] = {0x1.6a23cep-10, 0x1.123a2p-7, 0x1.5558f2p-5,
                                           0x1.555492p-3, 0x1.fffffcp-2};
};
struct Exp64 {
  static constexpr double kMagic = 0x1.8p52 + 1023, kLeast = -707;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b39p-40;
  // Taylor's: 4e-18 off e^r.
  static constexpr double kPolynomial[] = {
      1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
      1 / 5040.0,       1 / 720.0,       1 / 120.0,      1 / 24.0,      1 / 6.0,      1 / 2.0};
};

template <class V>
V exp(V x) {
  using C = std::conditional_t<std::is_same_v<V, F32>, Exp32, Exp64>;
  const V one = splat<V>(1), magic = splat<V>(C::kMagic), least = splat<V>(C::kLeast);
  const V bounded = maximum(least, x);
  const V shifted = multiply_add(bounded, splat<V>(1.4426950408889634), magic);
  const V n = shifted - magic;
  V r = multiply_add(n, splat<V>(-C::kLn2High), bounded);
  r = multiply_add(n, splat<V>(-C::kLn2Low), r);
  V q = splat<V>(C::kPolynomial[0]);
  for (size_t i = 1; i < std::size(C::kPolynomial); ++i) {
    q = multiply_add(q, r, splat<V>(C::kPolynomial[i]));
  }
  const V p = multiply_add(r * r, q, r) + one;
  // A product, not a sum of exponents, which would make a number of a NaN.
  return zero_where_less(x, least, p * power_of_two(shifted));
}
template <class V>
SumOf<V> exp_of(SumOf<V> x) {
  alignas(64) SumOf<V> lane[kLanes];
  store(lane, exp(broadcast(&x)));
  return lane[0];
}

// Products of small matrices. B comes in panels of 16 columns; A has rows in memory, or columns
// (`transposed`). The sums of a tile of C are in registers, and are added to C every kDepth terms:
// a sum of sums has less rounding error than one of all terms.

inline constexpr int64_t kDepth = 128;

template <class V, int rows, int panels, bool transposed, bool accumulate, class T = SumOf<V>>
void product_tile(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_panel, T* c,
                  int64_t c_stride) {
  V sum[rows][panels];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) sum[r][p] = splat<V>(0);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V column[panels];
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) column[p] = load(b + p * b_panel);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V x = broadcast(transposed ? a + r : a + r * a_stride);
#pragma GCC unroll 2
      for (int p = 0; p < panels; ++p) sum[r][p] = multiply_add(x, column[p], sum[r][p]);
    }
    a += transposed ? a_stride : 1;
    b += kLanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) {
      T* const to = c + r * c_stride + p * kLanes;
      store(to, accumulate ? load(to) + sum[r][p] : sum[r][p]);
    }
  }
}

template <class V, int panels, bool transposed, bool accumulate, int rows = Traits<V>::kRows,
          class... Args>
void product_rows(int64_t n, Args... args) {
  if (n == rows) {
    product_tile<V, rows, panels, transposed, accumulate>(args...);
  } else if constexpr (rows > 1) {
    product_rows<V, panels, transposed, accumulate, rows - 1>(n, args...);
  }
}

template <class V, int panels, bool transposed, bool accumulate, class T = SumOf<V>>
void product_panels(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b,
                    int64_t b_panel, T* c, int64_t c_stride) {
  // Of nearly equal sizes: a tile of few rows takes almost as long as a full one.
  const int64_t tiles = (rows + Traits<V>::kRows - 1) / Traits<V>::kRows;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t n = rows / tiles + (t < rows % tiles);
    product_rows<V, panels, transposed, accumulate>(n, depth, a + row * (transposed ? 1 : a_stride),
                                                    a_stride, b, b_panel, c + row * c_stride,
                                                    c_stride);
    row += n;
  }
}

// C (rows x columns) = A (rows x depth) B, or C += A B. Panels of B lie `b_panel` apart.
template <class V, bool transposed, bool accumulate, class T = SumOf<V>>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const T* b,
             int64_t b_panel, T* c, int64_t c_stride) {
  const int64_t n = std::min(depth, kDepth);
  constexpr int kPanels = Traits<V>::kPanels;
  for (int64_t panel = 0, left = round_up(columns) / kLanes; left > 0;) {
    const T* const from = b + panel * b_panel;
    T* const to = c + panel * kLanes;
    if (left >= kPanels) {
      product_panels<V, kPanels, transposed, accumulate>(rows, n, a, a_stride, from, b_panel, to,
                                                         c_stride);
      left -= kPanels, panel += kPanels;
    } else {
      product_panels<V, 1, transposed, accumulate>(rows, n, a, a_stride, from, b_panel, to,
                                                   c_stride);
      --left, ++panel;
    }
  }
  if (depth > n) {
    product<V, transposed, true>(rows, columns, depth - n, a + n * (transposed ? a_stride : 1),
                                 a_stride, b + n * kLanes, b_panel, c, c_stride);
  }
}

// Reading and packing.

template <class Elem>
typename VectorOf<Elem>::type load_part(const Elem* p, int64_t stride, int64_t n) {
  if (stride == 1 && n >= kLanes) return load(p);
  alignas(64) Elem buffer[kLanes] = {};
  for (int64_t i = 0; i < std::min(n, kLanes); ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

template <class Elem>
void store_part(Elem* p, typename VectorOf<Elem>::type x, int64_t n) {
  if (n >= kLanes) return store_any(p, x);
  alignas(64) Elem buffer[kLanes];
  store_any(buffer, x);
  std::copy_n(buffer, n, p);
}

template <class Elem>
const Elem* row_of(const Matrix& m, int64_t row) {
  return static_cast<const Elem*>(m.data) + row * m.row_stride;
}

// `factor` times rows [first, first + rows) of m, as rows and as panels, either of which may be
// null.
template <class Elem, class V = typename VectorOf<Elem>::type, class T = SumOf<V>>
void pack(const Matrix& m, int64_t first, int64_t rows, int64_t columns, double factor, T* as_rows,
          T* as_panels, int64_t panel_rows) {
  const V scale = splat<V>(factor);
  for (int64_t r = 0; r < rows; ++r) {
    const Elem* from = row_of<Elem>(m, first + r);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const V x = load_part(from + c * m.col_stride, m.col_stride, columns - c) * scale;
      if (as_rows != nullptr) store(as_rows + r * round_up(columns) + c, x);
      if (as_panels != nullptr) store(as_panels + c * panel_rows + r * kLanes, x);
    }
  }
}

// Rows [first, first + rows) of m as the columns of panels, whose rows are m's columns.
template <class Elem, class V = typename VectorOf<Elem>::type, class T = SumOf<V>>
void pack_transposed(const Matrix& m, int64_t first, int64_t rows, int64_t columns, T* panels) {
  alignas(64) T from[kLanes * kLanes], to[kLanes * kLanes];
  for (int64_t r = 0; r < rows; r += kLanes, panels += columns * kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool inside = r + i < rows;
        const Elem* row = inside ? row_of<Elem>(m, first + r + i) + c * m.col_stride : nullptr;
        store(from + i * kLanes, inside ? load_part(row, m.col_stride, columns - c) : splat<V>(0));
      }
      transpose_16x16(from, to);
      std::copy_n(to, std::min(kLanes, columns - c) * kLanes, panels + c * kLanes);
    }
  }
}

// The mask of one row over keys [first, first + n) as numbers to add.
template <class T, class Elem>
void read_mask(const Matrix& m, int64_t row, int64_t first, int64_t n, T* to) {
  const Elem* from = row_of<Elem>(m, row) + first * m.col_stride;
  for (int64_t c = 0; c < n; ++c) {
    const Elem x = from[c * m.col_stride];
    if constexpr (std::is_same_v<Elem, uint8_t>) {
      to[c] = x != 0 ? T{0} : -kInfinity<T>;
    } else if constexpr (std::is_floating_point_v<Elem>) {
      to[c] = static_cast<T>(x);
    } else {
      to[c] = static_cast<T>(to_float(x));
    }
  }
}
template <class T>
void read_mask(Dtype dtype, const Matrix& m, int64_t row, int64_t first, int64_t n, T* to) {
  switch (dtype) {
    case Dtype::kBool: return read_mask<T, uint8_t>(m, row, first, n, to);
    case Dtype::kFloat64: return read_mask<T, double>(m, row, first, n, to);
    case Dtype::kFloat32: return read_mask<T, float>(m, row, first, n, to);
    case Dtype::kFloat16: return read_mask<T, Float16>(m, row, first, n, to);
    default: return read_mask<T, BFloat16>(m, row, first, n, to);
  }
}

// Scores of a block, of query `row` + r and keys `first` to first + n: what is masked becomes
// -infinity, and so does what pads a row to a multiple of 16.
template <class V, class T = SumOf<V>>
void mask_scores(const Problem& p, const Head& head, int64_t row, int64_t rows, int64_t first,
                 int64_t n, T* scores, int64_t stride, T* mask) {
  for (int64_t r = 0; r < rows; ++r, scores += stride) {
    const int64_t seen = p.causal ? std::clamp(row + r + 1 - first, int64_t{0}, n) : n;
    std::fill(scores + seen, scores + round_up(n), -kInfinity<T>);
    if (!p.mask) continue;
    if (r == 0 || head.mask.row_stride != 0) {
      read_mask(*p.mask, head.mask, row + r, first, n, mask);
      std::fill(mask + n, mask + round_up(n), T{0});
    }
    for (int64_t c = 0; c < seen; c += kLanes) store(scores + c, load(scores + c) + load(mask + c));
  }
}

inline Keep keep_at(const uint64_t* bits, int64_t column) {
  return keep_from_bits(static_cast<uint16_t>(bits[column >> 6] >> (column & 63)));
}

// One row of a block's scores, to its dropped weights but for the divisor. `out` is the row's sum
// of values so far, relative to the old maximum.
template <class V, class T = SumOf<V>>
void online_softmax(T* scores, int64_t n, const uint64_t* bits, T& maximum_so_far, T& sum_so_far,
                    T* out, int64_t out_size) {
  V largest = splat<V>(-kInfinity<T>);
  for (int64_t c = 0; c < n; c += kLanes) largest = maximum(load(scores + c), largest);
  const T before = maximum_so_far;
  const T now = std::max(maximum_of_lanes(largest), before);
  if (now != before) {
    const T factor = exp_of<V>(before - now);
    const V v = broadcast(&factor);
    for (int64_t c = 0; c < out_size; c += kLanes) store(out + c, load(out + c) * v);
    sum_so_far *= factor;
    maximum_so_far = now;
  }
  // A row that has seen no key yet: e^(-infinity - 0) is 0.
  const T base_number = now == -kInfinity<T> ? T{0} : now;
  const V base = broadcast(&base_number);
  V sum = splat<V>(0);
  for (int64_t c = 0; c < n; c += kLanes) {
    const V weight = exp(load(scores + c) - base);
    sum = sum + weight;
    store(scores + c, keep_or_zero(keep_at(bits, c), weight));
  }
  sum_so_far += sum_of_lanes(sum);
}

template <class Elem>
void forward(const Problem& p, const Head& head, const Forward& to, Range queries, void* scratch) {
  using V = typename VectorOf<Elem>::type;
  using T = SumOf<V>;
  Scratch memory(scratch);
  const ForwardBlocks<T> blocks(p, queries.size(), memory);
  const int64_t size = round_up(p.head_size), value_size = round_up(p.value_size);
  std::fill_n(blocks.out, queries.size() * value_size, T{0});
  std::fill_n(blocks.maximum, queries.size(), -kInfinity<T>);
  std::fill_n(blocks.sum, queries.size(), T{0});
  const int64_t end = p.causal ? std::min(p.keys, queries.end) : p.keys;
  for (int64_t key = 0; key < end; key += blocks.block) {
    const int64_t block = std::min(blocks.block, end - key);
    pack_transposed<Elem>(head.key, key, block, p.head_size, blocks.keys);
    pack<Elem>(head.value, key, block, p.value_size, 1, static_cast<T*>(nullptr), blocks.values,
               blocks.block);
    for (int64_t row = queries.begin; row < queries.end; row += kForwardRows) {
      const int64_t rows = std::min(kForwardRows, queries.end - row);
      const int64_t n = p.causal ? std::min(block, row + rows - key) : block;
      if (n <= 0) continue;
      pack<Elem>(head.query, row, rows, p.head_size, p.scale, blocks.query,
                 static_cast<T*>(nullptr), 0);
      product<V, false, false>(rows, n, p.head_size, blocks.query, size, blocks.keys,
                               p.head_size * kLanes, blocks.scores, blocks.score_stride);
      mask_scores<V>(p, head, row, rows, key, n, blocks.scores, blocks.score_stride, blocks.mask);
      const uint64_t index = head.index + static_cast<uint64_t>(row * p.keys + key);
      cpu::kernels().keep_bits(blocks.bits, n, {head.dropout_key, index, p.threshold}, rows,
                               static_cast<uint64_t>(p.keys), blocks.words);
      const int64_t at = row - queries.begin;
      for (int64_t r = 0; r < rows; ++r) {
        online_softmax<V>(blocks.scores + r * blocks.score_stride, n,
                          blocks.bits + r * blocks.words, blocks.maximum[at + r],
                          blocks.sum[at + r], blocks.out + (at + r) * value_size, value_size);
      }
      product<V, false, true>(rows, p.value_size, n, blocks.scores, blocks.score_stride,
                              blocks.values, blocks.block * kLanes, blocks.out + at * value_size,
                              value_size);
    }
  }
  for (int64_t r = 0; r < queries.size(); ++r) {
    const T sum = blocks.sum[r];
    const T factor = sum == 0 ? T{0} : static_cast<T>(p.keep_scale) / sum;
    const V v = broadcast(&factor);
    const int64_t at = (queries.begin + r) * to.out_stride;
    for (int64_t c = 0; c < p.value_size; c += kLanes) {
      const V x = load(blocks.out + r * value_size + c) * v;
      Elem* const out = static_cast<Elem*>(to.out) + at + c;
      store_part(out, x, p.value_size - c);
      if constexpr (sizeof(Elem) == 2) {
        const V remainder = x - load_part(out, 1, p.value_size - c);
        store_part(static_cast<Elem*>(to.remainder) + at + c, remainder, p.value_size - c);
      }
    }
    T* const statistics = static_cast<T*>(to.statistics) + 2 * (queries.begin + r);
    statistics[0] = sum == 0 ? T{0} : blocks.maximum[r];
    statistics[1] = sum == 0 ? T{0} : 1 / sum;
  }
}

// One row of a block, from scores and the gradients of the kept weights to the dropped weights and
// the gradients of the scores. `dot` is that of the output and its gradient.
template <class V, class T = SumOf<V>>
void softmax_backward(T* scores, T* grads, int64_t n, const uint64_t* bits, const T* statistics,
                      const T* dot) {
  const V base = broadcast(statistics), factor = broadcast(statistics + 1), mean = broadcast(dot);
  for (int64_t c = 0; c < n; c += kLanes) {
    const V weight = exp(load(scores + c) - base) * factor;
    const Keep keep = keep_at(bits, c);
    const V grad = keep_or_zero(keep, load(grads + c)) - mean;
    store(scores + c, keep_or_zero(keep, weight));
    store(grads + c, weight * grad);
  }
}

template <class Elem>
void backward(const Problem& p, const Backward* heads, int64_t n_heads, const KeyGradients& to,
              Range queries, Range keys, void* scratch) {
  using V = typename VectorOf<Elem>::type;
  using T = SumOf<V>;
  Scratch memory(scratch);
  const BackwardBlocks<T> blocks(p, n_heads, queries.size(), memory);
  const int64_t size = round_up(p.head_size), value_size = round_up(p.value_size);
  for (int64_t h = 0; h < n_heads; ++h) {
    for (int64_t r = 0; r < queries.size(); ++r) {
      const int64_t row = queries.begin + r;
      V sum = splat<V>(0);
      for (int64_t c = 0; c < p.value_size; c += kLanes) {
        const auto read = [&](const Matrix& m) {
          return load_part(row_of<Elem>(m, row) + c * m.col_stride, m.col_stride, p.value_size - c);
        };
        V out = read(heads[h].out);
        if constexpr (sizeof(Elem) == 2) out = out + read(heads[h].remainder);
        sum = multiply_add(out, read(heads[h].grad_out), sum);
      }
      blocks.dots[h * queries.size() + r] = sum_of_lanes(sum);
    }
  }
  const int64_t end = p.causal ? std::min(keys.end, queries.end) : keys.end;
  for (int64_t key = keys.begin; key < end; key += blocks.block) {
    const int64_t block = std::min(blocks.block, end - key);
    const Head& first = heads[0].head;  // all have the same keys and values
    pack_transposed<Elem>(first.key, key, block, p.head_size, blocks.keys);
    pack_transposed<Elem>(first.value, key, block, p.value_size, blocks.values);
    pack<Elem>(first.key, key, block, p.head_size, p.scale, static_cast<T*>(nullptr),
               blocks.key_panels, blocks.block);
    T* const grad_key = static_cast<T*>(to.grad_key) + key * to.grad_key_stride;
    T* const grad_value = static_cast<T*>(to.grad_value) + key * to.grad_value_stride;
    for (int64_t h = 0; h < n_heads; ++h) {
      const Head& head = heads[h].head;
      int64_t row = p.causal ? std::max(queries.begin, key) : queries.begin;
      for (; row < queries.end; row += kBackwardRows) {
        const int64_t rows = std::min(kBackwardRows, queries.end - row);
        const int64_t n = p.causal ? std::min(block, row + rows - key) : block;
        pack<Elem>(head.query, row, rows, p.head_size, p.scale, blocks.query, blocks.query_panels,
                   kBackwardRows);
        pack<Elem>(heads[h].grad_out, row, rows, p.value_size, p.keep_scale, blocks.grad,
                   blocks.grad_panels, kBackwardRows);
        T *const scores = blocks.scores, *const grads = blocks.grad_scores;
        const int64_t stride = blocks.score_stride;
        product<V, false, false>(rows, n, p.head_size, blocks.query, size, blocks.keys,
                                 p.head_size * kLanes, scores, stride);
        product<V, false, false>(rows, n, p.value_size, blocks.grad, value_size, blocks.values,
                                 p.value_size * kLanes, grads, stride);
        mask_scores<V>(p, head, row, rows, key, n, scores, stride, blocks.mask);
        const uint64_t index = head.index + static_cast<uint64_t>(row * p.keys + key);
        cpu::kernels().keep_bits(blocks.bits, n, {head.dropout_key, index, p.threshold}, rows,
                                 static_cast<uint64_t>(p.keys), blocks.words);
        for (int64_t r = 0; r < rows; ++r) {
          softmax_backward<V>(scores + r * stride, grads + r * stride, n,
                              blocks.bits + r * blocks.words,
                              static_cast<const T*>(heads[h].statistics) + 2 * (row + r),
                              blocks.dots + h * queries.size() + row + r - queries.begin);
        }
        product<V, true, true>(n, p.value_size, rows, scores, stride, blocks.grad_panels,
                               kBackwardRows * kLanes, grad_value, to.grad_value_stride);
        product<V, true, true>(n, p.head_size, rows, grads, stride, blocks.query_panels,
                               kBackwardRows * kLanes, grad_key, to.grad_key_stride);
        product<V, false, true>(
            rows, p.head_size, n, grads, stride, blocks.key_panels, blocks.block * kLanes,
            static_cast<T*>(heads[h].grad_query) + row * heads[h].grad_query_stride,
            heads[h].grad_query_stride);
      }
    }
  }
}

template <class Elem>
constexpr Kernels::Of of() {
  return {forward<Elem>, backward<Elem>};
}

constexpr Kernels make_kernels() {
  return {{of<double>(), of<float>(), of<Float16>(), of<BFloat16>()}};
}
