"""What the extension asks of the C library on 64-bit Arm, against what Android's has at API level 24.

The subject is compiled here as the wheel is, by zig for manylinux_2_17, but for the C++ runtime: the wheel holds zig's,
while on Android it is a library of its own (libc++_shared.so), so that what the runtime asks of glibc says nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GLIBC = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-aarch64.so.1"}
# The Itanium C++ ABI's mangled names and support functions, and CPython's; both come from libraries that Termux has.
OTHERS = re.compile(r"_Z|__cxa_|__gxx_personality_v0$|__dynamic_cast$|_Unwind_|_?Py[A-Z_]")
COMPILE = (
    *("-c", "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"),
    "-mcpu=generic+fullfp16+bf16+i8mm",  # any kernel's instructions at once
    "-fno-builtin-bcmp",  # clang calls it for memcmp where the target's C library has it, as bionic has not
    '-DPOCKETZO_VERSION=""',
)

NEEDED = [name for name in ("ziglang", "pybind11", "elftools") if find_spec(name) is None]
compiles = pytest.mark.skipif(bool(NEEDED), reason=f"not installed, and needed to compile for aarch64: {NEEDED}")


def bionic() -> dict[str, set[str]]:
    text = re.sub("#.*", "", (TESTS / "bionic_api24.txt").read_text())
    return {library: set(names.split()) for library, names in re.findall(r"^(\S+)\n((?:  .*\n)+)", text, re.MULTILINE)}


def extension(folder: Path, *sources: Path) -> Path:
    """Compile and link for aarch64, with what is not in the sources or the C library left open."""

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    target = "-target", "aarch64-linux-gnu.2.17"
    include = [f"-I{ROOT / 'cpp'}", f"-I{ROOT / 'cpp/include'}", *run("pybind11", "--includes").split()]
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        run("ziglang", "c++", *target, *COMPILE, *include, source, "-o", compiled)
    run("ziglang", "cc", *target, "-shared", *objects, "-o", folder / "it.so")  # as C: without a C++ runtime
    return folder / "it.so"


def undefined(path: Path) -> dict[str, str | None]:
    """Return the names that a library leaves open, with the library that has them, if the linker found it."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        elf = ELFFile(file)
        origin = {
            version["vna_other"]: need.name
            for need, versions in elf.get_section_by_name(".gnu.version_r").iter_versions()
            for version in versions
        }
        versions = elf.get_section_by_name(".gnu.version")
        return {
            symbol.name: origin.get(versions.get_symbol(number)["ndx"])
            for number, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols())
            if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name
        }


def not_in_bionic(path: Path) -> set[str]:
    known = set().union(*bionic().values()) | {"__errno_location"}  # errno, which in bionic is __errno
    return {
        name
        for name, library in undefined(path).items()
        if not (name in known if library in GLIBC else library is None and OTHERS.match(name))
    }


def test_the_list_says_what_android_is_known_for() -> None:
    libc, libm = bionic()["libc.so"], bionic()["libm.so"]
    has = {"__errno", "getauxval", "madvise", "posix_memalign", "pthread_barrier_wait", "sched_setaffinity", "mmap64"}
    lacks = {"aligned_alloc", "getrandom", "memfd_create", "pthread_setaffinity_np", "shm_open", "malloc_trim", "bcmp"}
    assert has <= libc
    assert not lacks & libc
    assert {"sqrtf", "fmaf", "lgammal_r"} <= libm
    assert not {"cpow", "exp10"} & libm
    assert (len(libc), len(libm)) == (1173, 267)


@compiles
def test_the_extension_asks_for_nothing_that_bionic_lacks(tmp_path: Path) -> None:
    kernels = [path for path in sorted((ROOT / "cpp").glob("*.cpp")) if not path.stem.startswith("avx")]
    it = extension(tmp_path, *kernels, *sorted((ROOT / "src").glob("*.cpp")))
    assert {"madvise", "sysconf", "sched_getaffinity"} <= {name for name, lib in undefined(it).items() if lib in GLIBC}
    assert not_in_bionic(it) == set()


@compiles
def test_what_bionic_lacks_is_found(tmp_path: Path) -> None:
    (tmp_path / "bad.cpp").write_text(
        "#include <cstdlib>\n#include <pthread.h>\n#include <cmath>\n"
        'extern "C" long getrandom(void*, unsigned long, unsigned);\n'  # younger than glibc 2.17, so of no library
        'extern "C" __attribute__((visibility("default"))) void* bad(cpu_set_t* set) {\n'
        "  pthread_setaffinity_np(pthread_self(), sizeof *set, set);\n"
        "  const double x = getrandom(nullptr, 0, 0) + exp10(CPU_COUNT(set));\n"
        "  return std::aligned_alloc(64, static_cast<unsigned long>(x));\n"
        "}\n"
    )
    it = extension(tmp_path, tmp_path / "bad.cpp")
    assert not_in_bionic(it) == {"aligned_alloc", "exp10", "getrandom", "pthread_setaffinity_np"}
