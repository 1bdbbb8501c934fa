"""OmniGen2's own sequence of commands, from its options file and data files to an image: train, convert, generate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from simpletuner.cli.imports import run_of_options
from simpletuner.commands.omnigen2.convert import convert_checkpoint
from simpletuner.commands.omnigen2.inference import generate, parse
from simpletuner.launch import family_of_model, load_arguments
from simpletuner.training.trainer import train
from tests.tiny_omnigen2 import tiny_omnigen2_folder

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "data_configs" / "train" / "example"
STEPS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_omnigen2_folder(tmp_path_factory.mktemp("omnigen2"))


def train_options(name: str, model: Path, *arguments: str) -> Path:
    """Train as a shipped options file says, paths and length on the command line; returns the experiment's folder."""
    words = [
        *("--config", str(ROOT / "options" / f"{name}.yml"), "--data_path", str(EXAMPLE / "mix.yml")),
        *("--global_batch_size", "4", f"--pretrained_model_name_or_path={model}", f"--max_train_steps={STEPS}"),
        *("--report_to=none", "--num_processes=1", *arguments),
    ]
    rest, config_file = run_of_options(words, {}, Path.cwd(), print)
    train(load_arguments(rest, dict(os.environ), Path.cwd(), print, config_file))
    return Path("experiments") / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ft_lora", "ft"])
def test_from_the_options_file_to_an_image(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = train_options(name, model)
    assert (experiment / f"{name}.yml").read_text() == (ROOT / "options" / f"{name}.yml").read_text()
    # The last checkpoint is there, though the run is shorter than the interval.
    checkpoint = experiment / f"checkpoint-{STEPS}"
    assert checkpoint.is_dir()

    part = "transformer_lora" if name == "ft_lora" else "transformer"
    saved = convert_checkpoint(
        experiment / f"{name}.yml", checkpoint / "pytorch_model_fsdp.bin", checkpoint / part, print
    )
    if name == "ft_lora":
        tensors = load_file(saved / "pytorch_lora_weights.safetensors")
        assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
        # Two blocks and three refiners of one, four layers each.
        assert len(tensors) == 2 * 4 * 5
    flags = parse(
        [
            *("--model_path", str(model), "--num_inference_step", "2", "--height", "64", "--width", "80"),
            *("--text_guidance_scale", "4.0", "--instruction", "A crystal ladybug", "--num_images_per_prompt", "2"),
            *("--output_image_path", "outputs/out.png", f"--{part}_path", str(checkpoint / part)),
        ]
    )
    written = generate(flags, family_of_model(str(model), "omnigen2"), print)
    assert [path.name for path in written] == ["out.png", "out_0.png", "out_1.png"]
    assert [Image.open(path).size for path in written] == [(160, 64), (80, 64), (80, 64)]


@pytest.mark.slow
def test_an_edit_has_the_size_of_its_only_image(model: Path, tmp_path: Path) -> None:
    flags = parse(
        [
            *("--model_path", str(model), "--num_inference_step", "2", "--instruction", "recolor the square blue"),
            *("--input_image_path", str(EXAMPLE / "images" / "red-square-blue-circle.png")),
            *("--output_image_path", str(tmp_path / "out.png"), "--scheduler", "dpmsolver++"),
        ]
    )
    [path] = generate(flags, family_of_model(str(model), "omnigen2"), print)
    assert Image.open(path).size == (96, 64)


def test_the_shipped_mix_becomes_one_entry_with_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(ROOT / "options" / "ft.yml"), "--data_path", str(EXAMPLE / "mix.yml")]
    _, config_file = run_of_options([*words, "--num_processes=8"], {}, Path.cwd(), print)
    assert config_file is not None
    [entry] = json.loads((config_file.parent / "multidatabackend.json").read_text())
    assert (entry["type"], entry["records_file"]) == ("records", str(EXAMPLE / "mix.yml"))
    assert (entry["max_output_pixels"], entry["max_side_length"]) == (1048576, 2048)
    assert entry["max_input_pixels"] == [1048576, 1048576, 589824, 262144]
    assert "The image shows " in entry["caption_openers"]
    assert json.loads(config_file.read_text())["gradient_accumulation_steps"] == 1
