"""Every operation of a short run, with each fault: `python -m tests.faults.every_operation [WORD ...]`.

Round 0 kills at each operation. In each of the rounds 1 to 8 every operation meets one of the eight refusals, in the
order of its own, so each round covers all operations and all refusals, and the eight together are everything. Words:
`sites` takes one operation of each call site and kind of file, another one in each round (another step, another image;
the eight rounds show each site all eight refusals in less than half of the time), `rounds=0-2` takes these rounds,
`every=n` each n-th operation, `jobs=n` tries n at once, and the name of a fault (`kill`, `EIO`, `EIO-on`) takes that
one only.

One line for everything that is wrong, one for each round and each kind of fault; the exit code is 1 where something is.
"""

from __future__ import annotations

import errno
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.cases import ERRORS, Scene
from tests.faults.forks import Operation
from tests.memory_folder import memory_folder
from tests.tiny import tiny_omnigen_folder

KILL = "kill"
REFUSALS = {
    f"{errno.errorcode[error]}{suffix}": (error, persists)
    for error in ERRORS
    for suffix, persists in (("", False), ("-on", True))
}
FAULTS = {KILL: (0, False)} | REFUSALS


def faults_of(round_number: int, operations: Sequence[Operation], by_site: bool) -> list[tuple[Operation, str]]:
    """What meets which fault in a round.

    Args:
        by_site: one operation stands for all of its site.
    """
    chosen: dict[object, list[Operation]] = {}
    for operation in operations:
        chosen.setdefault(operation.site if by_site else operation.number, []).append(operation)
    trials = []
    for key, alike in chosen.items():
        order = [KILL, *random.Random(str(key)).sample(list(REFUSALS), len(REFUSALS))]
        trials.append((random.Random(f"{round_number} {key}").choice(alike), order[round_number]))
    return trials


def main() -> None:
    settings = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
    words = {word for word in sys.argv[1:] if "=" not in word}
    if unknown := words - {"sites", *FAULTS}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: sites, {', '.join(FAULTS)}")
    by_site = "sites" in words
    names = [name for name in FAULTS if name in words] or list(FAULTS)
    first, _, last = settings.get("rounds", f"0-{len(REFUSALS)}").partition("-")
    tried, wrong = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(dir=memory_folder()) as name:
        folder = Path(name)
        scene = Scene(folder / "scene", tiny_omnigen_folder(folder / "model"), is_cached=False)
        operations = scene.operations[:: int(settings.get("every", 1))]
        print(f"{len(scene.operations)} operations, {len({each.site for each in scene.operations})} sites", flush=True)

        def try_one(trial: tuple[Operation, str]) -> None:
            operation, fault = trial
            try:
                found = scene.check(operation, *FAULTS[fault])
            except (OSError, ValueError, LookupError) as error:  # what is to be compared is not there
                found = [f"{fault} at {operation}: {error!r}"]
            tried[fault] += 1
            wrong[fault] += bool(found)
            for line in found:
                print(line, flush=True)

        with ThreadPoolExecutor(int(settings.get("jobs", 1))) as threads:
            for number in range(int(first), int(last or first) + 1):
                started = time.monotonic()
                trials = [trial for trial in faults_of(number, operations, by_site) if trial[1] in names]
                list(threads.map(try_one, trials))
                seconds = time.monotonic() - started
                print(
                    f"round {number}: {len(trials)} trials, {seconds:.0f} s; wrong so far: {wrong.total()}", flush=True
                )
    for fault in tried:
        print(f"{fault}: {tried[fault]} trials, {wrong[fault]} wrong")
    sys.exit(wrong.total() > 0)


if __name__ == "__main__":
    main()
