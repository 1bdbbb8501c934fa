"""Numbers that nothing can be computed with are refused where they are read, in every file and option."""

from __future__ import annotations

import pytest

from simpletuner.config.datasets import DATASET_CLASSES, dataset_options
from simpletuner.config.lycoris import ENTRY_NUMBERS, NUMBERS
from simpletuner.config.options import OptionInfo, all_options
from simpletuner.config.options.declare import annotation_holds

NUMERIC = [each for each in all_options().values() if annotation_holds(each.annotation, float) and not each.planned]
WHOLE = [
    each
    for each in all_options().values()
    if annotation_holds(each.annotation, int) and not annotation_holds(each.annotation, bool) and not each.planned
]
OF_DATASETS = [
    each
    for kind in DATASET_CLASSES
    for each in dataset_options(kind).values()
    if annotation_holds(each.annotation, float) and not each.planned
]


def faults(workspace, key: str) -> str:
    error = workspace.fails_written()
    assert any(key in (problem.key or "") for problem in error.problems), str(error)
    return str(error)


@pytest.mark.parametrize("info", NUMERIC, ids=lambda info: info.name)
def test_no_option_takes_a_number_without_meaning(workspace, info: OptionInfo) -> None:
    for value in ("inf", "nan", "1e400", 1e31):
        workspace.config[info.name] = value
        faults(workspace, info.name)


@pytest.mark.parametrize("info", WHOLE, ids=lambda info: info.name)
def test_no_option_takes_a_whole_number_that_no_counter_holds(workspace, info: OptionInfo) -> None:
    workspace.config[info.name] = 10**20
    faults(workspace, info.name)


@pytest.mark.parametrize("name", sorted({info.name for info in OF_DATASETS if info.name in dataset_options("image")}))
def test_no_key_of_a_dataset_takes_one(workspace, name: str) -> None:
    workspace.datasets[0][name] = "inf"
    faults(workspace, name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("eps=inf", "eps must be a finite number"),
        ("weight_decay=inf", "weight_decay must be a finite number"),
        ("betas=nan", "betas must be a finite number"),
        ('{"betas": [0.9, 1e999]}', "optimizer_config: .*1e999 is not a finite number"),
        ("eps=1e35", "eps must be 0, or between 1e-30 and 1e\\+30"),
        ("eps=1e6", "cannot be eps of adamw"),
        ("weight_decay=1e9", "cannot be weight_decay of adamw"),
    ],
)
def test_no_argument_of_an_optimizer_is_one(workspace, text: str, reason: str) -> None:
    workspace.config |= {"optimizer": "adamw", "optimizer_config": text}
    workspace.write()
    with pytest.raises(Exception, match=reason):
        workspace.load()


@pytest.mark.parametrize("key", NUMBERS)
def test_no_setting_of_lycoris_is_one(workspace, key: str) -> None:
    workspace.lycoris = f'{{"algo": "lokr", "{key}": 1e999, "apply_preset": {{"target_module": ["Attention"]}}}}'
    assert "must be a finite number" in faults(workspace, key)


@pytest.mark.parametrize("key", ENTRY_NUMBERS)
def test_no_setting_of_one_class_of_layers_is_one(workspace, key: str) -> None:
    entry = f'{{"target_module": ["Attention"], "module_algo_map": {{"Attention": {{"{key}": 1e999}}}}}}'
    workspace.lycoris = f'{{"algo": "lokr", "factor": 4, "apply_preset": {entry}}}'
    assert "must be a finite number" in faults(workspace, key)


def test_dropout_that_leaves_nothing_is_refused(workspace) -> None:
    workspace.lycoris["dropout"] = 1.0
    assert "must be at least 0 and below 1" in faults(workspace, "dropout")


def test_numbers_in_use_are_taken(workspace) -> None:
    workspace.config |= {"optimizer": "adamw", "optimizer_config": "eps=1e-8,weight_decay=0.1", "learning_rate": 1e-6}
    workspace.config |= {"adam_epsilon": 1e-16, "lr_end": 0, "seed": 2**32}
    assert workspace.load_written().config.optimizer.optimizer_config == {"eps": 1e-8, "weight_decay": 0.1}
