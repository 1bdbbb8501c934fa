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
