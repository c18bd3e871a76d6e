#include "draw.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/graph_task.h>

#include <mutex>

#ifdef DROPOUT_EXT_WITH_CUDA
#include "../cuda/launcher.h"
#endif

namespace dropout_ext {

namespace {

// The complement of what torch.randint(0, 2**63 - 1, (1,)) returns, twice: traced code draws
// exactly that and complements it (_draw.py), so that one seed gives one mask in both.
void draw_cpu(const std::optional<at::Generator>& generator, const at::Tensor& key) {
  auto* gen = at::get_generator_or_default<at::CPUGeneratorImpl>(
      generator, at::detail::getDefaultCPUGenerator());
  constexpr uint64_t kRange = (uint64_t{1} << 63) - 1;
  auto* words = static_cast<uint64_t*>(key.mutable_data_ptr());
  const std::lock_guard<std::mutex> lock(gen->mutex_);
  words[0] = ~(gen->random64() % kRange);
  words[1] = ~(gen->random64() % kRange);
}

bool held_elsewhere(const at::Tensor& tensor) {
  return tensor.use_count() > 1 || tensor.storage().use_count() > 1;
}

}  // namespace

void check_generator(const std::optional<at::Generator>& generator, at::Device device) {
  if (!generator) return;
  const at::Device from = generator->device();
  // A device without an index is the current one, or the only one.
  const bool same = from.type() == device.type() &&
                    (from.index() == device.index() || !from.has_index() || !device.has_index());
  TORCH_CHECK_VALUE(from.is_cpu() || same, "dropout(): argument 'generator' is on ", from,
                    ", but accepted are the CPU and the device of the input, ", device);
  if (torch::autograd::get_current_graph_task_id() == -1) return;
  TORCH_CHECK(
      *generator == at::globalContext().defaultGenerator(from),
      "dropout(): argument 'generator' cannot be drawn from in a backward pass: an "
      "activation checkpoint that runs its forward again there restores the state of the "
      "default generators only, so that the gradients would be those of another mask. "
      "Draw a key outside of the checkpoint and pass it as 'key', or leave out 'generator'");
}

at::Tensor draw_key(const std::optional<at::Generator>& generator, at::Device device,
                    at::Tensor spare) {
  check_generator(generator, device);
  at::Tensor key = std::move(spare);
  if (!key.defined() || held_elsewhere(key) || key.is_inference()) {
    key = at::detail::empty_cpu({2}, at::kUInt64);
  }
#ifdef DROPOUT_EXT_WITH_CUDA
  const bool from_cpu = generator && generator->device().is_cpu();
  if (device.is_cuda() && !from_cpu) return cuda::draw_key(generator, device, std::move(key));
#endif
  draw_cpu(generator, key);
  return key;
}

namespace {

thread_local at::Tensor last_key;  // for the next call, unless a graph has kept it
thread_local bool keyed = false;

}  // namespace

bool is_keyed() { return keyed; }

void set_keyed(bool on) { keyed = on; }

DrawnKey::DrawnKey(at::Tensor& key, const std::optional<at::Generator>& generator,
                   const at::Tensor& input, double p) {
  if (key.defined()) return;
  key = p == 1 ? at::zeros({2}, at::kUInt64)
               : draw_key(generator, input.device(), std::move(last_key));
  drawn_ = &key;
}

DrawnKey::~DrawnKey() {
  if (drawn_ != nullptr && drawn_->is_cpu()) last_key = std::move(*drawn_);
}

}  // namespace dropout_ext
