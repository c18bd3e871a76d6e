// Where the kernels' keep decisions come from. Included like kernel_body.h, and before it.
// No include guard on purpose.

inline constexpr int kVector = 16;
inline constexpr int kGroup = 128;
inline constexpr int kVectors = kGroup / kVector;
inline constexpr uintptr_t kPrefetchBytes = 2048;

// Where the decisions of the next groups come from: read from stored bits, or computed.
class BitsSource {
 public:
  BitsSource(const uint64_t* bits, int64_t n) : bits_(bits), words_((n + 63) / 64) {}
  template <int groups>
  void next(Keep (&keep)[groups * kVectors]) {
    for (int w = 0; w < 2 * groups; ++w) {
      const uint64_t word = words_ > 0 ? *bits_ : 0;
      ++bits_, --words_;
      for (int v = 0; v < 4; ++v) {
        keep[4 * w + v] = keep_from_bits(static_cast<uint16_t>(word >> 16 * v));
      }
    }
  }

 private:
  const uint64_t* bits_;
  int64_t words_;
};

class PhiloxSource {
 public:
  explicit PhiloxSource(const MaskRun& mask)
      : key_(mask.key),
        threshold_(mask.threshold),
        block_(mask.index >> 3),
        block_high_(block_high(block_)),
        schedule_(mask.key, block_high_) {}
  void seek(uint64_t index) { block_ = index >> 3; }
  template <int groups>
  void next(Keep (&keep)[groups * kVectors]) {
    constexpr int kBlocks = groups * kGroup / kBlock;
    const uint32_t high = block_high(block_);
    if (high == block_high(block_ + kBlocks - 1)) {
      if (high != block_high_) schedule_.set_block_high(block_high_ = high);
      keep_groups<groups>(schedule_, block_, threshold_, keep);
    } else {
      // Once in 2^35 elements of a run. Out of line: inlined, it costs the loops registers.
      uint64_t bits[groups * kGroup / 64];
      keep_bits_one_by_one(bits, groups * kGroup, key_, block_ * kBlock, 1, threshold_);
      BitsSource(bits, groups * kGroup).next<groups>(keep);
    }
    block_ += kBlocks;
  }

 private:
  Key key_;
  uint32_t threshold_;
  uint64_t block_;
  uint32_t block_high_;
  PhiloxSchedule schedule_;
};
