"""Targets of a LyCORIS file are held against the family before anything is loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.json_reader import parse_json
from simpletuner.config.lycoris import check_lycoris
from simpletuner.config.lycoris_algorithms import useless_settings
from simpletuner.config.patterns import sample_paths
from simpletuner.errors import Problem

from .conftest import FAMILY


def check(lycoris: Any) -> list[Problem]:
    return check_lycoris(parse_json(json.dumps(lycoris, indent=1), "l.json"), FAMILY)


def preset(**values: Any) -> dict[str, Any]:
    return {"algo": "lokr", "apply_preset": values}


@pytest.mark.parametrize(
    "lycoris",
    [
        {"algo": "lokr"},
        {"algo": "ia3", "preset": "attn-only"},
        {"algo": "full", "preset": "unet-transformer-only"},
        {"algo": "dylora", "linear_dim": 8, "use_scalar": True},
        preset(target_module=["Attention", "FeedForward"], module_algo_map={"FeedForward": {"factor": 8}}),
        preset(target_module=["ToyFeedForward"]),
        preset(target_name=["layers.3.self_attn.to_q", "proj_out"]),
        preset(target_name=[r"layers\.(5|7)\..*"]),
        preset(target_name=["layers.*.self_attn"], use_fnmatch=True),
        preset(name_algo_map={"layers.1?.mlp": {"algo": "loha", "dim": 4}}, use_fnmatch=True),
        preset(target_module=["Attention"], exclude_name=["layers.0.self_attn", "gone"]),
    ],
)
def test_targets_of_the_family_are_accepted(lycoris: dict[str, Any]) -> None:
    assert check(lycoris) == []


@pytest.mark.parametrize(
    ("lycoris", "key", "words"),
    [
        (
            preset(target_module=["Attention", "Atention"]),
            "apply_preset.target_module.1",
            'did you mean "Attention"?',
        ),
        (preset(module_algo_map={"Nothing": {}}), "apply_preset.module_algo_map.Nothing", "FeedForward, Linear"),
        (preset(target_name=["blocks.0"]), "apply_preset.target_name.0", "layers.*.self_attn"),
        (preset(target_name=["("]), "apply_preset.target_name.0", "not a regular expression"),
        (preset(name_algo_map={"block*": {}}, use_fnmatch=True), "apply_preset.name_algo_map.block*", "matches no"),
        (preset(exclude_name=["["]), "apply_preset.exclude_name.0", "not a regular expression"),
        (preset(target_modules=["Attention"]), "apply_preset.target_modules", 'did you mean "target_module"?'),
        (preset(target_module="Attention"), "apply_preset.target_module", "list of names"),
        (
            preset(module_algo_map={"Attention": {"linear_dim": 4}}),
            "apply_preset.module_algo_map.Attention.linear_dim",
            '"dim"',
        ),
        (preset(module_algo_map={"Attention": 4}), "apply_preset.module_algo_map.Attention", "not a JSON object"),
        (preset(module_algo_map=["Attention"]), "apply_preset.module_algo_map", "not a JSON object"),
        ({"algo": "lokrr"}, "algo", 'did you mean "lokr"?'),
        ({"algo": "tlora"}, "algo", "cannot be trained"),
        ({"algo": "dylora", "linear_dim": 6}, "linear_dim", "not a multiple of block_size, which is 4"),
        ({"algo": "glora", "rank_dropout": 0.1}, "rank_dropout", "keeps the ranks that it should drop"),
        ({"algo": "loha", "dora_wd": True, "wd_on_output": False}, "wd_on_output", "as one of the output"),
        ({"algo": "full", "bypass_mode": True}, "bypass_mode", "cannot be used with full"),
        ({"algo": "lokr", "unbalanced_factorization": True}, "unbalanced_factorization", "cannot load files"),
        ({"algo": "dylora", "linear_dim": 4, "conv_dim": 2}, "conv_dim", "not a multiple of block_size, which is 4"),
        (
            preset(module_algo_map={"Attention": {"algo": "dylora", "dim": 3, "block_size": 2}}),
            "apply_preset.module_algo_map.Attention.dim",
            "not a multiple of block_size, which is 2",
        ),
        (
            preset(module_algo_map={"Attention": {"algo": "lokr", "rs_lora": True}}),
            "apply_preset.module_algo_map.Attention.rs_lora",
            "would be weaker",
        ),
        (
            preset(name_algo_map={"proj_out": {"weight_decompose": True, "wd_on_out": False}}),
            "apply_preset.name_algo_map.proj_out.wd_on_out",
            "as one of the output",
        ),
        (
            preset(module_algo_map={"Attention": {"factor": "8"}}),
            "apply_preset.module_algo_map.Attention.factor",
            "not a number",
        ),
        ({"algo": "lokr", "train_norm": True}, "train_norm", "no normalization that LyCORIS can train"),
        ({"algo": "lokr", "preset": "atn-only"}, "preset", 'did you mean "attn-only"?'),
        ({"algo": "lokr", "preset": "attn-mlp"}, "preset", "this model has no such layers"),
        ({"algo": "lokr", "preset": "ia3"}, "preset", "layers of Stable Diffusion"),
        ({"algo": "lokr", "preset": "full", "apply_preset": {}}, "preset", "both say which layers"),
        ({"algo": "lokr", "factr": 4}, "factr", 'did you mean "factor"?'),
        ({"algo": "lokr", "factor": "four"}, "factor", "not a number"),
        ({"algo": "lokr", "module_dropout": 1.0}, "module_dropout", "at least 0 and below 1"),
        ({"algo": "lokr", "linear_dim": 0}, "linear_dim", "at least 1"),
        ({"algo": "lokr", "dora_wd": 1}, "dora_wd", "true or false"),
        ({"algo": "lokr", "use_scalar": 2}, "use_scalar", "true or false"),
        ({"algo": "lokr", "lora_prefix": "lora_unet"}, "lora_prefix", "cannot be used: files carry the prefix"),
        ({"apply_preset": []}, "apply_preset", "not a JSON object"),
        ([], None, "not a JSON object"),
    ],
)
def test_faults_name_key_line_and_what_could_be_matched(lycoris: Any, key: str | None, words: str) -> None:
    (problem,) = check(lycoris)
    assert problem.key == key
    assert problem.file == "l.json"
    assert problem.line is not None
    assert words in problem.render()


def test_settings_that_nothing_reads_are_reported_with_the_algorithms() -> None:
    lycoris = {"algo": "locon", "linear_dim": 4, "factor": 8, "dora_wd": False, "rescaled": True}
    assert useless_settings(lycoris) == ["factor: has no effect on locon", "rescaled: has no effect on locon"]
    mixed = lycoris | preset(module_algo_map={"Attention": {"algo": "lokr"}}) | {"algo": "boft"}
    assert useless_settings(mixed) == []
    (line,) = useless_settings({"algo": "lokr", "dora_wd": True, "bypass_mode": True})
    assert "which need the merged weight" in line


def test_regular_expressions_are_tried_on_many_blocks() -> None:
    assert list(sample_paths("proj_out")) == ["proj_out"]
    assert {"layers.0.mlp", "layers.99.mlp"} <= set(sample_paths("layers.*.mlp"))
    assert "down_blocks.2.attentions.1.norm" in set(sample_paths("*attentions.*.norm"))
