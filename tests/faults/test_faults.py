"""A run that is killed or refused by the disk at any operation on its files: the next start makes up for it.

`python -m tests.faults.every_operation` does it at every operation, with each fault.
"""

from __future__ import annotations

import random

import pytest

from tests.faults.cases import ERRORS, Scene
from tests.faults.forks import Operation

pytestmark = pytest.mark.ci
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_a_kill_at_any_call_site_costs_nothing(scene: Scene, part: int) -> None:
    sites = scene.sites()
    assert len(sites) > 200
    assert [line for site in sites[part::PARTS] for line in scene.check(site)] == []


@pytest.mark.parametrize("part", range(PARTS))
def test_a_refusal_of_the_disk_once_ends_with_0_or_3_and_costs_nothing(scene: Scene, part: int) -> None:
    cases = list(enumerate(scene.sites()))[part::PARTS]
    assert [line for number, site in cases for line in scene.check(site, ERRORS[number % 4])] == []


@pytest.mark.parametrize("part", range(PARTS))
def test_a_disk_that_refuses_from_then_on_ends_with_0_or_3_and_costs_nothing(scene: Scene, part: int) -> None:
    cases = list(enumerate(scene.sites()))[part::PARTS]
    wrong = [line for number, site in cases for line in scene.check(site, ERRORS[(number + 2) % 4], persists=True)]
    assert wrong == []


@pytest.mark.parametrize(("refuses", "persists"), [(False, False), (True, False), (True, True)])
def test_the_rotation_of_a_run_that_keeps_two_costs_nothing_either(
    scene: Scene, rotating_scene: Scene, refuses: bool, persists: bool
) -> None:
    known = {operation.site for operation in scene.sites()}
    sites = [operation for operation in rotating_scene.sites() if operation.site not in known]
    assert any("rename" in operation.call for operation in sites)
    errors = [ERRORS[number % 4] if refuses else 0 for number in range(len(sites))]
    found = [rotating_scene.check(site, error, persists) for site, error in zip(sites, errors, strict=True)]
    assert [line for lines in found for line in lines] == []


@pytest.mark.parametrize("part", range(PARTS))
def test_faults_at_100_sampled_operations_of_a_first_run_cost_nothing(first_scene: Scene, part: int) -> None:
    """Scanning and caching are in it."""
    rng = random.Random(7)
    sample = rng.sample(first_scene.operations, 100)
    kinds = [(0, False), *((error, persists) for error in ERRORS for persists in (False, True))]
    cases = [(operation, *rng.choice(kinds)) for operation in sample][part::PARTS]
    assert [line for case in cases for line in first_scene.check(*case)] == []


def test_a_name_that_is_drawn_does_not_tell_one_operation_from_another() -> None:
    names = ("shard-0a1b2c3d4e5f60718293a4b5c6d7e8f9", "shard-ffffaaaa000011112222bbbbccccdddd")
    first, second = (Operation(1, "write", f"cache/{name}.safetensors", ("storage.py:1",), 0).site for name in names)
    assert first == second
    assert first != Operation(1, "write", "cache/index.sqlite", ("storage.py:1",), 0).site
