"""Attaching, switching off and training LyCORIS adapters on a stock transformer."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lycoris.config import PRESET
from lycoris.logging import logger
from lycoris.wrapper import LycorisNetwork, create_lycoris

from simpletuner.adapters import lycoris
from simpletuner.adapters.base import MatchCount
from simpletuner.adapters.lycoris import attach_lycoris, isolated_lycoris
from simpletuner.adapters.targets import resolve_targets
from simpletuner.errors import ConfigError
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.precision.quantize import quantize
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import base_state_dict, perturb, run_stock


def attach(lycoris: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 1):
    denoiser = tiny_omnigen_transformer()
    return denoiser, attach_lycoris(denoiser, lycoris, OMNIGEN, dtype, seed, "config/lycoris_config.json")


def with_preset(**preset: Any) -> dict[str, Any]:
    return {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "apply_preset": preset}


def test_the_quickstart_adapts_attention_and_the_familys_mlp(quickstart) -> None:
    denoiser, adapter = attach(quickstart)
    assert adapter.report == [
        MatchCount("Attention", "Attention", 8),
        MatchCount("FeedForward", "OmniGenFeedForward", 4),
    ]
    shapes = {name: tuple(p.shape) for name, p in adapter.trainable_parameters().items()}
    # Factor 16 splits 32 into 2 x 16, factor 8 splits 128 rows into 8 x 16; the smaller one goes to w1.
    assert shapes["lycoris_layers_1_self_attn_to_q.lokr_w1"] == (2, 2)
    assert shapes["lycoris_layers_1_self_attn_to_q.lokr_w2"] == (16, 16)
    assert shapes["lycoris_layers_1_mlp_gate_up_proj.lokr_w1"] == (8, 4)
    assert shapes["lycoris_layers_1_mlp_gate_up_proj.lokr_w2"] == (16, 8)
    assert len(shapes) == 24
    assert {name for name, p in denoiser.named_parameters() if p.requires_grad} == {
        f"adapter.{name}" for name in shapes
    }


def test_a_new_adapter_changes_nothing_and_a_perturbed_one_does(quickstart) -> None:
    base = run_stock(tiny_omnigen_transformer())
    denoiser, adapter = attach(quickstart)
    assert torch.equal(run_stock(denoiser), base)
    perturb(adapter.trainable_parameters())
    assert (run_stock(denoiser) - base).abs().max() > 1e-3


def test_disabled_is_the_base_bit_for_bit_even_with_broken_weights(quickstart) -> None:
    base = run_stock(tiny_omnigen_transformer())
    denoiser, adapter = attach(quickstart)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.fill_(float("nan"))
    with adapter.disabled():
        assert torch.equal(run_stock(denoiser), base)
    assert run_stock(denoiser).isnan().all()


def test_disabled_keeps_the_gradients_of_what_is_trained_and_gives_none_to_the_base(quickstart) -> None:
    denoiser, adapter = attach(quickstart)
    perturb(adapter.trainable_parameters())
    before = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    with adapter.disabled():
        assert not run_stock(denoiser).requires_grad
    assert {name: p.requires_grad for name, p in denoiser.named_parameters()} == before
    run_stock(denoiser).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable_parameters().values())


def test_disabled_comes_back_after_an_error(quickstart) -> None:
    denoiser, adapter = attach(quickstart)
    perturb(adapter.trainable_parameters())
    adapted = run_stock(denoiser)
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    assert torch.equal(run_stock(denoiser), adapted)


def test_equal_seeds_attach_equal_weights_whatever_the_global_generator_says(quickstart) -> None:
    first = attach(quickstart, seed=7)[1].state_dict()
    torch.manual_seed(99)
    second = attach(quickstart, seed=7)[1].state_dict()
    other = attach(quickstart, seed=8)[1].state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_attaching_draws_nothing_from_the_global_generator(quickstart) -> None:
    denoiser = tiny_omnigen_transformer()
    torch.manual_seed(4)
    attach_lycoris(denoiser, quickstart, OMNIGEN, torch.float32, 1)
    generated = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(generated, torch.rand(3))


def test_lycoris_globals_and_terminal_stay_as_they_were(quickstart, capsys) -> None:
    names = [name for name in vars(LycorisNetwork) if name.isupper()]
    before = {name: copy.deepcopy(getattr(LycorisNetwork, name)) for name in names}
    presets, level = set(PRESET), logger.level
    attach(quickstart | {"dropout": 0.1})
    assert {name: getattr(LycorisNetwork, name) for name in names} == before
    assert (set(PRESET), logger.level) == (presets, level)
    assert capsys.readouterr().out == ""


def test_gradients_reach_the_adapter_only(quickstart) -> None:
    denoiser, adapter = attach(quickstart)
    perturb(adapter.trainable_parameters())
    run_stock(denoiser).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.trainable_parameters().values())
    assert all(p.grad is None for name, p in denoiser.named_parameters() if not name.startswith("adapter."))


def test_the_output_is_that_of_lycoris_default_forward(quickstart) -> None:
    """The same weights through a network that LyCORIS makes by itself, which builds the Kronecker products."""
    denoiser, adapter = attach(quickstart)
    perturb(adapter.trainable_parameters())

    stock = tiny_omnigen_transformer()
    preset = quickstart["apply_preset"]
    saved = {name: getattr(LycorisNetwork, name) for name in ("TARGET_REPLACE_MODULE", "MODULE_ALGO_MAP")}
    try:
        LycorisNetwork.apply_preset(
            {
                "target_module": ["Attention", "OmniGenFeedForward"],
                "module_algo_map": {
                    "Attention": preset["module_algo_map"]["Attention"],
                    "OmniGenFeedForward": preset["module_algo_map"]["FeedForward"],
                },
            }
        )
        network = create_lycoris(stock, 1.0, linear_dim=10000, linear_alpha=1, algo="lokr", factor=16)
    finally:
        for name, value in saved.items():
            setattr(LycorisNetwork, name, value)
    network.apply_to()
    assert set(network.state_dict()) == set(adapter.network.state_dict())
    network.load_state_dict(adapter.network.state_dict())
    torch.testing.assert_close(run_stock(denoiser), run_stock(stock), rtol=0, atol=1e-5)


def test_the_base_is_saved_without_the_adapter(quickstart) -> None:
    denoiser, _ = attach(quickstart)
    assert set(base_state_dict(denoiser)) == set(tiny_omnigen_transformer().state_dict())
    assert any(name.startswith("adapter.") for name in denoiser.state_dict())


def test_a_bfloat16_adapter_keeps_alpha_exact() -> None:
    lycoris = {"algo": "lora", "linear_dim": 2, "linear_alpha": 10000, "apply_preset": {"target_module": ["Attention"]}}
    _, adapter = attach(lycoris, dtype=torch.bfloat16)
    assert {p.dtype for p in adapter.trainable_parameters().values()} == {torch.bfloat16}
    assert {float(module.alpha) for module in adapter.network.loras} == {10000.0}


def test_names_by_fnmatch_and_by_regular_expression_are_counted() -> None:
    _, adapter = attach(with_preset(target_name=["layers.*.to_q", "proj_out"], use_fnmatch=True))
    assert adapter.report == [MatchCount("layers.*.to_q", "Linear", 2), MatchCount("proj_out", "Linear", 1)]
    _, adapter = attach(with_preset(target_name=[r"layers\.\d+\.mlp\.down_proj$"]))
    assert adapter.report == [MatchCount(r"layers\.\d+\.mlp\.down_proj$", "Linear", 2)]
    assert len(adapter.network.loras) == 2


def test_a_name_map_sets_the_factor_of_its_layers() -> None:
    _, adapter = attach(
        with_preset(name_algo_map={"layers.*.to_q": {"factor": 2}, "layers.*.to_k": {}}, use_fnmatch=True)
    )
    shapes = {name: tuple(p.shape) for name, p in adapter.trainable_parameters().items()}
    assert shapes["lycoris_layers_0_self_attn_to_q.lokr_w1"] == (2, 2)
    assert shapes["lycoris_layers_0_self_attn_to_k.lokr_w1"] == (4, 4)


def test_excluded_names_are_left_alone() -> None:
    _, adapter = attach(with_preset(target_module=["Attention"], exclude_name=["layers.0.*"], use_fnmatch=True))
    assert adapter.report == [MatchCount("Attention", "Attention", 4)]


def test_without_a_preset_all_linear_and_convolutional_layers_are_adapted() -> None:
    denoiser = tiny_omnigen_transformer()
    kinds = {"Linear": torch.nn.Linear, "Conv2d": torch.nn.Conv2d}
    expected = {name: sum(isinstance(m, kind) for m in denoiser.modules()) for name, kind in kinds.items()}
    _, adapter = attach({"algo": "lokr", "linear_dim": 10000, "factor": 4})
    assert {match.entry: match.modules for match in adapter.report} == expected


def test_convolutions_are_adapted_unless_the_preset_says_otherwise() -> None:
    """Those of the tiny model have kernels of 2 x 2."""
    _, adapter = attach(with_preset(target_module=["Linear", "Conv2d"]))
    assert [match.modules for match in adapter.report if match.entry == "Conv2d"] == [2]
    with pytest.raises(ConfigError, match='"Conv2d" adapts no layer'):
        attach(with_preset(target_module=["Linear", "Conv2d"], enable_conv=False))


@pytest.mark.parametrize(
    ("preset", "key", "listed"),
    [
        ({"target_name": ["layers.9.self_attn.to_q"]}, "target_name", "layers.*.self_attn.to_q (2)"),
        ({"target_name": ["layers.0.self_attn"], "use_fnmatch": True}, "target_name", "layers.*.self_attn.to_q (2)"),
        ({"target_module": ["Attention", "LabelEmbedding"]}, "target_module.1", "OmniGenFeedForward"),
    ],
)
def test_an_entry_that_matches_nothing_lists_what_could_match(preset, key: str, listed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attach(with_preset(**preset))
    (problem,) = caught.value.problems
    assert problem.key == f"apply_preset.{key}"
    assert problem.file == "config/lycoris_config.json"
    assert listed in problem.allowed


def test_a_name_inside_a_targeted_class_is_refused_because_its_settings_never_apply() -> None:
    preset = {"target_module": ["Attention"], "name_algo_map": {"*.to_q": {"factor": 2}}, "use_fnmatch": True}
    with pytest.raises(ConfigError) as caught:
        attach(with_preset(**preset))
    assert '"*.to_q" adapts no layer' in caught.value.render()


def test_an_adapter_whose_layer_ignores_it_is_refused(quickstart, monkeypatch) -> None:
    def apply_nowhere(self) -> None:
        for module in self.loras:
            self.add_module(module.lora_name, module)

    monkeypatch.setattr(LycorisNetwork, "apply_to", apply_nowhere)
    with pytest.raises(ConfigError, match="lycoris_config: a LokrModule on Linear changes nothing"):
        attach(quickstart)


@pytest.mark.parametrize(
    ("lycoris", "bypasses"),
    [
        ({}, True),
        ({"dora_wd": True}, False),
        ({"dora_wd": True, "bypass_mode": True}, False),
        ({"rank_dropout": 0.1}, False),
        ({"bypass_mode": False}, False),
    ],
)
def test_bypass_is_used_only_where_the_result_is_the_same(quickstart, lycoris, bypasses: bool) -> None:
    _, adapter = attach(quickstart | lycoris)
    assert {bool(module.bypass_mode) for module in adapter.network.loras} == {bypasses}


def test_an_adapter_whose_file_could_not_be_loaded_is_refused_before_it_trains() -> None:
    """LyCORIS' loader guesses the factor from the shapes, and with 4 channels and a factor of 32 guesses 4."""
    lycoris = {"algo": "lokr", "linear_dim": 10000, "factor": 32}
    message = "lycoris_config: LyCORIS could not load the file: it takes patch_embedding.output_image_proj for one of"
    with pytest.raises(ConfigError, match=f"{message} another size"):
        attach(lycoris | {"apply_preset": {"target_name": ["patch_embedding.output_image_proj"]}})


