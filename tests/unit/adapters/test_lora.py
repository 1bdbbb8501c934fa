"""Standard LoRA and DoRA on a stock transformer: attached, switched off, trained, saved, started from a file."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.adapters.base import MatchCount
from simpletuner.adapters.dora import DoraLinear
from simpletuner.adapters.files import apply_adapter_file, check_saved_adapter
from simpletuner.adapters.formats import encode
from simpletuner.adapters.lora import LoraAdapter, LoraSettings, _inject, attach_lora
from simpletuner.adapters.lora_init import start_factors
from simpletuner.adapters.reading import read_adapter
from simpletuner.adapters.weights import ALPHA, DORA, DOWN, UP, AdapterWeights, alpha_tensor, scale_of
from simpletuner.errors import ConfigError, DataError
from simpletuner.families.spec import FamilySpec
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.storage import save_tensors
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import base_state_dict, perturb, run_stock

FORMATS = ("diffusers", "kohya", "comfyui", "lycoris")


def attach(dtype: torch.dtype = torch.float32, seed: int = 1, **settings):
    denoiser = tiny_omnigen_transformer()
    return denoiser, attach_lora(denoiser, LoraSettings(**({"rank": 4} | settings)), OMNIGEN, dtype, seed)


def trained(**settings) -> tuple[LoraAdapter, torch.Tensor]:
    denoiser, adapter = attach(**settings)
    perturb(adapter.trainable_parameters())
    denoiser.eval()
    with torch.no_grad():
        return adapter, run_stock(denoiser)


def test_the_default_adapts_the_attention_of_every_block() -> None:
    denoiser, adapter = attach()
    assert adapter.report == [MatchCount("default", "Linear", 8)]
    shapes = {name: tuple(p.shape) for name, p in adapter.trainable_parameters().items()}
    assert shapes["layers.1.self_attn.to_out.0.lora_A.weight"] == (4, 32)
    assert len(shapes) == 16
    assert sum(p.requires_grad for p in denoiser.parameters()) == 16


def test_targets_are_groups_patterns_or_every_linear_layer() -> None:
    _, adapter = attach(targets=("feed-forward", "proj_out"))
    assert adapter.report == [MatchCount("feed-forward", "Linear", 4), MatchCount("proj_out", "Linear", 1)]
    _, adapter = attach(targets=("all-linear",))
    linears = sum(isinstance(m, torch.nn.Linear) for m in tiny_omnigen_transformer().modules())
    assert adapter.report == [MatchCount("all-linear", "Linear", linears)]


def test_a_target_that_adapts_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'lora_target: "layers\.9\.\*" adapts no layer of'):
        attach(targets=("layers.9.*",))


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_new_adapter_changes_nothing_and_a_perturbed_one_does(init: str) -> None:
    base = run_stock(tiny_omnigen_transformer())
    denoiser, adapter = attach(init=init)
    assert torch.equal(run_stock(denoiser), base)
    perturb(adapter.trainable_parameters())
    assert (run_stock(denoiser) - base).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "orthogonal"])
def test_an_adapter_that_starts_from_the_base_still_changes_nothing_and_leaves_the_base_alone(init: str) -> None:
    stock = tiny_omnigen_transformer()
    denoiser, adapter = attach(init=init)
    torch.testing.assert_close(run_stock(denoiser), run_stock(stock), rtol=0, atol=1e-5)
    assert adapter.trainable_parameters()["layers.0.self_attn.to_q.lora_B.weight"].any()
    base = base_state_dict(denoiser)
    assert all(torch.equal(base[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_base_is_the_one_of_peft(init: str) -> None:
    """PEFT's factors, apart from the signs of singular vectors, which no decomposition decides."""
    _, adapter = attach(init=init, alpha=8.0)
    theirs = tiny_omnigen_transformer()
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules=["to_q"])
    inject_adapter_in_model(config, theirs)
    layer = theirs.layers[1].self_attn.to_q
    ours = adapter.trainable_parameters()
    product = ours["layers.1.self_attn.to_q.lora_B.weight"] @ ours["layers.1.self_attn.to_q.lora_A.weight"]
    expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-5)


