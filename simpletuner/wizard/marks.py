"""Buttons that show without colors what is chosen, and a list in which arrows choose.

Textual's own tell by color alone, which not every terminal and not every eye has; and in its list the arrows only
move, so that who goes on to the next page has chosen nothing.
"""

from __future__ import annotations

from textual.binding import Binding
from textual.widgets import Checkbox, RadioButton, RadioSet


class Choice(RadioButton):
    """One of a list; its mark is empty where it is not the chosen one."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]
        return "●" if self.value else " "


class Tick(Checkbox):
    """Yes or no; its mark is empty for no."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]
        return "X" if self.value else " "


class ChoiceList(RadioSet):
    """A list of choices. Up and down choose; Enter goes on, as it does in every other field."""

    BINDINGS = [
        Binding("down,right", "choose(1)", show=False),
        Binding("up,left", "choose(-1)", show=False),
        Binding("enter", "app.go_on", show=False),
    ]

    def action_choose(self, by: int) -> None:
        buttons = list(self.query(Choice))
        buttons[(self.pressed_index + by) % len(buttons)].value = True
