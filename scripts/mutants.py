"""Plants known faults in a copy of the package, one at a time, and asks the tests whether they see them.

    python scripts/mutants.py                  every fault of scripts/mutants/
    python scripts/mutants.py training storage those of some lists; also by words of their description
    python scripts/mutants.py --sample 20      a random sample, another one for each commit
    python scripts/mutants.py --check          only whether every fault still fits the code

A list is a TOML file for each package: where a fault is (file, function, an expression in it), what stands there
instead, why it matters, and which tests should see it. The expression has to occur once in that function; line breaks
count as spaces. Code that has moved makes its entries stale, which is an error: give them their new place, or remove
them with what they were about. New code comes with its own entries.

Results are kept in build/mutants.jsonl, by the content of the entry, the mutated file and its tests, so that a run that
was stopped goes on where it was. The working tree is never changed: the faults are planted in a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mutant_lists import ROOT, Mutant, check, read_lists
from mutant_runs import run_all

RESULTS = ROOT / "build" / "mutants.jsonl"
# Of all; and the packages on which everything else stands, where none may survive.
FEWEST_CAUGHT = 0.95
STRICT = ("training", "storage", "distributed")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="lists, files or words of the description")
    parser.add_argument("--sample", type=int, help="so many of them, at random; the commit is the seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more after so long")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last time")
    parser.add_argument("--check", action="store_true", help="only whether each entry fits the code")
    given = parser.parse_args()

    mutants = read_lists()
    if problems := check(mutants):
        print("\n".join(problems), file=sys.stderr)
        print(f"{len(problems)} of {len(mutants)} entries are stale: the code has moved", file=sys.stderr)
        return 2
    if given.check:
        print(f"{len(mutants)} faults fit the code: {dict(Counter(mutant.package for mutant in mutants))}")
        return 0
    mutants = [each for each in mutants if _is_wanted(each, given.words)]
    mutants.sort(key=lambda each: each.package not in STRICT)
    if given.sample is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        mutants = random.Random(commit.stdout).sample(mutants, min(given.sample, len(mutants)))
    known = {} if given.again else read_results()
    results = {mutant: known[key] for mutant in mutants if (key := mutant.key()) in known}
    if given.survivors:
        last = {record["title"] for record in read_results(last=True).values() if record["result"] != "caught"}
        mutants = [mutant for mutant in mutants if mutant.title in last]
        results = {}
    open_ones = [mutant for mutant in mutants if mutant not in results]
    print(f"{len(mutants)} faults, {len(results)} known, {len(open_ones)} to plant", flush=True)
    run_open(open_ones, results, given.workers, time.monotonic() + 60 * given.minutes)
    return report(mutants, results)


def _is_wanted(mutant: Mutant, words: Sequence[str]) -> bool:
    return not words or any(word == mutant.package or word in mutant.title for word in words)


def run_open(mutants: Sequence[Mutant], results: dict[Mutant, dict[str, Any]], workers: int, deadline: float) -> None:
    """Fill in `results`, and keep each of them in the file."""
    if not mutants:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    RESULTS.parent.mkdir(exist_ok=True)
    keys = {mutant: mutant.key() for mutant in mutants}
    with RESULTS.open("a", encoding="utf-8") as file:
        for mutant, result in run_all(mutants, workers, deadline):
            results[mutant] = result
            if result["result"] != "broken":
                file.write(json.dumps({"key": keys[mutant], "title": mutant.title, **result}) + "\n")
                file.flush()
            print(f"{result['result']:9}{result['seconds']:6} s  {mutant.title}  [{result['by']}]", flush=True)


def read_results(last: bool = False) -> dict[str, dict[str, Any]]:
    """Earlier results by key; with `last`, by title."""
    if not RESULTS.is_file():
        return {}
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {record["title" if last else "key"]: record for record in records if record["result"] != "broken"}


def report(mutants: Sequence[Mutant], results: dict[Mutant, dict[str, Any]]) -> int:
    """Print what was found by package; 0 where enough was caught."""
    tried = [mutant for mutant in mutants if mutant in results]
    missed = [mutant for mutant in tried if results[mutant]["result"] != "caught"]
    for package in dict.fromkeys(mutant.package for mutant in tried):
        of_package = [mutant for mutant in tried if mutant.package == package]
        caught = sum(mutant not in missed for mutant in of_package)
        print(f"{package:14}{caught:4} of {len(of_package)}")
    for mutant in missed:
        print(f"{results[mutant]['result']}: {mutant.title}")
    print(f"caught {len(tried) - len(missed)} of {len(tried)}; {len(mutants) - len(tried)} were not tried")
    is_strict = any(mutant.package in STRICT for mutant in missed)
    return int(is_strict or len(missed) > (1 - FEWEST_CAUGHT) * max(len(tried), 1))


if __name__ == "__main__":
    sys.exit(main())
