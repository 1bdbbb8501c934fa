"""Full fine-tuning behind the adapter's interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simpletuner.adapters.base import copy_into, values_replaced
from simpletuner.adapters.build import build_adapter, lora_settings
from simpletuner.adapters.full import FullAdapter
from simpletuner.adapters.lora import LoraSettings
from simpletuner.adapters.reading import read_tensor_file
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


def test_a_denoiser_without_a_configuration_is_saved_as_its_weights_alone(tmp_path: Path) -> None:
    layer = nn.Linear(2, 1).requires_grad_(False)
    FullAdapter(layer, OMNIGEN).save(tmp_path / "a.safetensors", {"x": "y", "format": "own"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    tensors, metadata = read_tensor_file(tmp_path / "a.safetensors")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "weight": layer.weight.tolist(), "bias": layer.bias.tolist()
    }  # fmt: skip
    assert (metadata["x"], metadata["format"], metadata["modelspec.title"]) == ("y", "own", "OmniGen")


def test_there_is_no_base_to_fall_back_on() -> None:
    adapter = FullAdapter(tiny_omnigen_transformer(), OMNIGEN)
    with pytest.raises(ConfigError, match="is_regularisation_data: prior preservation takes its target from the base"):
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


def test_an_average_is_written_in_the_format_of_the_weights_and_the_live_ones_stay(tmp_path: Path) -> None:
    denoiser = tiny_omnigen_transformer().to(torch.bfloat16)
    adapter = FullAdapter(denoiser, OMNIGEN, ("to_q",))
    name = next(iter(adapter.trainable_parameters()))
    before = denoiser.state_dict()[name].clone()
    adapter.save(tmp_path / adapter.file_name, {}, {name: before.float() + 1})
    saved = load_file(tmp_path / adapter.file_name)
    assert saved.keys() == denoiser.state_dict().keys()
    assert torch.equal(saved[name], (before.float() + 1).bfloat16())
    assert torch.equal(denoiser.state_dict()[name], before)


def test_parts_of_a_spread_denoiser_train_and_frozen_parts_are_saved_with_them() -> None:
    adapter = FullAdapter(tiny_omnigen_transformer(), OMNIGEN, ("to_q",))
    part, frozen = torch.nn.Parameter(torch.ones(2)), torch.zeros(3)
    adapter.use_parts({"a": part}, {"b": frozen})
    assert adapter.trainable_parameters() == {"a": part}
    state = adapter.state_to_save()
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_texts_are_reported_with_the_weights_that_each_names() -> None:
    denoiser = tiny_omnigen_transformer()
    adapter = FullAdapter(denoiser, OMNIGEN, ("to_q",), ("to_k", "proj_out"))
    counts = {
        text: sum(text in name for name, _ in denoiser.named_parameters()) for text in ("to_q", "to_k", "proj_out")
    }
    assert {each.entry: each.modules for each in adapter.report} == counts
    [whole] = FullAdapter(denoiser, OMNIGEN).report
    assert (whole.entry, whole.modules) == ("all parameters", len(list(denoiser.parameters())))


def test_values_of_other_names_or_shapes_are_refused_before_anything_is_copied() -> None:
    parameters = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(1))}
    with pytest.raises(DataError) as caught:
        copy_into(parameters, {"a": torch.ones(2), "c": torch.ones(1)})
    text = caught.value.render()
    assert "there is no weight for b" in text
    assert "the weight c belongs to no trained parameter" in text
    with pytest.raises(DataError, match=r"the weight b has shape .*3.*; the parameter .*1"):
        copy_into(parameters, {"a": torch.ones(2), "b": torch.ones(3)})
    assert [parameter.tolist() for parameter in parameters.values()] == [[0, 0], [0]]


def test_replaced_values_end_with_the_context_also_after_an_error() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def fail() -> None:
        with values_replaced({"a": parameter}, {"a": torch.tensor([3.0, 4.0])}):
            assert parameter.tolist() == [3, 4]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert parameter.tolist() == [1, 2]


def test_products_under_autocast_see_values_that_were_copied() -> None:
    """Autocast keeps the 16-bit copy of a weight until its context ends."""
    parameter, x = torch.nn.Parameter(torch.ones(1, 1)), torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(x, parameter).item() == 1
        copy_into({"a": parameter}, {"a": torch.full((1, 1), 2.0)})
        assert torch.nn.functional.linear(x, parameter).item() == 2


def test_every_setting_of_a_lora_is_the_option_of_its_name() -> None:
    options = {
        **{"lora_rank": 3, "lora_alpha": 5.0, "lora_dropout": 0.25, "lora_init_type": "olora", "use_dora": True},
        **{"lora_target": ("feed-forward",), "lora_format": "kohya"},
    }
    assert lora_settings(config_of(**options).adapter) == LoraSettings(
        3, 5.0, 0.25, "olora", True, ("feed-forward",), "kohya"
    )
    assert lora_settings(config_of(**options).adapter).scale == 5 / 3


@pytest.mark.parametrize(("targets", "told"), [(("to_q",), ""), (("attention",), "; it has no weights for 6 of the")])
def test_a_start_is_told_with_the_layers_that_it_leaves_new(targets, told: str, tmp_path: Path) -> None:
    targets = tuple("layers.*.self_attn.to_q" if each == "to_q" else each for each in targets)
    first = config_of(lora_type="standard", lora_rank=2, lora_target=("layers.*.self_attn.to_q",))
    build_adapter(tiny_omnigen_transformer(), OMNIGEN, first, None).save(tmp_path / "a.safetensors", {})
    second = config_of(
        lora_type="standard", lora_rank=2, lora_target=targets, init_lora=str(tmp_path / "a.safetensors")
    )
    [line] = build_adapter(tiny_omnigen_transformer(), OMNIGEN, second, None).notices
    assert line.startswith(f"started from {tmp_path / 'a.safetensors'}{told}")
    assert bool(told) == ("no weights" in line)
