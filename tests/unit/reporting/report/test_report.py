"""The HTML report: it holds the whole run, escapes user text, and takes nothing from outside of its folder."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.errors import DataError
from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    ImagesMade,
    ImagesScored,
    Notice,
    PhaseDone,
    RunFailed,
    RunFinished,
    RunStarted,
    SavedImage,
)
from simpletuner.reporting.report import write_report
from simpletuner.reporting.report.curves import _base_loss
from simpletuner.reporting.report.images import Embedder
from simpletuner.reporting.report.record import RunRecord, _images, read_contact, read_run
from simpletuner.reporting.report.view import (
    checkpoints_of,
    commands_of,
    dataset_of,
    spread,
    tiles_of,
    times_of,
    view_of,
)
from simpletuner.reporting.sinks.jsonl import JsonlSink
from tests.events import step_done

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_run(folder: Path, text: str = "a cat", end: bool = True, side: int = 64) -> Path:
    """The files of a run of twenty steps in which every text that a user can write is `text`."""
    folder.mkdir(parents=True)
    sink = JsonlSink(folder)
    sink.handle(RunStarted(text, folder, 20, 0, {"model": text, "device": "cpu"}, {"seed": 42, "hub": text}))
    sink.handle(PhaseDone(text, 3.0, text))
    sink.handle(Notice("warning", text))
    for step in range(21):
        if step:
            extra = {"regularisation_loss": 0.125} if step % 7 == 0 else {}
            loss = 0.125 if extra else 1 / step
            sink.handle(
                step_done(
                    step,
                    total_steps=20,
                    loss=loss,
                    grad_norm=2.0,
                    seconds=0.5,
                    memory_gb=1.5,
                    extra=extra,
                    is_regularisation=bool(extra),
                )
            )
        if step % 10 == 0:
            sink.handle(EvalDone(step, {text: 0.5}, 0.75 - step / 40, ((0.25, 0.5), (0.75, 0.25)), 2.0))
            sink.handle(ImagesScored(step, "clip", {"live/a": 0.25}, 0.25))
            kind = "live" if step else "base"
            path = folder / "validation_images" / f"{step}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (side, side), (step * 10, 90, 120)).save(path)
            sink.handle(ImagesMade(step, (SavedImage(path, text, text, side, side, 1, kind),)))
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir()
        sink.handle(CheckpointSaved(step, folder / f"checkpoint-{step}"))
    if end:
        sink.handle(RunFinished(20, 10.0, {}, (f"simpletuner generate --prompt {text}",)))
    sink.close()
    report = {"id": text, "found": 9, "readable": 7, "bucketed": 7, "per_epoch": 7, "sizes": {"64x64": 7}}
    report["set_aside"] = [{"reason": text, "count": 2, "examples": [text]}]
    (folder / "dataset_report.json").write_text(json.dumps([report]))
    lock = {"simpletuner": "1", "packages": {"torch": "2"}, "config": {"seed": 42, "hub_model_id": text}}
    lock |= {"origins": {"hub_model_id": f"{text}:7"}, "command": text, "data": {text: {"pictures": 7}}}
    lock |= {"config_files": {text: "ab" * 32}, "base": {"model": text, "files": {text: "cd" * 32}}}
    (folder / "run.lock.json").write_text(json.dumps(lock))
    return folder


def test_the_page_holds_the_whole_run_and_nothing_else_is_needed(tmp_path: Path):
    page = Page(write_report(make_run(tmp_path / "run")))
    for words in ("finished", "Curves", "Eval loss by share of noise", "clip score", "Learning rate", "base model"):
        assert words in page.text
    assert "0.25" in page.text  # the lowest eval loss: 0.75 - 20 / 40
    assert "simpletuner generate --prompt a cat" in page.text
    assert len(page.all("img")) == 3
    assert all(image["src"].startswith("data:image/webp;base64,") for image in page.all("img"))
    assert not page.all("script")
    assert not page.all("link")
    assert all(link["href"].startswith("#") for link in page.all("a"))


def test_the_best_checkpoint_is_the_one_of_the_lowest_eval_loss(tmp_path: Path):
    html = write_report(make_run(tmp_path / "run")).read_text()
    row = next(row for row in html.split("<tr>") if "best</span>" in row)
    assert "checkpoint-20" in row


def test_the_model_before_training_is_not_the_best_however_low_its_loss(tmp_path: Path):
    losses = ((0, 0.1), (10, 0.5), (20, 0.4), (30, 0.6))
    run = RunRecord(tmp_path, evaluations=[{"step": step, "pooled": loss} for step, loss in losses])
    assert run.best_evaluation() == (20, 0.4)
    assert RunRecord(tmp_path, evaluations=run.evaluations[:1]).best_evaluation() is None


def test_a_loss_that_falls_by_a_quarter_is_shown_so(tmp_path: Path):
    run = RunRecord(tmp_path, evaluations=[{"step": 5, "pooled": 0.8}, {"step": 10, "pooled": 0.6}])
    assert tiles_of(run) == [("0.6", "lowest eval loss, step 10", "-25 % since step 5")]


def test_a_run_that_a_signal_ended_was_interrupted_and_did_not_fail(tmp_path: Path):
    ends = [{"event": "run_failed", "exit_code": code} for code in (130, 143, 1)]
    states = [RunRecord(tmp_path, end=end).state for end in (*ends, {"event": "run_finished"}, {})]
    assert states == ["interrupted", "interrupted", "failed", "finished", "unfinished"]


def test_checkpoints_that_are_gone_are_counted_and_those_that_are_there_listed(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    (folder / "checkpoint-10").rmdir()
    found = checkpoints_of(read_run(folder))
    assert ([row["name"] for row in found["rows"]], found["num_removed"]) == (["checkpoint-20"], 1)


def test_what_a_user_writes_is_shown_and_never_runs(tmp_path: Path):
    page = Page(write_report(make_run(tmp_path / "run", EVIL)))
    assert not page.all("script")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert len(page.all("img")) == 3
    assert page.text.count(EVIL) >= 12
    [policy] = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_no_file_outside_of_the_folder_gets_into_the_page(tmp_path: Path):
    run = make_run(tmp_path / "run")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    sink = JsonlSink(run)
    sink.handle(RunStarted("a cat", run, 40, 20))
    for path in (secret, run / ".." / "secret.png"):
        sink.handle(ImagesMade(20, (SavedImage(path, "secret", "s", 8, 8, 1, "live"),)))
    shutil.copy(secret, run / "own.png")
    sink.handle(ImagesMade(20, (SavedImage(run / "own.png", "own", "o", 8, 8, 1, "live"),)))
    sink.close()
    text = Page(write_report(run)).text
    assert "own (8x8)" in text
    assert "secret" not in text


def test_a_run_that_was_moved_keeps_its_images(tmp_path: Path):
    make_run(tmp_path / "run")
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    assert len(Page(write_report(moved)).all("img")) == 3


def test_a_killed_and_a_failed_run_have_their_report_too(tmp_path: Path):
    run = make_run(tmp_path / "run", end=False)
    assert "unfinished" in Page(write_report(run)).text
    sink = JsonlSink(run)
    sink.handle(RunStarted("a cat", run, 40, 20))
    sink.handle(RunFailed(20, "the disk is full", 3))
    sink.close()
    text = Page(write_report(run)).text
    assert "failed" in text
    assert "the disk is full" in text


@pytest.mark.parametrize("missing", ["run.lock.json", "dataset_report.json", "validation_images", "checkpoint-20"])
def test_a_folder_that_lacks_something_is_shown_as_far_as_it_goes(tmp_path: Path, missing: str):
    path = make_run(tmp_path / "run") / missing
    shutil.rmtree(path) if path.is_dir() else path.write_text("{ torn")
    assert "Curves" in Page(write_report(tmp_path / "run")).text


def test_a_folder_without_a_run_is_said_to_be_one(tmp_path: Path):
    with pytest.raises(DataError, match="there is no run"):
        write_report(tmp_path)


@pytest.mark.slow
def test_the_page_stays_small_however_much_was_drawn(tmp_path: Path):
    noise = np.random.default_rng(1).integers(0, 255, (768, 768, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    embed = Embedder(300, budget=200_000)
    html = "".join(embed.img(tmp_path / "noise.png") for _ in range(300))
    assert len(html) < 1.5 * 200_000
    assert html.count("<img") + embed.left_out == 300
    assert embed.left_out > 0


@pytest.mark.slow
def test_a_run_of_many_steps_makes_a_small_page_without_losing_a_peak(tmp_path: Path):
    sink = JsonlSink(tmp_path)
    sink.handle(RunStarted("long", tmp_path, 20_000))
    for step in range(1, 20_001):
        sink.handle(
            step_done(
                step,
                total_steps=20_000,
                loss=1.0 + (step % 10) / 100,
                grad_norm=9.5 if step == 7777 else 1.0,
                seconds=0.5,
            )
        )
    sink.close()
    html = write_report(tmp_path).read_text()
    assert len(html) < 200_000
    gradient = html.split("<figcaption>Gradient norm")[1].split("</figure>")[0]
    heights = [float(point.split(",")[1]) for point in gradient.split('points="')[1].split('"')[0].split()]
    assert min(heights) < sorted(heights)[len(heights) // 2] - 50


def test_a_file_is_named_once_and_its_lines_at_each_option(tmp_path: Path):
    run = make_run(tmp_path / "run")
    lock = json.loads((run / "run.lock.json").read_text())
    lock["config"] |= {"resolution": 512.0, "learning_rate": 1e-4, "optimizer": "adamw", "report_to": "none"}
    lock["origins"] = {
        "resolution": "/home/me/config.json:12",
        "seed": "/home/me/config.json:3",
        "optimizer": "/home/a/other.json:1",
        "report_to": "/home/b/other.json:2",
        "learning_rate": "command line",
    }
    (run / "run.lock.json").write_text(json.dumps(lock))
    text = Page(write_report(run)).text
    for words in ("config.json, line 12", "config.json, line 3", "config.json is /home/me/config.json", "command line"):
        assert text.count(words) == 1
    assert "/home/a/other.json:1" in text, "two files of one name keep their paths"
    assert "512" in text
    assert "512.0" not in text


def test_each_image_of_a_prompt_has_a_row_of_its_own(tmp_path: Path):
    run = make_run(tmp_path / "run")
    sink = JsonlSink(run)
    images = []
    for index in range(2):
        path = run / "validation_images" / f"two_{index}.png"
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
        images.append(SavedImage(path, "two", "a cat", 8, 8, index, "live", index))
    sink.handle(RunStarted("a cat", run, 40, 20))
    sink.handle(ImagesMade(20, tuple(images)))
    sink.close()
    text = Page(write_report(run)).text
    assert "two (8x8)" in text
    assert "two (8x8, no. 2)" in text


def test_the_base_is_judged_on_the_images_of_the_last_evaluation(tmp_path: Path):
    """Files of before the field have the base at step 0."""
    first, last = {"step": 0, "pooled": 0.9}, {"step": 10, "pooled": 0.5}
    run = RunRecord(tmp_path, evaluations=[first | {"reference": 0.9}, last | {"reference": 0.7}])
    assert _base_loss(run) == 0.7
    assert _base_loss(RunRecord(tmp_path, evaluations=[first, last])) == 0.9
    assert _base_loss(RunRecord(tmp_path, evaluations=[last])) is None


def test_images_beyond_the_budget_are_counted_and_left_out():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    whole = Embedder(1)
    one = len(base64.b64decode(str(whole.img_of(image)).split("base64,")[1].split('"')[0]))
    embed = Embedder(3, budget=2 * one)
    shown = [str(embed.img_of(image)) for _ in range(3)]
    assert ["<img" in each for each in shown] == [True, True, False]
    assert (whole.left_out, embed.left_out) == (0, 1)


def test_times_are_shown_longest_first_as_shares_of_the_longest(tmp_path: Path):
    run = RunRecord(tmp_path, phases={"loading": 1.0, "encoding": 4.0}, evaluations=[{"seconds": 1.5}, {"step": 5}])
    run.steps = [{"step": 1, "seconds": 0.5}, {"step": 2, "seconds": 1.5}]
    assert times_of(run) == [
        ("encoding", 1.0, "4.0 s"),
        ("optimizer steps", 0.5, "2.0 s"),
        ("evaluation", 0.375, "1.5 s"),
        ("loading", 0.25, "1.0 s"),
    ]
    assert times_of(RunRecord(tmp_path)) == []


def test_images_that_the_run_kept_are_listed_by_dataset_as_far_as_their_table_can_be_read(tmp_path: Path):
    (tmp_path / "1").write_bytes(b"an image")
    assert read_contact(tmp_path) == {}
    shown = [
        {"dataset": "cats", "file": "1", "caption": "a cat", "note": "cut"},
        {"dataset": "cats", "file": 1},
        {"dataset": "dogs", "file": "elsewhere/1"},
        {"dataset": "dogs", "file": "gone"},
        {"dataset": "dogs"},
        "no image",
    ]
    (tmp_path / "pictures.json").write_text(json.dumps(shown))
    path = tmp_path / "1"
    assert read_contact(tmp_path) == {"cats": [(path, "a cat", "cut"), (path, "", "")], "dogs": [(path, "", "")]}
    (tmp_path / "pictures.json").write_text('{"dataset": "cats"}')
    assert read_contact(tmp_path) == {}


def test_what_is_too_much_for_the_page_is_counted_or_spread_over_the_run(tmp_path: Path):
    for count, more in ((60, 0), (61, 1), (63, 3)):
        warnings = [f"warning {number}" for number in range(count)]
        view = view_of(RunRecord(tmp_path, warnings=warnings))
        assert view["warnings"] == {"shown": warnings[:60], "num_more": more}
    assert spread([1, 2, 3], 3) == [1, 2, 3]
    assert spread([10, 20, 30, 40, 50], 3) == [10, 30, 50]
    assert spread([10, 20, 30, 40, 50, 60, 70], 2) == [10, 70]


def test_the_next_commands_are_those_of_the_state_of_the_run(tmp_path: Path):
    update = ("Update this page", f"simpletuner report {tmp_path}")
    assert commands_of(RunRecord(tmp_path)) == [update]
    (tmp_path / "logs").mkdir()
    run = RunRecord(tmp_path, start={"run_name": "a"}, lock={"command": "simpletuner train a"})
    curves = ("Open the curves in TensorBoard", f"tensorboard --logdir {tmp_path / 'logs'}")
    assert commands_of(run) == [("Resume from the last checkpoint", "simpletuner train a"), curves, update]
    run.end = {"event": "run_finished", "commands": ["simpletuner generate"]}
    assert commands_of(run) == [
        ("Generate images with the trained weights", "simpletuner generate"),
        ("Start the same run again", "simpletuner train a"),
        curves,
        update,
    ]


def test_images_of_a_report_are_those_that_are_there_and_no_sheets(tmp_path: Path):
    for name in ("a", "b", "sheet"):
        (tmp_path / f"{name}.png").write_bytes(b"an image")
    size = {"shortname": "cat", "width": 64, "height": 32, "prompt": "a cat"}
    run = RunRecord(tmp_path)
    made = [
        {"path": str(tmp_path / "a.png"), "kind": "live", **size},
        {"path": str(tmp_path / "b.png"), "kind": "ema", "index": 1, **size},
        {"path": str(tmp_path / "sheet.png"), "kind": "grid", **size},
        {"path": str(tmp_path / "gone.png"), "kind": "live", **size},
        "no image",
    ]
    found = _images(run, {"step": 20, "pictures": made})
    assert [(each.path.name, each.step, each.kind, each.row, each.prompt) for each in found] == [
        ("a.png", 20, "live", "cat (64x32)", "a cat"),
        ("b.png", 20, "ema", "cat (64x32, no. 2)", "a cat"),
    ]


def test_of_a_dataset_the_report_has_the_share_that_passed_each_filter(tmp_path: Path):
    counts = {"found": 8, "readable": 6, "large_enough": 4, "captioned": 4, "bucketed": 2, "per_epoch": 1234}
    skipped = {"reason": "too small", "count": 2, "examples": ["a", "b", "c", "d"]}
    report = {"id": "cats", **counts, "sizes": {"64x64": 1, "96x64": 3}, "set_aside": [skipped, "no reason"]}
    found = dataset_of(RunRecord(tmp_path), report, Embedder(1))
    assert found["stages"] == [
        ("found", 1.0, "8"),
        ("readable", 0.75, "6"),
        ("large enough", 0.5, "4"),
        ("captioned", 0.5, "4"),
        ("used", 0.25, "2"),
    ]
    assert (found["name"], found["per_epoch"]) == ("cats", "1,234")
    assert found["sizes"] == [("96x64", 3), ("64x64", 1)]
    assert found["skipped"] == [{"count": "2", "reason": "too small", "examples": "a, b, c"}]
    assert dataset_of(RunRecord(tmp_path), {"id": "none"}, Embedder(1))["stages"][0] == ("found", 0.0, "0")
