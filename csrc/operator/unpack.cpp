#include "unpack.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>

#include "draw.h"

namespace py = pybind11;

namespace dropout_ext {

bool is_plain(PyObject* object) {
  if (!THPVariable_CheckExact(object) || is_keyed()) return false;
  constexpr c10::DispatchKeySet kHarmless =
      c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView}) |
      c10::autocast_dispatch_keyset;
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  if (!(included - kHarmless).empty() || at::impl::PythonTorchFunctionTLS::stack_len() != 0) {
    return false;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.key_set().has_any(c10::DispatchKeySet(c10::DispatchKey::Python) |
                               c10::DispatchKeySet(c10::DispatchKey::Functionalize) |
                               c10::DispatchKeySet(c10::DispatchKey::FuncTorchBatched) |
                               c10::DispatchKeySet(c10::DispatchKey::NestedTensor))) {
    return false;
  }
#ifdef DROPOUT_EXT_WITH_CUDA
  return tensor.is_cpu() || tensor.is_cuda();
#else
  return tensor.is_cpu();
#endif
}

namespace {

const char* type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

// What is set but no Exception, an interrupt say, stays set and is thrown.
void clear_exception() {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw python_error();
  PyErr_Clear();
}

}  // namespace

const at::Tensor& unpack_tensor(PyObject* object, const char* name, const char* accepted) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "dropout(): argument '", name, "' must be ", accepted,
                   ", not ", type_name(object));
  return THPVariable_Unpack(object);
}

bool unpack_bool(PyObject* object) {
  if (object == Py_True || object == Py_False) return object == Py_True;
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw python_error();
  return truth != 0;
}

double unpack_float(PyObject* object, const char* name) {
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyErr_Clear();
      return std::numeric_limits<double>::infinity();
    }
    clear_exception();
    TORCH_CHECK_TYPE(false, "dropout(): argument '", name, "' must be float, not ",
                     type_name(object));
  }
  return value;
}

int64_t unpack_index(PyObject* object, const char* name) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!index) {
    clear_exception();
    TORCH_CHECK_TYPE(false, "dropout(): argument '", name, "' must be int, not ",
                     type_name(object));
  }
  return static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(index.ptr()));
}

std::optional<at::Generator> unpack_generator(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  TORCH_CHECK_TYPE(THPGenerator_Check(object),
                   "dropout(): argument 'generator' must be torch.Generator, not ",
                   type_name(object));
  return THPGenerator_Unwrap(object);
}

std::vector<c10::SymInt> unpack_strides(PyObject* object) {
  std::vector<c10::SymInt> strides;
  if (object == Py_None) return strides;
  for (const py::handle stride : py::reinterpret_borrow<py::object>(object)) {
    strides.emplace_back(unpack_index(stride.ptr(), "mask_strides"));
  }
  return strides;
}

bool has_torch_function(PyObject* object) {
  const auto attribute =
      py::reinterpret_steal<py::object>(PyObject_GetAttrString(object, "__torch_function__"));
  if (!attribute) clear_exception();
  return static_cast<bool>(attribute);
}

at::Tensor unpack_optional_tensor(PyObject* object, const char* name) {
  return object == Py_None ? at::Tensor() : unpack_tensor(object, name, "Tensor");
}

at::Tensor unpack_key(PyObject* object) {
  if (object == Py_None) return {};
  return unpack_tensor(object, "key", "a Tensor (dropout_ext.key makes one)");
}

void check_one_source(bool has_key, const std::optional<at::Generator>& generator) {
  TORCH_CHECK_VALUE(!(has_key && generator),
                    "dropout(): arguments 'key' and 'generator' exclude each other: a key is "
                    "drawn from a generator only where none is given");
}

std::optional<at::ScalarType> unpack_dtype(PyObject* object, const char* name) {
  if (object == Py_None) return std::nullopt;
  TORCH_CHECK_TYPE(THPDtype_Check(object), "dropout(): argument '", name,
                   "' must be torch.dtype, not ", type_name(object));
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

}  // namespace dropout_ext
