"""Presets of models by card: the shapes are those of the releases, and the file holds what the shapes give."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from simpletuner.commands.models import detail_lines
from simpletuner.examples import copy_example
from simpletuner.examples.presets import presets
from simpletuner.families.presets import (
    CARDS,
    PRESETS_FILE,
    Preset,
    preset_for,
    presets_of,
    smallest_card,
    usable_bytes,
)
from simpletuner.families.registry import FAMILIES, get_spec

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from presets import presets_of as computed_presets
from released_shapes import SHAPES


def test_every_flavour_has_presets():
    assert json.loads(PRESETS_FILE.read_text()).keys() == FAMILIES.keys()
    for family in FAMILIES:
        for flavour in get_spec(family).flavours:
            assert tuple(presets_of(family, flavour)) == CARDS, f"python scripts/presets.py {family}"


def test_a_card_takes_the_preset_of_the_largest_one_that_is_not_larger():
    assert usable_bytes(24) == 23_579_370_455  # 0.94 of 24 GiB without 0.6 GiB
    known = presets_of("flux", "dev")
    for gib, card in ((7.9, None), (8, 8), (11, 8), (15.9, 12), (16, 16), (79, 24), (200, 80)):
        assert preset_for("flux", "dev", gib) == (known[card] if card else None)
    assert [smallest_card(*model) for model in (("flux2", "dev"), ("sd15", "1.5"), ("no", "model"))] == [12, 8, None]
    assert preset_for("no", "model", 80) is None
    assert presets_of("flux", "nothing") == {}


def test_a_preset_is_told_in_one_line():
    swapped = Preset({"base_model_precision": "nf4-bnb", "gradient_checkpointing": True, "resolution": 512,
                      "musubi_blocks_to_swap": 9}, 7.5, 3.0)  # fmt: skip
    assert swapped.text() == "nf4-bnb, checkpointed, 9 blocks swapped, 512 px: 7.5 GiB and 3.0 GiB of main memory"
    whole = Preset({"resolution": 1024, "gradient_checkpointing": False}, 9.0, 0.0)
    assert whole.text() == "bf16, 1024 px: 9.0 GiB"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "flavour"), [key for key in SHAPES if key[0] in FAMILIES], ids="-".join)
def test_a_shape_has_as_many_parameters_as_the_release(family: str, flavour: str):
    spec = get_spec(family)
    module, _, name = spec.component("denoiser").class_name.rpartition(".")
    with torch.device("meta"):
        denoiser = getattr(importlib.import_module(module), name)(**SHAPES[family, flavour].denoiser)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == spec.flavours[flavour].parameters


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name == "sd15" else pytest.mark.ci) for name in FAMILIES]
)
def test_the_file_holds_what_the_shapes_give(family: str):
    assert computed_presets(family) == json.loads(PRESETS_FILE.read_text())[family]


def test_a_larger_card_is_never_worse_off():
    """Neither in the size of images nor in the bits of the frozen weights."""
    for family in FAMILIES:
        for flavour in get_spec(family).flavours:
            found = [preset for preset in presets_of(family, flavour).values() if preset]
            sides = [preset.options["resolution"] for preset in found]
            assert sides == sorted(sides), (family, flavour)
            assert all(
                preset.gib * 2**30 <= usable_bytes(card) + 2**27
                for card, preset in presets_of(family, flavour).items()
                if preset
            )


def test_a_card_between_two_takes_the_preset_of_the_smaller():
    assert preset_for("sdxl", "base-1.0", 20) == presets_of("sdxl", "base-1.0")[16]
    assert preset_for("sdxl", "base-1.0", 6) is None
    assert preset_for("sdxl", "no such flavor", 24) is None


def test_models_says_what_trains_on_which_card():
    preset = presets_of("flux", "dev")[24]
    assert preset is not None
    assert f"    on 24 GB: {preset.text()}" in detail_lines(get_spec("flux"))
    assert smallest_card("sd15", "1.5") == 8


@pytest.mark.slow
def test_each_preset_is_a_configuration_that_can_be_read(tmp_path: Path):
    from simpletuner.config.discovery import ConfigSource
    from simpletuner.config.loading import load_source

    for name, spec, flavour, card, preset in presets():
        if card not in (8, 24):
            continue
        folder = copy_example(name, tmp_path / name)
        (folder / "datasets" / "images").mkdir(parents=True)
        run = load_source(ConfigSource(folder / "config.json", "json"), (), {}, folder, variables={})
        assert (run.config.model.model_family, run.config.model.model_flavour) == (spec.name, flavour.name)
        assert {key: run.config.value(key) for key in preset.options} | {
            key: value for key, value in preset.options.items() if key.endswith("interval")
        } == dict(preset.options)
