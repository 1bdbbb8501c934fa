"""DiffSynth-Studio's LoRA files: its names and its scale, through `convert`, the reader, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.adapters.formats import encode
from simpletuner.adapters.reading import adapter_from_tensors, read_adapter
from simpletuner.adapters.targets import lora_layers
from simpletuner.adapters.weights import ALPHA, DOWN, UP, AdapterWeights
from simpletuner.commands.convert import convert
from simpletuner.config.lora import unknown_targets
from simpletuner.errors import ConfigError
from simpletuner.families.diffsynth import _as_patterns, target_patterns
from simpletuner.families.registry import get_spec
from tests.tiny import tiny_omnigen_transformer
from tests.tiny_flux import tiny_flux_transformer
from tests.tiny_hunyuan_dit import tiny_hunyuan_dit_transformer
from tests.tiny_kolors import tiny_kolors_unet
from tests.tiny_sd3 import tiny_sd3_transformer

QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
RANK = 3


def joint_layers(count: int) -> dict[str, list[str]]:
    """Layer of DiffSynth-Studio -> layers of diffusers, in blocks with two streams."""
    found = {}
    for n in range(count):
        ours = f"transformer_blocks.{n}"
        found[f"blocks.{n}.attn.a_to_qkv"] = [f"{ours}.attn.{name}" for name in QKV]
        found[f"blocks.{n}.attn.b_to_qkv"] = [f"{ours}.attn.{name}" for name in ADDED]
    return found


def sd3_layers(denoiser: nn.Module) -> dict[str, list[str]]:
    """The first block of 3.5 medium has two attentions."""
    second = {"blocks.0.attn2.a_to_qkv": [f"transformer_blocks.0.attn2.{name}" for name in QKV]}
    return joint_layers(len(denoiser.transformer_blocks)) | second


def flux_layers(denoiser: nn.Module) -> dict[str, list[str]]:
    """Those of its script's default targets."""
    found = joint_layers(len(denoiser.transformer_blocks))
    for n in range(len(denoiser.transformer_blocks)):
        single = {
            **{"attn.a_to_out": "attn.to_out.0", "attn.b_to_out": "attn.to_add_out"},
            **{"ff_a.0": "ff.net.0.proj", "ff_a.2": "ff.net.2"},
            **{"ff_b.0": "ff_context.net.0.proj", "ff_b.2": "ff_context.net.2"},
            **{"norm1_a.linear": "norm1.linear", "norm1_b.linear": "norm1_context.linear"},
        }
        found |= {f"blocks.{n}.{theirs}": [f"transformer_blocks.{n}.{ours}"] for theirs, ours in single.items()}
    for n in range(len(denoiser.single_transformer_blocks)):
        ours = f"single_transformer_blocks.{n}"
        found[f"single_blocks.{n}.to_qkv_mlp"] = [*(f"{ours}.attn.{name}" for name in QKV), f"{ours}.proj_mlp"]
        found |= {f"single_blocks.{n}.{name}": [f"{ours}.{name}"] for name in ("proj_out", "norm.linear")}
    return found


def hunyuan_dit_layers(denoiser: nn.Module) -> dict[str, list[str]]:
    """Its names are diffusers', but for the container of the last layer of an attention."""
    found = {}
    for n in range(len(denoiser.blocks)):
        for attention in (f"blocks.{n}.attn1", f"blocks.{n}.attn2"):
            found |= {f"{attention}.{name}": [f"{attention}.{name}"] for name in QKV}
            found[f"{attention}.to_out"] = [f"{attention}.to_out.0"]
    return found


# R: residual, A: attention, D and U: other sizes, p: keeps or fetches what skips a level.
UNET_BLOCKS = "RpRpDp" + "RApRApDp" + "RApRAp" + "RAR" + "pRApRApRAU" + "pRApRApRAU" + "pRpRpR"


