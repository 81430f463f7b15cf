# Fails if one of OBJECTS, the instruction sets' files compiled without optimisation, defines a weak symbol.
#
# The linker keeps one weak definition of an inline function for all callers. If it keeps the one from avx512.cpp,
# scalar.cpp executes AVX-512 instructions on CPUs that lack them. In an optimised build such functions are usually
# inlined and leave no symbol, so the check needs an unoptimised one.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  if(NOT symbols MATCHES "pocketzo::k")
    message(FATAL_ERROR "${NM} shows no kernel set in ${object}")
  endif()
  # nm's V, v, W and w are weak symbols, u unique ones (inline variables). The compiler's own DW.ref.* hold no code.
  string(REGEX MATCHALL "[^\n]* [VvWwu] [^\n]*" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX "DW\\.ref\\.")
  if(weak)
    list(JOIN weak "\n" weak)
    message(SEND_ERROR "${object} defines weak symbols:\n${weak}")
  endif()
endforeach()
