"""`lycoris_config.json` is checked before anything is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from simpletuner.adapters.lycoris_config import check_lycoris_config, resolve_targets
from simpletuner.models.omnigen.spec import OMNIGEN


def problems_of(lycoris) -> dict[str | None, str]:
    return {problem.key: problem.render() for problem in check_lycoris_config(lycoris, OMNIGEN, "lycoris.json")}


def test_the_quickstart_has_no_problem(quickstart) -> None:
    assert problems_of(quickstart) == {}


@pytest.mark.parametrize(
    ("lycoris", "key", "says"),
    [
        ({"alog": "lokr"}, "alog", 'did you mean "algo"?'),
        ({"algo": "lokrr"}, "algo", "allowed: lokr"),
        ({"algo": "full"}, "algo", "model_type full"),
        ({"use_scalar": True}, "use_scalar", "cannot be used"),
        ({"linear_dim": "big"}, "linear_dim", "not a number"),
        ({"linear_dim": 0}, "linear_dim", "at least 1"),
        ({"dora_wd": "yes"}, "dora_wd", "true, false"),
        ({"apply_preset": []}, "apply_preset", "not a JSON object"),
        ({"apply_preset": {"target_modul": []}}, "apply_preset.target_modul", 'did you mean "target_module"?'),
        ({"apply_preset": {"target_module": "Attention"}}, "apply_preset.target_module", "not a list"),
        ({"apply_preset": {"target_module": ["Atention"]}}, "apply_preset.target_module", "OmniGenFeedForward"),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"linear_dim": 4}}}},
            "apply_preset.module_algo_map.Attention.linear_dim",
            'did you mean "dim"?',
        ),
        ({"apply_preset": {"module_algo_map": {"Attention": 4}}}, "apply_preset.module_algo_map", "not a map"),
        ({"apply_preset": {"target_name": ["layers.(*"]}}, "apply_preset.target_name", "use_fnmatch"),
    ],
)
def test_each_mistake_names_its_key_and_the_way_out(lycoris, key: str, says: str) -> None:
    problems = problems_of(lycoris)
    assert list(problems) == [key]
    assert says in problems[key]
    assert problems[key].startswith("lycoris.json: ")


def test_all_mistakes_are_found_at_once() -> None:
    assert set(problems_of({"alog": "lokr", "factor": None, "apply_preset": {"target_name": 3}})) == {
        "alog",
        "factor",
        "apply_preset.target_name",
    }


def test_an_alias_gives_way_to_a_class_of_that_name(quickstart) -> None:
    targets = resolve_targets(quickstart, OMNIGEN, {"Attention", "OmniGenFeedForward"})
    assert targets.classes == {"Attention": "Attention", "FeedForward": "OmniGenFeedForward"}
    assert targets.module_algo_map["OmniGenFeedForward"] == {"factor": 8}
    assert resolve_targets(quickstart, OMNIGEN, {"FeedForward"}).classes["FeedForward"] == "FeedForward"


def test_checking_needs_no_torch() -> None:
    code = "import sys, simpletuner.adapters.lycoris_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
