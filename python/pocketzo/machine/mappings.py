"""Files that are mapped into the memory of this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

MAPS: Final = Path("/proc/self/maps")


def file_mappings(path: Path) -> dict[int, tuple[int, int]]:
    """Return where this process has mapped a file.

    Returns
    -------
    dict of int to (int, int)
        By offset in the file, the address and the length of the mapping, in bytes.

    Raises
    ------
    OSError
        The list of mappings cannot be read.
    """
    found = {}
    wanted = os.fsencode(path.resolve()).replace(b"\n", rb"\012")  # other files' names may be in any encoding
    for line in MAPS.read_bytes().split(b"\n"):
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode and, if any, a name
        if fields[5:] == [wanted]:
            start, stop = (int(address, 16) for address in fields[0].split(b"-"))
            found[int(fields[2], 16)] = start, stop - start
    return found
