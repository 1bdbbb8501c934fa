"""Training with reference images, from two folders of pairs to a model that uses what it is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.cache.store import TensorStore
from simpletuner.commands import cache
from tests.runs import dataset, load_here, metrics, run_forked, train_here, write_images, write_run
from tests.tiny import tiny_omnigen_folder


def entries(name: str, **changes: Any) -> list[dict[str, Any]]:
    """Images in `<name>`, the references of each in `<name>-sources`."""
    sources = {"dataset_type": "conditioning", "conditioning_type": "reference_strict"}
    return [
        dataset(name, conditioning_data=f"{name}-sources", resolution=32, **changes),
        {"id": f"{name}-sources", "instance_data_dir": f"{name}-sources", **sources},
    ]


def write_pairs(folder: Path, name: str, count: int, seed: int, shift: int = 0) -> None:
    """Images, and as the source of each the image `shift` places further on."""
    write_images(folder / name, count, seed, side=32)
    (folder / f"{name}-sources").mkdir()
    for index in range(count):
        target = folder / f"{name}-sources" / f"{index:03d}.png"
        shutil.copy(folder / name / f"{(index + shift) % count:03d}.png", target)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose latents are about as large as noise: there is something to copy."""
    folder = tiny_omnigen_folder(tmp_path_factory.mktemp("model"), hidden_size=64)
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 1.0}))
    return folder


@pytest.mark.slow
def test_a_model_that_is_shown_the_answer_learns_to_copy_it(tmp_path: Path, model: Path) -> None:
    """The eval loss on held-out pairs, where source and target are one image, and where they are not.

    All that differs is which file lies beside which: an ignored reference would give equal losses.
    """
    losses = {}
    for name, shift in (("right", 0), ("wrong", 1)):
        folder = tmp_path / name
        write_pairs(folder, "pairs", 48, seed=1, shift=shift)
        write_pairs(folder, "held-out", 8, seed=2, shift=shift)
        data = [*entries("pairs"), *entries("held-out", dataset_type="eval")]
        options = {"model_type": "full", "learning_rate": 3e-3, "max_train_steps": 220, "train_batch_size": 8}
        evaluation = {"eval_steps_interval": 220, "num_eval_images": 8, "eval_timesteps": 4}
        write_run(
            folder, model, data, caption_dropout_probability=0, checkpoint_step_interval=0, **options, **evaluation
        )
        losses[name] = [record["pooled"] for record in metrics(train_here(folder), "eval_done")]
    assert losses["right"][0] == pytest.approx(losses["wrong"][0], rel=0.05)
    assert losses["right"][-1] < 0.5 * losses["wrong"][-1]


@pytest.mark.slow
def test_pairs_masks_mirrors_and_dropped_captions_go_together(tmp_path: Path, model: Path) -> None:
    write_pairs(tmp_path, "pairs", 6, seed=1)
    write_images(tmp_path / "styles", 6, seed=2, side=80)
    (tmp_path / "masks").mkdir()
    for index in range(6):
        Image.new("L", (32, 32), 255 if index else 100).save(tmp_path / f"masks/{index:03d}.png")
    conditioning = {"dataset_type": "conditioning", "resolution": 64}
    data = [
        *entries("pairs", random_flip=True),
        {"id": "styles", "instance_data_dir": "styles", "conditioning_type": "reference_loose"} | conditioning,
        {"id": "masks", "instance_data_dir": "masks", "conditioning_type": "mask", "dataset_type": "conditioning"},
    ]
    data[0]["conditioning_data"] = ["masks", "pairs-sources", "styles"]
    folder = write_run(tmp_path, model, data, caption_dropout_probability=0.5, gradient_accumulation_steps=2)
    output = train_here(folder)
    assert len(metrics(output, "step_done")) == 8
    counts = {}
    for name in ("pairs", "pairs-sources", "styles", "masks"):
        with TensorStore(tmp_path / "cache/vae/omnigen" / name) as store:
            counts[name] = store.stats().num_entries
    # Both versions of each; a mask has no latents.
    assert counts == {"pairs": 12, "pairs-sources": 12, "styles": 12, "masks": 0}


def test_where_captions_are_dropped_their_references_are_too(tmp_path: Path, model: Path) -> None:
    """With every caption dropped a run on pairs is a run on the images alone."""
    losses = []
    for name, pairs in (("pairs", True), ("alone", False)):
        write_pairs(tmp_path / name, "pairs", 5, seed=1)
        data = entries("pairs") if pairs else [dataset("pairs", resolution=32)]
        folder = write_run(tmp_path / name, model, data, max_train_steps=3, caption_dropout_probability=1.0)
        losses.append([record["loss"] for record in metrics(train_here(folder), "step_done")])
    assert losses[0] == losses[1]


def entry_keys(folder: Path, name: str) -> set[str]:
    with TensorStore(folder / "cache/vae/omnigen" / name) as store:
        return set(store.keys())


