"""Whole runs with each kind of adapter: resumed with the same bits, started from files, full models complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import OmniGenTransformer2DModel
from safetensors.torch import load_file

from tests.end_to_end.test_processes import assert_same_training, train
from tests.runs import LYCORIS, dataset, metrics, train_here, write_images, write_run

ADAPTER = "pytorch_lora_weights.safetensors"
STANDARD = {"lora_type": "standard", "lora_rank": 4, "lora_dropout": 0.2}
TARGETS = {"apply_preset": {"target_module": ["Attention"]}}

# Files of these hold renamed, scaled or summed weights, so that a resume needs the parameters themselves.
INEXACT: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "lora": (STANDARD, None),
    "dora in kohya's form": (STANDARD | {"use_dora": True, "lora_format": "kohya", "lora_alpha": 3}, None),
    "pissa": (STANDARD | {"lora_init_type": "pissa"}, None),
    "full differences": ({}, {"algo": "full"} | TARGETS),
    "dylora": ({}, {"algo": "dylora", "linear_dim": 4, "block_size": 2} | TARGETS),
    "multiplier": ({}, {"algo": "lokr", "linear_dim": 10000, "factor": 4, "multiplier": 0.3} | TARGETS),
    "scalar": (
        {},
        {"algo": "lokr", "linear_dim": 10000, "factor": 4, "use_scalar": True, "module_dropout": 0.2} | TARGETS,
    ),
}


def run_folder(folder: Path, model: Path, options: dict[str, Any], lycoris: dict[str, Any] | None) -> Path:
    folder = write_run(folder, model, max_train_steps=4, gradient_checkpointing=True, use_ema=True, **options)
    if lycoris is not None:
        (folder / "lycoris_config.json").write_text(json.dumps(LYCORIS | {"linear_alpha": 1} | lycoris))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", INEXACT)
def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(name: str, tmp_path: Path, omnigen_folder) -> None:
    options, lycoris = INEXACT[name]
    whole = train_here(run_folder(tmp_path / "whole", omnigen_folder, options, lycoris))
    parts = run_folder(tmp_path / "parts", omnigen_folder, options, lycoris)
    train_here(parts, "--max_train_steps=2")
    resumed = train_here(parts)
    for file in (ADAPTER, f"ema/{ADAPTER}", "checkpoint-4/trainable.safetensors"):
        expected, found = load_file(whole / file), load_file(resumed / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), file


@pytest.mark.slow
def test_a_run_starts_from_the_file_of_another_program(tmp_path: Path, omnigen_folder: Path) -> None:
    options = STANDARD | {"lora_format": "kohya", "learning_rate": 1e-2}
    first = train_here(run_folder(tmp_path / "first", omnigen_folder, options, None))
    start = str(first / ADAPTER)
    options = STANDARD | {"init_lora": start, "lora_rank": 16, "learning_rate": 1e-9, "lora_format": "lycoris"}
    second = train_here(run_folder(tmp_path / "second", omnigen_folder, options, None))
    key = "lycoris_layers_1_self_attn_to_out_0.lora_up.weight"
    up = load_file(second / ADAPTER)[key]
    kohya = load_file(first / ADAPTER)
    theirs = kohya["lora_unet_llm_layers_1_self_attn_o_proj.lora_up.weight"]
    torch.testing.assert_close(up[:, :4], theirs, rtol=0, atol=1e-6)
    assert up[:, 4:].abs().max() < 1e-6
    reported = [line["text"] for line in metrics(second, "notice")]
    assert any(line.startswith("started from") for line in reported)
    assert f"{ADAPTER}: read by LyCORIS" in reported


def test_a_full_run_leaves_a_complete_model_and_its_average(tmp_path: Path, omnigen_folder: Path) -> None:
    write_images(tmp_path / "run" / "images", 4, seed=1)
    folder = write_run(
        tmp_path / "run", omnigen_folder, [dataset("images")], model_type="full", use_ema=True, max_train_steps=2
    )
    output = train_here(folder)
    parts = {path.name for path in omnigen_folder.iterdir() if path.is_dir()}
    for name, weights in (("pipeline", "transformer"), ("ema/pipeline", "ema/transformer")):
        assert {path.name for path in (output / name).iterdir() if path.is_dir()} == parts
        model = OmniGenTransformer2DModel.from_pretrained(output / name / "transformer")
        saved = load_file(output / "checkpoint-2" / weights / "diffusion_pytorch_model.safetensors")
        state = model.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in saved.items())
    live, average = (
        load_file(output / place / "transformer" / "diffusion_pytorch_model.safetensors")
        for place in ("pipeline", "ema/pipeline")
    )
    assert any(not torch.equal(live[key], average[key]) for key in live)


@pytest.mark.ci
@pytest.mark.parametrize("layout", [{}, {"fsdp_enable": True}], ids=["copies", "spread"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_init_type": "pissa"}], ids=["dora", "pissa"])
def test_two_processes_train_the_same_lora_as_one(tmp_path: Path, omnigen_folder, options, layout) -> None:
    options = STANDARD | {"lora_dropout": 0.0, "max_train_steps": 4, "learning_rate": 1e-3} | options
    one = train(write_run(tmp_path / "one", omnigen_folder, train_batch_size=4, **options))
    two = train(write_run(tmp_path / "two", omnigen_folder, train_batch_size=2, num_processes=2, **options, **layout))
    assert_same_training(one, two)
