"""The command line with the demo's encoder cut, for emulators. All else is as it ships."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cut_minilm import cut

from pocketzo.__main__ import main
from pocketzo.demo import head, run

with tempfile.TemporaryDirectory() as temporary:
    checkpoint = cut(Path(temporary))
    for module in head, run:
        vars(module)["find_checkpoint"] = lambda directory: checkpoint
    main()
