"""Every command in a ```bash block of the pages runs, in order, offline, in a folder as a clone has it.

Blocks that need a network, a GPU or hours are marked ```console and are not run. The environment makes runs short and
puts a tiny random model in the place of the one that a configuration names; nothing else is changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.fill_pages import PAGES, ROOT
from tests.runs import dataset, train_here, write_images, write_run

_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A console block that shows what a command prints: "$ command", then its output.
_SHOWN = re.compile(r"^```console\n\$ (.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHORT = {
    "MAX_TRAIN_STEPS": "2",
    "LR_WARMUP_STEPS": "0",
    "EVAL_TIMESTEPS": "2",
    "VALIDATION_NUM_INFERENCE_STEPS": "2",
    "REPORT_TO": "none",
}


def blocks(page: Path) -> list[str]:
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


WITH_COMMANDS = [page for page in sorted(PAGES.rglob("*.md")) if blocks(page)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what a clone has and commands of the pages use."""
    (tmp_path / "config").mkdir()
    for file in (ROOT / "config").glob("*.example"):
        shutil.copy(file, tmp_path / "config")
    shutil.copytree(ROOT / "config" / "examples", tmp_path / "config" / "examples")
    return tmp_path


def environment(model: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SIMPLETUNER_", "CONFIG_"))}
    kept.pop("ENV", None)
    kept |= {f"SIMPLETUNER_{name}": value for name, value in SHORT.items()}
    kept["SIMPLETUNER_PRETRAINED_MODEL_NAME_OR_PATH"] = str(model)
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept


def test_the_pages_that_begin_a_run_have_commands():
    assert {"QUICKSTART.md", "TUTORIAL.md", "INSTALL.md"} <= {page.name for page in WITH_COMMANDS}


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(PAGES)))
def test_the_commands_run(page: Path, clone: Path, omnigen_folder: Path):
    script = "set -euo pipefail\n" + "\n".join(blocks(page))
    result = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment(omnigen_folder), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    for command, output in _SHOWN.findall(page.read_text(encoding="utf-8")):
        shown = subprocess.run(
            ["bash", "-c", f"{command} 2>&1"],
            cwd=clone,
            env=environment(omnigen_folder),
            capture_output=True,
            text=True,
            check=False,
        )
        assert shown.stdout == output


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda page: str(page.relative_to(PAGES)))
def test_commands_stand_in_blocks_that_say_whether_they_are_run(page: Path):
    fences = re.findall(r"^ *```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"bash", "console", "json", "python", "toml", ""}
    assert "sh" not in fences


def test_the_tutorial_s_snippet_puts_an_adapter_on_the_stock_model(
    omnigen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    [snippet] = re.findall(
        r"^```python\n(.*?)^```$", (PAGES / "TUTORIAL.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    write_images(tmp_path / "images", 2, seed=1)
    output = train_here(write_run(tmp_path, omnigen_folder, [dataset("images")], max_train_steps=1))
    monkeypatch.chdir(output)
    Path("model").symlink_to(omnigen_folder)
    names: dict[str, Any] = {}
    exec(snippet, names)
    attention = names["transformer"].layers[0].self_attn.to_q
    assert {module.org_module[0] for module in names["network"].loras} >= {attention}
    x = torch.randn(1, 3, attention.in_features)
    assert (attention(x) - attention._lycoris_original_forward(x)).abs().max() > 0
