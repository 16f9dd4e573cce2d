"""Self-contained HTML pages of text, tables and figures, for light and dark screens and for print.

A page loads nothing: styles are inline, images are data URLs, there is no script, and the page's own
content security policy forbids everything else. Templates are in `templates/`; Jinja2 escapes all text.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from pgolf_fast.console import Table

SHORT = 24  # characters; columns of shorter cells do not wrap


@dataclass(frozen=True)
class Figure:
    """A PNG for light screens, optionally another for dark screens, and a text alternative."""

    png: bytes
    dark: bytes | None = None
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, text (paragraphs separated by empty lines, code in backticks), tables and figures."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()  # those without rows are not shown
    figures: Sequence[Figure] = ()
    label: Literal["", "published", "corrected"] = ""  # form of an analysis, shown as a badge


def render(template: str, title: str, sections: Sequence[Section], **context: object) -> str:
    """Render `templates/<template>.html.j2` to one HTML document; `context` is passed to the template."""
    # Imported here: only pages need Jinja2
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelled name must not render as nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = lambda text: Markup(inline_html(text))
    environment.filters["table"] = lambda table: Markup(table_html(table))
    environment.filters["paragraphs"] = lambda text: list(filter(None, map(str.strip, text.split("\n\n"))))
    environment.filters["data_url"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return environment.get_template(f"{template}.html.j2").render(title=title, sections=sections, **context)


def table_html(table: Table) -> str:
    """Return a `<table>`: cells escaped, backticks as `<code>`, classes `n` (numeric) and `s` (short)."""
    numeric = table.numeric()
    short = [all(len(cell) <= SHORT for cell in column) for column in table.columns()]
    both = zip(numeric, short, strict=True)
    kinds = [' class="n"' if right else ' class="s"' if fits else "" for right, fits in both]
    named = zip(kinds, table.header or (), strict=False)
    names = "".join(f'<th scope="col"{kind}>{inline_html(name)}</th>' for kind, name in named)
    head = "" if table.header is None else f"<thead><tr>{names}</tr></thead>"
    body = ""
    for row in table.rows:
        tags = ["td" if numeric[0] else 'th scope="row"', *["td"] * (len(row) - 1)]
        cells = zip(tags, kinds, row, strict=True)
        line = "".join(f"<{tag}{kind}>{inline_html(cell)}</{tag[:2]}>" for tag, kind, cell in cells)
        body += f"<tr>{line}</tr>\n"
    caption = f"<caption>{inline_html(table.caption)}</caption>" if table.caption else ""
    return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


def inline_html(text: str) -> str:
    """Escape text for HTML and turn `code` in backticks into `<code>` elements."""
    return re.sub(r"(?<!`)(``?)(?!`)(.+?)(?<!`)\1(?!`)", r"<code>\2</code>", escape(text), flags=re.DOTALL)


def portable(text: str) -> str:
    """Shorten absolute paths to their last component, so that a page does not describe this machine."""
    return re.sub(r"(^|[\s('\"`])/(?:[^\s/]+/)*(?=[^\s/])", r"\1", text)
