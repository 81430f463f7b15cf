"""Instructions and estimated cycles per element of the NEON kernels on three cores, without an Arm machine.

    python bench/cycles.py [--compiler zig|gcc] [--json FILE]

The object file of the wheel (cmake/aarch64-zig.cmake) runs under qemu, which logs each instruction. The difference
between a call on 2 n blocks and one on n blocks gives both figures: the instruction count, which is exact, and the
cycles that llvm-mca estimates. llvm-mca assumes first-level cache hits and correctly predicted branches. So the
figures compare kernels and find stalls; they are not times. gcc is Debian's, which builds the C++ tests.

Needs llvm-mca and llvm-objdump 19 (older ones model every large core as a Cortex-A57), qemu-aarch64-static, cmake,
ninja, and zig or aarch64-linux-gnu-g++: apt install llvm-19 qemu-user-static; pip install cmake ninja ziglang.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine, rounded
from tables import CORES, OPERATIONS, ROOT, cycles_table

OBJECTS = "CMakeFiles/pocketzo_kernels.dir/cpp"
COMPILERS = {
    # musl, since the emulator has no libraries for Arm; the kernels call none.
    "zig": ("cmake/aarch64-zig.cmake", ["python-zig", "c++", "-target", "aarch64-linux-musl"]),
    "gcc": ("cmake/aarch64.cmake", ["aarch64-linux-gnu-g++"]),
}
TILE = 64  # blocks
BLOCK = 64  # elements


@dataclass
class Tools:
    mca: str
    objdump: str
    qemu: str
    compiler: list[str]


def output(*command: str | Path, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"cycles.py: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def find_tools(compiler: str) -> Tools:
    """Find the tools, or exit naming those that are missing."""
    build = COMPILERS[compiler][1]
    names = ["llvm-mca-19", "llvm-objdump-19", "qemu-aarch64-static", "cmake", "ninja", build[0]]
    if missing := [name for name in names if shutil.which(name) is None]:
        sys.exit(f"cycles.py needs {', '.join(missing)}; see --help for where to get them")
    return Tools(names[0], names[1], names[2], build)


def build(tools: Tools, toolchain: str, folder: Path) -> Path:
    """Build the kernels as the wheel does, and a program around their NEON object."""
    output("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_TOOLCHAIN_FILE={ROOT / toolchain}")
    output("cmake", "--build", folder, "--target", "pocketzo_kernels")
    suffix = ".o" if (folder / OBJECTS / "neon.cpp.o").exists() else ".obj"
    program = folder / "cycles"
    source = [ROOT / "bench" / "cycles.cpp", folder / OBJECTS / f"neon.cpp{suffix}"]
    output(*tools.compiler, "-static", "-std=c++20", "-I", "cpp", "-I", "cpp/include", *source, "-o", program)
    return program


def disassemble(tools: Tools, program: Path) -> dict[int, str]:
    """Return the kernels' instructions by address, as text that llvm-mca reads as a straight run."""
    code, inside = {}, False
    for line in output(tools.objdump, "-d", "--no-show-raw-insn", program).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            inside = "8pocketzo" in match[1]
        elif inside and (match := re.match(r"\s*([0-9a-f]+):\s+(.*?)\s*(//.*)?$", line)):
            # The next line of the trace is the target of every branch.
            code[int(match[1], 16)] = re.sub(r"0x[0-9a-f]+ <.*>", "here", match[2])
    return code


def trace(tools: Tools, program: Path, code: dict[int, str], operation: str, n: int) -> list[str]:
    """Return the kernels' instructions that the operation on n blocks executes, in order."""
    log = program.with_name("log")
    output(tools.qemu, "-singlestep", "-d", "exec,nochain", "-D", log, program, operation, str(n))
    counters = re.findall(r"^Trace \d+: 0x[0-9a-f]+ \[[0-9a-f]+/([0-9a-f]+)/", log.read_text(), flags=re.MULTILINE)
    return [code[address] for address in (int(counter, 16) for counter in counters) if address in code]


def cycles(tools: Tools, core: str, lines: list[str]) -> int:
    """Return llvm-mca's estimate for a straight run of instructions."""
    source = "\n".join(["here:", *lines, ""])
    arguments = ["-mtriple=aarch64", f"-mcpu={core}", "-iterations=1", "-call-latency=1", "-instruction-info=0"]
    report = output(tools.mca, *arguments, "-resource-pressure=0", text=source)
    match = re.search(r"^Total Cycles:\s+(\d+)$", report, flags=re.MULTILINE)
    if match is None:
        sys.exit(f"cycles.py: {tools.mca} reports no cycles:\n{report}")
    return int(match[1])


def measure(tools: Tools, program: Path, code: dict[int, str], operation: str) -> dict[str, Any]:
    n, elements = (1, TILE * BLOCK) if operation == "two" else (32, 32 * BLOCK)
    short, long = (trace(tools, program, code, operation, count) for count in (n, 2 * n))
    if len(long) <= len(short) or len(short) < elements / 16:
        sys.exit(f"cycles.py: {operation} executes {len(short)} and {len(long)} instructions: the kernel was not found")
    return {
        "operation": operation,
        "instructions": (len(long) - len(short)) / elements,
        "cycles": {core: (cycles(tools, core, long) - cycles(tools, core, short)) / elements for core in CORES},
    }


def version(*command: str) -> str:
    match = re.search(r"\d+\.\d+(\.\d+)?", output(*command))
    return match[0] if match else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", choices=COMPILERS, default="zig")
    parser.add_argument("--json", type=Path, help="write the figures, with the machine, to this file")
    arguments = parser.parse_args()

    tools = find_tools(arguments.compiler)
    described = {**machine(), "busy": 0.0}  # nothing is timed, so that other load does not matter
    described["versions"] = {
        "pocketzo": described["versions"]["pocketzo"],
        "clang" if arguments.compiler == "zig" else "gcc": version(*tools.compiler, "--version"),
        "llvm-mca": version(tools.mca, "--version"),
        "qemu": version(tools.qemu, "--version"),
    }
    with tempfile.TemporaryDirectory() as folder:
        program = build(tools, COMPILERS[arguments.compiler][0], Path(folder))
        code = disassemble(tools, program)
        rows = [measure(tools, program, code, operation) for operation in OPERATIONS]
    report = rounded({"machine": described, "results": {"rows": rows}})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(cycles_table(report)))


if __name__ == "__main__":
    main()
