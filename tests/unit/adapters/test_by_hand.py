"""How keys, settings and targets of adapters are read, piece by piece, with literal names and numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.adapters import lokr_kernels, reading
from simpletuner.adapters.base import Adapter, MatchCount, copy_into
from simpletuner.adapters.effect import _read_off, _single_ones
from simpletuner.adapters.formats import modules_in_file
from simpletuner.adapters.layers import device_of, floating_dtype, is_layer, layer_class, num_rows
from simpletuner.adapters.lokr_kernels import Trial
from simpletuner.adapters.lora import LoraSettings
from simpletuner.adapters.metadata import adapter_metadata, modelspec_metadata
from simpletuner.adapters.peft_settings import config_beside, scale_of_layer, settings_in
from simpletuner.adapters.reading import adapter_from_tensors
from simpletuner.adapters.smoke_test import _example_input, smoke_test
from simpletuner.adapters.targets import (
    LycorisTargets,
    _patterns_that_take,
    adaptable_classes,
    adaptable_paths,
    count_matches,
    lora_layers,
    require_matches,
)
from simpletuner.adapters.weights import ALPHA, DORA, DOWN, UP, AdapterWeights, alpha_tensor
from simpletuner.errors import ConfigError, DataError
from simpletuner.families.registry import get_spec
from simpletuner.precision.linear import QuantizedLinear
from simpletuner.precision.quantize import get_format
from tests.tiny_flux import tiny_flux_transformer

OMNIGEN, SDXL, FLUX = (get_spec(name) for name in ("omnigen", "sdxl", "flux"))
ONE = torch.ones(1, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv, self.norm = nn.Linear(2, 3), nn.Conv2d(2, 5, 3), nn.LayerNorm(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList([Block(), Block()]), nn.Linear(2, 2)


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "module", "tensor"),
    [
        ("a.lora_A.weight", "a", DOWN),
        ("a.lora_B.weight", "a", UP),
        ("a.lora_A.default.weight", "a", DOWN),
        ("a.lora_B.default.weight", "a", UP),
        ("a.lora.down.weight", "a", DOWN),
        ("a.lora.up.weight", "a", UP),
        ("a.lora_down.weight", "a", DOWN),
        ("a.lora_magnitude_vector", "a", DORA),
        ("a.lora_magnitude_vector.weight", "a", DORA),
        ("a.dora_scale", "a", DORA),
        ("a.alpha", "a", ALPHA),
        ("a.b.lokr_w2_a", "a.b", "lokr_w2_a"),
        ("a.weight", "a", "weight"),
        ("a1.weight.a1.weight", "a1.weight", "a1.weight"),
        ("a.strange", "a.strange", ""),
    ],
)
def test_a_key_is_a_layer_and_a_tensor_by_any_program_s_name(key: str, module: str, tensor: str) -> None:
    assert reading.split_key(key) == (module, tensor)


@pytest.mark.parametrize(
    ("prefix", "spec"),
    [
        *((prefix, OMNIGEN) for prefix in ("lycoris_", "lora_unet_", "lora_transformer_", "diffusion_model.")),
        *((prefix, OMNIGEN) for prefix in ("transformer.", "base_model.model.", "model.diffusion_model.", "unet.", "")),
        ("unet.", SDXL),
    ],
)
def test_what_a_format_puts_in_front_is_taken_away_once(prefix: str, spec: Any) -> None:
    assert reading.without_prefix(f"{prefix}x.unet.y", spec) == "x.unet.y"


def test_the_format_is_that_of_the_first_key() -> None:
    keys = ("lycoris_a.lokr_w1", "lora_unet_a.alpha", "diffusion_model.a.lora_A.weight", "transformer.a", "a")
    assert [reading.format_of({key: ONE}) for key in keys] == ["lycoris", "kohya", "comfyui", "diffusers", "diffusers"]
    assert reading.format_of({}) == "diffusers"


def test_a_layer_has_its_own_name_with_dots_or_bars_and_that_of_the_original() -> None:
    denoiser = nn.Module()
    denoiser.transformer_blocks = nn.ModuleList([nn.Module()])
    denoiser.transformer_blocks[0].attn = nn.Module()
    denoiser.transformer_blocks[0].attn.to_out = nn.ModuleList([nn.Linear(2, 2)])
    names = reading.module_names(FLUX, denoiser)
    path = "transformer_blocks.0.attn.to_out.0"
    for name in (path, path.replace(".", "_"), "transformer_blocks.0.attn.to_out", "double_blocks.0.img_attn.proj"):
        assert names[name].parts == (path,), name
    assert "transformer_blocks.0.attn" not in names  # a container


def test_half_a_lora_and_unknown_layers_are_refused_with_a_reason() -> None:
    net = Net()
    for tensors, message in (
        ({}, "x.safetensors: holds no tensors"),
        ({"blocks.0.to_q.lora_A.weight": ONE}, "blocks.0.to_q has only one half of a LoRA"),
        ({"blocks.9.to_q.alpha": ONE, "out.alpha": ONE}, r"1 of 2 tensors belong to no module of Net: blocks\.9\.to_q"),
        ({"text_encoder.x.alpha": ONE}, "it also changes the text encoder, which is not trained here"),
        ({"lora_te1_x.alpha": ONE}, "it also changes the text encoder, which is not trained here"),
        ({"out.strange": ONE}, "use the model that the adapter was trained on"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            reading.adapter_from_tensors(tensors, {}, OMNIGEN, net, "x.safetensors")
        assert "x.safetensors" in caught.value.render()


def test_alpha_is_that_of_the_file_of_peft_s_settings_or_the_rank() -> None:
    lora = {"out.lora_A.weight": torch.ones(4, 2), "out.lora_B.weight": torch.ones(2, 4)}
    settings = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.use_rslora": True})}
    for tensors, metadata, alpha in (
        (lora, {}, 4.0),
        (lora | {"out.alpha": torch.tensor(3.0)}, settings, 3.0),
        (lora, settings, 6 / 2 * 4),  # by the root of the rank
    ):
        found = reading.adapter_from_tensors(tensors, metadata, OMNIGEN, Net(), "x")
        assert found.modules["out"][ALPHA].item() == alpha
        assert found.modules["out"][ALPHA].dtype == torch.float32
        assert found.notices == ()


def test_magnitudes_of_peft_become_a_column_and_peft_without_settings_is_reported() -> None:
    tensors = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(2, 1), "lora_magnitude_vector": ONE[0]}
    tensors["lora_magnitude_vector"] = torch.tensor([3.0, 4.0])
    found = reading.adapter_from_tensors({f"out.{k}": t for k, t in tensors.items()}, {}, OMNIGEN, Net(), "x")
    assert found.modules["out"][DORA].tolist() == [[3.0], [4.0]]
    missing = "there is no adapter_config.json beside these PEFT weights, so alpha is taken to be the rank (scale 1)"
    del tensors["lora_magnitude_vector"]
    ways = {
        "base_model.model.out.": (missing,),
        "out.": (),
    }
    for prefix, notices in ways.items():
        named = {prefix + key: tensor for key, tensor in tensors.items()}
        assert reading.adapter_from_tensors(named, {}, OMNIGEN, Net(), "x").notices == notices
    named = {f"out.{key.replace('.weight', '.default.weight')}": tensor for key, tensor in tensors.items()}
    [notice] = reading.adapter_from_tensors(named, {}, OMNIGEN, Net(), "x").notices
    assert notice == f"{missing}; `simpletuner convert FILE --alpha N` writes another one"


def test_a_configuration_in_a_header_is_a_json_object() -> None:
    assert reading.lycoris_config_in({}, "x") == {}
    assert reading.lycoris_config_in({"lycoris_config": '{"algo": "lokr"}'}, "x") == {"algo": "lokr"}
    for text, message in (("[]", "x: its lycoris_config metadata is not a JSON object"), ("{", "is not JSON")):
        with pytest.raises(DataError, match=message):
            reading.lycoris_config_in({"lycoris_config": text}, "x")


# ---- settings of PEFT ------------------------------------------------------------------------------------------------


def test_the_scale_is_alpha_over_the_rank_by_the_pattern_that_fits() -> None:
    assert scale_of_layer({}, "a.to_q", 8) == 1.0
    assert scale_of_layer({"lora_alpha": 4}, "a.to_q", 8) == 0.5
    assert scale_of_layer({"lora_alpha": 4, "use_rslora": True}, "a.to_q", 8) == 4 / math.sqrt(8)
    patterns = {"lora_alpha": 4, "alpha_pattern": {"to_q": 16}}
    assert [scale_of_layer(patterns, path, 8) for path in ("a.to_q", "a.to_k")] == [2.0, 0.5]


def test_settings_lie_in_the_header_of_diffusers_or_beside_the_weights_of_peft(tmp_path: Path) -> None:
    assert settings_in({}, "unet", "x") is None
    header = {"lora_adapter_metadata": '{"unet.r": 4, "text_encoder.r": 2}'}
    assert settings_in(header, "unet", "x") == {"r": 4, "text_encoder.r": 2}
    assert settings_in({"adapter_config": '{"r": 8}', **header}, "unet", "x") == {"r": 8}
    with pytest.raises(DataError, match="x: its PEFT settings cannot be read"):
        settings_in({"adapter_config": "[1]"}, "unet", "x")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    assert config_beside(weights) == {}
    config.write_text('{"r": 8, "init_lora_weights": "gaussian"}')
    assert json.loads(config_beside(weights)["adapter_config"]) == {"r": 8, "init_lora_weights": "gaussian"}
    for text, message in (
        ("[]", f"{config}: is not a JSON object"),
        ('{"init_lora_weights": "OLoRA"}', "init_lora_weights: its weights belong on a base that olora has changed"),
        ('{"arrow_config": {"a": 1}}', "arrow_config: arrow_config computes another function"),
        ('{"layer_replication": [[0, 1]]}', "layer_replication: layer_replication computes another function"),
        ('{"peft_type": "IA3"}', "peft_type: it is a IA3 adapter of PEFT, and only LORA can be read from it"),
    ):
        config.write_text(text)
        with pytest.raises(DataError, match=message.replace("[", r"\[")):
            config_beside(weights)


# ---- layers and targets ----------------------------------------------------------------------------------------------


def test_layers_are_seen_through_quantization() -> None:
    packed = QuantizedLinear(nn.Linear(64, 32, bias=False), get_format("int8-quanto"))

    class Own(nn.Linear):
        pass

    assert [layer_class(each) for each in (packed, Own(2, 2), nn.Conv1d(2, 2, 1), nn.LayerNorm(2))] == [
        "Linear", "Own", "Conv1d", "LayerNorm"
    ]  # fmt: skip
    assert [is_layer(each) for each in (packed, nn.LayerNorm(2), nn.Sequential(packed), nn.SiLU())] == [
        True, True, False, False
    ]  # fmt: skip
    assert [num_rows(each) for each in (packed, nn.Conv2d(2, 7, 1))] == [32, 7]
    assert device_of(packed) == torch.device("cpu")
    codes = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)])
    assert floating_dtype(nn.Sequential(codes, packed, nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))) == torch.bfloat16


def test_what_could_be_adapted_is_listed_by_class_and_by_path() -> None:
    assert adaptable_classes(Net()) == ["Block", "Conv2d", "Linear", "ModuleList"]
    assert adaptable_paths(Net()) == ["blocks.*.to_q (2)", "blocks.*.conv (2)", "out (1)"]


def test_entries_that_adapt_nothing_are_named_by_their_key() -> None:
    targets = LycorisTargets(classes={"Nothing": "Nothing"}, names=("blocks.9.*",))
    report = [MatchCount("Nothing", "Nothing", 0), MatchCount("blocks.9.*", "", 0)]
    with pytest.raises(ConfigError) as caught:
        require_matches(report, Net(), targets, "lycoris.json")
    text = caught.value.render()
    assert 'apply_preset.target_module: "Nothing" adapts no layer of Net' in text
    assert 'apply_preset.target_name: "blocks.9.*" adapts no layer of Net' in text
    assert "Block, Conv2d, Linear, ModuleList" in text
    assert "blocks.*.to_q (2), blocks.*.conv (2), out (1)" in text
    with pytest.raises(ConfigError, match="apply_preset: names no layer to adapt"):
        require_matches([], Net(), targets)
    require_matches([MatchCount("Block", "Block", 2)], Net(), targets)


def test_a_layer_counts_for_its_class_the_classes_around_it_or_its_pattern() -> None:
    adapted = ["blocks.0.to_q", "blocks.0.conv", "blocks.1.to_q", "out"]
    targets = LycorisTargets(classes={"B": "Block", "Linear": "Linear"}, names=("blocks.1", "out"), use_fnmatch=True)
    # The second block is left to its pattern, and so is `out`; a layer in it counts for the pattern by its own path.
    assert count_matches(Net(), adapted, targets) == [
        MatchCount("B", "Block", 2), MatchCount("Linear", "Linear", 2), MatchCount("blocks.1", "", 0),
        MatchCount("out", "Linear", 1),
    ]  # fmt: skip


def test_of_a_map_the_exact_name_counts_first_and_else_the_first_pattern() -> None:
    targets = LycorisTargets({}, ("a", "a.*", "b"), name_algo_map={"a.*": {}, ".*": {}, "a.b": {}})
    assert _patterns_that_take("a.b", targets) == ["a.b", "a"]
    assert _patterns_that_take("a.c", targets) == ["a.*", "a"]
    assert _patterns_that_take("c", targets) == [".*"]


def test_targets_of_lora_are_in_the_order_of_the_model_and_counted() -> None:
    paths, report = lora_layers(Net(), ("out", "blocks.*.conv", "all-linear"), OMNIGEN)
    assert paths == ["blocks.0.to_q", "blocks.0.conv", "blocks.1.to_q", "blocks.1.conv", "out"]
    assert report == [
        MatchCount("out", "Linear", 1), MatchCount("blocks.*.conv", "Conv2d", 2), MatchCount("all-linear", "Linear", 3)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match='lora_target: "nowhere" adapts no layer of Net') as caught:
        lora_layers(Net(), ("nowhere",), OMNIGEN)
    assert "default, all-linear, attention, feed-forward, blocks.*.to_q (2)" in caught.value.render()


# ---- trying and measuring --------------------------------------------------------------------------------------------


def test_an_adapter_that_is_tried_is_as_it_was_and_one_without_effect_is_refused() -> None:
    class Beside(nn.Module):
        def __init__(self, works: bool):
            super().__init__()
            self.base, self.delta, self.works = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2), works

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return self.base(x) + (self.delta(x) if self.works else 0 * self.delta(x))

    module = Beside(True).train()
    before, draws = module.delta.weight.detach().clone(), torch.get_rng_state()
    smoke_test([(module, module.base, module)], "lora_target")
    assert torch.equal(module.delta.weight, before)
    assert torch.equal(torch.get_rng_state(), draws)
    assert module.training
    useless = Beside(False)
    with pytest.raises(ConfigError, match="lora_target: a Beside on Linear changes nothing and would train nothing"):
        smoke_test([(useless, useless.base, useless)], "lora_target")


def test_a_layer_is_tried_with_an_input_of_its_size() -> None:
    shapes = {
        nn.Linear(3, 5): (2, 3),
        nn.Conv2d(3, 5, (3, 2)): (1, 3, 6, 4),
        nn.GroupNorm(2, 6): (2, 6, 4),
        nn.LayerNorm((4, 3)): (2, 4, 3),
    }
    for layer, shape in shapes.items():
        assert _example_input(layer.bfloat16()).shape == shape
        assert _example_input(layer).dtype == torch.bfloat16


def test_a_weight_is_read_off_the_outputs_for_ones_and_the_bias_off_those_for_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("simpletuner.adapters.effect.ROWS_AT_ONCE", 4)
    layer = nn.Conv2d(2, 3, (1, 3))
    parts = list(_single_ones(torch.Size((2, 1, 3)), torch.device("cpu")))
    assert [part.shape for part in parts] == [(4, 2, 1, 3), (2, 2, 1, 3)]
    assert torch.equal(torch.cat(parts).flatten(1), torch.eye(6))
    weight, bias = _read_off(layer, layer)
    torch.testing.assert_close(weight, layer.weight.flatten(1))
    torch.testing.assert_close(bias, layer.bias)


def test_kernels_win_by_a_margin_and_say_so() -> None:
    assert (lokr_kernels.NUM_ROWS, lokr_kernels.MARGIN) == (4096, 1.1)
    assert list(lokr_kernels.TOLERANCES.values()) == [1e-3, 3e-2, 5e-3]  # float32, bfloat16, float16
    shapes = ((4, 4), (8, 16))
    slower, faster = Trial(shapes, (1.09e-3, 1e-3)), Trial(shapes, (1.2e-3, 1e-3))
    assert (slower.is_won, faster.is_won, slower.name) == (False, True, "4x4 8x16")
    assert str(slower) == "LoKr of 4x4 and 8x16: two products (two products 1.09 ms, LyCORIS' kernels 1.00 ms)"
    assert str(faster) == "LoKr of 4x4 and 8x16: LyCORIS' kernels (two products 1.20 ms, LyCORIS' kernels 1.00 ms)"
    assert str(Trial(shapes, None, "why")) == ("LoKr of 4x4 and 8x16: two products, since LyCORIS' kernels failed: why")
    for known, words in ((True, "LyCORIS' kernels"), (False, "two products")):
        trial = Trial(shapes, None, "", known)
        assert trial.is_won == known
        assert str(trial) == f"LoKr of 4x4 and 8x16: {words}, as the checkpoint or the main process says"


# ---- what files say --------------------------------------------------------------------------------------------------


def test_model_managers_are_told_architecture_title_and_prediction() -> None:
    assert modelspec_metadata(SDXL) == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": "Stable Diffusion XL",
        "modelspec.prediction_type": "epsilon",
    }
    assert modelspec_metadata(get_spec("hunyuan_dit"))["modelspec.prediction_type"] == "v"
    assert modelspec_metadata(get_spec("auraflow"), "lora", "x")["modelspec.architecture"] == "auraflow/lora"


def test_rank_alpha_and_network_are_told_as_kohya_does() -> None:
    def lora(rank: int, alpha: float) -> dict[str, Tensor]:
        return {DOWN: torch.ones(rank, 2), UP: torch.ones(2, rank), ALPHA: alpha_tensor(alpha)}

    def told(weights: AdapterWeights) -> dict[str, str]:
        return {key: value for key, value in adapter_metadata(weights, FLUX).items() if key.startswith("ss_")}

    plain = {"ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux"}
    assert told(AdapterWeights({"a": lora(4, 2)})) == plain | {"ss_network_dim": "4", "ss_network_alpha": "2"}
    assert told(AdapterWeights({"a": lora(4, 2), "b": lora(8, 2.5)})) == plain | {
        "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"
    }  # fmt: skip
    config = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 16, "apply_preset": {"a": 1}}
    assert told(AdapterWeights({"a": {"lokr_w1": ONE}}, lycoris=config)) == {
        "ss_base_model_version": "flux1",
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "lokr", "factor": 16, "linear_alpha": 1, "linear_dim": 10000}',
        "ss_network_dim": "10000",
        "ss_network_alpha": "1",
    }
    title = adapter_metadata(AdapterWeights({"a": {"lokr_w1": ONE}}, lycoris=config), FLUX)["modelspec.title"]
    assert title == "FLUX.1 lokr"


def test_the_scale_of_a_lora_is_alpha_over_its_rank_and_without_alpha_one() -> None:
    assert LoraSettings(rank=8, alpha=4).scale == 0.5
    assert LoraSettings(rank=8).scale == 1.0
    assert LoraSettings() == LoraSettings(16, None, 0.0, "default", False, ("default",), "diffusers")


def test_what_a_kind_of_adapter_cannot_do_is_named_by_its_option() -> None:
    class Bare(Adapter):
        disabled = save = trainable_parameters = None  # type: ignore[assignment]

    bare = Bare([])  # type: ignore[abstract]
    with pytest.raises(ConfigError, match="validation_lycoris_strength: this kind of adapter cannot be scaled"):
        bare.scaled(0.5)
    with pytest.raises(DataError, match="x: init_lora: there is no adapter to start from a file"):
        bare.start_from(AdapterWeights({}), "x")
    assert (bare.read_by(), bare.choose_kernels(torch.device("cpu"), torch.float32, {})) == (None, [])
    lokr = AdapterWeights({"layers.0.self_attn.to_q": {"lokr_w1": ONE}})
    with pytest.raises(ConfigError, match="format: diffusers files hold plain LoRA, and this adapter is lokr"):
        modules_in_file(lokr, OMNIGEN, "diffusers", Net())
    joined = AdapterWeights({"transformer_blocks.0.attn.to_q": {"lokr_w1": ONE}})
    with pytest.raises(ConfigError, match=r"format: kohya files know .* as double_blocks.0.img_attn.qkv, and only a"):
        modules_in_file(joined, FLUX, "kohya", Net())


def test_values_that_do_not_fit_are_named_one_by_one(tmp_path: Path) -> None:
    parameters = {"a": nn.Parameter(torch.zeros(2, 3)), "b": nn.Parameter(torch.zeros(1))}
    with pytest.raises(DataError) as caught:
        copy_into(parameters, {"a": torch.ones(3, 2), "c": torch.ones(1)})
    text = caught.value.render()
    assert "there is no weight for b" in text
    assert "the weight c belongs to no trained parameter" in text
    assert "the weight a has shape 3 x 2; the parameter 2 x 3" in text
    assert not parameters["a"].any()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"k": "v"})
    tensors, metadata = reading.read_adapter_file(tmp_path / "x.safetensors")
    assert (tensors["a"].tolist(), metadata) == ([1.0], {"k": "v"})
    with pytest.raises(DataError, match="there is no adapter file here"):
        reading.read_adapter_file(tmp_path / "nothing.safetensors")


def test_a_matrix_of_several_layers_is_taken_apart_only_as_a_lora_with_the_rows_of_all() -> None:
    denoiser, spec = tiny_flux_transformer(), get_spec("flux")
    rows, columns = denoiser.get_submodule("transformer_blocks.0.attn.to_q").weight.shape
    key = "lora_unet_double_blocks_0_img_attn_qkv"

    def read(**tensors: torch.Tensor) -> AdapterWeights:
        named = {f"{key}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
        return adapter_from_tensors(named, {}, spec, denoiser, "a file")

    def lora(count: int) -> dict[str, torch.Tensor]:
        return {"lora_down__weight": torch.ones(1, columns), "lora_up__weight": torch.ones(count, 1)}

    assert sorted(read(**lora(3 * rows)).modules) == [f"transformer_blocks.0.attn.to_{name}" for name in "kqv"]
    with pytest.raises(DataError, match=f"has {2 * rows} rows, and the model's layers {3 * rows}"):
        read(**lora(2 * rows))
    with pytest.raises(DataError, match="is 3 layers in this model, and only a plain LoRA can be taken apart"):
        read(lokr_w1=torch.ones(1, 1), lokr_w2=torch.ones(3 * rows, columns))
