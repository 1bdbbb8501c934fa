"""Full fine-tuning behind the adapter's interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.adapters.build import build_adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.config.trained_parts import rates_of
from simpletuner.errors import ConfigError, DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.configs import config_of
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import perturb, run_stock


def test_every_parameter_trains() -> None:
    denoiser = tiny_omnigen_transformer().requires_grad_(False)
    adapter = build_adapter(denoiser, OMNIGEN, config_of(model_type="full"), None)
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


def test_lycoris_without_its_file_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build_adapter(tiny_omnigen_transformer(), OMNIGEN, config_of(lora_type="lycoris"), None)
    assert caught.value.problems[0].key == "lycoris_config"


def test_texts_choose_weights_by_parts_of_their_names() -> None:
    names = ["x_embedder.weight", "layers.0.to_q.weight", "layers.1.to_q.weight", "layers.1.to_k.weight"]
    assert rates_of(names, (), ()) == dict.fromkeys(names, 1.0)
    assert rates_of(names, (".",), ()) == dict.fromkeys(names, 1.0)
    assert rates_of(names, ("layers.1",), ("to_q",)) == {names[1]: 0.5, names[2]: 1.0, names[3]: 1.0}


@pytest.mark.parametrize(
    ("modules", "low", "key", "words"),
    [
        (("self_attn", "ropj_out"), (), "trainable_modules", 'no weight has "ropj_out" in its name'),
        (("proj_outt",), (), "trainable_modules", 'did you mean "proj_out"?'),
        (("self_attn",), ("nothing",), "trainable_modules_low_learning_rate", "input_layernorm"),
        (("self_attn",), ("to_q",), "trainable_modules_low_learning_rate", "are in trainable_modules already"),
    ],
)
def test_a_text_that_trains_nothing_is_refused(modules, low, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FullAdapter(tiny_omnigen_transformer(), OMNIGEN, modules, low)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert words in caught.value.render()


def test_weights_that_are_not_named_are_frozen_and_saved() -> None:
    denoiser = tiny_omnigen_transformer()
    adapter = FullAdapter(denoiser, OMNIGEN, ("to_q",))
    frozen = {name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad}
    assert set(adapter.trainable_parameters()) == {name for name, _ in denoiser.named_parameters()} - frozen
    assert all("to_q" not in name for name in frozen)
    assert [(each.entry, each.modules) for each in adapter.report] == [("to_q", len(adapter.trainable_parameters()))]
