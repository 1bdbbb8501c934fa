"""How the screens look: everything fits into 80 columns and 24 rows, and scrolls where it does not."""

from __future__ import annotations

STYLE = """
Screen { layout: vertical; background: $background; }
#title { height: 1; background: $primary-darken-2; color: $text; padding: 0 1; text-style: bold; }
#steps { height: 1; background: $surface; padding: 0 1; color: $text-muted; }
#pages { height: 1fr; }
.page { padding: 1 2 0 2; height: 1fr; scrollbar-size-vertical: 1; }
.intro { text-style: bold; color: $accent; padding: 0 0 1 0; width: 1fr; }
Field { height: auto; width: 1fr; }
Field Label { width: 18; color: $text-muted; }
Field:focus-within Label { color: $text; text-style: bold; }
Field Input, Field Select { width: 1fr; background: $surface; }
Field Input:focus { background: $primary-darken-3; }
Field Checkbox { background: $background; border: none; padding: 0; width: 1fr; }
Field RadioSet { width: 1fr; background: $background; border: none; padding: 0; }
Field TextArea { width: 1fr; height: 7; background: $surface; border: none; padding: 0; }
Field.lines { padding: 0 0 1 0; }
Field.list { padding: 0 0 1 0; }
Field.refused Input { background: $error-darken-3; }
#report { height: auto; padding: 1 0 0 0; width: 1fr; }
#status { height: auto; max-height: 4; padding: 0 2; background: $warning-darken-3; color: $text; display: none; }
#help { height: 5; background: $surface; padding: 0 2; border-top: solid $primary-darken-2; color: $text; }
#buttons { height: 1; padding: 0 2; }
#buttons Button { margin: 0 2 0 0; }
#verdict { height: auto; max-height: 50%; padding: 0 0 1 0; overflow-y: auto; }
#estimate { height: auto; max-height: 5; padding: 0 0 1 0; }
#diff-scroll { height: 1fr; background: $surface; padding: 0 1; scrollbar-size-vertical: 1; }
#diff { width: auto; height: auto; }
"""
