// The Python module dropout_ext._C.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "../contract/mask.h"
#include "../cpu/kernel.h"
#include "checks.h"
#include "draw.h"
#include "ops.h"
#include "row_bindings.h"
#include "unpack.h"

#ifdef DROPOUT_EXT_WITH_CUDA
#include <cuda_runtime_api.h>

#include "../cuda/launcher.h"
#endif

namespace py = pybind11;

namespace dropout_ext {

namespace {

PyDoc_STRVAR(
    eager_doc,
    "eager(input, p, training, inplace, key, generator, scale=None, bias=None, dropped=0.0, "
    "mask_strides=None, mask_offset=0)\n\n"
    "One call of the dropout family, or NotImplemented where it is not plain: the caller "
    "then composes it of operators that can be traced. scale: of what is kept, None for "
    "1 / (1 - p). bias, dropped: of keep ? fma(input, scale, bias) : dropped, None for a bias of "
    "-0.");

// Not through pybind11's argument casters, which take longer than the rest of a small call.
PyObject* eager(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 6 || n == 11, "eager() takes 6 or 11 arguments, but got ", n);
  if (!is_plain(args[0])) {
    // What is no tensor but stands for one, a torch.fx.Proxy say, overrides the call.
    if (!has_torch_function(args[0])) unpack_tensor(args[0], "input", "Tensor");
    Py_RETURN_NOTIMPLEMENTED;
  }
  const double p = unpack_float(args[1], "p");
  check_probability(p);
  const at::Tensor& self = THPVariable_Unpack(args[0]);
  const bool inplace = unpack_bool(args[3]);
  if (!unpack_bool(args[2])) return Py_NewRef(args[0]);
  if (p == 0 || self.numel() == 0) return Py_NewRef(args[0]);
  at::Tensor input = self;  // held while the GIL is let go
  const bool has_key = args[4] != Py_None;
  const std::optional<at::Generator> generator = unpack_generator(args[5]);
  check_one_source(has_key, generator);
  at::Tensor key = unpack_key(args[4]);
  std::vector<c10::SymInt> mask_strides;
  Call call{key, p, p < 1 ? 1 / (1 - p) : 0, {}, 0};
  if (n > 6) {
    if (args[6] != Py_None) call.scale = unpack_float(args[6], "scale");
    if (args[7] != Py_None) call.bias = unpack_float(args[7], "bias");
    call.dropped = unpack_float(args[8], "dropped");
    call.mask_strides = mask_strides = unpack_strides(args[9]);
    call.mask_offset = unpack_index(args[10], "mask_offset");
  }
  at::Tensor out;
  {
    const py::gil_scoped_release no_gil;
    // Errors before the draw, so that a call that fails leaves the generator alone.
    check(input, call);
    if (inplace) check_writable(input);
    const DrawnKey drawn(key, generator, input, p);
    if (inplace) {
      call.apply_(input);
    } else {
      out = call.apply(input);
    }
  }
  return inplace ? Py_NewRef(args[0]) : THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

PyMethodDef eager_method = {"eager",
                            reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager)),
                            METH_FASTCALL, eager_doc};

py::dict build_info() {
  py::dict info;
  info["version"] = DROPOUT_EXT_VERSION;
  info["mask_contract"] = kMaskContractVersion;
  info["torch"] = DROPOUT_EXT_TORCH_VERSION;
  info["torch_tested"] = DROPOUT_EXT_TORCH_TESTED;
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "msvc " + std::to_string(_MSC_VER);
#endif
#ifdef DROPOUT_EXT_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  std::vector<std::string> archs;
  std::string arch;
  for (const char c : std::string(DROPOUT_EXT_CUDA_ARCHS) + ";") {
    if (c != ';') {
      arch += c;
    } else if (!arch.empty()) {
      archs.push_back(arch);
      arch.clear();
    }
  }
  info["cuda_archs"] = archs;
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  info["cpu_variant"] = cpu::kernels().name;
  std::vector<std::string> variants;
  for (const cpu::Kernels* k : cpu::available_kernels()) variants.emplace_back(k->name);
  info["cpu_variants"] = variants;
  return info;
}

}  // namespace

// Safe without the GIL: kernels run without it anyway, and what outlives a call is of one thread.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  cpu::kernels();  // An environment variable that names no variant fails here, not in a kernel.
  PyObject* method = PyCFunction_NewEx(&eager_method, nullptr, nullptr);
  m.add_object("eager", py::reinterpret_steal<py::object>(method));
  bind_rows(m);
  m.def("build_info", build_info);
  m.def(
      "draw_key",
      [](std::optional<at::Generator> generator, const at::Device& device) {
        return draw_key(generator, device);
      },
      py::arg("generator"), py::arg("device"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "check_call",
      [](const at::Tensor& input, const std::optional<at::Tensor>& key, double p,
         std::optional<double> bias, double dropped, int64_t n_strides) {
        const std::vector<c10::SymInt> strides(n_strides);
        const at::Tensor none;
        check(input, {key ? *key : none, p, 1, strides, 0, bias, dropped});
      },
      py::arg("input"), py::arg("key"), py::arg("p"), py::arg("bias"), py::arg("dropped"),
      py::arg("n_strides"));
  m.def("set_keyed", set_keyed, py::arg("keyed"));
  m.def("check_writable", check_writable, py::arg("input"));
  m.def("check_generator", check_generator, py::arg("generator"), py::arg("device"));
  m.def("check_fold_in", check_fold_in, py::arg("key"), py::arg("n"));
  m.def("check_split", check_split, py::arg("key"), py::arg("n"));
  m.def("element_word", [](uint64_t seed, uint64_t offset, uint64_t index) {
    return element_word({seed, offset}, index);
  });
#ifdef DROPOUT_EXT_WITH_CUDA
  m.def("_force_cuda_geometry", cuda::force_geometry, py::arg("blocks"), py::arg("threads"),
        py::arg("wide"));
#endif
}

}  // namespace dropout_ext
