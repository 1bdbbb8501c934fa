"""The wizard, driven by keys on a terminal of 80 x 24: what it saves trains, and opens again."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path

import pytest
from textual import events
from textual.pilot import Pilot
from textual.widgets import Static

from simpletuner.config.loading import load_run
from simpletuner.wizard.questions import FAMILY
from simpletuner.wizard.review import Review
from tests.runs import metrics, train_here
from tests.unit.wizard.projects import CONFIG, configured, contents, drive, new_folder

pytestmark = pytest.mark.slow


async def fill_in(pilot: Pilot, field: str, text: str) -> None:
    """Tab to a field of this page and paste over what is there (one event in place of one per letter)."""
    for _ in range(20):
        if pilot.app.focused is not None and pilot.app.focused.id == field:
            break
        await pilot.press("tab")
    assert pilot.app.focused is not None
    assert pilot.app.focused.id == field
    await pilot.press("home", "ctrl+k")
    pilot.app.focused.post_message(events.Paste(text))
    await pilot.pause()


async def looked_at(pilot: Pilot) -> None:
    """Wait until every folder was looked at."""
    for _ in range(600):
        await pilot.pause(0.05)
        if not pilot.app.is_looking:
            return
    raise AssertionError("the images are looked at for half a minute")


async def first_run(pilot: Pilot, model: Path) -> None:
    """Answer every page and stop at the review."""
    await pilot.press("ctrl+n")
    await fill_in(pilot, "model", str(model))
    await pilot.press("ctrl+n")
    await fill_in(pilot, "images", "images")
    await fill_in(pilot, "instance_prompt", "ohwx box")
    await fill_in(pilot, "eval_images", "held_out")
    await looked_at(pilot)
    await pilot.press("ctrl+n")
    await fill_in(pilot, "learning_rate", "1e-3")
    await fill_in(pilot, "max_train_steps", "4")
    await pilot.press("ctrl+n")
    await fill_in(pilot, "validation_step_interval", "4")
    await fill_in(pilot, "validation_num_inference_steps", "2")
    await pilot.press("ctrl+n", "ctrl+n")
    await pilot.pause()


async def help_shown(pilot: Pilot, key: str) -> str:
    """The help on the screen, once it is that of `key`."""
    for _ in range(1500):
        await pilot.pause(0.02)
        shown = " ".join(str(pilot.app.query_one("#help", Static).render()).split())
        if shown.startswith(key):
            return shown
    raise AssertionError(f"no help for {key}: {shown}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_folder(tmp_path)


def test_from_the_first_screen_to_a_trained_adapter(folder: Path, omnigen_folder: Path, monkeypatch):
    async def steps(pilot: Pilot) -> None:
        await first_run(pilot, omnigen_folder)
        assert not (folder / "config").exists()
        await pilot.press("ctrl+s")

    wizard = drive(folder, steps)
    assert wizard.outcome == "saved"
    run = load_run((), {}, folder)
    assert run.warnings == ()
    assert (run.config.optimizer.learning_rate, run.config.training.max_train_steps, run.config.data.resolution) == (
        1e-3,
        4,
        64,
    )
    monkeypatch.chdir(folder)
    output = train_here(folder)
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert len(metrics(output, "step_done")) == 4


def test_edited_again_only_what_was_changed_is_different(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder, eval_data="held_out")
    config = folder / CONFIG
    config.write_text(config.read_text().replace('"seed": 42,', '"seed": 42, // the answer'))
    before = contents(folder)

    async def steps(pilot: Pilot) -> None:
        await pilot.press(*["ctrl+n"] * 3)
        await fill_in(pilot, "learning_rate", "5e-5")
        await pilot.press("ctrl+s")
        await pilot.pause()
        await pilot.press("ctrl+s")

    drive(folder, steps)
    after = contents(folder)
    lines = difflib.ndiff(before["config.json"].splitlines(), after["config.json"].splitlines())
    assert [" ".join(line.split()) for line in lines if line[0] in "+-"] == [
        '- "learning_rate": 1e-4,',
        '+ "learning_rate": 5e-5,',
    ]
    assert {name: text for name, text in after.items() if name != "config.json"} == {
        name: text for name, text in before.items() if name != "config.json"
    }


def test_walking_through_all_pages_and_saving_changes_nothing(folder: Path, omnigen_folder: Path):
    configured(folder, omnigen_folder, eval_data="held_out", regularisation_data="others")
    before = contents(folder)

    async def steps(pilot: Pilot) -> None:
        await looked_at(pilot)
        for _ in range(6):
            await pilot.press("ctrl+n", "tab", "tab")
            await pilot.pause()
        await pilot.press("ctrl+s", "ctrl+b", "ctrl+n", "ctrl+s")

    drive(folder, steps)
    assert contents(folder) == before


def test_a_wrong_answer_is_explained_and_holds_the_page(folder: Path, omnigen_folder: Path):
    async def steps(pilot: Pilot) -> None:
        await pilot.press(*["ctrl+n"] * 3)
        await fill_in(pilot, "train_batch_size", "0")
        help_text = str(pilot.app.query_one("#help", Static).render())
        assert "too small" in help_text
        assert "whole number >= 1" in help_text
        await pilot.press("ctrl+n")
        assert pilot.app.position == 3
        await fill_in(pilot, "train_batch_size", "2")
        await pilot.press("ctrl+n")
        assert pilot.app.position == 4

    drive(folder, steps)


def test_the_review_says_what_simpletuner_plan_says(folder: Path, omnigen_folder: Path):
    async def steps(pilot: Pilot) -> None:
        await first_run(pilot, omnigen_folder)
        review = pilot.app.query_one(Review)
        for _ in range(1200):
            await pilot.pause(0.05)
            if review.estimated:
                break
        shown = str(pilot.app.query_one("#estimate", Static).render())
        assert "4 steps, " in shown
        assert "s each" in shown
        await pilot.press("ctrl+s")
        pilot.app.shown = shown

    wizard = drive(folder, steps)
    reported = subprocess.run(
        [sys.executable, "-m", "simpletuner", "plan", "--no-probe"], cwd=folder, capture_output=True, text=True
    )
    together = [line.partition(" together")[0].strip() for line in reported.stdout.splitlines() if " together" in line]
    assert len(together) == 2  # memory, disk
    memory, disk, _ = wizard.shown.splitlines()
    assert memory.startswith(f"memory  {together[0]} of ")
    assert disk.startswith(f"disk    {together[1]}, ")


def test_page_down_reaches_what_a_small_terminal_cuts_off(folder: Path):
    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n", "ctrl+n")
        await fill_in(pilot, "images", "images")
        await looked_at(pilot)
        await pilot.pause()
        report = pilot.app.query_one("#report", Static)
        assert "▀" in str(report.render())
        page = pilot.app.query_one("#page-2")
        assert report.region.bottom > page.region.bottom
        await pilot.press("pagedown", "pagedown")
        await pilot.pause()
        assert report.region.bottom <= page.region.bottom

    drive(folder, steps)


def test_nothing_is_saved_while_a_check_fails(folder: Path):
    async def steps(pilot: Pilot) -> None:
        model = folder / "model"
        model.mkdir()
        await first_run(pilot, model)
        model.rmdir()
        await pilot.press("ctrl+b", "ctrl+n")
        verdict = pilot.app.query_one(Review).verdict
        assert [problem.key for problem in verdict.problems] == ["pretrained_model_name_or_path"]
        await pilot.press("ctrl+s", "ctrl+r")

    wizard = drive(folder, steps)
    assert wizard.outcome is None
    assert not (folder / "config").exists()


def test_a_folder_is_looked_at_once_its_name_is_whole(folder: Path):
    (folder / "images-2").mkdir()

    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n", "ctrl+n", *"images")
        assert pilot.app.is_looking
        await pilot.press(*"-2")
        await looked_at(pilot)
        assert set(pilot.app.answers.seen) <= {"images", "images-2"}
        assert "no usable images in images-2" in str(pilot.app.query_one("#report", Static).render())
        await pilot.press("backspace", "backspace")
        await looked_at(pilot)
        assert "4 images, 64 x 64" in str(pilot.app.query_one("#report", Static).render())
        await pilot.press("home", "~", "x")
        await looked_at(pilot)
        assert "there is no folder of this name" in str(pilot.app.query_one("#report", Static).render())

    drive(folder, steps)


def test_letters_that_arrive_together_stay_in_order(folder: Path):
    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n", "ctrl+n")
        field = pilot.app.focused
        for letter in "images":
            field.insert_text_at_cursor(letter)
        await looked_at(pilot)
        assert (field.value, field.cursor_position) == ("images", 6)
        assert pilot.app.answers.images == "images"

    drive(folder, steps)


def test_save_and_run_asks_for_the_start(folder: Path, omnigen_folder: Path):
    async def steps(pilot: Pilot) -> None:
        await first_run(pilot, omnigen_folder)
        await pilot.press("ctrl+r")

    assert drive(folder, steps).return_value == "start"


def test_every_field_of_every_page_has_help_from_its_declaration(folder: Path):
    async def steps(pilot: Pilot) -> None:
        for page in pilot.app.pages:
            for question in page.questions:
                pilot.app.query_one(f"#{question.key}").focus()
                shown = await help_shown(pilot, question.key)
                assert question.help.split(".")[0] in shown
            await pilot.press("ctrl+n")
            await pilot.pause()

    drive(folder, steps)


def test_without_a_terminal_the_same_files_are_written(folder: Path, omnigen_folder: Path):
    program = [sys.executable, "-m", "simpletuner", "configure"]
    reported = [*("--family", "omnigen", "--goal", "subject", "--data", "images", "--instance-prompt", "ohwx box")]
    reported += [
        "--model",
        str(omnigen_folder),
        "--eval-data",
        "held_out",
        "--learning_rate=1e-3",
        "--max_train_steps=4",
    ]
    reported += ["--validation_step_interval=4", "--validation_num_inference_steps=2"]
    result = subprocess.run([*program, *reported], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("simpletuner train")  # by whatever path the shell finds it
    written = contents(folder)
    for path in (folder / "config").glob("*.json"):
        path.unlink()

    async def steps(pilot: Pilot) -> None:
        await first_run(pilot, omnigen_folder)
        await pilot.press("ctrl+s")

    drive(folder, steps)
    assert contents(folder) == written

    refused = subprocess.run(program, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert refused.returncode == 2
    assert "no terminal" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_arrows_choose_and_marks_report_it_without_colors(folder: Path):
    async def steps(pilot: Pilot) -> None:
        await pilot.press("down")
        await pilot.pause()
        assert pilot.app.answers.goal == "style"
        marks = [str(button.render())[:3] for button in pilot.app.query("#goal Choice")]
        assert [mark[1] for mark in marks] == [" ", "●", " ", " "]
        await pilot.press("enter")  # on a page with one question: to the next one
        assert pilot.app.position == 1
        await pilot.press("up")
        await pilot.pause()
        assert pilot.app.answers.family == FAMILY.choices(pilot.app.answers)[-1][0]

    drive(folder, steps)
