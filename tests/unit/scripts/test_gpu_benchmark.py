"""The benchmark that needs a GPU runs: on a tiny shape, on the CPU, every part of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

META = torch.device("meta")
FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    return importlib.import_module("gpu")


@pytest.fixture(scope="module")
def rows(benchmark: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_rows")


def parts_of(file: Path) -> dict:
    return json.loads(file.read_text())["parts"]


# The eighth is `verify-resume`, which has its own tests and takes minutes.
PARTS = ("1 ,2,3,4,5,6,7", "9,10,11,12", "row: ", "published", "family: z_image")


@pytest.mark.ci
@pytest.mark.timeout(1800)  # a process for each row
@pytest.mark.parametrize("only", PARTS)
def test_every_part_runs_on_a_tiny_shape(only: str, benchmark: ModuleType, tmp_path: Path) -> None:
    words = ["--tiny", "--minutes=30", f"--only={only}", f"--file={tmp_path / 'gpu.json'}"]
    assert benchmark.main(words) == 0


SOME = ("row: recomputed to fit 15.5 GiB", "row: int8 all blocks swapped", "row: all weights by measure")
FAMILY_ROWS = ("family: flux plain", "family: sdxl recomputed", "family: z_image lowest")
OTHERS = ("4 waits", "5 parked inputs with dropout", "11 a padded batch", "published: omnigen lora")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOME, *FAMILY_ROWS, *OTHERS])
def test_a_part_runs_on_a_tiny_shape(name: str, benchmark: ModuleType, rows: ModuleType) -> None:
    setting = rows.setting_of(is_tiny=True)
    found = benchmark.parts(setting)[name](setting)
    json.dumps(found)
    if name.startswith(("row: ", "family: ")):
        assert found["seconds"] > 0
        assert found["planned_gib"] >= 0
    if name == "5 parked inputs with dropout":
        assert found["equal"]
    if name == "11 a padded batch":
        assert found["largest_difference"] < 0.05
    if name.startswith("published"):
        assert found["ours"]["seconds"] > 0
        assert found["published"]["seconds"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure here")
def test_without_a_gpu_it_says_so(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_measurements_come_first_and_in_order(benchmark: ModuleType, rows: ModuleType) -> None:
    names = list(benchmark.parts(rows.setting_of(is_tiny=True)))
    numbers = [int(name.split()[0]) for name in names if name[0].isdigit()]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, 13))
    kinds = ["row"] * len(rows.ROWS) + ["published"] * 6 + ["family"] * len(rows.FAMILY_ROWS)
    assert [name.partition(":")[0] for name in names[len(numbers) :]] == kinds


def test_the_full_shape_is_the_released_one(rows: ModuleType) -> None:
    model = rows.RandomOmniGen(rows.FULL, torch.device("meta")).public()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_762_072_592


@pytest.mark.parametrize(
    ("family", "count"),
    [("sdxl", 2_567_463_684), ("flux", 11_901_408_320), ("z_image", 6_154_908_736), ("qwen_image", 20_430_401_088)],
)
def test_other_families_have_the_released_shape(family: str, count: int, rows: ModuleType) -> None:
    model = rows.family_of(rows.Row(family=family), rows.Setting(True, META, 1024), META).public()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_a_missed_goal_is_seen(rows: ModuleType) -> None:
    row = rows.ROWS["recomputed to fit 15.5 GiB"]
    assert not rows.is_missed(row, {"seconds": 0.29, "peak_gib": 13.9})
    assert rows.is_missed(row, {"seconds": 0.31, "peak_gib": 13.9})
    assert rows.is_missed(row, {"seconds": 0.29, "peak_gib": 14.1})
    assert rows.is_missed(row, {"error": "out of memory"})
    assert not rows.is_missed(rows.ROWS["compiled"], {"error": "out of memory"})


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_says_so_and_ends_no_other(benchmark: ModuleType) -> None:
    def part(code: str, timeout: float = 60) -> dict:
        return benchmark.in_its_own_process([sys.executable, "-c", code], timeout)

    assert part("print('noise'); print('{\"seconds\": 0.2}')") == {"seconds": 0.2}
    assert part("raise MemoryError('out of memory')") == {"error": "MemoryError: out of memory"}
    assert part("import os; os._exit(9)") == {"error": "ended with 9 and without a word"}
    assert part("import time; time.sleep(60)", timeout=1) == {"error": "took longer than 1 s"}


def test_a_call_stops_when_its_time_is_over_and_the_next_one_goes_on(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran out of the call's time is taken again; what ran out of its own is not."""
    clock, asked, file = [0.0], [], tmp_path / "gpu.json"
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: clock[0])

    def one(command: list[str], timeout: float) -> dict:
        name = command[-1].removeprefix("--one=")
        asked.append((name, timeout))
        needed = {"quick": 30.0, "hangs": 1e9, "long": 200.0}[name]
        clock[0] += min(needed, timeout)
        return {"seconds": 1.0} if needed <= timeout else {"error": f"took longer than {timeout:.0f} s"}

    monkeypatch.setattr(benchmark, "in_its_own_process", one)
    names = ["quick", "hangs", "long"]
    benchmark.run_parts(names, file, 6, [])
    assert clock[0] <= 6 * 60
    assert list(parts_of(file)) == ["quick", "hangs"]
    benchmark.run_parts(names, file, 6, [])
    assert parts_of(file) == {
        "quick": {"seconds": 1.0}, "hangs": {"error": "took longer than 240 s"}, "long": {"seconds": 1.0}
    }  # fmt: skip
    assert [name for name, _ in asked] == ["quick", "hangs", "long", "long"]


def test_the_wheels_of_a_bare_machine_are_pinned_and_complete(benchmark: ModuleType) -> None:
    lines = benchmark.pinned(benchmark.WHEELS)
    assert len(lines) == len(benchmark.WHEELS)
    assert all("==" in line for line in lines)
    names = {name.lower() for name in benchmark.WHEELS}
    assert not names & {"torch", "bitsandbytes", "deepspeed"}  # there already, or too large
    there = everything_needed_by(["torch", "numpy"])
    assert everything_needed_by(names) - {canonicalize_name(name) for name in names} - there == {"ninja"}


def test_the_wheels_take_the_torch_of_a_bare_machine(benchmark: ModuleType) -> None:
    """2.11, with which rented machines come."""
    lines = [(name, Requirement(line)) for name in benchmark.WHEELS for line in importlib.metadata.requires(name) or ()]
    of_torch = [
        (name, each.specifier) for name, each in lines if each.name == "torch" and "extra" not in str(each.marker)
    ]
    assert {"accelerate", "peft", "optimum-quanto"} <= {name for name, _ in of_torch}
    assert [name for name, specifier in of_torch if not specifier.contains("2.11.0")] == []


def everything_needed_by(names: Iterable[str]) -> set[str]:
    """The packages and what they require, as they are installed here; extras and other systems left out."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            lines = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [canonicalize_name(r.name) for r in lines if not r.marker or r.marker.evaluate({"extra": ""})]
    return found
