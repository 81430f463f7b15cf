"""Fail where a wheel's extensions are not what 64-bit Arm loads: python cmake/check_wheel.py WHEEL SUFFIX."""

from __future__ import annotations

import io
import re
import sys
import zipfile

from elftools.elf.elffile import ELFFile

PAGE = 16 * 1024  # bytes: the pages of phones since Android 15, and of some boards

wheel, suffix = sys.argv[1:]
if not (glibc := re.search(r"manylinux_2_(\d+)_aarch64\.whl$", wheel)) or int(glibc[1]) > 28:
    sys.exit(f"{wheel}: expected manylinux_2_28_aarch64 or lower")  # that of onnxruntime's own wheels
with zipfile.ZipFile(wheel) as archive:
    extensions = [name for name in archive.namelist() if name.endswith(".so")]
    if extensions != [f"pocketzo/_core{suffix}"]:
        sys.exit(f"{wheel}: expected one extension, pocketzo/_core{suffix}, got {extensions}")
    elf = ELFFile(io.BytesIO(archive.read(extensions[0])))
machine, alignment = elf["e_machine"], min(s["p_align"] for s in elf.iter_segments("PT_LOAD"))
if machine != "EM_AARCH64" or alignment < PAGE:
    sys.exit(f"{extensions[0]}: expected EM_AARCH64, aligned to {PAGE} bytes or more, got {machine}, {alignment}")
print(f"{extensions[0]}: {machine}, load segments aligned to {alignment} bytes")
