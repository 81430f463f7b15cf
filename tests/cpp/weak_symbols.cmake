# Fails if one of OBJECTS, which are the instruction sets' files compiled without optimisation, defines a weak symbol.
#
# Of several weak definitions of an inline function the linker keeps one, for every caller. If that is the one from
# avx512.cpp, a processor without AVX-512 dies in what scalar.cpp calls. Optimised, such functions are usually inlined
# and leave no symbol, which is why this looks at a build that is not.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  if(NOT symbols MATCHES "pocketzo::k")
    message(FATAL_ERROR "${NM} shows no kernel set in ${object}")
  endif()
  # nm's V, W and lower case: weak; u: unique, as inline variables are. DW.ref.* are the compiler's own, and no code.
  string(REGEX MATCHALL "[^\n]* [VvWwu] [^\n]*" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX "DW\\.ref\\.")
  if(weak)
    list(JOIN weak "\n" weak)
    message(SEND_ERROR "${object} defines weak symbols:\n${weak}")
  endif()
endforeach()
