"""Every generated malformed configuration ends in one error that names file and key, with the right suggestion."""

from __future__ import annotations

import random
import re
import string
from typing import Any

import pytest

from simpletuner.config.datasets import dataset_options
from simpletuner.config.foreign_keys import RENAMED, RETIRED, UNBUILT
from simpletuner.config.options import OptionInfo, all_options
from simpletuner.errors import EXIT_CONFIG
from simpletuner.spelling import nearest

from .conftest import Workspace

KNOWN = {*all_options(), *RENAMED, *RETIRED, *UNBUILT}
LETTERS = string.ascii_lowercase + "_"


def misspelled(word: str, draw: random.Random) -> str:
    """The word with one letter left out, put in, replaced, or exchanged with its neighbor."""
    while True:
        at = draw.randrange(len(word))
        letter = draw.choice(LETTERS)
        edits = [
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at:],
            word[:at] + letter + word[at + 1 :],
            word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
        ]
        result = draw.choice(edits)
        if result not in KNOWN and result.strip("_") and not result.startswith("_"):
            return result


@pytest.mark.parametrize("key", sorted(all_options()))
def test_a_misspelled_option_is_named_with_its_file(workspace: Workspace, key: str) -> None:
    wrong = misspelled(key, random.Random(key))
    workspace.config[wrong] = "1"
    error = workspace.fails_written()
    assert error.exit_code == EXIT_CONFIG
    (problem,) = error.problems
    assert (problem.key, problem.file, problem.line) == (wrong, "config/config.json", 10)


@pytest.mark.slow
def test_suggestions_are_right() -> None:
    draw = random.Random(7)
    trials = [(key, misspelled(key, draw)) for key in sorted(all_options()) for _ in range(3)]
    right = sum(nearest(wrong, KNOWN) == key for key, wrong in trials)
    assert right / len(trials) >= 0.95, f"{right} of {len(trials)}"
    dataset_keys = dataset_options("image")
    trials = [(key, misspelled(key, draw)) for key in sorted(dataset_keys) for _ in range(3)]
    right = sum(nearest(wrong, dataset_keys) == key or wrong in dataset_keys for key, wrong in trials)
    assert right / len(trials) >= 0.95, f"{right} of {len(trials)}"


def test_a_word_that_is_near_nothing_gets_no_suggestion() -> None:
    assert nearest("zzzzqqqq", KNOWN) is None
    assert nearest("LEARNING-RATE", KNOWN) == "learning_rate"


def wrong_values(info: OptionInfo) -> list[Any]:
    """Values that a declaration refuses: of another type, or out of range."""
    kind = info.type_name
    values: list[Any] = [["a"]] if kind not in ("list", "object") else []
    if kind in ("whole number", "number"):
        values += ["abc", True]
        values += [info.bounds["ge"] - 1] if "ge" in info.bounds else []
        values += [info.bounds["gt"]] if "gt" in info.bounds else []
        values += [info.bounds["le"] + 1] if "le" in info.bounds else []
    if kind == "whole number":
        values.append(1.5)
    if kind == "true or false":
        values += ["perhaps", 3]
    if kind == "choice":
        values += ["nothing_of_this_name", 17]
    if kind in ("text", "path"):
        values.append(True)
    return values


CASES = [(name, value) for name, info in all_options().items() for value in wrong_values(info)]


@pytest.mark.parametrize("key", dict(CASES))
def test_a_wrong_value_is_named_with_its_file(workspace: Workspace, key: str) -> None:
    for value in wrong_values(all_options()[key]):
        workspace.config[key] = value
        error = workspace.fails_written()
        assert error.exit_code == EXIT_CONFIG, value
        problem = next(problem for problem in error.problems if problem.key == key)
        assert problem.file == "config/config.json", value
        assert problem.line == 2 + list(workspace.config).index(key), value
        assert problem.allowed, value
        assert not re.search(r"Traceback|pydantic|ValidationError|Input should", error.render()), value


def test_there_are_enough_of_them() -> None:
    assert len(CASES) + len(all_options()) >= 150


