"""What a run prints: plain lines in a pipe, a progress bar in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    ImagesScored,
    Notice,
    PhaseDone,
    PhaseProgress,
    PhaseStarted,
    RunFailed,
    RunFinished,
    RunStarted,
    StepDone,
)
from simpletuner.reporting.progress import Pace, clock_text, duration_text, number_text, step_facts
from simpletuner.reporting.sinks.terminal import LiveSink, PlainSink, describe, terminal_sink
from tests.events import step_done


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, seconds: float = 2.0) -> StepDone:
    return step_done(number, total_steps=100, grad_norm=1.5, seconds=seconds, memory_gb=3.25)


def test_a_pipe_gets_plain_lines_without_color_codes():
    stream = io.StringIO()
    sink = terminal_sink(stream)
    sink.handle(RunStarted("run", Path("out"), 100, 0, {"model": "tiny"}))
    sink.handle(Notice("warning", "look [here]"))
    sink.handle(step(1))
    sink.handle(RunFinished(100, 65.0, {"adapter": Path("out/a.safetensors")}, ("simpletuner generate",)))
    sink.close()
    text = stream.getvalue()
    assert isinstance(sink, PlainSink)
    assert "\x1b" not in text
    assert "[0:00:00] warning: look [here]" in text
    assert "adapter  out/a.safetensors" in text
    assert "finished 100 steps in 1 min 05 s" in text


def test_a_step_line_shows_loss_pace_time_left_and_memory():
    stream, clock = io.StringIO(), Clock()
    sink = PlainSink(stream, clock=clock)
    clock.seconds = 3723.0
    sink.handle(step(1))
    line = stream.getvalue()
    assert line == "[1:02:03] step   1/100  loss 0.5000  lr 1.00e-04  grad 1.5  2 s/step  3 min 18 s left  3.2 GB\n"


def test_steps_come_at_intervals_of_time_with_the_first_and_the_last():
    stream, clock = io.StringIO(), Clock()
    sink = PlainSink(stream, interval=10.0, clock=clock)
    for number in range(1, 101):
        clock.seconds = float(number)
        sink.handle(step(number, 1.0))
    shown = [int(line.split("step")[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_a_phase_shows_its_count_only_when_it_takes_long():
    stream, clock = io.StringIO(), Clock()
    sink = PlainSink(stream, interval=10.0, clock=clock)
    sink.handle(PhaseStarted("encoding images", 40))
    for done in (10, 20, 30):
        clock.seconds += 6.0
        sink.handle(PhaseProgress("encoding images", done))
    sink.handle(PhaseDone("encoding images", 18.0, "40 images"))
    assert [line.split("] ")[1] for line in stream.getvalue().splitlines()] == [
        "encoding images (40)",
        "encoding images: 20 of 40",
        "encoding images done in 18 s: 40 images",
    ]


def test_a_short_phase_without_a_result_is_reported_once():
    stream = io.StringIO()
    sink = PlainSink(stream, clock=Clock())
    for name, seconds, summary in (("loading", 0.4, ""), ("reading", 0.4, "7 images"), ("waiting", 1.5, "")):
        sink.handle(PhaseStarted(name))
        sink.handle(PhaseDone(name, seconds, summary))
    assert [line.split("] ")[1] for line in stream.getvalue().splitlines()] == [
        "loading",
        "reading",
        "reading done in 0.4 s: 7 images",
        "waiting",
        "waiting done in 1.5 s",
    ]


def test_the_name_of_a_dataset_is_no_markup():
    stream = FakeTerminal()
    sink = terminal_sink(stream)
    sink.handle(PhaseStarted("caching latents of [/bold] me", 2))
    sink.handle(PhaseProgress("caching latents of [/bold] me", 2))
    sink.close()
    assert "[/bold] me" in stream.getvalue()


def test_a_terminal_gets_a_bar_and_the_lines_of_note():
    stream = FakeTerminal()
    sink = terminal_sink(stream)
    assert isinstance(sink, LiveSink)
    sink.handle(RunStarted("run", Path("out"), 100))
    sink.handle(PhaseStarted("encoding images", 2))
    sink.handle(PhaseProgress("encoding images", 2))
    sink.handle(PhaseDone("encoding images", 1.0))
    sink.handle(step(1))
    sink.handle(EvalDone(1, {"a": 0.25, "b": 0.75}, 0.5))
    sink.close()
    text = stream.getvalue()
    assert "encoding images done in 1.0 s" in text
    assert "eval loss at step 1: 0.5000 (a 0.2500, b 0.7500)" in text
    assert "training" in text


@pytest.mark.parametrize("columns", [80, 140])
def test_a_bar_of_eighty_columns_shows_the_step_and_the_time_left_whole(monkeypatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = FakeTerminal()
    sink = terminal_sink(stream)
    sink.handle(step_done(1234, total_steps=10_000, grad_norm=1.5, seconds=2.0, memory_gb=23.25))
    sink.close()
    shown = stream.getvalue()
    assert "1234/10000" in shown
    assert "4 h 52 min left" in shown
    assert ("23.2 GB" in shown) == (columns == 140)


def test_one_slow_step_does_not_move_the_pace():
    pace, now = Pace(), 0.0
    for seconds in (30.0, 1.0, 1.0, 1.0, 1.0):
        now += seconds
        pace.add(seconds, now)
    assert pace.seconds_per_step == 1.0
    assert pace.seconds_left(10) == 10.0


def test_the_time_left_counts_what_lies_between_steps():
    pace, now = Pace(), 0.0
    for number in range(1, 22):
        now += 2.0
        pace.add(2.0, now)
        now += 30.0 if number % 10 == 0 else 0.0  # images at steps 10 and 20
    # 20 gaps of 60 s together: 3 s for each step, beside its own 2 s.
    assert pace.seconds_left(100) == pytest.approx(500.0)


def test_the_time_on_the_bar_is_that_of_the_run_not_of_the_phase():
    clock = Clock()
    sink = LiveSink(FakeTerminal(), clock=clock)
    clock.seconds = 60.0
    sink.handle(step(1))
    assert sink.elapsed() == "0:01:00"
    sink.handle(PhaseStarted("validation", 2))
    clock.seconds = 100.0
    sink.handle(PhaseDone("validation", 40.0))
    sink.handle(step(2))
    assert sink.elapsed() == "0:01:40"
    sink.close()


def test_a_wide_bar_shows_that_time(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Clock(), FakeTerminal()
    sink = LiveSink(stream, clock=clock)
    clock.seconds = 3723.0
    sink.handle(PhaseStarted("validation", 2))
    sink.close()
    assert "1:02:03" in stream.getvalue()


def test_durations_read_as_people_say_them():
    assert [duration_text(s) for s in (0.42, 9.96, 42.4, 59.7, 192, 3599.6, 7500, 187200)] == [
        "0.4 s",
        "10 s",
        "42 s",
        "1 min 00 s",
        "3 min 12 s",
        "1 h 00 min",
        "2 h 05 min",
        "2 d 4 h",
    ]
    assert clock_text(3661.9) == "1:01:01"


def test_control_characters_of_a_user_never_reach_the_terminal() -> None:
    evil = "a\x1b]0;title\x07\x1b[31m\x9b2J\u202e\r\x08b"
    shown = "\n".join(
        line
        for event in (
            Notice("warning", f"{evil}\nsecond"),
            PhaseStarted(f"caching {evil}", 3),
            RunStarted(evil, Path(evil), 1, 0, {"prompts": evil}),
        )
        for line in describe(event)
    )
    assert shown.count("\n") == 4
    assert not [letter for letter in shown if letter != "\n" and not letter.isprintable()]
    assert "a\\x1b]0;title\\x07" in shown


def test_a_short_line_has_the_loss_the_pace_and_the_time_left():
    pace = Pace()
    pace.add(2.0, 10.0)
    event = step_done(3, loss=0.25, grad_norm=1.5, memory_gb=6.25)
    assert step_facts(event, pace, is_short=True) == "loss 0.2500  2 s/step  14 s left"
    assert step_facts(event, pace) == "loss 0.2500  lr 1.00e-04  grad 1.5  2 s/step  14 s left  6.2 GB"
    assert [number_text(index) for index in (0, 1)] == ["", ", no. 2"]


BOLD, RED, YELLOW = "\x1b[1m", "\x1b[31m", "\x1b[33m"


@pytest.mark.parametrize(
    ("event", "line", "color"),
    [
        (PhaseStarted("caching", 3), "caching (3)", ""),
        (PhaseDone("caching", 2.0, "3 new"), "caching done in 2.0 s: 3 new", ""),
        (EvalDone(3, {"a": 1.0}, 1.0), "eval loss at step 3: 1.0000", ""),
        (
            EvalDone(3, {"a": 1.0, "b": 3.0}, 2.0, reference=2.5),
            "eval loss at step 3: 2.0000 (a 1.0000, b 3.0000; base model 2.5000)",
            "",
        ),
        (EvalDone(0, {"a": 1.0}, 1.0, reference=1.0), "eval loss at step 0: 1.0000", ""),
        (ImagesScored(4, "clip", {"live/a": 30.0, "live/b": 31.0}, 30.5), "clip score at step 4: 30.50 (2 images)", ""),
        (CheckpointSaved(5, "c"), "checkpoint saved at step 5: c", ""),
        (CheckpointSaved(5, "c", is_new=False), "checkpoint already saved at step 5: c", ""),
        (CheckpointSaved(5, "c", 0.25), "best checkpoint so far saved at step 5, eval loss 0.2500: c", ""),
        (Notice("info", "so it is"), "so it is", ""),
        (Notice("warning", "look"), "warning: look", YELLOW),
        (Notice("error", "no"), "error: no", RED),
        (RunFailed(6, "no", 3), "the run ended early at step 6 (exit code 3)", RED),
        (RunStarted("a", Path("b"), 7), "run a: 7 steps, output in b", BOLD),
        (RunStarted("a", Path("b"), 7, 2), "run a: 7 steps, output in b\nresumes after step 2", BOLD),
        (RunFinished(7, 2.0), "finished 7 steps in 2.0 s", BOLD),
        (RunFinished(7, 2.0, {"a": "b", "cd": "e"}), "finished 7 steps in 2.0 s\n  a   b\n  cd  e", BOLD),
        (RunFinished(7, 2.0, {}, ("x",)), "finished 7 steps in 2.0 s\nto generate images with it:\n  x", BOLD),
    ],
)
def test_an_event_is_told_in_these_words_and_in_its_color(
    monkeypatch: pytest.MonkeyPatch, event: Event, line: str, color: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "\n".join(describe(event)) == line
    stream = FakeTerminal()
    sink = LiveSink(stream)
    sink.handle(event)
    sink.close()
    shown = [each for each in stream.getvalue().splitlines() if line.split("\n")[0] in each]
    if not isinstance(event, PhaseStarted):
        assert [[code for code in (BOLD, RED, YELLOW) if code in each] for each in shown] == [[color] if color else []]
