"""The power fails at operations of a short run: `python -m tests.faults.power [fs=xfs] [every=n]`, as root.

A kill leaves what the kernel has in memory, and the next start reads it. Here the run lies on a disk in a file (a loop
device). When the process has been killed the file is copied and the copy is mounted, so that only what had reached the
disk is there: the journal is replayed, and what nobody had synced is gone. The order of writes is the file system's
own; ext4 is mounted with `data=writeback`, which may keep the name of a file and not its content.

Each checkpoint that the run had reported must be there and whole, and the next start must end with the same bits.
One line for everything that is wrong; the exit code is 1 where something is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from simpletuner import storage
from tests.faults import forks
from tests.faults.cases import CHARTS, Result, differences, result_of, write
from tests.memory_folder import memory_folder
from tests.tiny import tiny_omnigen_folder

# File system -> megabytes of the disk, its command, and how it is mounted.
KINDS = {
    "ext4": (96, ["mkfs.ext4", "-q", "-F"], "loop,data=writeback"),
    "xfs": (320, ["mkfs.xfs", "-q", "-f"], "loop"),
}


class Disk:
    """A disk in a file, mounted at `place`."""

    def __init__(self, folder: Path, kind: str):
        megabytes, make, self._options = KINDS[kind]
        self._file, self.place = folder / "disk", folder / "mounted"
        self.place.mkdir()
        with self._file.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run([*make, self._file], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", self._options, self._file, self.place], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.place], check=True)

    def keep(self, copy: Path) -> None:
        """Copy everything that is on the disk, after it was brought there."""
        self.unmount()
        shutil.copyfile(self._file, copy)
        self.mount()

    def restore(self, copy: Path) -> None:
        self.unmount()
        shutil.copyfile(copy, self._file)
        self.mount()

    def cut_power(self) -> None:
        """Lose what has not reached the disk."""
        left = self._file.with_name("left")
        shutil.copyfile(self._file, left)
        self.restore(left)


def main() -> None:
    settings = dict(word.split("=") for word in sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=memory_folder()) as name:
        folder = Path(name)
        disk = Disk(folder, settings.get("fs", "ext4"))
        try:
            wrong = _try_all(disk, folder, int(settings.get("every", 1)))
        finally:
            disk.unmount()
    sys.exit(wrong > 0)


def _try_all(disk: Disk, folder: Path, every: int) -> int:
    run, start, record = disk.place / "run", folder / "start", folder / "record"
    write(run, tiny_omnigen_folder(folder / "model"))
    disk.keep(start)
    assert forks.run(run, record=record) == 0, forks.terminal(run)
    expected, operations = result_of(run), forks.operations(record)[::every]
    num_wrong = 0
    for operation in operations:
        disk.restore(start)
        found = list(_faults(disk, run, operation, expected))
        num_wrong += bool(found)
        for line in found:
            print(f"{operation}: {line}", flush=True)
    print(f"{len(operations)} operations, {num_wrong} wrong")
    return num_wrong


def _faults(disk: Disk, run: Path, operation: forks.Operation, expected: Result) -> Iterator[str]:
    """What is wrong after the power failed at an operation."""
    forks.run(run, fault=forks.Fault(operation))
    reported = max(map(int, re.findall(r"checkpoint saved at step (\d+)", forks.terminal(run))), default=0)
    disk.cut_power()
    checkpoints = (run / "output").glob("checkpoint-[0-9]*")
    newest = max((int(path.name[11:]) for path in checkpoints if not storage.verify_dir(path)), default=0)
    if newest < reported:
        yield f"checkpoint {reported} was reported, and {newest} is there"
    if code := forks.run(run):
        yield f"exit {code}: {forks.terminal(run)[-500:]}"
    else:
        # Lines of the record are not synced one by one; a curve of this short run may lack its second point.
        yield from (line for line in differences(run, expected, is_record_whole=False) if not CHARTS.match(line))


if __name__ == "__main__":
    main()
