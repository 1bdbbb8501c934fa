"""Keys that arrive faster than the screens answer: the text is the one that a plain editor would have, what is typed
before a key of the application counts, and what is typed after Tab goes into the next field.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import Input, Static

from simpletuner.wizard.app import Wizard
from simpletuner.wizard.inputs import TextField
from tests.unit.wizard.projects import drive, new_folder

pytestmark = pytest.mark.slow

EDITING = ("backspace", "delete", "home", "end", "left", "right", "ctrl+k", "ctrl+u")
LETTERS = "abc xyz019_"
# What a terminal sends, in the words of tmux.
TMUX_KEYS = {"backspace": "BSpace", "delete": "DC", "ctrl+k": "C-k", "ctrl+u": "C-u"}


def edited(keys: list[str], text: str = "") -> str:
    """What a plain editor makes of keys, with the cursor at the end of `text`."""
    cursor = len(text)
    for key in keys:
        if len(key) == 1:
            text, cursor = text[:cursor] + key + text[cursor:], cursor + 1
        elif key == "backspace" and cursor:
            text, cursor = text[: cursor - 1] + text[cursor:], cursor - 1
        elif key == "delete":
            text = text[:cursor] + text[cursor + 1 :]
        elif key in ("home", "end"):
            cursor = 0 if key == "home" else len(text)
        elif key in ("left", "right"):
            cursor = min(max(cursor + (1 if key == "right" else -1), 0), len(text))
        elif key == "ctrl+k":
            text = text[:cursor]
        elif key == "ctrl+u":
            text, cursor = text[cursor:], 0
    return text


def burst(draw: random.Random) -> list[str]:
    """Some twenty keys, half of them letters."""
    return [draw.choice(LETTERS) if draw.random() < 0.6 else draw.choice(EDITING) for _ in range(draw.randint(8, 24))]


def send(app: App, *keys: str) -> None:
    """All keys at once, as a terminal hands them over that was read late."""
    for key in keys:
        letter = key if len(key) == 1 else None
        app.post_message(events.Key("space" if key == " " else key, letter))


async def answered(pilot: Pilot, condition: Callable[[], object]) -> None:
    """Wait until what was sent shows its effect."""
    for _ in range(3000):
        if condition():
            return
        await pilot.pause(0.02)
    raise AssertionError("there is no answer")


def status(app: Wizard) -> str:
    return str(app.query_one("#status", Static).render())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_folder(tmp_path)


def test_the_plain_editor_is_one() -> None:
    assert edited(["backspace", "backspace", "x", "y"], "cat") == "cxy"
    assert edited(["home", "a", "end", "b", "left", "delete"], "-") == "a-"
    assert edited(["left", "ctrl+u", "z"], "abc") == "zc"


class OneField(App[None]):
    """Nothing but a field: two hundred bursts in the whole wizard would take half a minute."""

    def compose(self) -> ComposeResult:
        yield TextField(id="field")


async def type_bursts(pilot: Pilot, field: Input, count: int) -> None:
    draw = random.Random(14)
    for _ in range(count):
        before, keys = field.value, burst(draw)
        send(pilot.app, "end", *keys)
        await pilot.pause()
        assert field.value == edited(keys, before), keys
        if len(field.value) > 40:
            send(pilot.app, "home", "ctrl+k")
            await pilot.pause()


def test_two_hundred_bursts_of_keys_give_the_text_of_a_plain_editor() -> None:
    async def run() -> None:
        async with OneField().run_test() as pilot:
            await type_bursts(pilot, pilot.app.query_one("#field", Input), 200)

    asyncio.run(run())


def test_bursts_become_the_answer_to_the_question(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press(*["ctrl+n"] * 5)
        field = pilot.app.query_one("#tracker_run_name", Input)
        field.focus()
        await pilot.pause()
        await type_bursts(pilot, field, 20)
        assert (pilot.app.answers.options["tracker_run_name"] or "") == field.value

    drive(folder, steps)


def test_lines_of_prompts_keep_their_order_too(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press(*["ctrl+n"] * 4)
        field = pilot.app.query_one("#prompts")
        field.text = ""
        field.focus()
        await pilot.pause()
        send(pilot.app, *"cat", "backspace", "backspace", *"xy", "enter", *"dog", "home", "a", "end", "z")
        await pilot.pause()
        assert field.text == "cxy\nadogz"
        assert pilot.app.answers.prompts == ("cxy", "adogz")

    drive(folder, steps)


def test_what_follows_tab_goes_into_the_next_field(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n", "ctrl+n")
        send(pilot.app, *"images", "tab", *"ohwx", "backspace", *"y box")
        await pilot.pause()
        assert pilot.app.answers.images == "images"
        assert pilot.app.answers.dataset["instance_prompt"] == "ohwy box"

    drive(folder, steps)


def test_what_is_typed_before_a_page_is_left_counts(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n", "ctrl+n")
        send(pilot.app, *"images", "ctrl+n")
        await pilot.pause()
        assert pilot.app.position == 3
        pilot.app.query_one("#train_batch_size").focus()
        await pilot.pause()
        send(pilot.app, "home", "ctrl+k", "0", "ctrl+n")
        await pilot.pause()
        assert pilot.app.position == 3
        assert "cannot be used" in status(pilot.app)
        assert pilot.app.answers.images == "images"

    drive(folder, steps)


def test_a_wrong_model_folder_is_reported_on_the_page_that_asks_for_it(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n")
        pilot.app.query_one("#model").focus()
        await pilot.pause()
        send(pilot.app, *"./nowhere", "enter")
        await pilot.pause()
        assert pilot.app.position == 1
        assert 'nowhere": there is no model folder of this name' in status(pilot.app)
        assert pilot.app.focused.id == "model"
        send(pilot.app, "home", "ctrl+k", "enter")
        await pilot.pause()
        assert pilot.app.position == 2
        assert status(pilot.app) == ""

    drive(folder, steps)


def test_enter_on_the_last_field_goes_to_the_next_page_and_not_to_the_top(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n", "enter", "tab", "tab")
        assert pilot.app.focused.id != "model" or pilot.app.position == 1
        pilot.app.query_one("#model").focus()
        await pilot.press("enter")
        assert pilot.app.position == 2

    drive(folder, steps)


def test_the_review_shows_no_help_of_the_page_before(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        send(pilot.app, *["ctrl+n"] * 6)
        await answered(pilot, lambda: pilot.app.position == 6)
        assert not pilot.app.query_one("#help").display

    drive(folder, steps)


def test_ctrl_c_leaves_as_in_a_shell_and_asks_before_answers_are_lost(folder: Path) -> None:
    async def unchanged(pilot: Pilot) -> None:
        send(pilot.app, "ctrl+c")
        await answered(pilot, lambda: pilot.app._exit)

    async def changed(pilot: Pilot) -> None:
        await pilot.press("down", "ctrl+c")
        assert "Ctrl+S saves" in status(pilot.app)
        await pilot.press("ctrl+c")

    assert drive(folder, unchanged).return_value is None
    assert drive(folder, changed).return_value is None
    assert not (folder / "config").exists()


def test_a_folder_is_completed_as_it_is_typed(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press("ctrl+n", "ctrl+n")
        await pilot.press(*"imag")
        await answered(pilot, lambda: pilot.app.focused._suggestion)
        await pilot.press("right")
        await pilot.pause()
        assert pilot.app.answers.images == "images/"

    drive(folder, steps)


def test_a_run_for_a_rented_gpu_is_proposed_on_a_machine_without_one(folder: Path) -> None:
    async def steps(pilot: Pilot) -> None:
        await pilot.press(*["ctrl+n"] * 3)
        assert pilot.app.query_one("#mixed_precision").value == "no"
        pilot.app.query_one("#trains_on").value = "24"
        await pilot.pause()
        assert pilot.app.query_one("#mixed_precision").value == "bf16"
        assert pilot.app.query_one("#optimizer").value == "adamw_bf16"

    drive(folder, steps)


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_bursts_through_a_real_terminal(folder: Path) -> None:
    draw = random.Random(41)
    socket = str(folder / "tmux")

    def tmux(*words: str) -> str:
        return subprocess.run(["tmux", "-S", socket, *words], check=True, capture_output=True, text=True).stdout

    def until(words: str) -> str:
        for _ in range(300):
            screen = tmux("capture-pane", "-p")
            if words in screen:
                return screen
            time.sleep(0.1)
        raise AssertionError(f"no {words!r} on\n{screen}")

    command = f"{sys.executable} -m simpletuner configure"
    tmux("new-session", "-d", "-x", "80", "-y", "24", "-c", str(folder), command)
    try:
        until("What should the model learn?")
        tmux("send-keys", "C-n", "C-n")
        until("Where are the images?")
        tmux("send-keys", "Tab")
        for number in range(20):
            keys = burst(draw)
            sent = [TMUX_KEYS.get(key, key.title() if len(key) > 1 else key) for key in keys]
            tmux("send-keys", "Home", "C-k")
            tmux("send-keys", *(word if word != " " else "Space" for word in sent), "End", "#", str(number % 10))
            until(f"{edited(keys)}#{number % 10}")
    finally:
        tmux("kill-server")
