"""The benchmark of a step compares equal work: the same products on both sides, of every family that it names."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.families.registry import FAMILIES

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    return importlib.import_module("step_against_peft")


def flops(step: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        step().backward()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_both_sides_take_the_same_products(name: str, benchmark: ModuleType) -> None:
    ours, theirs, again = benchmark.sides(name, importlib.import_module("random_families").TINY[name], 64, "low")
    assert flops(ours) == flops(theirs) == flops(again) > 0


def test_a_missed_goal_ends_with_1(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds are given: no test depends on time."""
    monkeypatch.setattr(benchmark, "MEDIUM", importlib.import_module("random_families").TINY)
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda _: None)
    for ours, code in ((1.02, 1), (1.00, 0)):
        seconds = [ours, 1.0, 1.01]  # ours, theirs, theirs again
        calls = iter([0.0] * 3 + [seconds[(number + place) % 3] for number in range(3) for place in range(3)])
        monkeypatch.setattr(benchmark, "processor_seconds", lambda step, calls=calls: next(calls))
        assert benchmark.main(["flux", "--rounds=3", "--pixels=64"]) == code
        row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]["flux"]
        assert row["spread"] == pytest.approx(0.01)
        assert row["ratio"] == pytest.approx(ours / 1.005, abs=1e-4)


def test_lowest_repeats_the_share_of_products_that_its_limit_allows(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 0)
    network = importlib.import_module("random_families").TINY["z_image"]
    (lowest, low, again), share = benchmark.own_levels("z_image", network, 64)
    assert flops(low) == flops(again) < flops(lowest) <= (1 + share) * flops(low)


def test_every_family_with_a_public_class_is_compared(benchmark: ModuleType) -> None:
    without = {"omnigen2", "qwen_image_21"}
    same_network = {"qwen_image_edit"}  # as qwen_image
    assert {*benchmark.MEDIUM, "omnigen"} == FAMILIES.keys() - without - same_network
    assert set(benchmark.NOT_ABOVE_THEIRS) <= benchmark.MEDIUM.keys()
