"""Every family with text encoders, from config.json to images generated with what was trained, on its tiny model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from tests.runs import dataset, metrics, run_forked, train_here, write_images, write_run
from tests.tiny_flux import tiny_flux_folder
from tests.tiny_folders import TINY_FOLDERS

FAMILIES = sorted(name for name in TINY_FOLDERS if get_spec(name).caches_prompt_embeds)
IMAGES = {
    "validation_disable": False,
    "validation_prompt": "a box",
    "validation_resolution": "64",
    "validation_num_inference_steps": 2,
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, TINY_FOLDERS[request.param](tmp_path_factory.mktemp(request.param))


Options = dict[str, object]
RUNS: dict[str, Options] = {
    "lokr": {},
    "lora": {"lora_type": "standard", "lora_rank": 4},
    "quantized": {
        "lora_type": "standard",
        "lora_rank": 4,
        "base_model_precision": "int8-quanto",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["lokr", *(pytest.param(kind, marks=pytest.mark.ci) for kind in RUNS if kind != "lokr")]
)
def test_an_adapter_is_trained_proved_resumed_and_used_to_generate(model, tmp_path: Path, kind: str):
    name, folder = model
    steps = {"max_train_steps": 4, "eval_steps_interval": 2, "learning_rate": 1e-3}
    options = {"model_family": name, **steps, **IMAGES, **RUNS[kind]}
    if kind == "quantized":
        encoders = [part for part in get_spec(name).components if part.role == "text_encoder"]
        options[f"text_encoder_{min(len(encoders), 2)}_precision"] = "int8-quanto"
    run = write_run(tmp_path / "run", folder, **options)
    if kind != "lokr":
        _edit(run / "config.json", lambda config: config.pop("lycoris_config"))
    output = train_here(run, "--max_train_steps=2")
    train_here(run)
    losses = [record["loss"] for record in metrics(output, "step_done")]
    assert len(losses) == 4
    assert all(0 <= loss < 100 for loss in losses), losses
    evals = [record["pooled"] for record in metrics(output, "eval_done")]
    assert evals[0] != evals[-1]
    assert (output / "before_after.png").is_file()
    adapter = output / "pytorch_lora_weights.safetensors"
    arguments = ["--model-family", name, "--model", str(folder), "--prompt", "a box", "--width", "64", "--height", "64"]
    arguments += ["--steps", "2", "--adapter", str(adapter), "--output", "box.png"]
    generated = run_forked(run, "generate", *arguments)
    assert generated.returncode == 0, generated.stderr
    assert Image.open(run / "box.png").size == (64, 64)


@pytest.mark.slow
def test_a_run_in_one_go_and_one_in_two_end_with_the_same_bits(model, tmp_path: Path):
    from safetensors.torch import load_file

    name, folder = model
    run = write_run(tmp_path / "run", folder, model_family=name, max_train_steps=4)
    whole = load_file(train_here(run, "--output_dir=whole") / "pytorch_lora_weights.safetensors")
    train_here(run, "--output_dir=halves", "--max_train_steps=2")
    halves = load_file(train_here(run, "--output_dir=halves") / "pytorch_lora_weights.safetensors")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


# Whose processors ask for torchvision, which is not installed.
WITHOUT_STOCK_PIPELINE = ("qwen_image_21", "qwen_image_edit")


def pipeline_of(name: str, folder: Path) -> Any:
    """diffusers' own pipeline of a folder; the family's where diffusers has none, or none that can be made here."""
    spec = get_spec(name)
    if hasattr(diffusers, spec.pipeline_class) and name not in WITHOUT_STOCK_PIPELINE:
        stock = getattr(diffusers, spec.pipeline_class).from_pretrained(folder)
        stock.set_progress_bar_config(disable=True)
        return stock
    family = get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)
    return family.pipeline(family.load_denoiser(), family.load_vae())


@pytest.mark.slow
def test_full_training_writes_a_whole_model_for_the_stock_pipeline(model, tmp_path: Path):
    name, folder = model
    run = write_run(tmp_path / "run", folder, model_family=name, model_type="full", max_train_steps=1)
    output = train_here(run)
    written = output / "pipeline"
    pipeline = pipeline_of(name, written)
    # Some pipelines would generate the nearest of a few sizes.
    has_binning = "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters
    options = {"use_resolution_binning": False} if has_binning else {}
    image = pipeline(prompt="a box", height=64, width=64, num_inference_steps=2, **options).images[0]
    assert image.size == (64, 64)
    index = json.loads((written / "model_index.json").read_text())
    assert index["_class_name"] == get_spec(name).pipeline_class
    assert {key for key, value in index.items() if isinstance(value, list) and value[0]} >= {
        part.name for part in get_spec(name).components
    }


@pytest.mark.slow
def test_kontext_is_trained_on_pairs_and_sees_the_reference(tmp_path: Path):
    """The eval loss of untrained weights differs by the reference alone; training and validation take references."""
    model = tiny_flux_folder(tmp_path / "model", "kontext")
    losses = {}
    for name, seed in (("one", 5), ("other", 6)):
        run = tmp_path / name
        for kind in ("after", "after-eval"):
            write_images(run / kind, 3, seed=1)
            write_images(run / f"{kind}-before", 3, seed=seed)
        before = {"dataset_type": "conditioning", "conditioning_type": "reference_strict"}
        data: list[dict[str, object]] = []
        for kind, changes in (("after", {}), ("after-eval", {"dataset_type": "eval"})):
            data.append(dataset(kind, conditioning_data=f"{kind}-before", **changes))
            data.append({"id": f"{kind}-before", "instance_data_dir": f"{kind}-before", **before})
        options = {"model_family": "flux", "max_train_steps": 2, "eval_steps_interval": 2, "learning_rate": 1e-3}
        write_run(run, model, data, **options, **IMAGES)
        output = train_here(run)
        losses[name] = metrics(output, "eval_done")[0]["pooled"]
        assert (output / "before_after.png").is_file()
        assert len(metrics(output, "step_done")) == 2
    assert losses["one"] != losses["other"]


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
