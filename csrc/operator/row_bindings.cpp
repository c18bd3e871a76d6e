#include "row_bindings.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>

#include "checks.h"
#include "draw.h"
#include "rows.h"
#include "unpack.h"

namespace py = pybind11;

namespace dropout_ext {

namespace {

// How many of the last dimensions normalized_shape names.
int64_t unpack_normalized_shape(PyObject* object, const at::Tensor& input) {
  std::vector<int64_t> shape;
  const auto add = [&](PyObject* size) {
    const Py_ssize_t value = PyNumber_AsSsize_t(size, PyExc_OverflowError);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      TORCH_CHECK_TYPE(false,
                       "dropout_add_norm(): argument 'normalized_shape' must be int or a sequence "
                       "of ints, not one of ",
                       Py_TYPE(size)->tp_name);
    }
    shape.push_back(value);
  };
  if (PyIndex_Check(object)) {
    add(object);
  } else {
    TORCH_CHECK_TYPE(PySequence_Check(object),
                     "dropout_add_norm(): argument 'normalized_shape' must be int or a sequence of "
                     "ints, not ",
                     Py_TYPE(object)->tp_name);
    for (const py::handle size : py::reinterpret_borrow<py::object>(object)) add(size.ptr());
  }
  const auto n = static_cast<int64_t>(shape.size());
  TORCH_CHECK_VALUE(n > 0 && n <= input.dim() && input.sizes().slice(input.dim() - n) == shape,
                    "dropout_add_norm(): argument 'normalized_shape' is ", at::IntArrayRef(shape),
                    ", but accepted are the last dimensions of the input, of shape ",
                    input.sizes());
  return n;
}

// RMSNorm's default is the input's.
double default_eps(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return std::numeric_limits<double>::epsilon();
    default: return std::numeric_limits<float>::epsilon();
  }
}

// What a call does besides the draw: nothing drops in eval mode and at p = 0.
template <class Run>
auto with_key(RowCall& call, bool training, const std::optional<at::Generator>& generator,
              const Run& run) {
  if (!training || call.p == 0 || call.input.numel() == 0) {
    call.key = at::Tensor();
    return run();
  }
  const DrawnKey drawn(call.key, generator, call.input, call.p);
  return run();
}

PyDoc_STRVAR(
    eager_rows_doc,
    "eager_rows(input, residual, p, training, key, generator, input_bias, colscale, rowscale, "
    "mask_strides, mask_offset, sum_dtype[, normalized_shape, weight, bias, eps, rms, dtype, "
    "return_sum])\n\n"
    "dropout + add, and a norm if there is a normalized_shape, or NotImplemented where the call "
    "is not plain.");

PyObject* eager_rows(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 12 || n == 19, "eager_rows() takes 12 or 19 arguments, but got ", n);
  if (!is_plain(args[0])) {
    if (!has_torch_function(args[0])) unpack_tensor(args[0], "input", "Tensor");
    Py_RETURN_NOTIMPLEMENTED;
  }
  for (const int i : {1, 6, 7, 8, 13, 14}) {
    if (i >= n || args[i] == Py_None || is_plain(args[i])) continue;
    if (THPVariable_Check(args[i]) || has_torch_function(args[i])) Py_RETURN_NOTIMPLEMENTED;
  }
  const bool norm = n > 12;
  RowCall call{.input = THPVariable_Unpack(args[0]),
               .residual = unpack_optional_tensor(args[1], "residual"),
               .input_bias = unpack_optional_tensor(args[6], "input_bias"),
               .colscale = unpack_optional_tensor(args[7], "colscale"),
               .rowscale = unpack_optional_tensor(args[8], "rowscale"),
               .key = unpack_key(args[4]),
               .p = unpack_float(args[2], "p")};
#ifdef DROPOUT_EXT_WITH_CUDA
  if (!call.input.is_cpu()) Py_RETURN_NOTIMPLEMENTED;