def test_each_module_is_where_its_layer_is(quickstart) -> None:
    """Packed layers are on the accelerator when the adapter is attached, and the rest still in main memory."""
    denoiser = tiny_omnigen_transformer()
    denoiser.layers[0].to("meta")  # for want of another device
    attach_lycoris(denoiser, quickstart, OMNIGEN, torch.float32, 1)
    places = {
        (module.org_module[0].weight.device.type, parameter.device.type)
        for module in denoiser.adapter.loras
        for parameter in (*module.parameters(), *module.buffers())
    }
    assert places == {("meta", "meta"), ("cpu", "cpu")}


def test_state_goes_back_bit_for_bit(quickstart) -> None:
    _, adapter = attach(quickstart, dtype=torch.bfloat16)
    perturb(adapter.trainable_parameters())
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    _, other = attach(quickstart, dtype=torch.bfloat16, seed=2)
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in state)


def test_an_alias_gives_way_to_a_class_of_that_name(quickstart) -> None:
    targets = resolve_targets(quickstart, OMNIGEN, {"Attention", "OmniGenFeedForward"})
    assert targets.classes == {"Attention": "Attention", "FeedForward": "OmniGenFeedForward"}
    assert targets.module_algo_map["OmniGenFeedForward"] == {"factor": 8}
    assert resolve_targets(quickstart, OMNIGEN, {"FeedForward"}).classes["FeedForward"] == "FeedForward"


