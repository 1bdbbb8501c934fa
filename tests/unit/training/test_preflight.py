"""What is looked at before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner.errors import ConfigError
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.training.preflight import check_model_folder
from tests.configs import config_of

KEY = "pretrained_model_name_or_path"


def test_a_model_folder_without_one_of_its_parts_is_refused_by_name(tmp_path: Path) -> None:
    for part in OMNIGEN.components:
        (tmp_path / part.name).mkdir()
        (tmp_path / part.name / part.config_file).write_text("{}")
    loaded: Any = SimpleNamespace(
        config=config_of(**{KEY: str(tmp_path)}), origins={KEY: SimpleNamespace(file=Path("config.json"))}
    )
    check_model_folder(loaded)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        check_model_folder(loaded)
    [problem] = caught.value.problems
    assert problem.message == f"the model folder {tmp_path} has no vae/config.json"
    assert (problem.key, problem.file) == (KEY, "config.json")
