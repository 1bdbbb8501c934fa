"""Every operation of a short run, with each fault: `python -m tests.faults.every_operation [kill] [EIO] [every=n]`.

Words choose faults, `every=n` takes each n-th operation only. One line for everything that is wrong; the exit code is 1
where something is.
"""

from __future__ import annotations

import errno
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.cases import ERRORS, Scene, memory_folder
from tests.tiny import tiny_omnigen_folder


def main() -> None:
    words = [word for word in sys.argv[1:] if "=" not in word]
    every = next((int(word.partition("=")[2]) for word in sys.argv[1:] if "=" in word), 1)
    kinds = {"kill": (0, False)}
    for error in ERRORS:
        kinds |= {errno.errorcode[error]: (error, False), f"{errno.errorcode[error]}-on": (error, True)}
    chosen = {name: kinds[name] for name in words or kinds}
    with tempfile.TemporaryDirectory(dir=memory_folder()) as name:
        folder = Path(name)
        scene = Scene(folder / "scene", tiny_omnigen_folder(folder / "model"), is_cached=False)
        operations, total = scene.operations[::every], 0
        for kind, (error, persists) in chosen.items():
            started, wrong = time.monotonic(), 0
            for operation in operations:
                found = scene.check(operation, error, persists)
                wrong += bool(found)
                for line in found:
                    print(line, flush=True)
            seconds = time.monotonic() - started
            print(f"{kind}: {len(operations)} operations, {wrong} wrong, {seconds:.0f} s", flush=True)
            total += wrong
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
