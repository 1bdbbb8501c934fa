"""Pages and texts made from the files in `templates/`. In HTML and SVG, everything that is filled in is escaped."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of this package. A name that a template uses and nobody gave is an error."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("simpletuner"),
        autoescape=jinja2.select_autoescape(("html", "svg")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"inline": inline, "cell": cell}
    return made


def render(template: str, /, **values: Any) -> str:
    """Fill in a template.

    Args:
        template: name of the file in `templates/`.
    """
    return environment().get_template(template).render(**values)


def to_bytes(text: str) -> bytes:
    """UTF-8. A file name that is not UTF-8 gives half characters; they are written as escapes."""
    return text.encode("utf-8", "backslashreplace")


def inline(text: str) -> str:
    """For Markdown: a text of the user's that must stay within its line and is no markup."""
    return " ".join(text.replace("<", "&lt;").replace("`", "'").split())


def cell(value: Any) -> str:
    """For Markdown: a value in a cell of a table."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, float):
        value = f"{value:g}"
    return inline(str(value)).replace("|", "\\|")
