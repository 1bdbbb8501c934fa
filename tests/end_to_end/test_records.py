"""Training on records with OmniGen2: resumed to the bit, from caches alone, and by two processes as by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from simpletuner.commands import cache
from simpletuner.families.registry import all_specs, get_spec
from simpletuner.models.family import ModelFamily
from simpletuner.models.text_encoders import TextEncoders
from tests.runs import (
    load_here,
    metrics,
    require_same_bits_after_a_stop,
    run_cli,
    run_forked,
    train_here,
    write_images,
    write_run,
)
from tests.tiny_folders import TINY_FOLDERS
from tests.tiny_omnigen2 import tiny_omnigen2_folder

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "data_configs" / "train" / "example"
# All that is drawn anew for each image and step.
DRAWN = {
    "caption_dropout_probability": 0.5,
    "reference_dropout_probability": 0.5,
    "timestep_stratified": True,
    "loss_balance": "pixels",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_omnigen2_folder(tmp_path_factory.mktemp("omnigen2"))


def write(folder: Path, model: Path, **options: Any) -> Path:
    entry = {"id": "mix", "type": "records", "records_file": str(EXAMPLE / "mix.yml"), "max_output_pixels": 4096}
    entry |= {"max_input_pixels": [4096, 2304], "caption_openers": ["The image shows "]}
    defaults = {"model_family": "omnigen2", "lora_type": "standard", "lycoris_config": None, "max_train_steps": 6}
    return write_run(folder, model, [entry], **{**defaults, "train_batch_size": 2, **DRAWN, **options})


@pytest.mark.slow
def test_a_stopped_run_on_records_ends_with_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_same_bits_after_a_stop(
        lambda folder: write(folder, model, max_train_steps=4, gradient_accumulation_steps=2), tmp_path, monkeypatch, 2
    )


@pytest.mark.slow
def test_a_second_epoch_and_a_second_start_load_neither_language_model_nor_vae(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 14 rows are 10 batches; 25 steps reach into the third epoch."""
    loaded: list[str] = []
    for owner, name in ((ModelFamily, "load_vae"), (TextEncoders, "encoder")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, name=name: loaded.append(name) or real(*args))
    output = train_here(write(tmp_path, model, max_train_steps=25, checkpoint_step_interval=0))
    epochs = [record["epoch"] for record in metrics(output, "step_done")]
    assert epochs[-1] >= 2
    # The VAE once; the language model for the captions and for the one that stands for a dropped instruction.
    assert loaded.count("load_vae") == 1
    assert "encoder" in loaded
    first, loaded[:] = list(loaded), []
    shutil.rmtree(output)
    again = train_here(tmp_path)
    assert loaded == [], first
    assert [record["loss"] for record in metrics(again, "step_done")][-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", [spec.name for spec in all_specs()[0] if spec.max_references])
def test_every_family_that_edits_trains_on_rows_with_different_numbers_of_references(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Targets of two shapes, references of others; captions with and without their references are dropped."""
    spec = get_spec(family)
    for name, size in (("a", (64, 64)), ("b", (96, 64)), ("c", (48, 80))):
        Image.new("RGB", size, (40, 90, 160)).save(tmp_path / f"{name}.png")
    numbers = range(min(spec.max_references, 2) + 1)
    rows = [
        {"target": f"{target}.png", "references": ["c.png", "b.png"][:number], "instruction": f"edit {number}"}
        for target in "ab"
        for number in numbers
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"id": "edits", "type": "records", "records_file": "rows.jsonl", "max_output_pixels": 6144}
    options = {"max_train_steps": len(rows), "train_batch_size": 2, "caption_dropout_probability": 0.5}
    options |= {"model_family": family, "lora_type": "standard", "lycoris_config": None, "checkpoint_step_interval": 0}
    folder = write_run(tmp_path, TINY_FOLDERS[family](tmp_path_factory.mktemp(family)), [entry], **options)
    losses = [record["loss"] for record in metrics(train_here(folder), "step_done")]
    # Each row is a batch of its own: no other has its shape and number of references.
    assert len(losses) == len(rows)
    assert all(0 < loss < 100 for loss in losses)


def test_caches_of_records_are_a_folder_for_each_part_of_which_pruning_keeps_what_is_used(
    omnigen_folder: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 4, seed=1, side=32)
    names = [f"images/{number:03d}.png" for number in range(4)]
    rows = [{"target": names[0], "references": names[1 : 1 + number], "instruction": "x"} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"id": "edits", "type": "records", "records_file": "rows.jsonl", "resolution": 32}
    folder = write_run(tmp_path, omnigen_folder, [entry])
    cache.build(load_here(folder))
    lines: list[str] = []
    cache.stats(load_here(folder), lines.append)
    assert sum("in use: 1, unused: 0, still to encode: 0" in line for line in lines) == 6
    # A part whose rows are gone is kept by nothing.
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    cache.stats(load_here(folder), lines.append)
    pruned: list[str] = []
    cache.prune(load_here(folder), pruned.append)
    kept = {line.split(" (")[0].rpartition("/")[2]: "removed 0 of 1" in line for line in pruned if "entries" in line}
    parts = ("edits-0", "edits-1", "edits-1-reference-1")
    gone = ("edits-2", "edits-2-reference-1", "edits-2-reference-2")
    assert kept == dict.fromkeys(parts, True) | dict.fromkeys(gone, False)


def write_options(folder: Path, name: str) -> Path:
    """A shipped options file whose optimizer moves weights within a few steps."""
    text = (ROOT / "options" / f"{name}.yml").read_text()
    path = folder / f"{name}.yml"
    path.write_text(
        text.replace("!!float 8e-7", "1e-2").replace("8e-7", "1e-2").replace("warmup_t: 500", "warmup_t: 0")
    )
    assert "1e-2" in path.read_text()
    return path


def train_options(folder: Path, name: str, model: Path, *arguments: str) -> Path:
    folder.mkdir()
    words = ["--config", str(write_options(folder, name)), "--data_path", str(EXAMPLE / "mix.yml")]
    words += ["--global_batch_size", "4", f"--pretrained_model_name_or_path={model}", "--max_train_steps=4"]
    result = run_cli(folder, "train", *words, "--report_to=none", "--mixed_precision=no", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "experiments" / name


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ft_lora", "ft"])
def test_the_shipped_commands_with_two_processes_that_share_one_model(name: str, model: Path, tmp_path: Path) -> None:
    """Train, convert and generate as in OmniGen2's own sequence; weights are those of one process."""
    # Two images of each process are one batch of four.
    whole = ("--num_processes=1", "--train_batch_size=4", "--gradient_accumulation_steps=1")
    alone = train_options(tmp_path / "one", name, model, *whole)
    spread = train_options(tmp_path / "two", name, model, "--num_processes=2", "--fsdp_enable=true")
    pairs = zip(metrics(alone, "step_done"), metrics(spread, "step_done"), strict=True)
    for one, two in pairs:
        assert (one["step"], one["samples"]) == (two["step"], two["samples"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-5)
    part = "transformer_lora" if name == "ft_lora" else "transformer"
    tensors = []
    for experiment in (alone, spread):
        checkpoint = experiment / "checkpoint-4"
        words = ["--config_path", str(experiment / f"{name}.yml"), "--model_path"]
        words += [str(checkpoint / "pytorch_model_fsdp.bin"), "--save_path", str(checkpoint / part)]
        result = run_forked(tmp_path, "convert", *words)
        assert result.returncode == 0, result.stdout + result.stderr
        [file] = (checkpoint / part).glob("*.safetensors")
        tensors.append(load_file(file))
    assert tensors[0].keys() == tensors[1].keys()
    assert max(float((tensors[0][key] - tensors[1][key]).abs().max()) for key in tensors[0]) < 2e-4
    if name == "ft_lora":
        assert all(".lora_A." in key or ".lora_B." in key for key in tensors[1])
    words = ["--model_path", str(model), f"--{part}_path", str(spread / "checkpoint-4" / part)]
    words += ["--num_inference_step", "2", "--height", "64", "--width", "64", "--instruction", "A crystal ladybug"]
    result = run_forked(tmp_path, "generate", *words, "--output_image_path", "out.png")
    assert result.returncode == 0, result.stdout + result.stderr
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert json.loads((spread / "config.json").read_text())["gradient_accumulation_steps"] == 1
