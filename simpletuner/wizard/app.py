"""The screens of `simpletuner configure`: a page for each group of questions, and one that shows the files.

The screens only generate: what is asked is in `pages.py`, what follows from answers in `plan.py` and `files.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from rich.markup import escape
from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import ContentSwitcher, Footer, Input, Static, TextArea
from textual.worker import get_current_worker

from simpletuner.errors import Problem, SimpleTunerError
from simpletuner.wizard.css import STYLE
from simpletuner.wizard.fields import Field
from simpletuner.wizard.files import judge, save, texts_for
from simpletuner.wizard.images import FolderReport, bucket_lines, folder_path, look_at_folder
from simpletuner.wizard.pages import asked_as, pages
from simpletuner.wizard.plan import make_plan
from simpletuner.wizard.project import Project
from simpletuner.wizard.question import Page, Question, Refused
from simpletuner.wizard.review import Review
from simpletuner.wizard.thumbnails import thumbnails_text

Outcome = Literal["saved", "start"] | None
_FOLDERS = ("images", "reference_images", "eval_images", "regularisation_images")


# A folder is looked at when its name has stood for so long; how often a scan says how far it is.
SETTLE_SECONDS = 0.6
PROGRESS_SECONDS = 0.2
# From this page on, the process that estimates memory and time is being started.
ESTIMATE_FROM = 3


def field_of(widget: Widget) -> Field | None:
    """The question that a widget is part of."""
    return next((node for node in widget.ancestors_with_self if isinstance(node, Field)), None)


class ScanStopped(Exception):
    """The folder is not the one that is asked about any more."""


class Wizard(App[Outcome]):
    """The application; returns "start" where the run is to be started, None where nothing was saved.

    Args:
        project: the files as they are; `project` holds what was saved last.
    """

    CSS = STYLE
    TITLE = "simpletuner configure"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [
        Binding("ctrl+n", "go(1)", "Next", priority=True),
        Binding("ctrl+b", "go(-1)", "Back", priority=True),
        Binding("ctrl+s", "save", "Save", priority=True),
        Binding("ctrl+r", "start", "Save and run", priority=True),
        Binding("ctrl+q", "leave", "Quit", priority=True),
        Binding("ctrl+c", "copy_or_leave", "Quit", priority=True, show=False),
        # With priority, so that what is typed after Tab goes into the next field however fast it comes.
        Binding("tab", "app.focus_next", priority=True, show=False),
        Binding("shift+tab", "app.focus_previous", priority=True, show=False),
        Binding("pagedown", "scroll(1)", "Scroll", priority=True),
        Binding("pageup", "scroll(-1)", "Scroll up", priority=True, show=False),
    ]

    def __init__(self, project: Project):
        super().__init__()
        self.animation_level = "none"  # every frame travels over ssh
        self.project = project
        self.answers = project.answers
        self.pages = pages()
        self.reports: dict[str, FolderReport | str] = {}
        self.position = 0
        self.outcome: Outcome = None
        self._waiting: dict[str, Timer] = {}
        self._asked_to_leave = False

    # ---- what is on the screen -------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        plan = make_plan(self.answers)
        shown = self.project.places.shown(self.project.places.config)
        yield Static(f"simpletuner configure   {'new' if self.project.is_new else 'editing'}: {shown}", id="title")
        yield Static(id="steps")
        with ContentSwitcher(id="pages", initial="page-0"):
            for number, page in enumerate(self.pages):
                with VerticalScroll(id=f"page-{number}", classes="page", can_focus=False):
                    yield Static(classes="intro", markup=False)
                    for question in page.questions:
                        yield Field(question, self.answers, plan, self.project.places.working_dir)
                    if page.title == "Images":
                        yield Static(id="report", markup=False)
            yield Review(id=f"page-{len(self.pages)}")
        yield Static(id="status", markup=False)
        yield Static(id="help")
        yield Footer()

    def on_mount(self) -> None:
        self.show_page(0)
        for key in _FOLDERS:
            self.look_at(key, seconds=0)

    def show_page(self, position: int) -> None:
        self.position = position
        self.say("")
        switcher = self.query_one("#pages", ContentSwitcher)
        switcher.current = f"page-{position}"
        titles = [*(page.title for page in self.pages), "Review"]
        steps = [
            f"[reverse] {number} {title} [/]" if number - 1 == position else f" {number} {title} "
            for number, title in enumerate(titles, 1)
        ]
        self.query_one("#steps", Static).update("".join(steps))
        if position == len(self.pages):
            self.show_help(None)
            review = self.query_one(Review)
            review.show(self.project, self.answers)
            review.focus_diff()
            return
        if position >= ESTIMATE_FROM:
            self.query_one(Review).prepare_estimate(self.project.places.working_dir)
        self.refresh_fields()
        self.query_one(f"#page-{position}").query(Field).first().input.focus()

    @property
    def page(self) -> Page | None:
        return self.pages[self.position] if self.position < len(self.pages) else None

    def refresh_fields(self) -> None:
        """Show the answers that count now on this page: proposals move with other answers."""
        # A timer may end while the screens are being taken down.
        if self.page is None or not self.is_running:
            return
        plan, view = make_plan(self.answers), self.query_one(f"#page-{self.position}")
        self.put(view.query(".intro").first(Static), self.page.intro(self.answers))
        for field in view.query(Field):
            field.display = field.question.applies(self.answers)
            # Who types is ahead of what was taken from the field so far: it must not be put back.
            if not field.has_class("refused") and not field.input.has_focus:
                field.show(self.answers, plan)
        if self.page.title == "Images":
            self.put(self.query_one("#report", Static), self.report())

    def put(self, static: Static, text: str | Text) -> None:
        """Show a text; the same one again costs no layout."""
        if static.content != text:
            static.update(text)

    def say(self, text: str) -> None:
        """Show one message in a line of its own, in place of the one before; an empty one takes the line away."""
        status = self.query_one("#status", Static)
        status.update(text)
        status.display = bool(text)

    def show_help(self, question: Question | None, refusal: str | None = None) -> None:
        text = ""
        if question is not None:
            head = f"[b]{question.key}[/b]  {escape(question.help)}"
            known = question.facts if isinstance(question.facts, str) else question.facts(self.answers)
            facts = f"[b $error]{escape(refusal)}[/]" if refusal else f"[dim]{escape(known)}[/dim]"
            text = f"{head}\n{facts}"
        self.put(self.query_one("#help", Static), text)
        self.query_one("#help").display = question is not None

    # ---- answers ---------------------------------------------------------------------------------------------------

    @on(Field.Changed)
    def take_answer(self, event: Field.Changed) -> None:
        self.take(event.field, event.value)

    def take(self, field: Field, value: Any) -> None:
        """Make the value of a field the answer to its question, or say why it is none."""
        question = field.question
        self._asked_to_leave = False
        self.say("")
        try:
            self.answers = question.write(self.answers, value)
        except Refused as refusal:
            field.add_class("refused")
            self.show_help(question, str(refusal))
            return
        field.remove_class("refused")
        self.show_help(question)
        if question.key in _FOLDERS:
            self.look_at(question.key)
        self.refresh_fields()

    @on(events.DescendantFocus)
    def explain(self, event: events.DescendantFocus) -> None:
        field = field_of(event.widget)
        # The event of a field may come when its page has gone already.
        if field is not None and self.page is not None and field.question in self.page.questions:
            self.show_help(field.question)

    @on(Input.Submitted)
    def action_go_on(self) -> None:
        """To the next field; from the last one of a page to the next page."""
        field = field_of(self.focused) if self.focused else None
        if field is None or self.page is None:
            return
        shown = [each for each in self.query_one(f"#page-{self.position}").query(Field) if each.display]
        if field is shown[-1]:
            self.action_go(1)
        else:
            shown[shown.index(field) + 1].input.focus()

    # ---- images --------------------------------------------------------------------------------------------------

    def look_at(self, key: str, seconds: float = SETTLE_SECONDS) -> None:
        """Scan a folder in the background, once it has stood for some time: the start of a path is a folder too."""
        folder = getattr(self.answers, key)
        if waiting := self._waiting.pop(key, None):
            waiting.stop()
        self.workers.cancel_group(self, key)
        if folder and folder not in self.answers.seen:
            self._waiting[key] = self.set_timer(max(seconds, 0.01), partial(self.start_scan, key, folder))

    def start_scan(self, key: str, folder: str) -> None:
        self._waiting.pop(key, None)
        if folder_path(folder, self.project.places.working_dir).is_dir():
            self.reports[folder] = "reading the images ..."
            self.run_worker(partial(self.scan, folder), group=key, thread=True)
            self.refresh_fields()

    @property
    def is_looking(self) -> bool:
        """Whether a folder is yet to be looked at."""
        scans = [worker for worker in self.workers if worker.group in _FOLDERS]
        return bool(self._waiting) or any(not worker.is_finished for worker in scans)

    def scan(self, folder: str) -> None:
        """In a thread of its own."""
        worker, places = get_current_worker(), self.project.places
        reported = time.monotonic()

        def progress(num_files: int) -> None:
            nonlocal reported
            if worker.is_cancelled:
                raise ScanStopped
            if time.monotonic() > reported + PROGRESS_SECONDS:
                reported = time.monotonic()
                self.call_from_thread(self.take_report, folder, f"reading the images: {num_files} files ...")

        try:
            report = look_at_folder(
                folder, places.working_dir, places.cache_dir(self.answers), progress, with_thumbnails=True
            )
        except ScanStopped:
            return
        except SimpleTunerError as error:
            self.call_from_thread(self.take_report, folder, error.render())
            return
        if not worker.is_cancelled:
            self.call_from_thread(self.take_report, folder, report)

    def take_report(self, folder: str, report: FolderReport | str) -> None:
        if not self.is_running:  # the screens are being taken down
            return
        self.reports[folder] = report
        if isinstance(report, FolderReport):
            self.answers = replace(self.answers, seen={**self.answers.seen, folder: report.facts})
        self.refresh_fields()
        if self.position == len(self.pages):
            self.query_one(Review).show(self.project, self.answers)

    def report(self) -> Text:
        """What is known of the folders, and a few of the images that are learned."""
        text = Text("\n".join(self.report_lines()))
        main = self.reports.get(self.answers.images)
        if isinstance(main, FolderReport) and main.thumbnails:
            text.append("\n\n").append(thumbnails_text(main.thumbnails))
        return text

    def report_lines(self) -> list[str]:
        lines = []
        for key in _FOLDERS:
            folder = getattr(self.answers, key)
            if not folder:
                continue
            report = self.reports.get(folder, "there is no folder of this name")
            lines += [f"{folder}: {report}"] if isinstance(report, str) else self.lines_of(report)
        return lines or ["(images are counted and measured as soon as a folder is named)"]

    def lines_of(self, report: FolderReport) -> list[str]:
        first, *rest = report.lines()
        lines = [f"{report.folder}: {first}", *(f"  {line}" for line in rest)]
        if report.folder == self.answers.images and report.facts.usable:
            plan = make_plan(self.answers)
            settings = {**plan.config, **plan.entries["images"]}
            resolution, unit, crop = (settings[key] for key in ("resolution", "resolution_type", "crop"))
            buckets = bucket_lines(report, float(resolution), unit, bool(crop), self.answers.spec)
            more = f", and {len(buckets) - 4} more sizes" if len(buckets) > 4 else ""
            lines.append(f"  trained as {', '.join(buckets[:4])}{more}")
        return lines

    # ---- moving, saving, leaving -----------------------------------------------------------------------------------

    def after_typing(self, action: Callable[[], object]) -> None:
        """Run an action once the letters that were typed before its key have become an answer."""
        field = field_of(self.focused) if self.focused else None
        if field is None:
            action()
            return

        def answered() -> None:
            if (text := field.typed()) is not None:
                self.take(field, text)
            action()

        field.input.call_later(answered)

    def action_go(self, by: int) -> None:
        self.after_typing(partial(self.go, by))

    def go(self, by: int) -> None:
        target = self.position + by
        if 0 <= target <= len(self.pages) and self.may_leave_page(is_forward=by > 0):
            self.show_page(target)

    def action_scroll(self, by: int) -> None:
        """What is longer than the screen: a page, or the files of the review."""
        wanted = "#diff-scroll" if self.page is None else f"#page-{self.position}"
        view = self.query_one(wanted, VerticalScroll)
        view.scroll_relative(y=by * max(1, view.size.height - 2))

    def may_leave_page(self, is_forward: bool = True) -> bool:
        """Whether every text on this page is an answer; and for who goes on, one that a start can use."""
        view = self.query_one(f"#page-{self.position}")
        refused = view.query(".refused")
        if refused:
            refused.first(Field).input.focus()
            self.say("this answer cannot be used")
            return False
        problem = self.problem_here() if is_forward else None
        if problem is not None:
            self.query_one(f"#field-{asked_as(problem.key or '')}", Field).input.focus()
            self.say(problem.render())
        return problem is None

    def problem_here(self) -> Problem | None:
        """What a start would say against an answer that was given on this page."""
        if self.page is None:
            return None
        plan = make_plan(self.answers)
        given = {
            question.key
            for question in self.page.questions
            if question.applies(self.answers) and question.read(self.answers, plan) not in (None, "")
        }
        found = judge(self.project, texts_for(self.project, self.answers), self.answers).problems
        return next((problem for problem in found if asked_as(problem.key or "") in given), None)

    def action_save(self) -> None:
        self.after_typing(self.save)

    def save(self) -> bool:
        """Write the files if the checks pass; on any other page, show them first."""
        if self.page is not None:
            if self.may_leave_page():
                self.show_page(len(self.pages))
            return False
        if self.is_looking:
            self.say("the images are still being read; save again in a moment")
            return False
        verdict = self.query_one(Review).verdict
        if verdict is None or verdict.problems:
            self.say("nothing was saved: see the problems above")
            return False
        try:
            self.project = save(self.project, texts_for(self.project, self.answers), self.answers)
        except SimpleTunerError as error:
            self.say(error.render())
            return False
        self.outcome = "saved"
        self.query_one(Review).show(self.project, self.answers)
        self.say("saved")
        return True

    def action_start(self) -> None:
        self.after_typing(self.start)

    def start(self) -> None:
        if self.save():
            self.exit("start")

    def action_copy_or_leave(self) -> None:
        """Ctrl+C copies what is selected in a field, as everywhere; without a selection it leaves, as in a shell."""
        field = self.focused
        if isinstance(field, Input | TextArea) and field.selected_text:
            self.copy_to_clipboard(field.selected_text)
            self.say("copied; Ctrl+Q leaves")
            return
        self.action_leave()

    def action_leave(self) -> None:
        self.after_typing(self.leave)

    def leave(self) -> None:
        if not self._asked_to_leave and texts_for(self.project, self.answers) and self.answers != self.project.answers:
            self._asked_to_leave = True
            self.say("nothing was saved yet: Ctrl+S saves, Ctrl+Q or Ctrl+C again leaves without saving")
            return
        self.workers.cancel_all()
        self.exit(self.outcome)
