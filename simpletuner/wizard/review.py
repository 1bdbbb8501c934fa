"""The last page: what is wrong or noteworthy, and the files as they would be written."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Static

from simpletuner.wizard.answers import Answers
from simpletuner.wizard.files import Verdict, diff_lines, judge, start_command, texts_for
from simpletuner.wizard.project import Project

_COLOURS = (("+++", "bold"), ("---", "bold"), ("@@", "cyan"), ("+", "green"), ("-", "red"))


class Review(Vertical):
    """Shows what saving would do. `verdict` is that of the checks a start makes."""

    DEFAULT_CSS = "Review { padding: 1 2 0 2; }"

    verdict: Verdict | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="verdict")
        with VerticalScroll(id="diff-scroll"):
            yield Static(id="diff")
        with Horizontal(id="buttons"):
            yield Button("Save (Ctrl+S)", id="save", compact=True, action="app.save", variant="primary")
            yield Button("Save and run (Ctrl+R)", id="start", compact=True, action="app.start", variant="success")

    def focus_diff(self) -> None:
        self.query_one("#diff-scroll").focus()

    def show(self, project: Project, answers: Answers) -> None:
        """Check the answers, and draw the files."""
        texts = texts_for(project, answers)
        self.verdict = judge(project, texts, answers)
        self.query_one("#verdict", Static).update(verdict_text(self.verdict, bool(texts), start_command(project)))
        diff = Text("\n").join(coloured(line) for line in diff_lines(project, texts))
        self.query_one("#diff", Static).update(diff or Text("(the files on the disk say the same)", "dim"))


def verdict_text(verdict: Verdict, is_changed: bool, start: str) -> Text:
    """Problems in red, notes in yellow, or that all is well."""
    parts = []
    for problem in verdict.problems:
        parts.append(Text(problem.render(), "red"))
    for warning in verdict.warnings:
        parts.append(Text(f"note: {warning}", "yellow"))
    if not verdict.problems:
        saved = f"Saved. `simpletuner plan` says what it takes; start with: {start}"
        parts.append(Text("Every check of a start passes." if is_changed else saved, "bold green"))
    return Text("\n").join(parts)


def coloured(line: str) -> Text:
    """One line of a diff."""
    style = next((colour for start, colour in _COLOURS if line.startswith(start)), "")
    return Text(line, style)