def test_disabled_is_the_base_bit_for_bit_and_gradients_come_back_after_it() -> None:
    base = run_stock(tiny_omnigen_transformer())
    denoiser, adapter = attach(init="pissa")
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.fill_(float("nan"))
    before = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    with adapter.disabled():
        assert torch.equal(run_stock(denoiser), base)
    assert run_stock(denoiser).isnan().all()
    assert {name: p.requires_grad for name, p in denoiser.named_parameters()} == before


@pytest.mark.parametrize("use_dora", [False, True])
def test_strength_leads_from_the_base_to_the_adapter(use_dora: bool) -> None:
    base = run_stock(tiny_omnigen_transformer())
    denoiser, adapter = attach(use_dora=use_dora, targets=("proj_out",))
    perturb(adapter.trainable_parameters())
    whole = run_stock(denoiser)
    for strength, expected in ((0.0, base), (1.0, whole), (0.5, (base + whole) / 2)):
        with adapter.scaled(strength):
            torch.testing.assert_close(run_stock(denoiser), expected, rtol=0, atol=1e-6)
    assert torch.equal(run_stock(denoiser), whole)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init": "pissa"}])
def test_gradients_reach_the_adapter_only(settings) -> None:
    denoiser, adapter = attach(**settings)
    perturb(adapter.trainable_parameters())
    run_stock(denoiser).square().mean().backward()
    own = {id(parameter) for parameter in adapter.trainable_parameters().values()}
    assert {id(p) for p in denoiser.parameters() if p.grad is not None} == own
    assert all(p.grad.any() for p in adapter.trainable_parameters().values())


def test_equal_seeds_attach_equal_weights_and_draw_nothing_from_the_global_generator() -> None:
    torch.manual_seed(4)
    first = attach(seed=7)[1].state_dict()
    generated = torch.rand(3)
    tiny_omnigen_transformer()
    torch.manual_seed(99)
    second, other = attach(seed=7)[1].state_dict(), attach(seed=8)[1].state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    tiny_omnigen_transformer()  # seeds the generator itself
    assert torch.equal(generated, torch.rand(3))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init": "pissa"}, {"alpha": 3.0}])
def test_a_file_of_every_format_gives_the_same_output_elsewhere(file_format: str, settings, tmp_path: Path) -> None:
    adapter, output = trained(file_format=file_format, targets=("attention", "feed-forward"), **settings)
    path = tmp_path / adapter.file_name
    adapter.save(path, {"global_step": "7"})
    check_saved_adapter(path, tiny_omnigen_transformer(), OMNIGEN, run_stock, output)
    generation = tiny_omnigen_transformer()
    apply_adapter_file(generation, path, OMNIGEN)
    with torch.no_grad():
        torch.testing.assert_close(run_stock(generation), output, rtol=0, atol=1e-5)
        assert (run_stock(tiny_omnigen_transformer()) - output).abs().max() > 1e-3


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_weight_decomposed_convolution_gives_the_same_output_elsewhere(file_format: str, tmp_path: Path) -> None:
    """PEFT's magnitudes of a convolution have four dimensions."""
    targets = ("patch_embedding.output_image_proj",)
    adapter, output = trained(file_format=file_format, targets=targets, use_dora=True)
    path = tmp_path / adapter.file_name
    adapter.save(path, {})
    check_saved_adapter(path, tiny_omnigen_transformer(), OMNIGEN, run_stock, output)
    weights = read_adapter(path, OMNIGEN, tiny_omnigen_transformer())
    assert tuple(weights.modules[targets[0]][DORA].shape) == (32, 1, 1, 1)  # LyCORIS' own shape, a number for each row
    denoiser, other = attach(targets=targets, use_dora=True, seed=9)
    assert other.start_from(weights, "a.safetensors") == []
    with torch.no_grad():
        torch.testing.assert_close(run_stock(denoiser.eval()), output, rtol=0, atol=1e-5)


def test_the_keys_are_those_of_each_format(tmp_path: Path) -> None:
    keys = {}
    for file_format in FORMATS:
        adapter, _ = trained(file_format=file_format, alpha=2.0)
        adapter.save(tmp_path / "a.safetensors", {})
        keys[file_format] = {key: tuple(t.shape) for key, t in load_file(tmp_path / "a.safetensors").items()}
    assert keys["diffusers"]["transformer.layers.0.self_attn.to_q.lora_A.weight"] == (4, 32)
    assert not [key for key in keys["diffusers"] if "alpha" in key]
    assert keys["kohya"]["lora_unet_llm_layers_0_self_attn_qkv_proj.lora_down.weight"] == (12, 32)
    assert keys["kohya"]["lora_unet_llm_layers_1_self_attn_o_proj.alpha"] == ()
    assert keys["comfyui"]["diffusion_model.llm.layers.0.self_attn.qkv_proj.lora_B.weight"] == (96, 12)
    assert keys["lycoris"]["lycoris_layers_0_self_attn_to_out_0.lora_up.weight"] == (32, 4)


