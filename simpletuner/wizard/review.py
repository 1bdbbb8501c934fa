"""The last page: what is wrong or noteworthy, and the files as they would be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Static
from textual.worker import get_current_worker

from simpletuner.errors import Problem
from simpletuner.hardware import Hardware
from simpletuner.program import pasteable
from simpletuner.wizard.answers import Answers
from simpletuner.wizard.estimate import Estimate, Estimating, estimate_lines, rough_lines
from simpletuner.wizard.files import Verdict, diff_lines, judge, start_command, texts_for
from simpletuner.wizard.pages import page_of
from simpletuner.wizard.project import Project

_COLORS = (("+++", "bold"), ("---", "bold"), ("@@", "cyan"), ("+", "green"), ("-", "red"))


class Review(Vertical):
    """Shows what saving would do. `verdict` is that of the checks a start makes."""

    DEFAULT_CSS = "Review { padding: 1 2 0 2; }"

    verdict: Verdict | None = None
    estimated: tuple[tuple[Verdict, Hardware], Estimate] | None = None
    estimating: Estimating | None = None
    waiting: Estimating | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="verdict")
        yield Static(id="estimate")
        with VerticalScroll(id="diff-scroll"):
            yield Static(id="diff")
        with Horizontal(id="buttons"):
            yield Button("Save (Ctrl+S)", id="save", compact=True, action="app.save", variant="primary")
            yield Button("Save and run (Ctrl+R)", id="start", compact=True, action="app.start", variant="success")

    def focus_diff(self) -> None:
        self.query_one("#diff-scroll").focus()

    def show(self, project: Project, answers: Answers) -> None:
        """Check the answers, and show the files."""
        texts = texts_for(project, answers)
        self.verdict = judge(project, texts, answers)
        self.query_one("#verdict", Static).update(verdict_text(self.verdict, bool(texts), start_command(project)))
        diff = Text("\n").join(colored(line) for line in diff_lines(project, texts))
        self.query_one("#diff", Static).update(diff or Text("(the files on disk are up to date)", "dim"))
        self.query_one("#estimate").display = self.verdict.run is not None
        if self.verdict.run is not None:
            self.start_estimate(self.verdict, project, texts, answers)

    def prepare_estimate(self, working_dir: Path) -> None:
        """Start the process that will be asked, so that the seconds of its start are over when it is."""
        if self.waiting is None:
            self.waiting = Estimating(working_dir)

    def start_estimate(self, verdict: Verdict, project: Project, texts: Mapping[Path, str], answers: Answers) -> None:
        """Show memory, time and disk as they become known; the same run is not asked about twice."""
        hardware = answers.target
        static = self.query_one("#estimate", Static)
        if self.estimated and self.estimated[0] == (verdict, hardware):
            static.update(estimate_text(self.estimated[1], verdict, hardware))
            return
        self.stop_estimate()
        self.estimated = None
        static.update(Text("estimating memory, disk and time ...", "dim"))
        self.prepare_estimate(project.places.working_dir)
        self.estimating, self.waiting = self.waiting, None
        assert self.estimating is not None
        self.estimating.ask(project, texts, None if answers.trains_on is None else hardware.device_bytes)
        self.estimate(self.estimating, verdict, hardware)

    @work(group="estimate", exclusive=True, thread=True)
    def estimate(self, estimating: Estimating, verdict: Verdict, hardware: Hardware) -> None:
        """In a thread of its own."""
        worker, last = get_current_worker(), None
        for last in estimating:
            if not worker.is_cancelled:
                self.app.call_from_thread(self.show_estimate, last, verdict, hardware)
        if last and not worker.is_cancelled:
            self.estimated = (verdict, hardware), last

    def show_estimate(self, found: Estimate, verdict: Verdict, hardware: Hardware) -> None:
        if self.is_running:  # the screens may be taken down by now
            self.query_one("#estimate", Static).update(estimate_text(found, verdict, hardware))

    def stop_estimate(self) -> None:
        if self.estimating is not None:
            self.estimating.stop()
            self.estimating = None

    def on_unmount(self) -> None:
        self.workers.cancel_group(self, "estimate")
        self.stop_estimate()
        if self.waiting is not None:
            self.waiting.stop()


def verdict_text(verdict: Verdict, is_changed: bool, start: str) -> Text:
    """Problems in red, or that all is well, then notes in yellow: a small screen cuts off what comes last."""
    parts = [Text("\n".join([problem.render(), *_asked(problem)]), "red") for problem in verdict.problems]
    if not verdict.problems:
        parts.append(
            Text(
                "All checks pass." if is_changed else f"Saved. Start with: {pasteable(start)}",
                "bold green",
            )
        )
    return Text("\n").join([*parts, *(Text(f"note: {warning}", "yellow") for warning in verdict.warnings)])


def _asked(problem: Problem) -> list[str]:
    """Where on the screens something can be done about it."""
    page = page_of(problem.key or "")
    return [f"  asked on page {page}"] if page else []


def estimate_text(found: Estimate, verdict: Verdict, hardware: Hardware) -> Text:
    """What the run takes; red where it is more than there is."""
    if not found.error:
        return _colored_by_wellness(estimate_lines(found, hardware))
    rough = rough_lines(verdict.run, hardware) if verdict.run else []
    reason = "rough until the model is downloaded; an estimate downloads nothing" if rough else found.error
    return _colored_by_wellness(rough).append("\n" if rough else "").append(reason, "dim")


def _colored_by_wellness(lines: Sequence[tuple[str, bool]]) -> Text:
    return Text("\n").join(Text(line, "" if is_well else "bold red") for line, is_well in lines)


def colored(line: str) -> Text:
    """One line of a diff."""
    style = next((color for start, color in _COLORS if line.startswith(start)), "")
    return Text(line, style)
