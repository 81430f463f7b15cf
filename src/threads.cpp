// The number of threads.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "module.h"
#include "pocketzo/kernels.h"

namespace binding {
namespace {

void set_threads(py::handle count) {
  const long n = PyLong_AsLong(integer(count, "threads").ptr());
  PyErr_Clear();  // n is -1 if it does not fit a long
  if (n < 1 || n > static_cast<long>(pz::kMaxThreads))
    throw py::value_error("threads must be in 1 .. " + std::to_string(pz::kMaxThreads) + ", got " + shown(count));
  bool done = false;
  {
    const py::gil_scoped_release release;  // so that other Python threads run while threads are joined
    done = pz::set_threads(static_cast<unsigned>(n));
  }
  if (!done) throw std::runtime_error("the system refuses to start " + std::to_string(n - 1) + " threads");
}

}  // namespace

void add_threads(py::module_& m) {
  m.attr("MAX_THREADS") = pz::kMaxThreads;
  m.def("threads", &pz::threads);
  m.def("set_threads", &set_threads, py::arg("count"));
}

}  // namespace binding
