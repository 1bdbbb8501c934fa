"""How prompts are encoded is an option of some families: training, its images and `generate` read them alike."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from simpletuner import launch
from tests.runs import dataset, metrics, train_here, write_images, write_run
from tests.tiny_sd15 import tiny_sd15_folder
from tests.tiny_sdxl import tiny_sdxl_folder

IMAGES = {
    "validation_disable": False,
    "validation_prompt": "a box",
    "validation_resolution": "64",
    "validation_num_inference_steps": 2,
}
MODELS = {
    "sd15": (tiny_sd15_folder, {"clip_skip": 2}),
    "sdxl": (tiny_sdxl_folder, {"force_zeros_for_empty_prompt": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_on_long_lists_of_tags_is_generated_with_as_it_was_trained(name: str, tmp_path: Path) -> None:
    make, options = MODELS[name]
    run = tmp_path / "run"
    write_images(run / "images", 2, seed=1)
    for image in (run / "images").glob("*.png"):
        image.with_suffix(".txt").write_text("a ||| " + ", ".join(f"t{number}" for number in range(40)))
    shuffle = {"enable": True, "count": 2, "keep_separator": "|||", "dropout": 0.3}
    data = dataset("images", caption_strategy="textfile", caption_shuffle=shuffle)
    model = make(tmp_path / "model")
    steps = {"max_train_steps": 2, "caption_dropout_probability": 0.5}
    write_run(run, model, [data], model_family=name, tokenizer_max_length=152, **steps, **options, **IMAGES)
    output = train_here(run)
    assert len(metrics(output, "step_done")) == 2
    rows = [
        tensor
        for file in (run / "cache").rglob("*.safetensors")
        for key, tensor in load_file(file).items()
        if "prompt_embeds" in key and "pooled" not in key
    ]
    assert rows
    assert {len(row) for row in rows} == {152}
    [finished] = metrics(output, "run_finished")
    words = shlex.split(finished["commands"][0])
    assert words[words.index("--config") + 1] == str(run / "config.json")
    loaded = launch.load_arguments([], {}, run, print, run / "config.json", check_files=False)
    assert launch.family_of_run(loaded).prompt_settings == {"prompt_length": 152, **options}
    exported = launch.family_of_export(output / "pytorch_lora_weights.safetensors", None, None)
    assert exported.prompt_settings == {"prompt_length": 152, **options}
