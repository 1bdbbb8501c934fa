"""A run is put together from layers, with the origin of each value; the quickstart's files work as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.config.discovery import ConfigSource, find_config
from simpletuner.config.loading import load_run
from simpletuner.config.options import all_options
from simpletuner.config.reference import resolved_text
from simpletuner.distributed.lifeline import LAST_WORDS, LIFELINE, LISTENER
from tests.costs import calls_in_program

from .conftest import Workspace, find_spec

REPOSITORY = Path(__file__).parents[3]


# ---- the quickstart ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_file", ["multidatabackend-dreambooth.json", "multidatabackend-eval.json"])
def test_the_quickstart_is_read_as_written(quickstart: Callable[[str], Workspace], data_file: str) -> None:
    run = quickstart(data_file).load(check_files=False)
    config = run.config
    assert (
        config.validation.validation_num_inference_steps,
        config.optimizer.learning_rate,
        config.model.gradient_checkpointing,
    ) == (
        20,
        4e-5,
        True,
    )
    assert (config.optimizer.grad_clip_method, config.optimizer.max_grad_norm, config.optimizer.optimizer) == (
        "value",
        0.01,
        "adamw_bf16",
    )
    assert config.reporting.report_to == ("tensorboard",)
    assert run.lycoris is not None
    assert run.lycoris["linear_dim"] == 10000
    assert any("validation_torch_compile has no effect" in line for line in run.warnings)


def test_the_quickstart_datasets(quickstart: Callable[[str], Workspace]) -> None:
    workspace = quickstart("multidatabackend-dreambooth.json")
    camera, subject, small, texts = workspace.load(check_files=False).datasets
    assert camera.is_regularisation_data
    assert (camera.resolution, camera.crop_aspect, camera.crop_style) == (512, "square", "center")
    assert camera.instance_data_dir == workspace.root / "datasets/pseudo-camera-10k"
    assert (subject.repeats, subject.crop, subject.instance_prompt) == (
        1000,
        False,
        ("the name of your subject goes here",),
    )
    assert small.resolution == 512
    assert (texts.dataset_type, texts.default, texts.write_batch_size) == ("text_embeds", True, 128)


def test_the_quickstart_with_evaluation_has_nothing_to_warn_of_there(quickstart: Callable[[str], Workspace]) -> None:
    assert not [
        line for line in quickstart("multidatabackend-eval.json").load(check_files=False).warnings if "eval" in line
    ]
    without = quickstart("multidatabackend-dreambooth.json").load(check_files=False).warnings
    assert len([line for line in without if "eval" in line]) == 1


def test_the_quickstart_prompt_library_is_taken_with_dashes(quickstart: Callable[[str], Workspace]) -> None:
    workspace = quickstart("multidatabackend-eval.json")
    text = (workspace.root / "config/config.json").read_text().rstrip().removesuffix("}").rstrip()
    workspace.put("config/config.json", text + ',\n  "--user_prompt_library": "config/user_prompt_library.json"\n}')
    run = workspace.load(check_files=False)
    assert run.prompt_library is not None
    assert len(run.prompt_library) == 15
    assert run.prompt_library["man"].prompt.startswith("a powerful and striking portrait")


def test_resolved_shows_each_quickstart_key_with_its_line(quickstart: Callable[[str], Workspace]) -> None:
    workspace = quickstart("multidatabackend-eval.json")
    path = workspace.root / "config/config.json"
    lines = path.read_text().splitlines()
    shown = {line.split()[0]: line for line in resolved_text(workspace.load(check_files=False)).splitlines() if line}
    for key in json.loads(path.read_text()):
        if key == "validation_torch_compile":
            continue
        number = next(index for index, line in enumerate(lines, 1) if f'"{key}"' in line)
        assert shown[key].endswith(f"config/config.json:{number}"), shown[key]
    assert set(all_options()) <= set(shown)


# ---- layers --------------------------------------------------------------------------------------------------------


def test_a_later_layer_wins(workspace: Workspace) -> None:
    workspace.config |= {"seed": 1, "validation_guidance": 4}
    workspace.write()
    assert workspace.load().config.training.seed == 1
    workspace.environment["SIMPLETUNER_SEED"] = "2"
    assert workspace.load().config.training.seed == 2
    run = workspace.load("--seed=3")
    assert run.config.training.seed == 3
    assert (run.origin("seed").kind, run.origin("validation_guidance").line) == ("command line", 11)
    # The file's word counts against the family's, the family's against the declaration's.
    assert (run.config.validation.validation_guidance, run.config.validation.validation_num_inference_steps) == (4, 25)
    assert run.origin("validation_num_inference_steps").kind == "family"
    assert run.origin("train_batch_size").kind == "default"


def test_unset_values_leave_the_layer_below(workspace: Workspace) -> None:
    workspace.config |= {"seed": None, "validation_guidance": "", "validation_negative_prompt": ""}
    config = workspace.load_written("--train_batch_size=").config
    assert (config.training.seed, config.validation.validation_guidance, config.training.train_batch_size) == (
        42,
        3.5,
        4,
    )
    assert config.validation.validation_negative_prompt == ""


def test_arguments_come_in_three_forms(workspace: Workspace) -> None:
    config = workspace.load_written("--use_ema", "--seed", "7", "--learning-rate=1e-3", "--validation_seed", "9").config
    assert (
        config.training.use_ema,
        config.training.seed,
        config.optimizer.learning_rate,
        config.validation.validation_seed,
    ) == (True, 7, 1e-3, 9)
    assert workspace.load("--use_ema=true", "--use_ema", "false").config.training.use_ema is False
    assert "stray" in workspace.fails("stray").render()


def test_variables_that_name_no_option_are_reported(workspace: Workspace) -> None:
    workspace.environment |= {"SIMPLETUNER_QUOTA_SERVER": "1", "SEED": "5", "SIMPLETUNER_DEBUG": "1"}
    workspace.environment |= {LAST_WORDS: "/x", LIFELINE: "3", LISTENER: "4"}  # of our launcher
    run = workspace.load_written()
    assert run.config.training.seed == 42
    assert [line for line in run.warnings if "environment" in line] == [
        "environment variable SIMPLETUNER_QUOTA_SERVER: names no option and is not read"
    ]


def test_a_misspelled_variable_is_as_wrong_as_a_misspelled_key(workspace: Workspace) -> None:
    workspace.environment |= {"SIMPLETUNER_LEARNING_RTE": "1e-5"}
    text = workspace.fails_written().render()
    assert "environment variable SIMPLETUNER_LEARNING_RTE" in text
    assert 'did you mean "SIMPLETUNER_LEARNING_RATE"?' in text


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rte", "learning_rate"),
        ("save_total_limt", "checkpoints_total_limit"),
        ("optimizer_bta1", "adam_beta1"),
    ],
)
def test_a_misspelled_old_name_suggests_the_present_one(workspace: Workspace, key: str, meant: str) -> None:
    workspace.config[key] = 1
    assert (
        f'{key}: there is no option of this name\n  fix: did you mean "{meant}"?' in workspace.fails_written().render()
    )


def test_extra_arguments_with_an_open_quote_are_placed(workspace: Workspace) -> None:
    workspace.config["TRAINER_EXTRA_ARGS"] = "--validation_prompt='a dog"
    assert "config/config.json:10: TRAINER_EXTRA_ARGS: has unbalanced quotes" in workspace.fails_written().render()
    del workspace.config["TRAINER_EXTRA_ARGS"]
    workspace.environment["TRAINER_EXTRA_ARGS"] = '--seed="1'
    assert "environment variable TRAINER_EXTRA_ARGS" in workspace.fails_written().render()


def test_old_names_are_read_with_a_warning(workspace: Workspace) -> None:
    workspace.config |= {"validation_steps": 7, "--save_total_limit": "3", "vae_cache_preprocess": False}
    run = workspace.load_written()
    config = run.config
    assert (
        config.validation.validation_step_interval,
        config.checkpoint.checkpoints_total_limit,
        config.data.vae_cache_ondemand,
    ) == (7, 3, True)
    assert any("validation_steps is now called validation_step_interval" in line for line in run.warnings)
    workspace.config["checkpoints_total_limit"] = 4
    assert 'given twice, as "save_total_limit" and as "checkpoints_total_limit"' in workspace.fails_written().render()


def test_extra_arguments_in_json_are_read_and_reported(workspace: Workspace) -> None:
    workspace.config["TRAINER_EXTRA_ARGS"] = "--seed=5 --validation_prompt='a dog'"
    run = workspace.load_written()
    assert (run.config.training.seed, run.config.validation.validation_prompt) == (5, "a dog")
    assert any("add each option as a key" in line for line in run.warnings)


# ---- other kinds of file -------------------------------------------------------------------------------------------


def test_toml_says_the_same_as_json(workspace: Workspace) -> None:
    expected = workspace.load_written("--seed=3").config
    (workspace.root / "config/config.json").unlink()
    lines = [f"{key} = {json.dumps(value)}" for key, value in workspace.config.items()]
    workspace.put("config/config.toml", "\n".join([*lines, "seed = 3"]))
    run = workspace.load()
    assert run.config == expected
    assert str(run.origin("seed")) == "config/config.toml:9"
    workspace.put("config/config.toml", "seed = \n")
    assert "config/config.toml:1: is not TOML" in workspace.fails().render()


def test_an_env_file_says_the_same_as_json(workspace: Workspace) -> None:
    expected = workspace.load_written("--seed=3", "--use_ema", "--validation_prompt=a red cat").config
    (workspace.root / "config/config.json").unlink()
    lines = [f"{key.upper()}='{value}'" for key, value in workspace.config.items() if key != "max_train_steps"]
    lines += ["# a comment", "export MAX_NUM_STEPS=100 # steps", "TRAINING_SEED=3", "HF_HOME=/somewhere"]
    lines += ['TRAINER_EXTRA_ARGS="--use_ema"', 'WHAT="red cat"']
    lines += ["TRAINER_EXTRA_ARGS=\"${TRAINER_EXTRA_ARGS} --validation_prompt='a ${WHAT}'\""]
    workspace.put("config/config.env", "\n".join(line for line in lines if "VALIDATION_PROMPT" not in line))
    run = workspace.load()
    assert run.config == expected
    assert any("HF_HOME names no option" in line for line in run.warnings)
    workspace.put("config/config.env", "SEED=$(date +%s)")
    assert "holds a command" in workspace.fails().render()


def test_the_file_is_chosen_by_the_environment(workspace: Workspace) -> None:
    workspace.write()
    for name, seed in (("config/other/config.json", 11), ("config.json", 12), ("elsewhere/mine.json", 13)):
        workspace.put(name, {**workspace.config, "seed": seed})
    start_up = workspace.put("home/.shrc", "alias ll='ls -l'")
    found = {
        "ENV=other": 11,
        "SIMPLETUNER_ENV=other": 11,
        "ENV=default": 42,
        f"ENV={start_up}": 42,  # as shells know it
        "CONFIG_PATH=elsewhere/mine.json": 13,
        "CONFIG_PATH=elsewhere/mine": 13,
        "CONFIG_PATH=config/other": 11,
        "": 42,
    }
    for choice, seed in found.items():
        name, _, value = choice.partition("=")
        workspace.environment = {name: value} if name else {}
        assert workspace.load().config.training.seed == seed, choice
    for choice in (
        "ENV=missing",
        f"SIMPLETUNER_ENV={start_up}",
        "CONFIG_PATH=missing",
        "CONFIG_BACKEND=toml",
        "CONFIG_BACKEND=yaml",
    ):
        name, _, value = choice.partition("=")
        workspace.environment = {name: value}
        assert value in workspace.fails().render()
    workspace.environment = {"ENV": "othr"}
    assert 'did you mean "other"?' in workspace.fails().render()
    workspace.environment = {"CONFIG_PATH": "elsewere/mine.json"}  # codespell:ignore
    assert 'did you mean "elsewhere/mine.json"?' in workspace.fails().render()
    (workspace.root / "elsewhere/mine.json").rename(workspace.root / "elsewhere/mine.txt")
    chosen = {"CONFIG_PATH": "elsewhere/mine.txt", "CONFIG_BACKEND": "toml"}
    assert find_config(chosen, workspace.root) == ConfigSource(workspace.root / "elsewhere/mine.txt", "toml")
    workspace.environment = {"CONFIG_BACKEND": "cmd"}
    arguments = [f"--{key}={value}" for key, value in workspace.config.items()]
    assert workspace.load(*arguments, "--seed=14").config.training.seed == 14


def test_without_any_file_the_places_are_listed(tmp_path: Path) -> None:
    text = Workspace(tmp_path).fails().render()
    assert str(tmp_path / "config/config.json") in text
    assert str(tmp_path / "config.json") in text
    assert "config.json.example" in text


# ---- paths ---------------------------------------------------------------------------------------------------------


def test_paths_lead_to_the_working_folder_then_to_the_files_own(workspace: Workspace) -> None:
    workspace.config |= {"lycoris_config": "lycoris_config.json", "pretrained_model_name_or_path": "model"}
    del workspace.config["data_backend_config"]
    (workspace.root / "config/model").mkdir(parents=True)
    run = workspace.load_written()
    assert run.lycoris_file == workspace.root / "config/lycoris_config.json"
    assert run.data_file == workspace.root / "config/multidatabackend.json"
    assert run.config.model.pretrained_model_name_or_path == str(workspace.root / "config/model")
    assert run.config.checkpoint.output_dir == workspace.root / "output/run"
    workspace.put("lycoris_config.json", {**workspace.lycoris, "factor": 8})
    nearer = workspace.load()
    assert nearer.lycoris is not None
    assert nearer.lycoris["factor"] == 8


def test_a_hub_id_stays_as_it_is(workspace: Workspace) -> None:
    workspace.config["pretrained_model_name_or_path"] = "toys/small"
    assert workspace.load_written().config.model.pretrained_model_name_or_path == "toys/small"


@pytest.mark.parametrize("key", ["lycoris_config", "data_backend_config", "user_prompt_library"])
def test_a_missing_file_lists_both_places(workspace: Workspace, key: str) -> None:
    workspace.config[key] = "sub/gone.json"
    text = workspace.fails_written().render()
    assert key in text
    assert f"{workspace.root}/sub/gone.json or {workspace.root}/config/sub/gone.json" in text


def test_the_resolved_configuration_can_be_read_back(workspace: Workspace) -> None:
    workspace.config |= {"report_to": "tensorboard", "optimizer_config": "weight_decay=0.5", "learning_rate": "1e-5"}
    run = workspace.load_written()
    workspace.put("config/config.json", run.resolved())
    assert workspace.load().config == run.config


# ---- speed and examples --------------------------------------------------------------------------------------------


def test_reading_a_run_imports_no_torch_and_is_quick(quickstart: Callable[[str], Workspace]) -> None:
    root = quickstart("multidatabackend-eval.json").root
    script = (
        "import sys; from pathlib import Path; from simpletuner.config.loading import load_run; "
        "from simpletuner.families.registry import get_spec; "
        f"load_run([], {{}}, Path({str(root)!r}), check_files=False); "
        "print([name for name in ('torch', 'numpy', 'diffusers', 'transformers') if name in sys.modules])"
    )
    calls, reported = calls_in_program(script)
    assert reported.strip() == "[]"
    assert calls < 800_000  # a third of a second of CPU time


def test_the_example_files_load(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for example in (REPOSITORY / "config").glob("*.example"):
        workspace.put(f"config/{example.name.removesuffix('.example')}", example.read_text(encoding="utf-8"))
    for name in ("subject", "regularisation", "subject-eval"):
        (tmp_path / "datasets" / name).mkdir(parents=True)
    run = load_run([], {}, tmp_path)
    assert not run.warnings
    assert [entry.id for entry in run.datasets] == ["subject", "regularisation", "subject-eval"]
    assert run.prompt_library
    assert find_spec("omnigen").name == run.config.model.model_family


def test_a_path_that_is_spelled_almost_right_is_suggested(workspace: Workspace) -> None:
    workspace.datasets[0]["instance_data_dir"] = "dataset/image"
    assert 'did you mean "datasets/images"?' in workspace.fails_written().render()
    workspace.datasets[0]["instance_data_dir"] = "somewhere/else"
    assert "did you mean" not in workspace.fails_written().render()
    workspace.datasets[0]["instance_data_dir"] = "datasets/images"
    workspace.config["data_backend_config"] = "config/multidatabackends.json"
    assert 'did you mean "config/multidatabackend.json"?' in workspace.fails_written().render()


def test_a_flavour_has_defaults_of_its_own_over_the_family_s(workspace: Workspace) -> None:
    workspace.config["model_family"] = "flux"
    workspace.config.pop("model_flavour", None)
    for key in ("validation_num_inference_steps", "validation_guidance"):
        workspace.config.pop(key, None)
    steps = {}
    for flavour in (None, "schnell", "kontext"):
        workspace.config |= {"model_flavour": flavour} if flavour else {}
        config = workspace.load_written().config
        steps[flavour] = (config.validation.validation_num_inference_steps, config.validation.validation_guidance)
    assert steps == {None: (28, 3.5), "schnell": (4, 3.5), "kontext": (28, 2.5)}
