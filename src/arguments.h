// Checks Python arguments and reads their values. Arrays are refused, never converted: work on a converted copy would
// be silently lost. Every error names the argument, what was expected and what came.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "pocketzo/kernels.h"

namespace binding {

namespace py = pybind11;
namespace pz = pocketzo;

inline std::string shown(py::handle value) { return py::repr(value).cast<std::string>(); }

inline py::object integer(py::handle value, const char* name) {
  auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be an integer, got " + shown(value));
  }
  return index;
}

template <typename T>
T unsigned_integer(py::handle value, const char* name) {
  const auto index = integer(value, name);
  const unsigned long long n = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred() != nullptr || n > std::numeric_limits<T>::max()) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must be in 0 .. 2**" + std::to_string(8 * sizeof(T)) + " - 1, got " +
                          shown(value));
  }
  return static_cast<T>(n);
}

inline float finite_float(py::handle value, const char* name) {
  const double v = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be a number, got " + shown(value));
  }
  if (!(std::fabs(v) <= std::numeric_limits<float>::max()))
    throw py::value_error(std::string(name) + " must be finite in float32, got " + shown(value));
  return static_cast<float>(v);
}

inline pz::Distribution distribution_of(py::handle name) {
  if (py::isinstance<py::str>(name)) {
    if (name.equal(py::str("gaussian"))) return pz::Distribution::gaussian;
    if (name.equal(py::str("rademacher"))) return pz::Distribution::rademacher;
  }
  throw py::value_error("distribution must be 'gaussian' or 'rademacher', got " + shown(name));
}

inline pz::Rounding rounding_of(py::handle name) {
  if (py::isinstance<py::str>(name)) {
    if (name.equal(py::str("nearest"))) return pz::Rounding::nearest;
    if (name.equal(py::str("stochastic"))) return pz::Rounding::stochastic;
  }
  throw py::value_error("rounding must be 'nearest' or 'stochastic', got " + shown(name));
}

// Sets `storage` and returns true if a dtype is one of its values. numpy has no bfloat16; that of ml_dtypes is
// recognised by its name.
inline bool storage_of(const py::dtype& dtype, pz::Storage& storage) {
  const auto name = py::str(dtype.attr("name")).cast<std::string>();
  if (!dtype.attr("isnative").cast<bool>()) return false;
  storage = name == "float16"    ? pz::Storage::float16
            : name == "bfloat16" ? pz::Storage::bfloat16
                                 : pz::Storage::float32;
  return storage != pz::Storage::float32 || name == "float32";
}

// Returns the array itself: C-contiguous, aligned, writable, and float32 or, for weights, a 16-bit format.
inline py::array checked(py::handle value, const char* name, bool weights = false) {
  const std::string kinds = weights ? "float32, float16 or bfloat16" : "float32";
  const std::string expected = std::string(name) + " must be a writable, C-contiguous " + kinds + " array";
  if (!py::isinstance<py::array>(value)) throw py::type_error(expected + ", got " + shown(py::type::handle_of(value)));
  auto array = py::reinterpret_borrow<py::array>(value);
  pz::Storage storage{};
  if (!storage_of(array.dtype(), storage) || !(weights || storage == pz::Storage::float32))
    throw py::type_error(expected + ", got dtype " + shown(py::str(array.dtype())));
  if ((array.flags() & py::array::c_style) == 0) throw py::value_error(expected + ", got one that is not contiguous");
  if (!array.writeable()) throw py::value_error(expected + ", got a read-only one");
  const auto size = static_cast<std::uintptr_t>(array.itemsize());
  if (reinterpret_cast<std::uintptr_t>(array.data()) % size != 0)
    throw py::value_error(expected + ", got one whose address is not a multiple of " + std::to_string(size));
  return array;
}

inline pz::Segment segment_of(py::array& array, py::handle tensor, py::handle offset) {
  pz::Segment s{array.mutable_data(), static_cast<std::uint64_t>(array.size()),
                unsigned_integer<std::uint64_t>(offset, "offset"), unsigned_integer<std::uint32_t>(tensor, "tensor")};
  storage_of(array.dtype(), s.storage);
  if (s.size > std::numeric_limits<std::uint64_t>::max() - s.offset)
    throw py::value_error("offset + size must not exceed 2**64 - 1, got offset " + shown(offset));
  return s;
}

inline std::uint64_t packed_size(const pz::Packing& p) { return p.rows * p.stride; }

inline py::array checked_packed(py::handle value, const pz::Packing& p) {
  auto array = checked(value, "packed");
  if (static_cast<std::uint64_t>(array.size()) != packed_size(p))
    throw py::value_error("packed must have " + std::to_string(packed_size(p)) + " elements, got " +
                          std::to_string(array.size()));
  return array;
}

}  // namespace binding
