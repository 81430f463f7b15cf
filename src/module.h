// The parts of the module. Each adds its functions and classes.
#pragma once

#include <pybind11/pybind11.h>

namespace binding {

void add_arrays(pybind11::module_& m);
void add_instruction_sets(pybind11::module_& m);
void add_packing(pybind11::module_& m);
void add_products(pybind11::module_& m);
void add_segments(pybind11::module_& m);
void add_threads(pybind11::module_& m);

}  // namespace binding
