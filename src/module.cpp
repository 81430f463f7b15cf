// The module pocketzo._core. Its functions check their arguments, release the GIL and make one call.
#include "module.h"

#include "pocketzo/kernels.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "PocketZO's kernels. Use pocketzo.kernels.";
  m.attr("SPEC_VERSION") = pocketzo::kSpecVersion;
  m.attr("__version__") = POCKETZO_VERSION;
  binding::add_arrays(m);
  binding::add_segments(m);
  binding::add_packing(m);
  binding::add_products(m);
  binding::add_instruction_sets(m);
  binding::add_threads(m);
}
