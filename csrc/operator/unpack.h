// Python arguments of an eager call. Not through pybind11's casters, which take longer than the
// rest of a small call. Errors are those of the argument `name`.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <torch/csrc/python_headers.h>

#include <optional>
#include <vector>

namespace dropout_ext {

// Whether the call can go straight to the dispatcher: an ordinary tensor on a device with a kernel,
// nothing that traces, transforms or intercepts it, and no keys of Python's to take.
bool is_plain(PyObject* object);

const at::Tensor& unpack_tensor(PyObject* object, const char* name, const char* accepted);
// Undefined for None.
at::Tensor unpack_optional_tensor(PyObject* object, const char* name);
at::Tensor unpack_key(PyObject* object);
bool unpack_bool(PyObject* object);
double unpack_float(PyObject* object, const char* name);
// Of an index modulo 2^64 the int64 of the same bits.
int64_t unpack_index(PyObject* object, const char* name);
std::optional<at::Generator> unpack_generator(PyObject* object);
// None: no key was given, so a generator may be.
void check_one_source(bool has_key, const std::optional<at::Generator>& generator);
std::vector<c10::SymInt> unpack_strides(PyObject* object);
std::optional<at::ScalarType> unpack_dtype(PyObject* object, const char* name);

// Whether what is no tensor stands for one, as a torch.fx.Proxy does, and overrides the call.
bool has_torch_function(PyObject* object);

}  // namespace dropout_ext