def test_a_strength_multiplies_the_multiplier_that_is_written() -> None:
    lycoris = with_preset(target_module=["Attention"]) | {"multiplier": 0.5}
    denoiser, adapter = attach(lycoris)
    perturb(adapter.trainable_parameters())
    whole = run_stock(denoiser)
    with adapter.scaled(1.0):
        torch.testing.assert_close(run_stock(denoiser), whole, rtol=0, atol=1e-6)
    assert {module.multiplier for module in adapter.network.loras} == {0.5}
    with adapter.scaled(3.0):
        assert {module.multiplier for module in adapter.network.loras} == {1.5}


def test_kernels_that_cannot_be_had_are_reported_where_they_were_wanted(quickstart, monkeypatch) -> None:
    """A CPU has none; a run that had them logs that its last bits differ."""
    adapter = attach(quickstart)[1]
    given = torch.device("cpu"), torch.float32
    assert adapter.choose_kernels(*given, {}) == adapter.choose_kernels(*given, {"4x4 8x8": False}) == []
    assert adapter.choose_kernels(*given, {"4x4 8x8": False, "2x2 8x8": True}) == [
        "LoKr: two products; this run had LyCORIS' kernels before, so the last bits differ"
    ]

    def fail(device: torch.device) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(lycoris, "fused_kernels", fail)
    assert adapter.choose_kernels(*given, {}) == [
        "LoKr: two products, since LyCORIS' kernels cannot be loaded: no compiler"
    ]
    assert adapter.kernel_choice == {}


