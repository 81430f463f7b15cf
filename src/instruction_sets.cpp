// Which instruction sets there are, and the one in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "pocketzo/kernels.h"

namespace binding {
namespace {

std::vector<std::string> available() {
  const char* names[4];
  return {names, names + pz::available(names, std::size(names))};
}

void use(const std::string& name) {
  if (pz::use(name.c_str())) return;
  std::string known;
  for (const std::string& set : available()) known += (known.empty() ? "" : ", ") + set;
  throw py::value_error("instruction set '" + name +
                        "' is unknown, or this build or processor lacks it; there is: " + known);
}

}  // namespace

void add_instruction_sets(py::module_& m) {
  m.def("isa", &pz::instruction_set);
  m.def("available", &available);
  m.def("use", &use, py::arg("name"));
  m.def("has_fp16_arithmetic", &pz::has_fp16_arithmetic);
}

}  // namespace binding
