"""The OmniGen quickstart as written: its files verbatim, overridden only where a test must be small or local."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import metrics, run_cli, write_images
from tests.tiny import tiny_omnigen_folder

QUICKSTART = Path(__file__).parents[1] / "fixtures" / "quickstart"


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A working folder as the quickstart describes it, with a random model that takes 1024 px."""
    for name, place in {
        "config.json": "config/config.json",
        "lycoris_config.json": "config/lycoris_config.json",
        "multidatabackend-dreambooth.json": "config/omnigen/multidatabackend.json",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(QUICKSTART / name, tmp_path / place)
    write_images(tmp_path / "datasets" / "pseudo-camera-10k", 2, seed=1, side=600)
    write_images(tmp_path / "datasets" / "dreambooth-subject", 2, seed=2, side=1024)
    tiny_omnigen_folder(tmp_path / "model", pos_embed_max_size=64)
    return tmp_path


@pytest.mark.slow
def test_the_quickstart_trains_from_its_own_files(quickstart):
    result = run_cli(
        quickstart,
        "train",
        "--pretrained_model_name_or_path=model",
        "--max_train_steps=3",
        "--validation_resolution=64x64",
        "--validation_num_inference_steps=2",
    )
    assert result.returncode == 0, result.stderr
    output = quickstart / "output" / "models-omnigen"
    assert [record["step"] for record in metrics(output, "step_done")] == [1, 2, 3]
    said = result.stdout
    assert "adapter: 8 modules of Attention" in said
    assert "adapter: 4 modules of FeedForward (OmniGenFeedForward)" in said
    assert said.count("dataset_type eval") == 1
    assert "validation_torch_compile" in said
    report = {entry["id"]: entry for entry in json.loads((output / "dataset_report.json").read_text())}
    assert report["pseudo-camera-10k-omnigen"]["sizes"] == {"512x512": 2}
    assert report["dreambooth-subject"]["sizes"] == {"1024x1024": 2}
    assert report["dreambooth-subject-512"]["sizes"] == {"512x512": 2}
    assert report["dreambooth-subject"]["per_epoch"] == 2002
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert list((output / "logs").rglob("events.out.tfevents*"))
    assert (output / "benchmarks" / "base_model" / "validation_64x64.png").is_file()
    assert (output / "validation_images" / "step_3_validation_0_64x64.png").is_file()


def test_every_key_of_the_quickstart_is_resolved_with_its_origin(quickstart):
    result = run_cli(quickstart, "options", "--resolved")
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for key in json.loads((QUICKSTART / "config.json").read_text()):
        if key != "validation_torch_compile":  # retired
            assert "config/config.json" in lines[key]
