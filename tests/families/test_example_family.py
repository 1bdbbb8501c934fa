"""The worked example of documentation/ADDING_A_MODEL.md keeps the contract, and trains in the shared trainer."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import torch

from simpletuner.families.registry import FAMILIES, get_family_class
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from tests.families.auraflow.spec import AURAFLOW
from tests.families.auraflow.tiny import tiny_auraflow_folder

# The contract tests run here too, on the `family` below.
from tests.families.test_contract import *  # noqa: F403
from tests.runs import metrics, train_here, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_auraflow_folder(tmp_path_factory.mktemp("auraflow"))


@pytest.fixture(scope="module")
def family(folder: Path) -> ModelFamily:
    return get_family_class(AURAFLOW)(AURAFLOW, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


def test_the_spec_names_the_modules_that_there_are(family: ModelFamily):
    modules = list(family.load_denoiser().named_modules())
    for adaptable in AURAFLOW.adaptable:
        for pattern in adaptable.names:
            found = {type(module).__name__ for name, module in modules if fnmatch.fnmatchcase(name, pattern)}
            assert adaptable.class_name in found, pattern


@pytest.mark.slow
def test_the_shared_trainer_trains_it_without_an_edit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "auraflow", "tests.families.auraflow.spec:AURAFLOW")
    options = {"model_family": "auraflow", "max_train_steps": 3, "eval_steps_interval": 3}
    images = {"validation_disable": False, "validation_prompt": "a box", "validation_resolution": "64"}
    write_run(tmp_path, folder, **options, **images, validation_num_inference_steps=2)
    output = train_here(tmp_path)
    assert len(metrics(output, "step_done")) == 3
    assert metrics(output, "eval_done")[-1]["pooled"] != metrics(output, "eval_done")[0]["pooled"]
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert (output / "before_after.png").is_file()