def unet_layers(denoiser: nn.Module) -> dict[str, list[str]]:
    numbers = [number for number, kind in enumerate(UNET_BLOCKS) if kind == "A"]
    levels = [(f"down_blocks.{n}", 2) for n in (1, 2)] + [("mid_block", 1)] + [(f"up_blocks.{n}", 3) for n in (0, 1)]
    attentions = [f"{level}.attentions.{place}" for level, count in levels for place in range(count)]
    found = {}
    for number, path in zip(numbers, attentions, strict=True):
        for n, block in enumerate(denoiser.get_submodule(path).transformer_blocks):
            for attention in ("attn1", "attn2"):
                layers = {"to_out": "to_out.0", **{name: name for name in QKV}}
                found |= {
                    f"blocks.{number}.transformer_blocks.{n}.{attention}.{theirs}": [
                        f"{path}.transformer_blocks.{n}.{attention}.{ours}"
                    ]
                    for theirs, ours in layers.items()
                }
            assert block is not None
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict[str, list[str]]], str]] = {
    "flux": (
        tiny_flux_transformer,
        flux_layers,
        "a_to_qkv,b_to_qkv,ff_a.0,ff_a.2,ff_b.0,ff_b.2,a_to_out,b_to_out,proj_out,norm.linear,norm1_a.linear,"
        "norm1_b.linear,to_qkv_mlp",
    ),
    "sd3": (tiny_sd3_transformer, sd3_layers, "a_to_qkv,b_to_qkv"),
    "hunyuan_dit": (tiny_hunyuan_dit_transformer, hunyuan_dit_layers, "to_q,to_k,to_v,to_out"),
    "kolors": (tiny_kolors_unet, unet_layers, "to_q,to_k,to_v,to_out"),
}


def write_pickle(path: Path, denoiser: nn.Module, layers: dict[str, list[str]]) -> dict[str, Tensor]:
    """A file as DiffSynth-Studio writes it; path of a layer -> what it adds to its weight at scale 1."""
    generator = torch.Generator().manual_seed(0)
    tensors, deltas = {}, {}
    for theirs, ours in layers.items():
        sizes = [denoiser.get_submodule(layer).out_features for layer in ours]
        down = torch.randn(RANK, denoiser.get_submodule(ours[0]).in_features, generator=generator)
        up = torch.randn(sum(sizes), RANK, generator=generator)
        tensors |= {f"{theirs}.lora_A.default.weight": down, f"{theirs}.lora_B.default.weight": up}
        deltas |= dict(zip(ours, (up @ down).split(sizes), strict=True))
    torch.save(tensors, path)
    return deltas


def require_deltas(weights: AdapterWeights, deltas: dict[str, Tensor], scale: float = 1.0) -> None:
    assert weights.modules.keys() == deltas.keys()
    for layer, module in weights.modules.items():
        delta = module[UP] @ module[DOWN] * float(module[ALPHA]) / len(module[DOWN])
        torch.testing.assert_close(delta, scale * deltas[layer], rtol=0, atol=1e-6, msg=layer)


@pytest.mark.parametrize("name", MODELS)
def test_its_file_is_converted_read_and_written_with_the_same_change(name: str, tmp_path: Path) -> None:
    make, layers_of, _ = MODELS[name]
    denoiser, spec = make(), get_spec(name)
    layers = layers_of(denoiser)
    deltas = write_pickle(tmp_path / "epoch=0-step=500.ckpt", denoiser, layers)
    weights = read_adapter(convert(tmp_path / "epoch=0-step=500.ckpt", None), spec, denoiser)
    require_deltas(weights, deltas)
    assert "alpha is taken to be the rank" in weights.notices[0]

    written = encode(weights, spec, "diffsynth", denoiser)
    assert {key.partition(".lora_")[0] for key in written} == set(layers)
    assert {key.partition(".lora_")[2] for key in written} == {"A.default.weight", "B.default.weight"}
    save_file(written, tmp_path / "again.safetensors")
    require_deltas(read_adapter(tmp_path / "again.safetensors", spec, denoiser), deltas)


def test_every_part_of_its_unet_has_the_number_of_its_place() -> None:
    keys = get_spec("kolors").diffsynth
    assert keys is not None
    residual = [f"down_blocks.{level}.resnets.{place}" for level in range(3) for place in range(2)]
    residual += [f"mid_block.resnets.{place}" for place in range(2)]
    residual += [f"up_blocks.{level}.resnets.{place}" for level in range(3) for place in range(3)]
    paths = {
        "R": [f"{path}.time_emb_proj" for path in residual],
        "D": [f"down_blocks.{level}.downsamplers.0.conv" for level in range(2)],
        "U": [f"up_blocks.{level}.upsamplers.0.conv" for level in range(2)],
    }
    for kind, of_kind in paths.items():
        numbers = [number for number, each in enumerate(UNET_BLOCKS) if each == kind]
        assert [keys.original(path).name.split(".")[1] for path in of_kind] == list(map(str, numbers))