#endif
  check_probability(call.p);
  call.scale = call.p < 1 ? 1 / (1 - call.p) : 0;
  const bool training = unpack_bool(args[3]);
  const auto generator = unpack_generator(args[5]);
  check_one_source(call.key.defined(), generator);
  const std::vector<c10::SymInt> mask_strides = unpack_strides(args[9]);
  call.mask_strides = mask_strides;
  call.mask_offset = unpack_index(args[10], "mask_offset");
  const at::ScalarType like =
      call.residual.defined() ? call.residual.scalar_type() : call.input.scalar_type();
  const at::ScalarType sum_dtype = unpack_dtype(args[11], "sum_dtype").value_or(like);
  at::ScalarType dtype = call.input.scalar_type();
  bool return_sum = false;
  if (norm) {
    call.norm_dims = unpack_normalized_shape(args[12], call.input);
    call.weight = unpack_optional_tensor(args[13], "weight");
    call.bias = unpack_optional_tensor(args[14], "bias");
    call.rms = unpack_bool(args[16]);
    const bool default_of_rms = call.rms && args[15] == Py_None;
    call.eps = default_of_rms ? default_eps(dtype) : unpack_float(args[15], "eps");
    dtype = unpack_dtype(args[17], "dtype").value_or(dtype);
    call.return_sum = return_sum = unpack_bool(args[18]);
  }
  at::Tensor out, sum;
  {
    const py::gil_scoped_release no_gil;
    check_rows(call, norm, sum_dtype, dtype);
    with_key(call, training, generator, [&] {
      if (norm) {
        std::tie(out, sum, std::ignore, std::ignore) = add_norm(call, sum_dtype, dtype);
      } else {
        out = add(call, sum_dtype);
      }
    });
  }
  if (!return_sum) return THPVariable_Wrap(std::move(out));
  return PyTuple_Pack(2, py::reinterpret_steal<py::object>(THPVariable_Wrap(out)).ptr(),
                      py::reinterpret_steal<py::object>(THPVariable_Wrap(sum)).ptr());
  END_HANDLE_TH_ERRORS
}

PyDoc_STRVAR(eager_activation_doc,
             "eager_activation(input, function, p, training, key, generator, mask_strides, "
             "mask_offset)\n\n"
             "dropout of an activation, or NotImplemented where the call is not plain.");

PyObject* eager_activation(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 8, "eager_activation() takes 8 arguments, but got ", n);
  if (!is_plain(args[0])) {
    if (!has_torch_function(args[0])) unpack_tensor(args[0], "input", "Tensor");
    Py_RETURN_NOTIMPLEMENTED;
  }
  RowCall call{.input = THPVariable_Unpack(args[0]),
               .key = unpack_key(args[4]),
               .p = unpack_float(args[2], "p")};
  check_probability(call.p);
  const bool training = unpack_bool(args[3]);
  const auto generator = unpack_generator(args[5]);
  check_one_source(call.key.defined(), generator);
  const int64_t function = unpack_index(args[1], "function");
  // What has no kernel, and what would not drop: PyTorch's own activation.
  if (!training || call.p == 0 || call.input.numel() == 0 || !call.input.is_cpu() ||
      call.input.scalar_type() == at::kDouble) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const std::vector<c10::SymInt> mask_strides = unpack_strides(args[6]);
  call.mask_strides = mask_strides;
  call.mask_offset = unpack_index(args[7], "mask_offset");
  call.scale = call.p < 1 ? 1 / (1 - call.p) : 0;
  at::Tensor out;
  {
    const py::gil_scoped_release no_gil;
    check_input(call.input, /*linear=*/false);
    check(call.input, call.dropout());
    with_key(call, training, generator,
             [&] { out = activation(call.input, function, call.dropout()); });
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

template <class Function>
PyMethodDef fast_method(const char* name, Function* function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    fast_method("eager_rows", eager_rows, eager_rows_doc),
    fast_method("eager_activation", eager_activation, eager_activation_doc),
};

}  // namespace

void bind_rows(py::module_& m) {
  for (PyMethodDef& method : methods) {
    m.add_object(method.ml_name,
                 py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr)));
  }
  m.def(
      "check_rows",
      [](const at::Tensor& input, const std::array<std::optional<at::Tensor>, 7>& others, double p,
         int64_t n_strides, std::optional<int64_t> norm_dims, bool rms, const py::object& sum_dtype,
         const py::object& dtype) {
        const auto at = [&](int i) { return others[i] ? *others[i] : at::Tensor(); };
        const std::vector<c10::SymInt> strides(n_strides);
        check_rows({.input = input,
                    .residual = at(0),
                    .input_bias = at(1),
                    .colscale = at(2),
                    .rowscale = at(3),
                    .key = at(4),
                    .p = p,
                    .mask_strides = strides,
                    .norm_dims = norm_dims.value_or(0),
                    .weight = at(5),
                    .bias = at(6),
                    .rms = rms},
                   norm_dims.has_value(), *unpack_dtype(sum_dtype.ptr(), "sum_dtype"),
                   *unpack_dtype(dtype.ptr(), "dtype"));
      },
      py::arg("input"), py::arg("others"), py::arg("p"), py::arg("n_strides"), py::arg("norm_dims"),
      py::arg("rms"), py::arg("sum_dtype"), py::arg("dtype"));
}

}  // namespace dropout_ext
