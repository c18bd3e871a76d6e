// The CPU kernel from many threads at once, for ThreadSanitizer: the choice of the variant, ranges
// of one plan, and plans of the threads' own over one input.
#include <barrier>
#include <cstdio>
#include <numeric>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernel.h"
#include "../../csrc/cpu/plan.h"

namespace {

using namespace dropout_ext;

constexpr int kThreads = 8;
constexpr int64_t kRows = 301, kColumns = 1013;
constexpr uint32_t kHalf = uint32_t{1} << 31;  // p = 0.5

// Rows of `columns` elements that lie `stride` apart; index = row * kColumns + column.
ApplyArgs rows(const float* in, float* out, int64_t n, int64_t columns, int64_t stride) {
  ApplyArgs args;
  args.in = in;
  args.out = out;
  args.dtype = Dtype::kFloat32;
  args.epilogue = Epilogue::kAffine;
  args.params = {.scale = 2};
  args.threshold = kHalf;
  args.map.ndim = 2;
  args.map.dims[0] = {n, stride, stride, static_cast<uint64_t>(kColumns)};
  args.map.dims[1] = {columns, 1, 1, 1};
  normalize(args.map);
  return args;
}

int64_t wrong(const std::vector<float>& in, const std::vector<float>& out, Key key,
              int64_t columns) {
  int64_t count = 0;
  for (int64_t i = 0; i < kRows * kColumns; ++i) {
    const bool ours = i % kColumns < columns;
    const bool keep = element_word(key, static_cast<uint64_t>(i)) >= kHalf;
    const float expected = ours ? (keep ? 2 * in[i] : 0.0f) : -1.0f;
    count += out[i] != expected;
  }
  return count;
}

}  // namespace

int main() {
  const int64_t n = kRows * kColumns;
  std::vector<float> in(n);
  std::iota(in.begin(), in.end(), 1.0f);
  std::vector<std::vector<float>> own(kThreads, std::vector<float>(n, -1.0f));
  std::vector<float> shared(n, -1.0f), shared_rows(n, -1.0f);
  const Key key{42, 7};
  const ApplyArgs flat = rows(in.data(), shared.data(), kRows, kColumns, kColumns);
  const ApplyArgs cut = rows(in.data(), shared_rows.data(), kRows, kColumns - 5, kColumns);
  std::vector<int64_t> errors(kThreads);
  std::barrier start(kThreads);

  const auto work = [&](int t) {
    start.arrive_and_wait();
    cpu::kernels();  // first of all, in every thread at once
    const Key mine{static_cast<uint64_t>(t), 1};
    const ApplyArgs args = rows(in.data(), own[t].data(), kRows, kColumns, kColumns);
    const cpu::Plan plan(args, &mine);
    plan.run(0, plan.units());
    for (const ApplyArgs* one : {&flat, &cut}) {
      const cpu::Plan part(*one, &key);
      const int64_t units = part.units();
      part.run(units * t / kThreads, units * (t + 1) / kThreads);
    }
    errors[t] = wrong(in, own[t], mine, kColumns);
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(work, t);
  for (std::thread& thread : threads) thread.join();

  int64_t total = wrong(in, shared, key, kColumns) + wrong(in, shared_rows, key, kColumns - 5);
  for (const int64_t e : errors) total += e;
  if (total != 0) {
    std::printf("%lld wrong elements\n", static_cast<long long>(total));
    return 1;
  }
  std::printf("%s ok\n", cpu::kernels().name);
}