def test_a_file_of_joined_layers_can_be_written_in_the_other_formats(tmp_path: Path) -> None:
    adapter, _ = trained(file_format="comfyui")
    adapter.save(tmp_path / "a.safetensors", {})
    denoiser = tiny_omnigen_transformer()
    weights = read_adapter(tmp_path / "a.safetensors", OMNIGEN, denoiser)
    trained_on = adapter.weights().modules
    for file_format in FORMATS:
        save_tensors(tmp_path / f"{file_format}.safetensors", encode(weights, OMNIGEN, file_format, denoiser))
        again = read_adapter(tmp_path / f"{file_format}.safetensors", OMNIGEN, denoiser).modules
        assert again.keys() == trained_on.keys()
        for path, module in trained_on.items():
            change, expected = (scale_of(each) * each[UP] @ each[DOWN] for each in (again[path], module))
            torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)


def test_the_metadata_reports_rank_alpha_and_model(tmp_path: Path) -> None:
    adapter, _ = trained(alpha=2.0, file_format="lycoris")
    adapter.save(tmp_path / "a.safetensors", {"global_step": "7"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "omnigen-v1/lora"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert metadata["global_step"] == "7"


def test_other_values_can_be_saved_without_touching_the_live_ones(tmp_path: Path) -> None:
    adapter, _ = trained()
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    average = {name: value * 0.5 for name, value in before.items()}
    adapter.save(tmp_path / "ema.safetensors", {}, state=average)
    saved = load_file(tmp_path / "ema.safetensors")
    assert all(torch.equal(saved[f"transformer.{name}"], average[name]) for name in average)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_a_bfloat16_adapter_is_trained_and_written_in_bfloat16(tmp_path: Path) -> None:
    _, adapter = attach(dtype=torch.bfloat16)
    assert {p.dtype for p in adapter.trainable_parameters().values()} == {torch.bfloat16}
    adapter.save(tmp_path / "a.safetensors", {})
    assert {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("file_format", FORMATS)
def test_training_starts_where_a_file_of_a_smaller_rank_ends(file_format: str, tmp_path: Path) -> None:
    adapter, output = trained(file_format=file_format, alpha=2.0, targets=("layers.*.self_attn.to_out.0",))
    adapter.save(tmp_path / "a.safetensors", {})
    weights = read_adapter(tmp_path / "a.safetensors", OMNIGEN, tiny_omnigen_transformer())
    denoiser, other = attach(rank=16, alpha=4.0)
    untouched = other.start_from(weights, "a.safetensors")
    assert len(untouched) == 6
    with torch.no_grad():
        torch.testing.assert_close(run_stock(denoiser), output, rtol=0, atol=1e-5)


def test_a_start_that_does_not_fit_is_refused_with_the_key_to_change(tmp_path: Path) -> None:
    adapter, _ = trained(targets=("attention", "feed-forward"), rank=8)
    adapter.save(tmp_path / "a.safetensors", {})
    weights = read_adapter(tmp_path / "a.safetensors", OMNIGEN, tiny_omnigen_transformer())
    with pytest.raises(DataError) as caught:
        attach(use_dora=True)[1].start_from(weights, "a.safetensors")
    text = caught.value.render()
    assert "set lora_rank to 8" in text
    assert "4 layers that are not trained here" in text
    assert "set use_dora to false" in text
    assert [(problem.key, problem.file) for problem in caught.value.problems] == [("init_lora", "a.safetensors")] * 3


def test_a_frozen_start_belongs_to_the_adapter_and_is_not_trained() -> None:
    denoiser, adapter = attach(init="pissa", use_dora=False)
    stock = {id(p) for name, p in denoiser.named_parameters() if ".lora_" not in name}
    own = adapter.all_parameters()
    assert len(own) == 2 * len(adapter.trainable_parameters())
    assert {id(p) for p in denoiser.parameters()} - {id(p) for p in own} == stock
    assert sum(p.requires_grad for p in own) == len(adapter.trainable_parameters())


def test_wide_factors_follow_narrow_activations_and_learn_in_their_own_format() -> None:
    """PEFT alone turns the activations of each layer to float32 and back."""
    denoiser = tiny_omnigen_transformer().to(torch.bfloat16)
    adapter = attach_lora(denoiser, LoraSettings(rank=4), OMNIGEN, torch.float32, seed=1)
    perturb(adapter.trainable_parameters())
    layer = denoiser.layers[0].self_attn.to_q
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    seen: list[torch.dtype] = []
    down.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    output = layer(x)
    output.float().square().sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    exact = x.float() @ (layer.base_layer.weight.float() + up.weight @ down.weight).T
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)
    [wanted] = torch.autograd.grad((x.float() @ down.weight.T @ up.weight.T * 2 * exact.detach()).sum(), up.weight)
    assert up.weight.grad.dtype == torch.float32
    torch.testing.assert_close(up.weight.grad, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


def test_dropout_drops_in_training_and_not_in_evaluation() -> None:
    denoiser, adapter = attach(dropout=0.5)
    perturb(adapter.trainable_parameters())

    def output(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x)

    layer, x = denoiser.layers[0].self_attn.to_q, torch.ones(4, 32)
    denoiser.train()
    assert not torch.equal(output(1), output(2))
    assert torch.equal(output(1), output(1))
    # An input is kept with probability 0.5 and then doubled: on average nothing changes.
    mean = torch.stack([output(seed) for seed in range(400)]).mean(dim=(0, 1))
    denoiser.eval()
    assert torch.equal(output(1), output(2))
    torch.testing.assert_close(mean, output(1)[0], rtol=0.1, atol=0.1 * output(1).abs().max().item())
    without = attach(dropout=0.0)[0].train().layers[0].self_attn.to_q
    assert torch.equal(without(x), without(x))


@pytest.mark.parametrize("init", ["pissa"])
def test_a_frozen_start_is_not_dropped(init: str) -> None:
    """Only what is trained is: the start takes away exactly what the trained factors began with."""
    denoiser, _ = attach(dropout=0.5, init=init)
    layer = denoiser.layers[0].self_attn.to_q
    assert isinstance(layer.lora_dropout["default"], torch.nn.Dropout)
    assert isinstance(layer.lora_dropout["start"], torch.nn.Identity)


def test_an_adapter_comes_back_after_an_error_while_it_was_off_or_weak() -> None:
    denoiser, adapter = attach()
    perturb(adapter.trainable_parameters())
    whole = run_stock(denoiser)

    def fail(inside: AbstractContextManager[None]) -> None:
        with inside:
            assert not torch.equal(run_stock(denoiser), whole)
            raise RuntimeError("inside")

    for inside in (adapter.disabled(), adapter.scaled(0.5)):
        with pytest.raises(RuntimeError, match="inside"):
            fail(inside)
        assert torch.equal(run_stock(denoiser), whole)


def test_weights_that_were_taken_do_not_change_with_the_live_ones() -> None:
    _, adapter = attach(use_dora=True)
    kept = adapter.weights().modules["layers.0.self_attn.to_q"]
    before = {name: tensor.clone() for name, tensor in kept.items()}
    perturb(adapter.trainable_parameters())
    assert all(torch.equal(kept[name], before[name]) for name in before)


def test_magnitudes_belong_to_the_adapter() -> None:
    _, adapter = attach(use_dora=True)
    own = {id(parameter) for parameter in adapter.all_parameters()}
    assert own == {id(parameter) for parameter in adapter.trainable_parameters().values()}
    assert len(own) == 3 * 8


def test_a_dora_computes_by_the_form_that_keeps_little() -> None:
    _, adapter = attach(use_dora=True, targets=("layers.*.to_q", "patch_embedding.output_image_proj"))
    kinds = {path: type(layer.lora_variant["default"]) for path, layer in adapter.layers.items()}
    assert kinds.pop("patch_embedding.output_image_proj") is not DoraLinear
    assert set(kinds.values()) == {DoraLinear}


@pytest.mark.parametrize("file_format", FORMATS)
def test_settings_of_peft_stand_in_diffusers_files_alone_and_given_metadata_wins(file_format, tmp_path: Path) -> None:
    _, adapter = attach(file_format=file_format)
    adapter.save(tmp_path / "a.safetensors", {"modelspec.title": "mine"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert ("lora_adapter_metadata" in metadata) == (file_format == "diffusers")
    assert metadata["modelspec.title"] == "mine"


def test_a_start_of_a_smaller_rank_leaves_nothing_of_the_first_weights(tmp_path: Path) -> None:
    """An orthogonal start has an `up` that is not zero."""
    adapter, output = trained(rank=2)
    denoiser, other = attach(rank=4, init="orthogonal")
    assert other.start_from(adapter.weights(), "a.safetensors") == []
    with torch.no_grad():
        torch.testing.assert_close(run_stock(denoiser.eval()), output, rtol=0, atol=1e-5)


def test_the_largest_rank_of_a_file_is_the_one_that_has_to_fit() -> None:
    def lora(rank: int) -> dict[str, torch.Tensor]:
        return {DOWN: torch.ones(rank, 32), UP: torch.ones(32, rank), ALPHA: alpha_tensor(rank)}

    modules = {f"layers.0.self_attn.to_{name}": lora(rank) for name, rank in (("q", 2), ("k", 8), ("v", 3))}
    with pytest.raises(DataError) as caught:
        attach()[1].start_from(AdapterWeights(modules), "a.safetensors")
    assert "a.safetensors: init_lora: has rank 8, and lora_rank is 4" in caught.value.render()
    assert len(attach(rank=8)[1].start_from(AdapterWeights(modules), "a.safetensors")) == 5
    with pytest.raises(DataError, match=r"a\.safetensors: init_lora: holds loha, and standard LoRA is trained"):
        attach()[1].start_from(AdapterWeights({"layers.0": {"hada_w1_a": torch.ones(1)}}), "a.safetensors")


def test_an_adapter_whose_layer_ignores_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", lambda self, x, *_, **__: self.base_layer(x))
    with pytest.raises(ConfigError, match="lora_target: a Linear on Linear changes nothing"):
        attach()


def test_a_start_from_the_base_needs_a_matrix_that_has_values() -> None:
    with pytest.raises(ConfigError, match="lora_init_type: pissa decomposes the weight of patch_embedding"):
        attach(init="pissa", targets=("patch_embedding.output_image_proj",))
    denoiser = tiny_omnigen_transformer().to("meta")
    counted = attach_lora(denoiser, LoraSettings(rank=4, init="pissa"), OMNIGEN, torch.float32, 1)
    assert {name: p.shape for name, p in counted.trainable_parameters().items()} == {
        name: p.shape for name, p in attach(init="pissa")[1].trainable_parameters().items()
    }


def test_other_programs_are_named_by_what_the_file_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FamilySpec, "read_by", lambda self, form, kind, paths: f"{form} {kind} {len(paths)}")
    told = [attach(use_dora=use_dora, file_format="kohya")[1].read_by() for use_dora in (False, True)]
    assert told == ["kohya lora 8", "kohya dora 8"]


def test_factors_that_start_from_the_base_are_roots_of_singular_values_and_columns_of_q() -> None:
    """diag(8, 2): with the scale 2 both factors get the root of half of the largest singular value."""
    weight = torch.diag(torch.tensor([2.0, 8.0]))
    for init in ("pissa", "pissa_niter_16"):
        down, up = start_factors(weight, 1, 2.0, init)
        torch.testing.assert_close(down.abs(), torch.tensor([[0.0, 2.0]]), rtol=0, atol=1e-5)
        torch.testing.assert_close(2 * up @ down, torch.tensor([[0.0, 0.0], [0.0, 8.0]]), rtol=0, atol=1e-4)
    down, up = start_factors(weight, 1, 2.0, "olora")
    assert (down.abs().tolist(), up.abs().tolist()) == ([[2, 0]], [[1], [0]])


def test_a_path_is_neither_the_end_of_another_one_nor_a_pattern() -> None:
    model = torch.nn.Module()
    model.proj, model.a, model.a_b = torch.nn.Linear(2, 2), torch.nn.Module(), torch.nn.Linear(2, 2)
    model.a.proj, model.a.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    _inject(model, ["proj", "a.b"], LoraSettings(rank=1), "default")
    assert [type(layer) is torch.nn.Linear for layer in (model.proj, model.a.b)] == [False, False]
    assert [type(layer) is torch.nn.Linear for layer in (model.a.proj, model.a_b)] == [True, True]
