"""Stage two by the page's own command: what trains, how often, and that a killed run ends with the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from simpletuner.batch import Batch
from simpletuner.cli import app
from simpletuner.commands.convert import convert_folder
from simpletuner.commands.firered.extract import extract
from simpletuner.commands.firered.extract_flags import parse_extract
from simpletuner.commands.firered.run import load_sft
from simpletuner.config.loading import LoadedRun, load_run
from simpletuner.data.sampler import build_sampler
from simpletuner.errors import DataError, Interrupted
from simpletuner.launch import family_of_model, spec_of_name
from simpletuner.models.build import build_family
from simpletuner.training.objective import build_objective
from simpletuner.training.prepare import read_datasets
from simpletuner.training.step import sample_noise, sample_quantiles
from simpletuner.training.trainer import train
from tests.runs import metrics, stop_after, weights_of
from tests.runs import write_images as draw_images
from tests.tiny_omnigen2 import TEXT_SIZE
from tests.tiny_qwen_image import tiny_qwen_image_edit_folder
from tests.unit.commands.firered.edits import write_images, write_table, write_task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen_image_edit_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    images = write_images(tmp_path / "images")
    write_task(tmp_path / "meta/dataset_a", images, [1, 1, 2], TEXT_SIZE)
    write_task(tmp_path / "meta/dataset_b", images, [0, 1, 1, 1], TEXT_SIZE)
    write_task(tmp_path / "meta/dataset_c", images, [3], TEXT_SIZE)
    return tmp_path / "meta"


# As on the page, but for the paths, and for the numbers that a test has no time for.
PAGE = {
    "train_data_weights": "dataset_a=0.5,dataset_b=1.2,dataset_c=1.0",
    "train_src_img_num_weights": "0=1,1=1,2=1,3=0",
    "train_batch_size": "1",
    "image_sample_size": "64",
    "gradient_accumulation_steps": "1",
    "num_train_epochs": "1",
    "max_train_steps": "4",
    "learning_rate": "2e-05",
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": "1",
    "checkpointing_steps": "2",
    "mixed_precision": "no",
    "adam_weight_decay": "3e-2",
    "max_grad_norm": "0.05",
    "vae_mini_batch": "1",
}


def words_of(model: Path, meta: Path, output: Path, *more: str, **changes: Any) -> list[str]:
    values = {**PAGE, "report_to": "none", **changes}
    paths = {"pretrained_model_name_or_path": model, "train_data_meta_dir": meta, "output_dir": output}
    flags = [f"--{name}={value}" for name, value in (paths | values).items() if value is not None]
    return [*flags, "--gradient_checkpointing", "--uniform_sampling", "--trainable_modules", ".", *more]


def load(words: list[str], folder: Path, says: list[str] | None = None) -> LoadedRun:
    return load_sft(words, {}, folder, (says if says is not None else []).append, spec_of_name, lambda rest: 1)


@pytest.mark.slow
def test_the_command_of_the_page_trains_and_a_killed_run_ends_with_the_same_bits(model, meta, tmp_path, monkeypatch):
    says: list[str] = []
    straight = load(words_of(model, meta, tmp_path / "straight"), tmp_path, says)
    train(straight)
    assert any("dataset_c is never trained: its rows with 3 source images have no weight" in line for line in says)
    words = words_of(model, meta, tmp_path / "stopped")
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        stopped = load(words, tmp_path)
        with pytest.raises(Interrupted):
            train(stopped)
    train(load(words, tmp_path))
    expected = weights_of(tmp_path / "straight/checkpoint-4")
    assert expected
    assert weights_of(tmp_path / "stopped/checkpoint-4") == expected
    losses = [record["loss"] for record in metrics(tmp_path / "straight", "step_done")]
    assert len(losses) == 4
    name = "transformer/diffusion_pytorch_model.safetensors"
    trained, base = load_file(tmp_path / "straight/checkpoint-4" / name), load_file(model / name)
    assert any(not torch.equal(trained[key], base[key]) for key in base)


@pytest.mark.slow
def test_shares_of_tasks_and_of_source_images_hold_over_ten_thousand_batches(model, meta, tmp_path) -> None:
    """By hand, of 0=1,1=1,2=1 and a=0.5,b=1.2: n = 0 is in b alone, n = 2 in a alone, n = 1 in both, 5 to 12."""
    expected = {("dataset_b", 0): 1 / 3, ("dataset_a", 2): 1 / 3}
    expected |= {("dataset_a", 1): 5 / 17 / 3, ("dataset_b", 1): 12 / 17 / 3}
    loaded = load(words_of(model, meta, tmp_path / "run"), tmp_path)
    datasets = read_datasets(loaded, build_family(loaded.config))
    sampler = build_sampler(loaded.config, datasets)
    found: dict[tuple[str, int], int] = {}
    place = (0, 0)
    for step in range(10_000):
        place = sampler.seek(*place, step)
        plan = sampler.batch(*place)
        dataset = next(each for each in datasets if each.id == plan.dataset_id)
        key = plan.dataset_id.rpartition("-")[0], len(dataset.references)
        found[key] = found.get(key, 0) + 1
        place = sampler.after(*place)
    assert {key: count / 10_000 for key, count in found.items()} == pytest.approx(expected, abs=0.01)


def test_noise_levels_have_the_declared_distribution_and_no_step_the_noise_of_another(model, meta, tmp_path) -> None:
    """Uniform levels, shifted by e^mu of the image's patches and stretched to 0.02; the original repeats one for ever.

    Undone, 1,000 levels must be uniform: Kolmogorov's distance is below 1.63 / sqrt(1000) in 99 of 100 samples.
    """
    loaded = load(words_of(model, meta, tmp_path / "run"), tmp_path)
    family, objective = build_family(loaded.config), build_objective(loaded.config)
    terminal = 0.02
    assert loaded.config.objective.flow_schedule_terminal == terminal
    latents = torch.zeros(1, 16, 16, 16)
    batch = Batch(latents, [], [0], [""], torch.ones(1), "")
    noises, levels = [], []
    for step in range(1000):
        noises.append(float(sample_noise(batch, loaded.config.training.seed, step)[0, 0, 0, 0]))
        quantiles = sample_quantiles(batch, loaded.config.training.seed, step)
        levels.append(float(objective.sigmas_at(family, quantiles, latents)))
    assert len(set(noises)) == len(set(levels)) == 1000
    shift = math.exp(0.5 + 0.4 * (64 - 256) / (8192 - 256))
    shifted = (torch.tensor(sorted(levels), dtype=torch.float64) - terminal) / (1 - terminal)
    uniform = shifted / (shift + (1 - shift) * shifted)
    steps = torch.arange(1000) / 1000
    distance = torch.maximum((uniform - steps).abs(), (uniform - steps - 1e-3).abs()).max()
    assert distance < 1.63 / 1000**0.5


@pytest.mark.slow
def test_embeddings_of_stage_one_train_as_those_that_are_encoded_on_demand(model, tmp_path) -> None:
    """The same images, wording and dropped captions (none): losses are equal to a millionth."""
    images = [str(path) for path in write_images(tmp_path / "images")]
    rows = [
        {"source_image": images[0], "target_image": images[1], "instruction": "Add a hat.", "instruction_cn": "加帽子"},
        {"source_image": images[1:3], "target_image": images[3], "instruction": "Merge them."},
    ]
    table = write_table(tmp_path / "rows.jsonl", rows)
    task = tmp_path / "meta/task"
    paths = [str(table), f"--output_jsonl_dir={task}", f"--embeddings_save_dir={task}/embeddings"]
    flags = parse_extract([*paths, "--image_sample_size=64", "--disable_inverse"])
    family = family_of_model(str(model), None)
    extract(flags, tmp_path, 0, 1, lambda: family, lambda line: None)
    losses = []
    for mode in ("offline", "sync"):
        changes = {"train_data_weights": "task=1", "condition_encoder_mode": mode, "learning_rate": "1e-3"}
        words = words_of(model, task.parent, tmp_path / mode, "--caption_dropout_probability=0", **changes)
        train(load(words, tmp_path))
        losses.append([record["loss"] for record in metrics(tmp_path / mode, "step_done")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_a_tiny_model_learns_edits_from_files_as_well_as_from_embeddings_on_demand(model, tmp_path) -> None:
    """The loss on held-out rows falls by a third; the two ways differ by a millionth at most, from step to step."""
    images = [str(path) for path in sorted(draw_images(tmp_path / "images", 9, seed=1).glob("*.png"))]
    rows = [
        {"source_image": images[number], "target_image": images[number + 1], "instruction": f"Make it number {number}."}
        for number in range(8)
    ]
    table, task = write_table(tmp_path / "rows.jsonl", rows), tmp_path / "meta/task"
    paths = [str(table), f"--output_jsonl_dir={task}", f"--embeddings_save_dir={task}/embeddings"]
    flags = parse_extract([*paths, "--image_sample_size=64", "--disable_inverse"])
    family = family_of_model(str(model), None)
    extract(flags, tmp_path, 0, 1, lambda: family, lambda line: None)
    held_out = ["--eval_holdout=0.25", "--num_eval_images=2", "--eval_steps_interval=100", "--eval_timesteps=3"]
    found = {}
    for mode in ("offline", "sync"):
        changes = {"train_data_weights": "task=1", "condition_encoder_mode": mode, "learning_rate": "3e-3"}
        changes |= {"max_train_steps": "200", "checkpointing_steps": "1000", "max_grad_norm": "1"}
        words = words_of(model, task.parent, tmp_path / mode, *held_out, "--caption_dropout_probability=0", **changes)
        train(load(words, tmp_path))
        trained = [record["loss"] for record in metrics(tmp_path / mode, "step_done")]
        found[mode] = trained, [record["pooled"] for record in metrics(tmp_path / mode, "eval_done")]
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    losses, evaluated = found["offline"]
    assert len(losses) == 200
    assert evaluated[-1] < 2 / 3 * evaluated[0]


def test_a_command_is_written_as_files_that_mean_the_same_run(model, meta, tmp_path, monkeypatch) -> None:
    words = words_of(model, meta, tmp_path / "run", "--validation_prompt=a hat")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["import", "firered", "sft", *words, "--output", "config/edit"])
    assert done.exit_code == 0, done.output
    written = load_run([], {"ENV": "edit"}, tmp_path)
    meant = load(words, tmp_path)
    elsewhere = {"data_backend_config": None}
    assert written.config.with_values(elsewhere) == meant.config.with_values(elsewhere)
    assert written.datasets == meant.datasets
    assert written.config.validation.validation_prompt == "a hat"


def test_original_embeddings_are_refused_with_the_command_that_turns_them(model, meta, tmp_path) -> None:
    for path in (meta / "dataset_a/embeddings").glob("0_*.safetensors"):
        [tensor] = load_file(path).values()
        torch.save(tensor, path.with_suffix(".pt"))
        path.unlink()
    table = meta / "dataset_a/rows_rank_000.jsonl"
    table.write_text(table.read_text().replace(".safetensors", ".pt"))
    words = words_of(model, meta, tmp_path / "run")
    with pytest.raises(DataError) as caught:
        load(words, tmp_path)
    assert f"simpletuner convert {meta}/dataset_a/embeddings" in caught.value.render()
    convert_folder(meta / "dataset_a/embeddings")
    assert load(words, tmp_path).datasets
