"""Full training of chosen weights: the others stay as they were, and what is saved is the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.errors import ConfigError
from tests.end_to_end.test_processes import SHARDED, assert_same_tensors, train
from tests.runs import dataset, require_same_bits_after_a_stop, train_here, write_images, write_run

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CHOSEN = {"trainable_modules": ["to_q"], "trainable_modules_low_learning_rate": ["to_k"]}
FULL = {"model_type": "full", "use_ema": True, "max_train_steps": 3, "learning_rate": 1e-3, "optimizer": "adamw"}


def write(folder: Path, model: Path, **options) -> Path:
    write_images(folder / "images", 4, seed=1)
    return write_run(folder, model, [dataset("images")], **{**FULL, **CHOSEN, **options})


@pytest.mark.slow
def test_only_what_is_named_is_trained_and_a_resume_has_the_same_bits(tmp_path, omnigen_folder, monkeypatch) -> None:
    straight, _ = require_same_bits_after_a_stop(
        lambda folder: write(folder, omnigen_folder, checkpoint_step_interval=1), tmp_path, monkeypatch, step=2
    )
    base = load_file(omnigen_folder / WEIGHTS)
    for place in ("checkpoint-3", "checkpoint-3/ema", "pipeline"):
        saved = load_file(straight / place / WEIGHTS)
        changed = {name for name in base if not torch.equal(saved[name], base[name])}
        assert changed == {name for name in base if "to_q" in name or "to_k" in name}


def test_the_low_rate_is_half_of_the_other(tmp_path, omnigen_folder) -> None:
    """Adam's first step of a weight is the rate, whatever its gradient."""
    options = {"max_train_steps": 1, "use_ema": False, "adam_weight_decay": 0.0, "max_grad_norm": 0}
    output = train_here(write(tmp_path, omnigen_folder, **options))
    base, saved = load_file(omnigen_folder / WEIGHTS), load_file(output / "checkpoint-1" / WEIGHTS)
    moved = {
        name: float((saved[name] - base[name]).abs().median()) for name in base if "to_q" in name or "to_k" in name
    }
    for name, step in moved.items():
        assert step == pytest.approx(1e-3 if "to_q" in name else 5e-4, rel=1e-2), name


def test_a_text_in_no_name_is_refused_before_anything_is_encoded(tmp_path, omnigen_folder) -> None:
    folder = write(tmp_path, omnigen_folder, trainable_modules=["to_p", "to_q"])
    with pytest.raises(ConfigError) as caught:
        train_here(folder)
    assert [(each.key, each.message) for each in caught.value.problems] == [
        ("trainable_modules", 'no weight has "to_p" in its name')
    ]
    assert not (folder / "cache" / "vae").exists()


@pytest.mark.ci
def test_a_spread_denoiser_trains_the_same_parts(tmp_path, omnigen_folder) -> None:
    one = train(write(tmp_path / "one", omnigen_folder, num_processes=1, train_batch_size=4))
    two = train(write(tmp_path / "two", omnigen_folder, **SHARDED))
    for name in ("checkpoint-3", "pipeline", "ema/pipeline"):
        assert_same_tensors(one / name, two / name)
