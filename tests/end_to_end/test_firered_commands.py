"""Both stages by the commands of the page, as real processes: torchrun, then accelerate launch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import metrics
from tests.tiny_qwen_image import tiny_qwen_image_edit_folder
from tests.unit.commands.firered.edits import write_images, write_table

ROOT = Path(__file__).parents[2]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny edit model and the tables of two tasks: an edit, one of two images, and text to image."""
    folder = tmp_path_factory.mktemp("firered")
    tiny_qwen_image_edit_folder(folder / "model")
    images = [str(path) for path in write_images(folder / "img")]
    edits = [
        {
            "source_image": images[0],
            "target_image": images[1],
            "instruction": "Change the sky.",
            "instruction_cn": "改",
        },
        {"source_image": images[:2], "target_image": images[2], "instruction": "Merge.", "instruction_cn": "合成"},
        {"source_image": images[2], "target_image": images[3], "instruction": "Add a hat."},
    ]
    write_table(folder / "edits.jsonl", edits)
    write_table(folder / "plain.jsonl", [{"source_image": None, "target_image": images[3], "instruction": "A cat."}])
    return folder


def run_script(place: Path, name: str, *arguments: str) -> None:
    """An example script, in two processes; the programs of this environment come first."""
    programs = Path(sys.executable).parent
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    variables |= {"PATH": f"{programs}:{os.environ['PATH']}", "GPUS_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    variables |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"ACCELERATE_USE_CPU": "true", "RANK": "0", "WORLD_SIZE": "1"}  # numbers of machines, as pages say
    command = ["bash", str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.ci
def test_the_examples_go_from_two_tables_to_weights(place: Path) -> None:
    run_script(place, "extract_vlm_embeds.sh", "edits.jsonl", "meta/edits", "model", "--image_sample_size=64")
    run_script(place, "extract_vlm_embeds.sh", "plain.jsonl", "meta/plain", "model", "--t2i_mode")
    rows = [
        json.loads(line)
        for path in sorted((place / "meta/edits").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(row["instruction"] for row in rows) == ["Add a hat.", "Change the sky.", "Merge."]
    assert len(list((place / "meta/edits/embeddings/edits").glob("*.safetensors"))) == 18
    changes = ["--max_train_steps=2", "--checkpointing_steps=1", "--image_sample_size=64", "--mixed_precision=no"]
    changes += ["--report_to=none", "--learning_rate=1e-3", "--lr_warmup_steps=0"]
    run_script(place, "train.sh", "model", "meta", "out", "edits=1,plain=0.5", *changes)
    base, trained = load_file(place / "model" / WEIGHTS), load_file(place / "out/checkpoint-2" / WEIGHTS)
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    shutil.rmtree(place / "out/checkpoint-2")
    run_script(place, "train.sh", "model", "meta", "out", "edits=1,plain=0.5", *changes)
    again = load_file(place / "out/checkpoint-2" / WEIGHTS)
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    assert [record["step"] for record in metrics(place / "out", "step_done")] == [1, 2]
