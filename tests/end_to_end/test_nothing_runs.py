"""Folders of strangers: code in the working folder, variables, pickles, links. Nothing of them runs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.distributed import launcher
from simpletuner.distributed.layout import Layout
from tests.runs import run_cli, write_run

PROGRAM = Path(sys.executable).with_name("simpletuner")
# Names that a run imports, of this program's libraries and of Python's own.
MODULES = ("torch", "numpy", "PIL", "yaml", "safetensors", "diffusers", "transformers", "accelerate", "sitecustomize")
MODULES += ("usercustomize", "json", "random", "wandb", "simpletuner", "conftest", "setup")


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path: Path, omnigen_folder: Path) -> Path:
    return write_run(tmp_path / "run", omnigen_folder, max_train_steps=1, checkpoint_step_interval=0)


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SIMPLETUNER_", "PYTHON"))}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.ci
def test_code_and_pickles_in_the_working_folder_do_not_run_in_any_process(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n")
    for place in (folder, folder / "images", folder / "output", folder / "cache"):
        place.mkdir(exist_ok=True)
        for name in ("model.pt", "optimizer.bin", "0.ckpt", "latents.pt", "random_states_0.pkl", "training_state.pkl"):
            with (place / name).open("wb") as file:
                pickle.dump(Payload(marker), file)
    words = [str(PROGRAM), "train", "--num_processes=2"]
    ended = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (folder / "output" / "pytorch_lora_weights.safetensors").is_file()
    assert not marker.exists()


def test_every_process_is_started_without_the_working_folder_on_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda command, **_: seen.append(command))
    launcher._start(["train"], Layout(2, 1, 0, "127.0.0.1", 0), 0, 1, Path(), 3)
    assert seen[0][1:4] == ["-P", "-m", "simpletuner"]
    sources = Path(launcher.__file__).parents[1].rglob("*.py")
    starts = [line for path in sources for line in path.read_text().splitlines() if "sys.executable, " in line]
    assert len(starts) >= 3
    assert [line for line in starts if 'sys.executable, "-P", ' not in line] == []


@pytest.mark.slow
def test_variables_of_a_stranger_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'it ran')!r})\n")
    (folder / "config").mkdir()
    for name in ("config.json", "multidatabackend.json", "lycoris_config.json"):
        (folder / name).rename(folder / "config" / name)
    lines = f"PYTHONPATH={tmp_path}\nPYTHONSTARTUP={tmp_path}/evil.py\nHF_ENDPOINT=https://elsewhere.example\n"
    (folder / "config/config.env").write_text(f"{lines}LD_PRELOAD=/tmp/x.so\nhttps_proxy=http://elsewhere.example\n")
    ended = run_cli(folder, "train", environment=environment())
    assert ended.returncode == 2
    for number, name in enumerate(("PYTHONPATH", "PYTHONSTARTUP", "HF_ENDPOINT", "LD_PRELOAD", "https_proxy"), 1):
        assert f"config/config.env:{number}: {name}: could " in ended.stderr
        assert f"set it in the shell: export {name}=..." in ended.stderr
    assert not (tmp_path / "it ran").exists()
    assert not (folder / "output").exists()


def test_code_that_reads_pickles_or_lets_models_run_theirs_is_in_one_place() -> None:
    root = Path(launcher.__file__).parents[1]
    found = {
        f"{path.relative_to(root)}: {words}"
        for path in root.rglob("*.py")
        for words in ("torch.load(", "pickle.load", "trust_remote_code=True", "yaml.load(", "shell=True", "os.system(")
        if words in path.read_text(encoding="utf-8")
    }
    assert found == {"commands/convert.py: torch.load("}
    loaders = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if ".from_pretrained(" in path.read_text(encoding="utf-8")
    }
    assert loaders == {"models/safe_loading.py", "hub/usage.py"}  # the second writes it into a page