def test_another_reference_is_encoded_and_nothing_else_and_pruning_keeps_references(
    tmp_path: Path, model: Path
) -> None:
    write_pairs(tmp_path, "pairs", 4, seed=1)
    folder = write_run(tmp_path, model, entries("pairs"))
    cache.build(load_here(folder))
    before = {name: entry_keys(tmp_path, name) for name in ("pairs", "pairs-sources")}
    cache.prune(load_here(folder), lambda line: None)
    assert {name: entry_keys(tmp_path, name) for name in before} == before

    write_images(tmp_path / "other", 1, seed=9, side=32)
    shutil.copy(tmp_path / "other/000.png", tmp_path / "pairs-sources/002.png")
    cache.build(load_here(folder))
    assert entry_keys(tmp_path, "pairs") == before["pairs"]
    assert len(entry_keys(tmp_path, "pairs-sources") - before["pairs-sources"]) == 1
    cache.prune(load_here(folder), lambda line: None)
    assert len(entry_keys(tmp_path, "pairs-sources") & before["pairs-sources"]) == 3


@pytest.mark.slow
def test_references_are_encoded_on_demand_with_the_same_losses(tmp_path: Path, model: Path) -> None:
    losses = []
    for name, keys in (("ahead", {}), ("demand", {"vae_cache_ondemand": True}), ("never", {"vae_cache_disable": True})):
        write_pairs(tmp_path / name, "pairs", 5, seed=1)
        folder = write_run(tmp_path / name, model, entries("pairs"), max_train_steps=3, **keys)
        losses.append([record["loss"] for record in metrics(train_here(folder), "step_done")])
    assert losses[0] == losses[1] == losses[2]
    assert entry_keys(tmp_path / "demand", "pairs-sources")
    assert not entry_keys(tmp_path / "never", "pairs-sources")


@pytest.mark.slow
def test_one_of_several_references_can_be_drawn(tmp_path: Path, model: Path) -> None:
    losses = []
    for sampling in ("combined", "random", "random"):
        folder = tmp_path / f"run{len(losses)}"
        write_pairs(folder, "pairs", 5, seed=1)
        write_images(folder / "styles", 5, seed=2, side=32)
        data = entries("pairs")
        data.append(data[1] | {"id": "styles", "instance_data_dir": "styles"})
        data[0]["conditioning_data"] = ["pairs-sources", "styles"]
        write_run(folder, model, data, max_train_steps=4, conditioning_multidataset_sampling=sampling)
        losses.append([record["loss"] for record in metrics(train_here(folder), "step_done")])
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


@pytest.mark.slow
def test_validation_edits_the_first_held_out_image_or_what_is_named(tmp_path: Path, model: Path) -> None:
    """Base images of one prompt, seed and model differ by the reference alone."""
    generated = {}
    for name, options in (
        ("held out", {}),
        ("held out again", {}),
        ("named", {"validation_references": "other/000.png"}),
        ("none", {"user_prompt_library": "library.json", "validation_prompt": None}),
    ):
        folder = tmp_path / name
        write_pairs(folder, "pairs", 3, seed=1)
        write_pairs(folder, "held-out", 2, seed=2)
        write_images(folder / "other", 1, seed=9, side=48)
        (folder / "library.json").write_text(json.dumps({"plain": {"prompt": "turn it green", "references": []}}))
        data = [*entries("pairs"), *entries("held-out", dataset_type="eval")]
        validation = {"validation_disable": False, "validation_num_inference_steps": 2, "validation_resolution": "32"}
        validation |= {"validation_prompt": "turn it green", "max_train_steps": 1} | options
        write_run(folder, model, data, **{key: value for key, value in validation.items() if value is not None})
        (path,) = (train_here(folder) / "benchmarks/base_model").glob("*.png")
        generated[name] = path.read_bytes()
    assert generated["held out"] == generated["held out again"]
    assert len(set(generated.values())) == 3


@pytest.mark.slow
def test_a_model_edits_an_image_on_the_command_line(tmp_path: Path, model: Path) -> None:
    write_images(tmp_path / "sources", 2, seed=1, side=40)
    options = (
        "--model",
        str(model),
        "--model-family",
        "omnigen",
        "--prompt",
        "turn it green",
        "--width",
        "32",
        "--steps",
        "2",
    )
    for index in range(2):
        result = run_forked(
            tmp_path, "generate", *options, "--reference", f"sources/{index:03d}.png", "--output", f"{index}.png"
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
    # The pipeline's own guidance toward the references is 1.6.
    for value, is_same in (("1.6", True), ("4", False)):
        words = ("--reference", "sources/001.png", "--guidance-image", value, "--output", f"{value}.png")
        assert run_forked(tmp_path, "generate", *options, *words).returncode == 0
        assert ((tmp_path / f"{value}.png").read_bytes() == (tmp_path / "1.png").read_bytes()) is is_same
    result = run_forked(tmp_path, "generate", *options, *["--reference", "sources/000.png"] * 4)
    assert result.returncode == 2
    assert "4 reference images are too many for OmniGen" in result.stderr


def test_a_prompt_that_names_an_image_that_is_not_there_is_explained(tmp_path: Path, model: Path) -> None:
    write_pairs(tmp_path, "pairs", 2, seed=1)
    for path in (tmp_path / "pairs").glob("*.txt"):
        path.write_text("put <img><|image_1|></img> beside <img><|image_2|></img>")
    result = run_forked(write_run(tmp_path, model, entries("pairs"), caption_dropout_probability=0), "train")
    assert result.returncode == 3
    assert "names the input images 1, 2, but has 1" in result.stderr
    assert "Traceback" not in result.stderr
