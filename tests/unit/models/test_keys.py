"""Key tables: names of other programs, one to one with the modules that an adapter can be attached to."""

from __future__ import annotations

import fnmatch

import pytest

from simpletuner.families.keys import KeyTable, OriginalModule
from simpletuner.families.registry import family_names, get_spec

FLUX_LIKE = KeyTable(
    renamed={
        "transformer_blocks.*.attn.to_out.0": "double_blocks.*.img_attn.proj",
        "transformer_blocks.*": "double_blocks.*",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    fused={
        "single_blocks.*.linear1": ("single_transformer_blocks.*.attn.to_q", "single_transformer_blocks.*.proj_mlp"),
    },
    swapped=("norm_out.linear",),
)


@pytest.mark.parametrize(
    ("path", "original"),
    [
        ("transformer_blocks.3.attn.to_out.0", OriginalModule("double_blocks.3.img_attn.proj", ("",))),
        ("transformer_blocks.12.norm1.linear", OriginalModule("double_blocks.12.norm1.linear", ("",))),
        ("norm_out.linear", OriginalModule("final_layer.adaLN_modulation.1", ("",), swaps_halves=True)),
        ("x_embedder", OriginalModule("x_embedder", ("",))),
    ],
)
def test_a_module_has_the_name_of_the_longest_entry_that_fits(path: str, original: OriginalModule) -> None:
    found = FLUX_LIKE.original(path)
    assert (found.name, found.swaps_halves) == (original.name, original.swaps_halves)
    assert found.parts == (path,)


def test_modules_that_are_rows_of_one_matrix_know_each_other() -> None:
    parts = ("single_transformer_blocks.7.attn.to_q", "single_transformer_blocks.7.proj_mlp")
    for part in parts:
        assert FLUX_LIKE.original(part) == OriginalModule("single_blocks.7.linear1", parts)


def test_a_number_is_matched_whole() -> None:
    table = KeyTable(renamed={"layers.1": "first"})
    assert table.original("layers.10.proj").name == "layers.10.proj"
    assert table.original("layers.1.proj").name == "first.proj"


def test_the_last_block_may_be_another_one_in_each_model() -> None:
    table = KeyTable(renamed={"blocks.*": "joint_blocks.*"}, swapped=("norm_out", "blocks.$.norm"))
    with pytest.raises(ValueError, match="in a model only"):
        table.original("blocks.3.norm")
    keys = table.in_model(f"blocks.{number}.norm.weight" for number in (9, 10, 11))
    swapped = {path: keys.original(path).swaps_halves for path in ("blocks.9.norm", "blocks.11.norm", "norm_out")}
    assert swapped == {"blocks.9.norm": False, "blocks.11.norm": True, "norm_out": True}
    assert table.in_model(["elsewhere.3.norm"]).swapped == ("norm_out",)
    assert not table.in_model(["blocks.3.norm"], swaps_last_block=False).original("blocks.3.norm").swaps_halves


@pytest.mark.parametrize("family", family_names())
def test_every_adaptable_layer_of_a_family_has_a_name_of_its_own(family: str) -> None:
    spec = get_spec(family)
    paths = {pattern.replace("*", "1") for module in spec.adaptable for pattern in module.names}
    keys = spec.keys.in_model(paths)
    rows = [(keys.original(path).name, keys.original(path).parts.index(path)) for path in sorted(paths)]
    assert len(set(rows)) == len(paths)


@pytest.mark.parametrize("family", family_names())
def test_every_entry_of_a_table_fits_something_of_the_family(family: str) -> None:
    spec = get_spec(family)
    known = [pattern for module in spec.adaptable for pattern in module.names]
    parts = [part for parts in spec.keys.fused.values() for part in parts]
    for part in parts:
        assert any(fnmatch.fnmatchcase(part.replace("*", "1"), pattern) for pattern in known), part


QKVO = tuple(f"to_{name}" for name in ("q", "k", "v", "out.0"))
ADDED = ("to_add_out", *(f"add_{name}_proj" for name in "qkv"))
MLP = ("net.0.proj", "net.2")
LINEAR_3, W_3 = (tuple(f"{name}{n}" for n in (1, 2, 3)) for name in ("linear_", "w"))
AURA = ("linear_1", "linear_2", "out_projection")
UNET = "*attentions.*.transformer_blocks.*"
KREA = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")
JOINT, SINGLE, LAYERS = "transformer_blocks.*", "single_transformer_blocks.*", "layers.*"
REFINERS = ("noise_refiner.*", "context_refiner.*")
FLUX_MLP = ((f"{JOINT}.ff", MLP), (f"{JOINT}.ff_context", MLP), (SINGLE, ("proj_mlp", "proj_out")))
QWEN_MLP = ((f"{JOINT}.img_mlp", MLP), (f"{JOINT}.txt_mlp", MLP))


def layers_of(*rows: tuple[str, tuple[str, ...]]) -> set[str]:
    return {f"{prefix}.{name}" for prefix, names in rows for name in names}


# Attention and feed-forward of each family, by the paths of the public network.
GROUPS = {
    "omnigen": (layers_of((f"{LAYERS}.self_attn", QKVO)), layers_of((f"{LAYERS}.mlp", ("gate_up_proj", "down_proj")))),
    **dict.fromkeys(
        ("sdxl", "sd15", "kolors"), (layers_of((f"{UNET}.attn*", QKVO)), layers_of((f"{UNET}.ff", MLP)))
    ),
    **dict.fromkeys(
        ("flux", "chroma"),
        (layers_of((f"{JOINT}.attn", QKVO + ADDED), (f"{SINGLE}.attn", QKVO[:3])), layers_of(*FLUX_MLP)),
    ),
    "sd3": (layers_of((f"{JOINT}.attn", QKVO + ADDED), (f"{JOINT}.attn2", QKVO)), layers_of(*FLUX_MLP[:2])),
    "omnigen2": tuple(
        layers_of(*((f"{stack}.{part}", names) for stack in (LAYERS, "ref_image_refiner.*", *REFINERS)))
        for part, names in (("attn", QKVO), ("feed_forward", LINEAR_3))
    ),
    "hunyuan_dit": (layers_of(("blocks.*.attn*", QKVO)), layers_of(("blocks.*.ff", MLP))),
    **dict.fromkeys(
        ("qwen_image", "qwen_image_edit"), (layers_of((f"{JOINT}.attn", QKVO + ADDED)), layers_of(*QWEN_MLP))
    ),
    "z_image": tuple(
        layers_of(*((f"{stack}.{part}", names) for stack in (LAYERS, *REFINERS)))
        for part, names in (("attention", QKVO), ("feed_forward", W_3))
    ),
    "flux2": (
        layers_of((f"{JOINT}.attn", QKVO + ADDED), (f"{SINGLE}.attn", ("to_qkv_mlp_proj", "to_out"))),
        layers_of(*((f"{JOINT}.{part}", ("linear_in", "linear_out")) for part in ("ff", "ff_context"))),
    ),
    "krea2": (layers_of((f"{JOINT}.attn", KREA)), layers_of((f"{JOINT}.ff", ("gate", "up", "down")))),
    "qwen_image_21": (
        layers_of((f"{JOINT}.attn", QKVO)), layers_of((f"{JOINT}.img_mlp", ("proj", "gate_layer", "out")))
    ),
    "pixart_sigma": (layers_of(*((f"{JOINT}.attn{n}", QKVO) for n in (1, 2))), layers_of((f"{JOINT}.ff", MLP))),
    "sana": (
        layers_of(*((f"{JOINT}.attn{n}", QKVO) for n in (1, 2))),
        layers_of((f"{JOINT}.ff", ("conv_inverted", "conv_point"))),
    ),
    "auraflow": (
        layers_of((f"joint_{JOINT}.attn", QKVO + ADDED), (f"{SINGLE}.attn", QKVO)),
        layers_of((f"joint_{JOINT}.ff", AURA), (f"joint_{JOINT}.ff_context", AURA), (f"{SINGLE}.ff", AURA)),
    ),
    "lumina2": tuple(
        layers_of(*((f"{stack}.{part}", names) for stack in (LAYERS, *REFINERS)))
        for part, names in (("attn", QKVO), ("feed_forward", LINEAR_3))
    ),
}  # fmt: skip
# Where standard LoRA adapts by default something else than all attention.
DEFAULTS = {
    "z_image": layers_of((f"{LAYERS}.attention", QKVO)),
    "krea2": layers_of((f"{JOINT}.attn", KREA), (f"{JOINT}.ff", ("up", "down"))),
    "lumina2": GROUPS["lumina2"][0] | GROUPS["lumina2"][1] | {f"{LAYERS}.norm1.linear", "noise_refiner.*.norm1.linear"},
}
MODULATION = {
    "flux": {f"{JOINT}.norm1.linear", f"{JOINT}.norm1_context.linear", f"{SINGLE}.norm.linear"},
    "omnigen2": {f"{stack}.norm1.linear" for stack in (LAYERS, "noise_refiner.*", "ref_image_refiner.*")},
    **{key: {f"{JOINT}.img_mod.1", f"{JOINT}.txt_mod.1"} for key in ("qwen_image", "qwen_image_edit")},
    "z_image": {f"{LAYERS}.adaLN_modulation.0", "noise_refiner.*.adaLN_modulation.0"},
    "flux2": {"double_stream_modulation_*.linear", "single_stream_modulation.linear"},
    "lumina2": {f"{LAYERS}.norm1.linear", "noise_refiner.*.norm1.linear"},
}


def test_groups_and_defaults_of_targets_are_whole() -> None:
    for name, (attention, feed_forward) in GROUPS.items():
        spec = get_spec(name)
        expected = {"attention": attention, "feed-forward": feed_forward}
        expected |= {"modulation": MODULATION[name]} if name in MODULATION else {}
        groups = {group: set(patterns) for group, patterns in spec.target_groups.items() if group != "text"}
        assert groups == expected, name
        assert set(spec.default_lora_targets) == DEFAULTS.get(name, attention), name
    parts = (*((f"attn.{name}") for name in KREA), *(f"ff.{name}" for name in ("gate", "up", "down")))
    blocks = ("layerwise_blocks", "refiner_blocks")
    text = {f"text_fusion.{block}.*.{part}" for block in blocks for part in parts}
    assert set(get_spec("krea2").target_groups["text"]) == text
    assert GROUPS.keys() == set(family_names())


@pytest.mark.parametrize(
    ("family", "ups", "downs"),
    [
        ("sdxl", ["2.2", "5.2"], ["3.0", "6.0"]),
        ("kolors", ["2.2", "5.2"], ["3.0", "6.0"]),
        ("sd15", ["2.1", "5.2", "8.2"], ["3.0", "6.0", "9.0"]),
    ],
)
def test_changes_of_size_stand_where_the_released_unets_have_them(
    family: str, ups: list[str], downs: list[str]
) -> None:
    """Upward behind the attention, where a level has one. Diffusers' conversion takes any place, others do not."""
    keys = get_spec(family).keys
    up = [keys.original(f"up_blocks.{level}.upsamplers.0.conv").name for level in range(len(ups))]
    down = [keys.original(f"down_blocks.{level}.downsamplers.0.conv").name for level in range(len(downs))]
    assert up == [f"output_blocks.{place}.conv" for place in ups]
    assert down == [f"input_blocks.{place}.op" for place in downs]