SOUND = '{"model_family": "toy", "max_train_steps": 5}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("[]", "list"),
        ('"text"', "text"),
        ("null", "null"),
        (SOUND[:-1] + ",}", "remove the comma"),
        (SOUND.replace('"', "'"), "single quotes"),
        ("\ufeff" + SOUND, "byte order mark"),
        (SOUND[:-1], "end of the file"),
        (SOUND[:-1] + ', "max_train_steps": 6}', "given twice"),
        (SOUND[:-1] + ', "--max_train_steps": 6}', "given twice"),
        (SOUND[:-1] + ', "seed": 1 "x": 2}', "put a comma at the end of line 1"),
        (SOUND[:-1] + ', "seed": 007}', "begins with 0"),
        (SOUND[:-1] + ', "seed": ' + "1" * 5000 + "}", "more than 1000 digits"),
        (SOUND[:-1] + ', "seed": .5}', "numbers as 0.5"),
        (SOUND[:-1] + ', "seed": True}', "true or false"),
        (SOUND[:-1] + ", seed: 5}", "double quotes"),
        (SOUND[:-1] + ', "output_dir": "C:\\Users"}', "write a backslash as"),
        (SOUND[:-1] + ', "validation_prompt": "a\ncat"}', "close it on its own line"),
    ],
)
def test_a_broken_file_is_placed(workspace: Workspace, text: str, words: str) -> None:
    workspace.write()
    workspace.put("config/config.json", text)
    error = workspace.fails()
    assert error.exit_code == EXIT_CONFIG
    assert error.problems[0].file == "config/config.json"
    assert error.problems[0].line == 1
    assert words in error.render()


@pytest.mark.parametrize("value", [["image"], {"a": 1}, 7, "imgae"])
def test_a_kind_of_dataset_that_is_none_is_placed(workspace: Workspace, value: Any) -> None:
    workspace.datasets[0]["dataset_type"] = value
    (problem,) = workspace.fails_written().problems
    assert (problem.file, problem.key) == ("config/multidatabackend.json", "images.dataset_type")


@pytest.mark.parametrize("value", [3, {"vae": 1}, ["vaee"]])
def test_steps_to_leave_out_that_are_none_are_placed(workspace: Workspace, value: Any) -> None:
    workspace.datasets[0]["skip_file_discovery"] = value
    (problem,) = workspace.fails_written().problems
    assert problem.key == "images.skip_file_discovery"
    assert "vae, aspect, metadata, text" in (problem.allowed or "")


def test_a_name_that_is_too_long_for_the_disk_is_not_there(workspace: Workspace) -> None:
    keys = ["lycoris_config", "pretrained_model_name_or_path", "resume_from_checkpoint"]
    workspace.config |= {key: "n" * 5000 for key in keys}
    assert sorted(problem.key or "" for problem in workspace.fails_written().problems) == keys


def test_a_list_of_the_wrong_things_is_worded_like_everything_else(workspace: Workspace) -> None:
    workspace.config["lora_target"] = [{"attention": 1}]
    text = workspace.fails_written().render()
    assert "allowed: list of names, or text with commas" in text
    assert "Input should" not in text


@pytest.mark.parametrize("value", ["int8-sdnq", "fp8-native", "int8dq-int4-torchao"])
def test_a_number_format_of_other_trainers_is_refused_with_the_one_to_take(workspace: Workspace, value: str) -> None:
    workspace.config["base_model_precision"] = value
    text = workspace.fails_written().render()
    assert f'"{value}" cannot be used: ' in text
    assert "; use " in text


def test_of_many_choices_the_likely_ones_are_shown(workspace: Workspace) -> None:
    workspace.config["optimizer"] = "adamw8bit"
    (problem,) = workspace.fails_written().problems
    allowed = problem.allowed or ""
    assert "bnb-adamw8bit" in allowed
    assert "`simpletuner options optimizer` lists all 49" in allowed
    assert len(allowed) < 200


def test_an_option_without_its_value_is_no_text_true(workspace: Workspace) -> None:
    workspace.write()
    text = workspace.fails("--learning_rate", "--validation_prompt", "--use_ema").render()
    assert "command line: learning_rate: has no value" in text
    assert "write --validation_prompt=VALUE" in text
    assert "use_ema" not in text


def test_a_run_without_length_or_images_names_the_file_to_fix(workspace: Workspace) -> None:
    del workspace.config["max_train_steps"]
    workspace.datasets = []
    files = {problem.message.split(":")[0]: problem.file for problem in workspace.fails_written().problems}
    assert files == {
        "the run has no length": "config/config.json",
        "names no dataset of dataset_type image": "config/multidatabackend.json",
    }


def test_a_missing_family_is_asked_for(workspace: Workspace) -> None:
    del workspace.config["model_family"]
    assert "config/config.json: model_family: is missing" in workspace.fails_written().render()
    workspace.config["model_family"] = "omnigenn"
    text = workspace.fails_written().render()
    assert 'config/config.json:9: model_family: "omnigenn"' in text
    assert 'did you mean "omnigen"?' in text
