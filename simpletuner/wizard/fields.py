"""One question on the screen: its label, a field of the fitting kind, and the answer read from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Checkbox, Input, Label, RadioSet, Select, TextArea

from simpletuner.wizard.answers import Answers
from simpletuner.wizard.inputs import FolderSuggester, LinesField, TextField
from simpletuner.wizard.marks import Choice, ChoiceList, Tick
from simpletuner.wizard.plan import Plan
from simpletuner.wizard.question import Question, shown


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


class Field(Horizontal):
    """A question. Posts `Changed` when somebody gives another answer; what the program puts in posts nothing."""

    class Changed(Message):
        """Another answer was given."""

        def __init__(self, field: Field, value: Any):
            super().__init__()
            self.field = field
            self.value = value

    def __init__(self, question: Question, answers: Answers, plan: Plan, working_dir: Path):
        super().__init__(id=f"field-{question.key}", classes=question.kind)
        self.question = question
        self.working_dir = working_dir
        self._shown = question.read(answers, plan)
        self._choices = list(question.choices(answers))

    def compose(self) -> ComposeResult:
        if self.question.label:
            yield Label(self.question.label)
        yield self._make_input()

    def _make_input(self) -> Widget:
        kind, value, name = self.question.kind, self._shown, self.question.key
        if kind == "list":
            return ChoiceList(
                *(Choice(words, value=choice == value, name=choice) for choice, words in self._choices),
                id=name,
                compact=True,
            )
        if kind == "choice":
            return Select(self._options(value), value=value, allow_blank=False, id=name, compact=True)
        if kind == "yes_no":
            return Tick(yes_or_no(bool(value)), value=bool(value), id=name, compact=True)
        if kind == "lines":
            return LinesField(shown(value), id=name, compact=True, tab_behavior="focus")
        suggester = FolderSuggester(self.working_dir) if kind == "folder" else None
        return TextField(shown(value), id=name, compact=True, select_on_focus=False, suggester=suggester)

    def _options(self, value: Any) -> list[tuple[str, str]]:
        """Words and value of each choice; a value that a file holds stays choosable whatever it is."""
        choices = [(words, choice) for choice, words in self._choices]
        known = value in [choice for _, choice in choices]
        return choices if known else [*choices, (shown(value) or "(unset)", value)]

    @property
    def input(self) -> Widget:
        """What takes the focus."""
        return self.query_one(f"#{self.question.key}")

    def show(self, answers: Answers, plan: Plan) -> None:
        """Put in the answer that counts now."""
        value = self.question.read(answers, plan)
        self._choices = list(self.question.choices(answers))
        if value == self._shown:
            return
        self._shown = value
        self.remove_class("refused")
        field = self.input
        with field.prevent(Input.Changed, Select.Changed, Checkbox.Changed, TextArea.Changed):
            if isinstance(field, Select):
                field.set_options(self._options(value))
                field.value = value
            elif isinstance(field, Checkbox):
                field.value = bool(value)
                field.label = yes_or_no(field.value)
            elif isinstance(field, TextArea):
                field.text = shown(value)
            elif isinstance(field, Input):
                field.value = shown(value)

    def _answered(self, value: Any) -> None:
        is_same = value == bool(self._shown) if isinstance(value, bool) else shown(value) == shown(self._shown)
        if not is_same:
            self._shown = value
            self.post_message(self.Changed(self, value))

    def typed(self) -> str | None:
        """The text in the field, where it is ahead of the answer that was taken from it; else None."""
        field = self.input
        text = field.value if isinstance(field, Input) else field.text if isinstance(field, TextArea) else None
        if text is None or text == shown(self._shown):
            return None
        self._shown = text
        return text

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._answered(event.input.value)  # not the event's: that may be of a letter ago

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        event.stop()
        self._answered(event.text_area.text)

    def on_select_changed(self, event: Select.Changed) -> None:
        event.stop()
        self._answered(event.value)

    def on_checkbox_changed(self, event: Checkbox.Changed) -> None:
        event.stop()
        event.checkbox.label = yes_or_no(event.value)
        self._answered(event.value)

    def on_radio_set_changed(self, event: RadioSet.Changed) -> None:
        event.stop()
        self._answered(str(event.pressed.name))
