// The contract headers against tests/data/known_answers.txt (first argument). Also compiled by
// nvcc.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "../../csrc/epilogue/apply_args.h"

namespace {

using namespace dropout_ext;

int failures = 0;

void expect(bool ok, const std::string& what, uint64_t actual, uint64_t expected) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "%s: got %llx, expected %llx\n", what.c_str(),
               static_cast<unsigned long long>(actual), static_cast<unsigned long long>(expected));
}

uint64_t hex(std::istringstream& line) {
  uint64_t value = 0xa5a5a5a5a5a5a5a5;
  line >> std::hex >> value;
  if (!line) {
    std::fprintf(stderr, "malformed line: %s\n", line.str().c_str());
    ++failures;
  }
  return value;
}

// Decimal for p: an istream in hexadecimal mode would read a double differently.
double decimal(std::istringstream& line) {
  std::string text;
  line >> text;
  return std::stod(text);
}

Key read_key(std::istringstream& line) {
  const uint64_t seed = hex(line);
  return {seed, hex(line)};
}

void check_philox(std::istringstream& line) {
  uint32_t in[6];
  for (uint32_t& word : in) word = static_cast<uint32_t>(hex(line));
  PhiloxWords words{{0xa5a5a5a5, 0xa5a5a5a5, 0xa5a5a5a5, 0xa5a5a5a5}};
  words = philox4x32_10(in[0], in[1], in[2], in[3], in[4], in[5]);
  for (const uint32_t word : words.w) {
    const uint64_t expected = hex(line);
    expect(word == expected, line.str(), word, expected);
  }
}

void check_words(std::istringstream& line) {
  const Key key = read_key(line);
  uint64_t index = hex(line);
  for (; !(line >> std::ws).eof(); ++index) {
    const uint64_t expected = hex(line);
    const uint32_t word = element_word(key, index);
    expect(word == expected, line.str(), word, expected);
    const uint32_t by_block = lane_word(block_words(key, index / kBlock), index % kBlock);
    expect(by_block == expected, line.str(), by_block, expected);
  }
}

void check_fold_in(std::istringstream& line) {
  const Key key = read_key(line);
  const Key derived = fold_in(key, hex(line));
  const Key expected = read_key(line);
  expect(derived.seed == expected.seed, line.str(), derived.seed, expected.seed);
  expect(derived.offset == expected.offset, line.str(), derived.offset, expected.offset);
}

void check_threshold(std::istringstream& line) {
  const double p = decimal(line);
  const uint64_t expected = hex(line);
  expect(threshold(p) == expected, line.str(), threshold(p), expected);
  expect(keeps_nothing(threshold(p)) == (expected > 0xffffffff), line.str(), 0, 1);
}

void check_keep(std::istringstream& line) {
  const Key key = read_key(line);
  const double p = decimal(line);
  const uint64_t expected = hex(line);
  uint64_t bits = 0xa5a5a5a5a5a5a5a5;
  for (int i = 0; i < 64; ++i) {
    bits = (bits & ~(uint64_t{1} << i)) | static_cast<uint64_t>(keep(key, i, threshold(p))) << i;
  }
  expect(bits == expected, line.str(), bits, expected);
}

void check_known_answers(const char* path) {
  const std::map<std::string, void (*)(std::istringstream&)> checks = {
      {"philox", check_philox},       {"words", check_words}, {"fold_in", check_fold_in},
      {"threshold", check_threshold}, {"keep", check_keep},
  };
  std::map<std::string, int> lines;
  std::ifstream file(path);
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string kind;
    if (!(line >> kind) || kind[0] == '#') continue;
    const auto check = checks.find(kind);
    expect(check != checks.end(), "unknown kind " + kind, 0, 0);
    if (check == checks.end()) continue;
    check->second(line);
    ++lines[kind];
  }
  for (const auto& check : checks) expect(lines[check.first] > 0, "no " + check.first, 0, 1);
}

// At T = 2^32 even the largest word is dropped, at T = 0 even the smallest is kept.
void check_extreme_thresholds() {
  for (uint64_t i = 0; i < 1000; ++i) {
    const Key key{0x1234, i << 40};
    expect(keep(key, i, 0), "T = 0", i, 0);
    expect(!keep(key, i, uint64_t{1} << 32), "T = 2^32", i, 0);
  }
}

using Element = std::tuple<int64_t, int64_t, uint64_t>;  // input address, output address, index

std::vector<Element> elements(const IndexMap& map) {
  std::vector<Element> all;
  for (int64_t n = 0; n < map.numel(); ++n) {
    Element element{0, 0, map.mask_offset};
    int64_t rest = n;
    for (int d = map.ndim - 1; d >= 0; --d) {
      const int64_t position = rest % map.dims[d].size;
      rest /= map.dims[d].size;
      std::get<0>(element) += position * map.dims[d].in_stride;
      std::get<1>(element) += position * map.dims[d].out_stride;
      std::get<2>(element) += static_cast<uint64_t>(position) * map.dims[d].mask_stride;
    }
    all.push_back(element);
  }
  std::sort(all.begin(), all.end());
  return all;
}

// Normalizing moves no element, merges all that it can of a dense tensor, and orders the output.
void check_normalize() {
  std::mt19937 random(7);
  const auto draw = [&](int bound) { return static_cast<int>(random() % bound); };
  int flat = 0;
  for (int round = 0; round < 2000; ++round) {
    IndexMap map;
    map.ndim = draw(6);
    map.mask_offset = std::numeric_limits<uint64_t>::max() - draw(50);
    std::vector<int> order(map.ndim);
    for (int d = 0; d < map.ndim; ++d) order[d] = d;
    if (draw(2)) std::shuffle(order.begin(), order.end(), random);
    int64_t dense = 1;
    uint64_t index = 1;
    const bool shares = draw(2), strides = draw(2);
    for (int d = map.ndim - 1; d >= 0; --d) {
      map.dims[d].size = 1 + draw(4);
      const bool shared = shares && draw(2);
      map.dims[d].mask_stride = shared ? 0 : index;
      if (!shared) index *= map.dims[d].size;
    }
    for (int k = map.ndim - 1; k >= 0; --k) {
      Dim& dim = map.dims[order[k]];
      dim.out_stride = dense;
      dim.in_stride = strides ? draw(4) * dense : dense;
      dense *= dim.size;
    }
    const bool ordered = std::is_sorted(order.begin(), order.end());
    const auto before = elements(map);
    normalize(map);
    expect(elements(map) == before, "normalize changed an element of map", round, 0);
    expect(map.ndim >= 1, "normalized dimensions of map", map.ndim, 1);
    for (int d = 1; d < map.ndim; ++d) {
      expect(map.dims[d - 1].out_stride >= map.dims[d].out_stride, "order of map", round, 0);
      expect(map.dims[d].size > 1, "a dimension of size 1 is left in map", round, 0);
    }
    if (ordered && !shares && !strides) {
      expect(is_flat(map), "a dense map is not flat", round, 0);
      ++flat;
    }
  }
  expect(flat > 100, "dense maps drawn", flat, 100);
}

static_assert(threshold(0.5) == 0x80000000);
static_assert(kBlock == 8 && kMaskContractVersion == 1);

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s known_answers.txt\n", argv[0]);
    return 2;
  }
  check_known_answers(argv[1]);
  check_extreme_thresholds();
  check_normalize();
  if (failures != 0) return 1;
  std::puts("ok");
  return 0;
}
