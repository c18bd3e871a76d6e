// Where eager calls get their keys: the generators.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace dropout_ext {

// ValueError for a generator that does not serve `device`: one of the CPU serves every device, any
// other one only its own. RuntimeError where a recomputation in a backward pass would silently get
// another key than its forward: every checkpoint restores the default generators, none of them
// another one.
void check_generator(const std::optional<at::Generator>& generator, at::Device device);

// A fresh key, uint64 of shape (2,), for a tensor on `device`: from `generator`, or from the
// device's default one. It is written into `spare` where nobody else holds that.
at::Tensor draw_key(const std::optional<at::Generator>& generator, at::Device device,
                    at::Tensor spare = {});

// Whether calls without a key take one from a `keys` context of Python (_keys.py), in this thread.
bool is_keyed();
void set_keyed(bool on);

// Sets a key that is undefined to a fresh one as long as this lives; nothing is drawn at p = 1,
// where nothing is kept under any key.
class DrawnKey {
 public:
  DrawnKey(at::Tensor& key, const std::optional<at::Generator>& generator, const at::Tensor& input,
           double p);
  ~DrawnKey();
  DrawnKey(const DrawnKey&) = delete;
  DrawnKey& operator=(const DrawnKey&) = delete;

 private:
  at::Tensor* drawn_ = nullptr;
};

}  // namespace dropout_ext
