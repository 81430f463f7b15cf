# Cross-builds wheels for 64-bit Arm Linux with the clang of PyPI's `ziglang`: for glibc 2.17 and with libc++ inside, so
# that they run where manylinux_2_17 wheels do. (Debian's GCC, which builds the C++ tests, makes them need its own glibc.)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(POCKETZO_ZIG python-zig REQUIRED)
set(CMAKE_CXX_COMPILER ${POCKETZO_ZIG} c++ -target aarch64-linux-gnu.2.17)
set(CMAKE_CXX_ARCHIVE_CREATE "${POCKETZO_ZIG} ar qcs <TARGET> <OBJECTS>")  # CMAKE_AR takes no `ar` after the program
set(CMAKE_CXX_ARCHIVE_FINISH "")
set(CMAKE_MODULE_LINKER_FLAGS_INIT -s)  # the machine's own strip knows no Arm
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
