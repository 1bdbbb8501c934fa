"""A layer of a model can be named by its own path, before the model is there: in `lora_target` and for LyCORIS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.adapters.targets import lora_layers
from simpletuner.config.json_reader import parse_json
from simpletuner.config.lora import is_known
from simpletuner.config.lycoris import check_lycoris
from simpletuner.config.patterns import may_match
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from tests.tiny_folders import TINY_FOLDERS


def check(family: str, *names: str, **preset: Any) -> list[str]:
    document = parse_json(json.dumps({"algo": "lokr", "apply_preset": {"target_name": names, **preset}}), "l.json")
    return [problem.message for problem in check_lycoris(document, get_spec(family))]


@pytest.mark.parametrize("name", family_names())
def test_every_layer_of_a_family_is_known_by_its_path(name: str, tmp_path: Path) -> None:
    spec = get_spec(name)
    source = ModelSource(str(TINY_FOLDERS[name](tmp_path)))
    denoiser = get_family_class(spec)(spec, source, torch.device("meta"), torch.float32).empty_denoiser()
    paths, _ = lora_layers(denoiser, ("all-linear",), spec)
    assert paths
    assert [path for path in paths if not is_known(path, spec)] == []
    assert check(name, *paths) == []
    assert check(name, *paths, use_fnmatch=True) == []


def test_places_of_a_unet_are_known_and_places_that_it_lacks_are_not() -> None:
    spec = get_spec("sdxl")
    for pattern in ("down_blocks.*", "up_blocks.0.attentions.[01].*", "mid_block.attentions.0.*", "*attn1*"):
        assert is_known(pattern, spec), pattern
        assert check("sdxl", pattern, use_fnmatch=True) == []
    for pattern in (r"up_blocks\.0\.attentions\.(0|1)\..*", "down_blocks.2.attentions"):
        assert check("sdxl", pattern) == []
    for pattern in ("middle.*", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_z"):
        assert not is_known(pattern, spec), pattern
    assert check("sdxl", "middle.*", use_fnmatch=True) == ['"middle.*" matches no module']
    assert check("sdxl", "(") == ['"(" is not a regular expression: missing ), unterminated subpattern at position 0']


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("a*b", "ac*b", True),
        ("a?c", "a*", True),
        ("layers.1?.mlp", "layers.*.mlp", True),
        ("layers.*.mlp", "layers.*.attn", False),
        ("layers", "layers.*", False),
        ("*", "x", True),
        ("", "", True),
        ("*", "", True),
        ("a", "", False),
        ("*x", "y*", True),
        ("a" * 5000, "*attentions.*.norm", False),
        ("*" + "a" * 5000 + "*", "layers.*.mlp", True),
    ],
)
def test_a_pattern_may_match_where_one_path_fits_both(pattern: str, name: str, fits: bool) -> None:
    assert may_match(pattern, [name]) is fits
