"""Full fine-tuning behind the adapter's interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.adapters.build import build_adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.errors import ConfigError, DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import perturb, run_stock

BUILD = {"lora_type": "lycoris", "lycoris": None, "dtype": torch.float32, "seed": 1}


def test_every_parameter_trains() -> None:
    denoiser = tiny_omnigen_transformer().requires_grad_(False)
    adapter = build_adapter(denoiser, OMNIGEN, model_type="full", **BUILD)
    assert set(adapter.trainable_parameters()) == {name for name, _ in denoiser.named_parameters()}
    assert all(p.requires_grad for p in denoiser.parameters())


def test_what_is_saved_is_what_diffusers_loads(tmp_path: Path) -> None:
    denoiser = tiny_omnigen_transformer()
    adapter = FullAdapter(denoiser, OMNIGEN)
    perturb(adapter.trainable_parameters())
    adapter.save(tmp_path / adapter.file_name, {"global_step": "3"})
    loaded = type(denoiser).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(run_stock(loaded), run_stock(denoiser))


def test_there_is_no_base_to_fall_back_on() -> None:
    adapter = FullAdapter(tiny_omnigen_transformer(), OMNIGEN)
    with pytest.raises(ConfigError, match="is_regularisation_data"):
        adapter.disabled()


def test_weights_of_another_model_are_refused_before_anything_changes() -> None:
    adapter = FullAdapter(tiny_omnigen_transformer(), OMNIGEN)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    other = FullAdapter(tiny_omnigen_transformer(hidden_size=64, seed=1), OMNIGEN)
    with pytest.raises(DataError, match="shape"):
        adapter.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model_type": "lora"}, "lycoris_config"),
        ({"model_type": "tiny"}, "model_type"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_key(settings, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_adapter(tiny_omnigen_transformer(), OMNIGEN, **(BUILD | settings))
    assert caught.value.problems[0].key == key