def test_the_alpha_that_its_file_lacks_can_be_given(tmp_path: Path) -> None:
    make, layers_of, _ = MODELS["sd3"]
    denoiser = make()
    deltas = write_pickle(tmp_path / "a.ckpt", denoiser, layers_of(denoiser))
    weights = read_adapter(convert(tmp_path / "a.ckpt", None, alpha=6.0), get_spec("sd3"), denoiser)
    require_deltas(weights, deltas, scale=6.0 / RANK)
    assert weights.notices == ()
    # Its readers multiply by 1, so a file in its form has the scale in its weights.
    save_file(encode(weights, get_spec("sd3"), "diffsynth", denoiser), tmp_path / "again.safetensors")
    assert not any("alpha" in key for key in load_file(tmp_path / "again.safetensors"))
    require_deltas(read_adapter(tmp_path / "again.safetensors", get_spec("sd3"), denoiser), deltas, scale=2.0)


@pytest.mark.parametrize("name", MODELS)
def test_its_default_targets_are_the_layers_that_its_files_hold(name: str) -> None:
    make, layers_of, names = MODELS[name]
    denoiser, spec = make(), get_spec(name)
    expected = {layer for layers in layers_of(denoiser).values() for layer in layers}
    patterns = [pattern for found in target_patterns(names.split(","), spec).values() for pattern in found]
    assert {*lora_layers(denoiser, patterns, spec)[0]} == expected
    own = [each for each in names.split(",") if each != "proj_out"]  # this one is a layer here too
    assert list(unknown_targets(own, spec)) == []
    expected -= {layer for layer in expected if layer.endswith(".proj_out")}
    assert {*lora_layers(denoiser, own, spec)[0]} == expected


def test_the_container_of_a_layer_is_a_target_too() -> None:
    layers, _ = lora_layers(tiny_sd3_transformer(), ("transformer_blocks.0.attn.to_out",), get_spec("sd3"))
    assert layers == ["transformer_blocks.0.attn.to_out.0"]
    assert list(unknown_targets(["*.attn.to_out"], get_spec("sd3"))) == []
    assert [entry for entry, *_ in unknown_targets(["a_to_out.0", "to_qkv_mlp"], get_spec("sd3"))] == [
        "a_to_out.0",
        "to_qkv_mlp",
    ]


def test_a_pattern_stands_for_wanted_layers_alone() -> None:
    """Where a pattern of the family fits a layer more, the wanted ones are named one by one."""
    spec = SimpleNamespace(default_lora_targets=("b.*",), target_groups={"all": ("a.x", "b.*")})
    layers = ["a.x", "b.y", "b.z", "c"]
    assert _as_patterns(["b.y", "c"], layers, spec) == ("b.y", "c")
    assert _as_patterns(["c", "b.z", "a.x", "b.y"], layers, spec) == ("b.*", "a.x", "c")
    assert _as_patterns(["c"], ["c"], spec) == ("c",)


def test_a_family_that_it_does_not_have_is_refused() -> None:
    denoiser = tiny_omnigen_transformer()
    with pytest.raises(ConfigError, match="format: DiffSynth-Studio has no OmniGen"):
        encode(AdapterWeights({}), get_spec("omnigen"), "diffsynth", denoiser)
    assert target_patterns(["to_q"], get_spec("omnigen")) == {"to_q": ()}


def test_a_file_that_names_the_container_means_the_layer_in_it() -> None:
    denoiser, spec = tiny_sd3_transformer(), get_spec("sd3")
    key, side = (
        "transformer.transformer_blocks.0.attn.to_out",
        denoiser.transformer_blocks[0].attn.to_out[0].in_features,
    )
    file = {f"{key}.lora_A.weight": torch.ones(1, side), f"{key}.lora_B.weight": torch.ones(side, 1)}
    assert {*adapter_from_tensors(file, {}, spec, denoiser, "a").modules} == {"transformer_blocks.0.attn.to_out.0"}