def test_layers_on_which_no_adapter_may_sit_are_left_out() -> None:
    spec = replace(OMNIGEN, unadaptable=("layers.0.self_attn.*",))
    targets = resolve_targets(with_preset(target_module=["Attention"], exclude_name=["proj_out"]), spec, {"Attention"})
    assert targets.exclude == ("proj_out", "layers.0.self_attn.*")
    lycoris = with_preset(target_module=["Attention"], use_fnmatch=True)
    adapter = attach_lycoris(tiny_omnigen_transformer(), lycoris, spec, torch.float32, 1)
    assert adapter.report == [MatchCount("Attention", "Attention", 4)]


def test_the_kernels_that_were_chosen_are_known_by_shape(quickstart, monkeypatch) -> None:
    adapter = attach(quickstart)[1]
    trials = [SimpleNamespace(name="4x4 8x8", is_won=True), SimpleNamespace(name="2x2 8x8", is_won=False)]
    monkeypatch.setattr(lycoris, "fused_kernels", lambda device: "kernels")
    monkeypatch.setattr(lycoris, "choose_kernels", lambda *given: trials)
    assert len(adapter.choose_kernels(torch.device("cpu"), torch.float32, {})) == 2
    assert adapter.kernel_choice == {"4x4 8x8": True, "2x2 8x8": False}


def test_no_preset_of_one_network_is_there_for_the_next() -> None:
    from lycoris.wrapper import VALID_PRESET_KEYS

    def everything() -> tuple[dict[str, Any], dict[str, Any]]:
        return {key: value for key, value in vars(LycorisNetwork).items() if key.isupper()}, dict(PRESET)

    before = everything()
    with isolated_lycoris():
        LycorisNetwork.apply_preset({key: "mine" for key in VALID_PRESET_KEYS if key != "unet_target_module"})
        PRESET["mine"] = {}
        assert sum(value == "mine" for value in everything()[0].values()) == 8
    assert everything() == before


def test_only_an_adapter_that_is_merged_into_packed_weights_is_said_to_be() -> None:
    """Weight decomposition needs the whole weight; a plain LoRA goes beside it."""
    for decomposes in (False, True):
        denoiser = quantize(tiny_omnigen_transformer(), "int8-quanto", quantizes_activations=True)
        lycoris = {
            "algo": "locon",
            "linear_dim": 2,
            "dora_wd": decomposes,
            "apply_preset": {"target_module": ["Attention"]},
        }
        notices = attach_lycoris(denoiser, lycoris, OMNIGEN, torch.float32, 1).notices
        assert any("layers compute with the adapter merged" in notice for notice in notices) == decomposes
