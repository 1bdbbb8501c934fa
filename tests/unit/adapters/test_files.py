"""Adapter files: read by LyCORIS alone, complete, honest about their configuration."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.adapters.files import (
    _require_same_weights,
    apply_adapter_file,
    check_saved_adapter,
    load_with_peft,
    network_from,
)
from simpletuner.adapters.lycoris import LycorisAdapter, attach_lycoris
from simpletuner.adapters.reading import read_adapter
from simpletuner.adapters.weights import ALPHA, DOWN, UP, AdapterWeights
from simpletuner.errors import DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import perturb, run_stock


def trained(lycoris: dict[str, Any]) -> tuple[LycorisAdapter, torch.Tensor]:
    denoiser = tiny_omnigen_transformer()
    adapter = attach_lycoris(denoiser, lycoris, OMNIGEN, torch.float32, 1)
    perturb(adapter.trainable_parameters())
    denoiser.eval()
    with torch.no_grad():
        return adapter, run_stock(denoiser)


TARGETS = {"apply_preset": {"target_module": ["Attention", "FeedForward"]}}
CONFIGS = {
    "lokr low rank": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 4, "factor": 4},
    "lokr both": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 2, "factor": 4, "decompose_both": True},
    "lokr multiplier": {"algo": "lokr", "linear_dim": 10000, "factor": 4, "multiplier": 0.5},
    "lokr both multiplier": {"algo": "lokr", "linear_dim": 1, "factor": 4, "decompose_both": True, "multiplier": 0.3},
    "loha multiplier": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2, "multiplier": 2},
    "locon multiplier": {"algo": "locon", "linear_dim": 4, "linear_alpha": 2, "multiplier": 0.3},
    "glora multiplier": {"algo": "glora", "linear_dim": 4, "multiplier": 0.3},
    "full multiplier": {"algo": "full", "multiplier": 0.3},
    "dylora multiplier": {"algo": "dylora", "linear_dim": 8, "linear_alpha": 4, "block_size": 2, "multiplier": 0.3},
    "ia3 multiplier": {"algo": "ia3", "multiplier": 0.3},
    "lokr decomposed": {"algo": "lokr", "linear_dim": 10000, "factor": 4, "dora_wd": True},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2},
    "locon": {"algo": "locon", "linear_dim": 4, "linear_alpha": 2},
    "glora": {"algo": "glora", "linear_dim": 4, "linear_alpha": 2},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4},
    "boft": {"algo": "boft", "linear_dim": 4},
    "full": {"algo": "full"},
    "dylora": {"algo": "dylora", "linear_dim": 8, "linear_alpha": 4, "block_size": 2},
    "ia3": {"algo": "ia3"},
    "lokr scalar": {"algo": "lokr", "linear_dim": 10000, "factor": 4, "use_scalar": True},
    "loha scalar": {"algo": "loha", "linear_dim": 4, "use_scalar": True},
    "locon scalar": {"algo": "locon", "linear_dim": 4, "use_scalar": True},
    "glora scalar": {"algo": "glora", "linear_dim": 4, "use_scalar": True},
    "oft rescaled": {"algo": "diag-oft", "linear_dim": 4, "rescaled": True, "constraint": 1e-2},
    "boft rescaled": {"algo": "boft", "linear_dim": 4, "rescaled": True, "constraint": 1e-2},
    "rank dropout": {"algo": "loha", "linear_dim": 4, "rank_dropout": 0.5, "module_dropout": 0.5},
}


def test_the_quickstart_file_gives_the_same_output_through_lycoris_alone(quickstart, tmp_path: Path) -> None:
    adapter, output = trained(quickstart)
    path = tmp_path / adapter.file_name
    adapter.save(path, {"global_step": "7"})
    fresh = tiny_omnigen_transformer()
    assert check_saved_adapter(path, fresh, OMNIGEN, run_stock, output) <= 1e-5
    with torch.no_grad():
        assert not torch.allclose(output, run_stock(tiny_omnigen_transformer()), atol=1e-3)


def test_the_file_carries_lycoris_keys_and_its_configuration(quickstart, tmp_path: Path) -> None:
    adapter, _ = trained(quickstart)
    adapter.save(tmp_path / "a.safetensors", {"global_step": "7"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    of_one_layer = {key for key in keys if key.startswith("lycoris_layers_0_self_attn_to_q.")}
    assert {key.split(".")[1] for key in of_one_layer} == {"alpha", "lokr_w1", "lokr_w2"}
    assert len(keys) == 12 * 3
    assert json.loads(metadata["lycoris_config"]) == quickstart
    assert metadata["global_step"] == "7"
    assert metadata["modelspec.architecture"] == "omnigen-v1/lycoris"


CONVOLUTION = {"apply_preset": {"target_name": ["patch_embedding.output_image_proj"]}}


@pytest.mark.parametrize("algo", ["lokr", "loha", "locon", "glora", "dylora", "diag-oft", "full", "ia3"])
def test_an_adapted_convolution_gives_the_same_output_through_lycoris_alone(algo: str, tmp_path: Path) -> None:
    adapter, output = trained({"algo": algo, "linear_dim": 4, "linear_alpha": 1, **CONVOLUTION})
    adapter.save(tmp_path / "a.safetensors", {})
    check_saved_adapter(tmp_path / "a.safetensors", tiny_omnigen_transformer(), OMNIGEN, run_stock, output)
    with torch.no_grad():
        assert not torch.allclose(output, run_stock(tiny_omnigen_transformer()), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_algorithm_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    adapter, output = trained(CONFIGS[name] | TARGETS)
    path = tmp_path / "a.safetensors"
    adapter.save(path, {})
    check_saved_adapter(path, tiny_omnigen_transformer(), OMNIGEN, run_stock, output)

    generation = tiny_omnigen_transformer()
    apply_adapter_file(generation, path, OMNIGEN)
    with torch.no_grad():
        torch.testing.assert_close(run_stock(generation), output, rtol=0, atol=1e-5)
    with safe_open(path, framework="pt") as file:  # no other program looks at the multiplier: it is in the weights
        assert json.loads(file.metadata()["lycoris_config"]).get("multiplier", 1) == 1
    # A resume reads the live parameters from this file, unless it says that it is of no use for that.
    saved = load_file(path)
    if adapter.file_is_exact:
        assert all(torch.equal(saved[key], value) for key, value in adapter.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_training_starts_where_a_file_of_the_same_algorithm_ends(name: str, tmp_path: Path) -> None:
    adapter, output = trained(CONFIGS[name] | TARGETS)
    adapter.save(tmp_path / "a.safetensors", {})
    denoiser = tiny_omnigen_transformer()
    weights = read_adapter(tmp_path / "a.safetensors", OMNIGEN, denoiser)
    other = attach_lycoris(denoiser, CONFIGS[name] | TARGETS, OMNIGEN, torch.float32, 9)
    assert other.start_from(weights, "a.safetensors") == []
    denoiser.eval()
    with torch.no_grad():
        torch.testing.assert_close(run_stock(denoiser), output, rtol=0, atol=1e-5)


def test_a_start_of_another_algorithm_or_size_is_refused(quickstart, tmp_path: Path) -> None:
    adapter, _ = trained(CONFIGS["loha"] | TARGETS)
    adapter.save(tmp_path / "a.safetensors", {})
    denoiser = tiny_omnigen_transformer()
    weights = read_adapter(tmp_path / "a.safetensors", OMNIGEN, denoiser)
    with pytest.raises(DataError, match=r"a\.safetensors: init_lora: .* is loha with hada_w1_a"):
        attach_lycoris(denoiser, quickstart, OMNIGEN, torch.float32, 9).start_from(weights, "a.safetensors")
    denoiser = tiny_omnigen_transformer()
    narrow = {"algo": "loha", "linear_dim": 4, "apply_preset": {"target_module": ["Attention"]}}
    with pytest.raises(DataError, match="init_lora: adapts 4 layers that are not trained here"):
        attach_lycoris(denoiser, narrow, OMNIGEN, torch.float32, 9).start_from(weights, "a.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_files_work_on_a_base_in_half_precision(name: str, adapter_dtype: torch.dtype, tmp_path: Path) -> None:
    denoiser = tiny_omnigen_transformer().to(torch.bfloat16)
    adapter = attach_lycoris(denoiser, CONFIGS[name] | TARGETS, OMNIGEN, adapter_dtype, 1)
    perturb(adapter.trainable_parameters())
    denoiser.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = run_stock(denoiser)
    adapter.save(tmp_path / "a.safetensors", {})
    fresh, generation = (tiny_omnigen_transformer().to(torch.bfloat16) for _ in range(2))
    check_saved_adapter(tmp_path / "a.safetensors", fresh, OMNIGEN, run_stock, output, 5e-2)
    apply_adapter_file(generation, tmp_path / "a.safetensors", OMNIGEN)
    with torch.no_grad():
        torch.testing.assert_close(run_stock(generation), output, rtol=0, atol=5e-2)


def test_strength_scales_what_the_file_changes(quickstart, tmp_path: Path) -> None:
    adapter, output = trained(quickstart)
    adapter.save(tmp_path / "a.safetensors", {})
    plain, silent = tiny_omnigen_transformer(), tiny_omnigen_transformer()
    apply_adapter_file(silent, tmp_path / "a.safetensors", OMNIGEN, strength=0.0)
    with torch.no_grad():
        assert torch.equal(run_stock(silent), run_stock(plain))
        assert not torch.allclose(run_stock(silent), output, atol=1e-3)


def test_other_values_can_be_saved_without_touching_the_live_ones(quickstart, tmp_path: Path) -> None:
    adapter, _ = trained(quickstart)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    average = {name: value * 0.5 for name, value in before.items()}
    adapter.save(tmp_path / "ema.safetensors", {}, state=average)
    saved = load_file(tmp_path / "ema.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_a_bfloat16_adapter_is_written_in_bfloat16(quickstart, tmp_path: Path) -> None:
    adapter = attach_lycoris(tiny_omnigen_transformer(), quickstart, OMNIGEN, torch.bfloat16, 1)
    adapter.save(tmp_path / "a.safetensors", {})
    weights = {key: value.dtype for key, value in load_file(tmp_path / "a.safetensors").items() if "lokr" in key}
    assert set(weights.values()) == {torch.bfloat16}


def rewritten(path: Path, change) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def rename_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lycoris_layers_9_self_attn_to_q.lokr_w1"] = tensors.pop("lycoris_layers_0_self_attn_to_q.lokr_w1")


def add_unknown_part(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lycoris_layers_0_self_attn_to_q.lokr_w9"] = torch.ones(2)


def shrink_one(tensors: dict[str, torch.Tensor]) -> None:
    key = "lycoris_layers_0_self_attn_to_q.lokr_w2"
    tensors[key] = tensors[key][:2].clone()


def change_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lycoris_layers_0_self_attn_to_q.lokr_w2"] += 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_one, "layers_9"),
        (add_unknown_part, "lokr_w9"),
        (shrink_one, "the model that the adapter was trained on"),
        (change_one, "a different output"),
    ],
)
def test_a_file_that_does_not_carry_the_adapter_is_refused(quickstart, tmp_path: Path, change, message: str) -> None:
    adapter, output = trained(quickstart)
    adapter.save(tmp_path / "a.safetensors", {})
    path = rewritten(tmp_path / "a.safetensors", change)
    with pytest.raises(DataError) as caught:
        check_saved_adapter(path, tiny_omnigen_transformer(), OMNIGEN, run_stock, output)
    assert message in caught.value.render()


def test_an_output_that_is_not_a_number_is_refused(quickstart, tmp_path: Path) -> None:
    adapter, output = trained(quickstart)
    adapter.save(tmp_path / "a.safetensors", {})
    with pytest.raises(DataError, match="a different output"):
        check_saved_adapter(
            tmp_path / "a.safetensors", tiny_omnigen_transformer(), OMNIGEN, run_stock, output * float("nan")
        )


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    for name in ("text.safetensors", "missing.safetensors"):
        with pytest.raises(DataError, match=name):
            apply_adapter_file(tiny_omnigen_transformer(), tmp_path / name, OMNIGEN)


def test_a_loader_that_changes_a_weight_is_noticed() -> None:
    """Only alpha and whole differences may come back otherwise."""
    weight = torch.tensor([1.0, 2.0])
    network: Any = SimpleNamespace(
        loras=[SimpleNamespace(lora_name="a", state_dict=lambda: {"lokr_w1": weight, "alpha": weight})]
    )
    _require_same_weights(network, {"a.lokr_w1": weight.clone(), "a.alpha": weight + 1}, "file")
    for other in ({"a.lokr_w1": weight + 1e-6}, {"a.lokr_w2": weight}, {"b.lokr_w1": weight}):
        with pytest.raises(DataError, match="1 tensors are lost on reloading"):
            _require_same_weights(network, other, "file")


def test_a_tensor_that_lycoris_leaves_out_is_an_error() -> None:
    """Of a module with tensors of two algorithms it reads one."""
    path = "layers.0.self_attn.to_q"
    rows, columns = tiny_omnigen_transformer().get_submodule(path).weight.shape
    lora = {DOWN: torch.ones(2, columns), UP: torch.ones(rows, 2), ALPHA: torch.tensor(2.0)}
    for more, is_refused in (({}, False), ({"w_norm": torch.ones(rows)}, True)):
        weights = AdapterWeights({path: lora | more})
        with pytest.raises(DataError, match="lost on reloading") if is_refused else nullcontext():
            network_from(weights, tiny_omnigen_transformer(), OMNIGEN, 1.0, "file")


def test_peft_gives_layers_of_several_ranks_the_scale_one(tmp_path: Path) -> None:
    """Files of diffusers' form that name no alpha: each layer's alpha is its own rank."""
    denoiser, tensors = tiny_omnigen_transformer(), {}
    for name, rank in (("to_q", 2), ("to_k", 3)):
        rows, columns = denoiser.get_submodule(f"layers.0.self_attn.{name}").weight.shape
        key = f"{OMNIGEN.component('denoiser').name}.layers.0.self_attn.{name}"
        tensors |= {f"{key}.lora_A.weight": torch.ones(rank, columns), f"{key}.lora_B.weight": torch.ones(rows, rank)}
    assert load_with_peft(tensors, denoiser, OMNIGEN, tmp_path / "a.safetensors") == "PEFT"
    found = {name: denoiser.get_submodule(f"layers.0.self_attn.{name}") for name in ("to_q", "to_k")}
    assert {name: (each.r["file"], each.scaling["file"]) for name, each in found.items()} == {
        "to_q": (2, 1.0),
        "to_k": (3, 1.0),
    }


def test_half_of_twice_a_change_is_the_change_where_a_file_has_a_multiplier(tmp_path: Path) -> None:
    """Files that other programs wrote, and earlier versions, keep it in their configuration."""
    adapter, output = trained(CONFIGS["locon"] | {"apply_preset": {"target_module": ["Attention"]}})
    path = tmp_path / "a.safetensors"
    adapter.save(path, {})
    tensors = {key: tensor * (2 if ".lora_up." in key else 1) for key, tensor in load_file(path).items()}
    save_file(tensors, path, {"lycoris_config": json.dumps({"algo": "locon", "multiplier": 0.5})})
    check_saved_adapter(path, tiny_omnigen_transformer(), OMNIGEN, run_stock, output)
    generation = tiny_omnigen_transformer()
    apply_adapter_file(generation, path, OMNIGEN)
    with torch.no_grad():
        torch.testing.assert_close(run_stock(generation), output, rtol=0, atol=1e-5)
