"""A run that is killed or refused by the disk at any operation on its files: the next start makes up for it.

`python -m tests.faults.every_operation` does it at every operation, with each fault.
"""

from __future__ import annotations

import random

import pytest

from tests.faults.cases import ERRORS, Scene

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


@pytest.mark.parametrize("part", range(PARTS))
def test_faults_at_100_sampled_operations_of_a_first_run_cost_nothing(first_scene: Scene, part: int) -> None:
    """Scanning and caching are in it."""
    rng = random.Random(7)
    sample = rng.sample(first_scene.operations, 100)
    kinds = [(0, False), *((error, persists) for error in ERRORS for persists in (False, True))]
    cases = [(operation, *rng.choice(kinds)) for operation in sample][part::PARTS]
    assert [line for case in cases for line in first_scene.check(*case)] == []
