"""`scripts/interface.py`: it sees every kind of name that a user spells, and names one that is gone or changed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

import interface  # noqa: E402
from same_results import Facts, differences  # noqa: E402


@pytest.fixture(scope="module")
def facts() -> Facts:
    return interface.interface_of(ROOT)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("options", "seed", "default"), 42),
        (("datasets", "image", "required"), ["id"]),
        (("other keys", "Renamed keys > lr_schedule"), "lr_scheduler"),
        (("webhooks", "log_level"), "debug, info, warning, error, critical, default `info`"),
        (("webhook events", "properties", "schema_version", "const"), 1),
        (("commands", "plan", "--device-memory"), {"type": "float", "min": 1}),
        (("commands", "cache verify"), {}),
    ],
)
def test_each_kind_of_name_is_described(facts: Facts, path: tuple[str, ...], value: object):
    found = facts
    for key in path:
        found = found[key]
    if value != {}:
        assert found == value


def test_a_flag_that_is_gone_and_a_default_that_changed_are_named(facts: Facts):
    changed = copy.deepcopy(facts)
    del changed["commands"]["train"]["--monitor"]
    changed["options"]["seed"]["default"] = 43
    assert differences(facts, changed) == [
        "options > seed > default: 42 -> 43",
        "commands > train > --monitor > type: bool -> missing",
    ]
