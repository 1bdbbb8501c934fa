"""Files from answers: new ones pass every check, existing ones change only where an answer did."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.config.loading import load_run
from simpletuner.config.prompt_library import LibraryPrompt
from simpletuner.errors import ConfigError
from simpletuner.reporting.report.record import CONTACT_DIR
from simpletuner.training.trainer import train
from simpletuner.wizard.command import Given, apply, configure_without_screens
from simpletuner.wizard.files import judge, save, start_command, texts_for
from simpletuner.wizard.images import look_at_folder
from simpletuner.wizard.project import open_project
from tests.runs import write_run
from tests.unit.wizard.projects import CONFIG, CPU, configured, contents, new_folder

SHIPPED = Path(__file__).parents[3] / "config"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_folder(tmp_path)


def changed_lines(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [" ".join(line.split()) for line in lines if line[0] in "+-"]


def test_the_written_run_loads_and_says_what_was_answered(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder, "--max_train_steps=4", eval_data="held_out", regularisation_data="others")
    run = load_run((), {}, folder)
    assert run.warnings == ()
    assert run.config.training.max_train_steps == 4
    assert run.config.data.resolution == 64
    assert [(entry.id, entry.dataset_type, entry.is_regularisation_data) for entry in run.datasets] == [
        ("images", "image", False),
        ("regularisation", "image", True),
        ("images-eval", "eval", False),
    ]
    assert run.datasets[0].instance_prompt == ("ohwx box",)
    assert run.lycoris is not None
    assert run.config.validation.validation_prompt == "ohwx box"


def test_opened_and_saved_without_an_answer_nothing_changes(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    project = open_project(CONFIG, folder, CPU)
    assert texts_for(project, project.answers) == {}


def test_files_of_every_origin_open_without_a_change(tmp_path: Path, omnigen_folder: Path):
    write_run(tmp_path / "run", omnigen_folder)
    project = open_project(Path("config.json"), tmp_path / "run", CPU)
    assert texts_for(project, project.answers) == {}
    (tmp_path / "shipped" / "config").mkdir(parents=True)
    for example in SHIPPED.glob("*.json.example"):
        (tmp_path / "shipped" / "config" / example.stem).write_text(example.read_text())
    project = open_project(CONFIG, tmp_path / "shipped", CPU)
    assert texts_for(project, project.answers) == {}
    assert project.roles == {"images": 0, "regularisation": 1, "eval": 2}
    assert project.answers.goal == "subject"


def test_only_the_changed_value_of_a_hand_written_file_is_rewritten(tmp_path: Path):
    (tmp_path / "config").mkdir()
    text = '{ // mine\n  "--model_family": "omnigen",\n  "--learning_rate": "4e-5", /* slow */\n  "seed": "7"\n}\n'
    (tmp_path / CONFIG).write_text(text)
    project = open_project(CONFIG, tmp_path, CPU)
    options = {**project.answers.options, "learning_rate": 1e-4, "optimizer": "adamw"}
    texts = texts_for(project, replace(project.answers, options=options))
    # A LoKr run cannot start without the name of that file, so it is added too.
    added = '"seed": "7",\n  "optimizer": "adamw",\n  "lycoris_config": "config/lycoris_config.json"'
    assert texts[tmp_path / CONFIG] == text.replace('"4e-5"', "1e-4").replace('"seed": "7"', added)


def test_an_option_on_the_command_line_changes_one_line(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    before = contents(folder)
    project = open_project(CONFIG, folder, CPU)
    given = Given(yes=True, arguments=("--learning_rate=2e-4",))
    configure_without_screens(project, given, lambda line: None)
    after = contents(folder)
    assert changed_lines(before["config.json"], after["config.json"]) == [
        '- "learning_rate": 1e-4,',
        '+ "learning_rate": 2e-4,',
    ]
    assert {name for name in before if before[name] != after[name]} == {"config.json"}


def test_existing_files_are_not_changed_without_yes(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    before = contents(folder)
    with pytest.raises(ConfigError, match="--yes"):
        configure_without_screens(
            open_project(CONFIG, folder, CPU), Given(arguments=("--learning_rate=2e-4",)), lambda line: None
        )
    assert contents(folder) == before


def test_from_adapter_to_full_training_and_back_the_run_loads(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    configured(folder, omnigen_folder, goal="full", yes=True)
    assert "lycoris_config" not in json.loads(
        "".join(line for line in contents(folder)["config.json"].splitlines() if "//" not in line)
    )
    assert load_run((), {}, folder).config.model.model_type == "full"
    configured(folder, omnigen_folder, goal="subject", yes=True)
    assert load_run((), {}, folder).lycoris is not None


def test_from_lokr_to_dora_and_lora_and_back_the_run_loads(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    configured(folder, omnigen_folder, adapter="dora", yes=True)
    run = load_run((), {}, folder)
    assert (run.config.adapter.lora_type, run.config.adapter.use_dora, run.config.adapter.lora_rank) == (
        "standard",
        True,
        16,
    )
    (warning,) = run.warnings  # says who reads the file
    assert "PEFT" in warning
    configured(folder, omnigen_folder, "--lora_rank=4", adapter="lora", yes=True)
    run = load_run((), {}, folder)
    assert (run.config.adapter.use_dora, run.config.adapter.lora_rank, run.lycoris) == (False, 4, None)
    project = open_project(CONFIG, folder, CPU)
    assert project.answers.adapter == "lora"
    assert texts_for(project, project.answers) == {}
    configured(folder, omnigen_folder, adapter="lokr", yes=True)
    run = load_run((), {}, folder)
    assert run.lycoris is not None
    assert run.warnings == ()


def test_folders_are_added_and_prompts_replaced_in_existing_files(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    configured(folder, omnigen_folder, eval_data="held_out", prompt=["ohwx box", "a red box"], yes=True)
    run = load_run((), {}, folder)
    assert [entry.dataset_type for entry in run.datasets] == ["image", "eval"]
    assert run.prompt_library == {"a_red_box": LibraryPrompt("a red box")}
    assert run.config.evaluation.eval_steps_interval
    project = open_project(CONFIG, folder, CPU)
    answers = replace(project.answers, eval_images="")
    saved = save(project, texts_for(project, answers), answers)
    assert [entry.dataset_type for entry in load_run((), {}, folder).datasets] == ["image"]
    assert "eval" not in saved.roles


def test_two_folders_that_go_take_their_own_entries_along(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder, eval_data="held_out", regularisation_data="others")
    project = open_project(CONFIG, folder, CPU)
    assert project.roles == {"images": 0, "regularisation": 1, "eval": 2}
    answers = replace(project.answers, eval_images="", regularisation_images="")
    [text] = texts_for(project, answers).values()
    assert [entry["instance_data_dir"] for entry in json.loads(text)] == ["images"]


def test_an_entry_that_is_disabled_is_not_the_one_that_is_edited(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    data = folder / "config/multidatabackend.json"
    entries = json.loads(data.read_text())
    data.write_text(
        json.dumps([{**entries[0], "id": "old", "instance_data_dir": "others", "disabled": "true"}, *entries])
    )
    project = open_project(CONFIG, folder, CPU)
    assert (project.roles, project.answers.images) == ({"images": 1}, "images")


def test_another_flavor_takes_the_place_of_a_model_folder(folder: Path, omnigen_folder: Path):
    project = configured(folder, omnigen_folder)
    assert project.answers.model == str(omnigen_folder)
    assert apply(project, Given(flavour="v1")).model is None
    assert apply(project, Given(rank=3)).model == str(omnigen_folder)
    assert apply(project, Given(family="sdxl")).model is None


def test_another_algorithm_has_its_own_usual_rank(folder: Path, omnigen_folder: Path):
    project = configured(folder, omnigen_folder, adapter="loha", rank=6)
    assert apply(project, Given(adapter="locon")).rank is None
    assert apply(project, Given(adapter="locon", rank=5)).rank == 5
    assert apply(project, Given()).rank == 6


def test_images_with_a_text_file_are_not_without_words(folder: Path):
    rename_as_a_camera_does(folder, with_text=1)
    facts = look_at_folder("images", folder, folder / "cache", lambda count: None).facts
    assert (facts.usable, facts.with_text, facts.without_words) == (4, 1, 3)


def test_a_folder_is_as_large_as_its_middle_image_and_sizes_are_width_by_height(folder: Path):
    """Squares of 64 pixels, and one image of 320 x 1280, which is as many as 640 x 640."""
    Image.new("RGB", (320, 1280)).save(folder / "images/000.png")
    report = look_at_folder("images", folder, folder / "cache", lambda count: None)
    assert report.facts.side == 64
    assert report.lines()[0] == "4 images, 64 x 64 to 320 x 1280; each has a text file"


def test_pairs_are_written_opened_without_a_change_and_taken_out_again(folder: Path, omnigen_folder: Path):
    reported = {"goal": "edit", "reference_data": "before", "instance_prompt": None, "captions": "textfile"}
    configured(folder, omnigen_folder, **reported)
    images, references = load_run((), {}, folder).datasets
    assert images.conditioning_data == (references.id,)
    assert (references.conditioning_type, references.instance_data_dir) == ("reference_strict", folder / "before")
    project = open_project(CONFIG, folder, CPU)
    assert (project.answers.goal, project.answers.reference_images) == ("edit", "before")
    assert texts_for(project, project.answers) == {}
    answers = replace(project.answers, goal="style", reference_images="")
    save(project, texts_for(project, answers), answers)
    [images] = load_run((), {}, folder).datasets
    assert images.conditioning_data is None


def test_references_that_a_hand_written_file_names_its_own_way_stay_as_they_are(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder, goal="style", instance_prompt=None)
    entries = json.loads((folder / "config/multidatabackend.json").read_text())
    more = {"dataset_type": "conditioning", "instance_data_dir": "before", "type": "local"}
    entries.insert(0, {"id": "x", "conditioning_type": "reference_loose", "source_dataset_id": "images", **more})
    entries.append({"id": "masks", "conditioning_type": "mask", **more})
    entries[1]["conditioning_data"] = ["masks"]
    (folder / "config/multidatabackend.json").write_text(json.dumps(entries))
    project = open_project(CONFIG, folder, CPU)
    assert (project.answers.goal, project.roles) == ("edit", {"images": 1, "references": 0})
    assert texts_for(project, project.answers) == {}
    answers = replace(project.answers, reference_images="others")
    [text] = texts_for(project, answers).values()
    entries[0]["instance_data_dir"] = "others"
    assert json.loads(text) == entries


def test_an_edit_needs_the_images_before_it(folder: Path, omnigen_folder: Path):
    with pytest.raises(ConfigError, match="before the edit"):
        configured(folder, omnigen_folder, goal="edit")


def test_a_file_that_changed_in_the_meantime_is_not_overwritten(folder: Path, omnigen_folder: Path):
    project = configured(folder, omnigen_folder)
    (folder / CONFIG).write_text(contents(folder)["config.json"].replace("1e-4", "9e-4"))
    answers = replace(project.answers, options={**project.answers.options, "learning_rate": 5e-5})
    with pytest.raises(ConfigError, match="in the meantime"):
        save(project, texts_for(project, answers), answers)
    assert "9e-4" in contents(folder)["config.json"]


def test_what_a_start_would_refuse_is_not_written(folder: Path):
    with pytest.raises(ConfigError, match="no model folder"):
        configured(folder, Path("/nowhere/model"))
    assert not (folder / "config").exists()


def rename_as_a_camera_does(folder: Path, with_text: int) -> None:
    """The images become photographs of a stranger, of which the first have a text file."""
    for number, path in enumerate(sorted((folder / "images").glob("*.png"))):
        path.rename(path.with_name(f"IMG_{2031 + number}.png"))
        text = path.with_suffix(".txt")
        if number < with_text:
            text.rename(text.with_name(f"IMG_{2031 + number}.txt"))
        else:
            text.unlink()


@pytest.mark.slow
def test_a_half_captioned_folder_of_photographs_trains_by_the_answers_alone(folder: Path, omnigen_folder: Path):
    rename_as_a_camera_does(folder, with_text=2)
    small = ("--max_train_steps=1", "--resolution=64", "--validation_disable=true", "--report_to=none")
    configured(folder, omnigen_folder, *small, instance_prompt="my cat")
    run = load_run((), {}, folder)
    (entry,) = run.datasets
    assert (entry.caption_strategy, entry.caption_fallback) == ("textfile", "instanceprompt")
    train(run)
    seen = json.loads((Path(run.config.checkpoint.output_dir) / CONTACT_DIR / "pictures.json").read_text())
    assert sorted(image["caption"] for image in seen) == [
        "my cat", "my cat", "my cat picture 0 of set 1", "my cat picture 1 of set 1",
    ]  # fmt: skip


def test_a_style_from_photographs_that_nobody_named_asks_for_a_prompt(folder: Path, omnigen_folder: Path):
    rename_as_a_camera_does(folder, with_text=2)
    with pytest.raises(ConfigError, match="instance_prompt: is missing: caption_fallback instanceprompt needs it"):
        configured(folder, omnigen_folder, goal="style", instance_prompt=None)


def test_names_with_words_stand_in_for_texts_that_are_missing(folder: Path, omnigen_folder: Path):
    for number, path in enumerate(sorted((folder / "images").glob("*.png"))):
        path.rename(path.with_name(f"a red box {number}.png"))
    (folder / "images" / "a red box 0.txt").write_text("a box")
    configured(folder, omnigen_folder, goal="style", instance_prompt=None)
    (entry,) = load_run((), {}, folder).datasets
    assert (entry.caption_strategy, entry.caption_fallback) == ("textfile", "filename")


def test_unsaved_texts_are_judged_as_saved_ones_would_be(folder: Path, omnigen_folder: Path):
    project = configured(folder, omnigen_folder)
    answers = replace(project.answers, options={**project.answers.options, "max_train_steps": 0})
    verdict = judge(project, texts_for(project, answers), answers)
    assert [problem.key for problem in verdict.problems] == ["max_train_steps"]
    assert verdict.problems[0].file == "config/config.json"
    assert verdict.problems[0].line == 1 + [
        "max_train_steps" in line for line in contents(folder)["config.json"].splitlines()
    ].index(True)


def test_a_login_that_is_missing_is_reported_and_can_be_made_later(
    folder: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NETRC", str(folder / "nothing"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    project = configured(folder, omnigen_folder, "--report_to=wandb")
    verdict = judge(project, {}, project.answers)
    assert verdict.problems == ()
    assert any("wandb login" in line for line in verdict.warnings)


def test_a_webhook_of_the_command_line_is_written_as_an_object(folder: Path, omnigen_folder: Path):
    text = '{"webhook_type": "raw", "callback_url": "http://localhost:1/secret"}'
    said: list[str] = []
    project = open_project(CONFIG, folder, CPU)
    given = Given(goal="style", data="images", model=str(omnigen_folder), arguments=(f"--webhook_config={text}",))
    configure_without_screens(project, given, said.append)
    assert not any("secret" in line for line in said)
    run = load_run((), {}, folder)
    assert run.webhooks.targets[0].url == "http://localhost:1/secret"
    project = open_project(CONFIG, folder, CPU)
    assert project.answers.options["webhook_config"] == json.loads(text)
    assert texts_for(project, project.answers) == {}


def test_the_start_command_names_a_file_in_another_place(tmp_path: Path):
    assert start_command(open_project(CONFIG, tmp_path, CPU)) == "simpletuner train"
    other = open_project(Path("config/mine/config.json"), tmp_path, CPU)
    assert start_command(other) == "simpletuner train env=mine"
    other = open_project(Path("runs/mine.json"), tmp_path, CPU)
    assert start_command(other) == "CONFIG_PATH=runs/mine.json simpletuner train"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.toml", "", "is not JSON"),
        ("config.json", '{"a": 1,}', "a comma before"),
        ("config.json", '{"model_family": "omnigem"}', "not a known model family"),
    ],
)
def test_files_that_cannot_be_edited_are_refused_by_name(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_project(Path(name), tmp_path, CPU)


def test_a_second_configuration_in_a_folder_has_files_of_its_own(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    before = contents(folder)
    project = open_project(Path("config/sketch.json"), folder, CPU)
    given = Given(goal="style", data="others", model=str(omnigen_folder), prompt=["a", "b"], captions="instanceprompt")
    configure_without_screens(project, replace(given, instance_prompt="a sketch"), lambda line: None)
    assert {name: contents(folder)[name] for name in before} == before
    run = load_run((), {"CONFIG_PATH": "config/sketch.json"}, folder)
    assert run.data_file == folder / "config" / "sketch.multidatabackend.json"
    assert run.lycoris_file == folder / "config" / "sketch.lycoris_config.json"


@pytest.mark.parametrize("value", [[], {"a": 1}, True, "n" * 300, "\0"])
def test_a_name_of_a_file_that_is_none_opens_and_is_refused_by_the_checks(
    folder: Path, omnigen_folder: Path, value: object
):
    configured(folder, omnigen_folder)
    config = folder / CONFIG
    for key in ("lycoris_config", "data_backend_config"):
        written = json.dumps(f"config/{'multidatabackend' if key[0] == 'd' else 'lycoris_config'}.json")
        text = config.read_text()
        config.write_text(text.replace(f'"{key}": {written}', f'"{key}": {json.dumps(value)}'))
        project = open_project(CONFIG, folder, CPU)
        texts = texts_for(project, project.answers)
        assert set(texts) <= {config, folder / "config/lycoris_config.json", folder / "config/multidatabackend.json"}
        assert key in [problem.key for problem in judge(project, texts, project.answers).problems]
        config.write_text(text)


def test_files_with_the_line_ends_of_windows_are_edited_and_keep_them(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder)
    config = folder / CONFIG
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))
    before = config.read_bytes()
    configured(folder, omnigen_folder, "--learning_rate=3e-5", yes=True)
    assert config.read_bytes() == before.replace(b'"learning_rate": 1e-4', b'"learning_rate": 3e-5')
