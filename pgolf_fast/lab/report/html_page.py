"""Pages that open offline: text, tables and figures in one HTML file, for light and dark screens and paper.

A page loads nothing: styles are inline, pictures are data, there is no script, and its own content policy
forbids all else. Whatever callers pass is escaped, except SVG, which they must have drawn themselves.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from pgolf_fast.bench import drawing

Label = Literal["", "published", "corrected"]
SHORT = 24  # characters of a cell that stays on one line


@dataclass(frozen=True)
class Table:
    """Cells as text; a column of numbers, with or without a short unit, is aligned to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture: PNG bytes for light screens and, where there are any, others for dark ones; or one `<svg>`
    element, whose strokes and text in currentColor fit both. `alt` is for who cannot see it."""

    png: bytes | None = None
    dark: bytes | None = None
    svg: str | None = None
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Section:
    """Text (an empty line ends a paragraph, `code` stands in backticks), below it tables, then figures.

    label: whether this is an analysis as published, or as it should be.
    """

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    label: Label = ""


def page(title: str, sections: Sequence[Section], note: str = "") -> str:
    """One whole HTML document. `note` stands below the title, as a section's text does.

    Raises ValueError for a table row that does not fit its header, and for a figure without a picture.
    """
    contents = "".join(f'<li><a href="#s{i}">{_head(s)}</a></li>' for i, s in enumerate(sections, 1))
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        note=_paragraphs(note),
        contents=f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(sections) > 2 else "",
        sections="".join(_section(f"s{i}", section) for i, section in enumerate(sections, 1)),
    )


def portable(text: str) -> str:
    """Text without where things lie on this machine: of absolute paths only the last part."""
    return re.sub(r"(^|[\s('\"`])/(?:[^\s/]+/)*(?=[^\s/])", r"\1", text)


def _section(anchor: str, section: Section) -> str:
    parts = [
        f'<section id="{anchor}" aria-labelledby="{anchor}h"><h2 id="{anchor}h">{_head(section)}</h2>',
        _paragraphs(section.text),
        *map(_table, section.tables),
        *map(_figure, section.figures),
        "</section>\n",
    ]
    return "".join(parts)


def _head(section: Section) -> str:
    badge = f' <span class="label {section.label}">{section.label}</span>' if section.label else ""
    return escape(section.title) + badge


def _paragraphs(text: str) -> str:
    found = (part.strip() for part in text.split("\n\n"))
    return "".join(f"<p>{_inline(part)}</p>\n" for part in found if part)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(table: Table) -> str:
    wrong = [row for row in table.rows if len(row) != len(table.header)]
    if wrong:
        raise ValueError(f"table {table.caption!r}: {wrong[0]} does not fit the header {table.header}")
    columns = zip(*table.rows, strict=True) if table.rows else ((),) * len(table.header)
    kinds = [
        ' class="n"' if _are_numbers(column) else ' class="s"' if _are_short(column) else ""
        for column in columns
    ]
    header = "".join(f'<th scope="col"{k}>{escape(c)}</th>' for k, c in zip(kinds, table.header, strict=True))
    body = "\n".join(f"<tr>{_row(row, kinds)}</tr>" for row in table.rows)
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    name = escape(table.caption or ", ".join(filter(None, table.header)) or "table")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table>{caption}'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    """Cells; the first names the row, unless it is a number."""
    first = "td" if "n" in kinds[0] else "th"
    tags = [first, *["td"] * (len(row) - 1)]
    scopes = [' scope="row"' if tag == "th" else "" for tag in tags]
    return "".join(
        f"<{tag}{scope}{kind}>{_inline(cell)}</{tag}>"
        for tag, scope, kind, cell in zip(tags, scopes, kinds, row, strict=True)
    )


_NUMBER = re.compile(r"[-+±~<>]?\s?(\d[\d,]*(\.\d+)?([eE][-+]?\d+)?|nan|inf)(\s?[a-zA-Zµ%/²]{1,8})?")


def _are_numbers(cells: Sequence[str]) -> bool:
    """Whether some cell is a number and every other one too, or stands for one that there is not."""
    held = [cell.strip() for cell in cells if cell.strip() not in ("", "-")]
    return bool(held) and all(_NUMBER.fullmatch(cell) for cell in held)


def _are_short(cells: Sequence[str]) -> bool:
    """Whether these had better not be broken over lines."""
    return all(len(cell) <= SHORT for cell in cells)


def _figure(figure: Figure) -> str:
    if figure.png is None and figure.svg is None:
        raise ValueError(f"figure {figure.caption or figure.alt!r} has neither a PNG nor an SVG")
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure><div tabindex="0">{_picture(figure)}</div>{caption}</figure>\n'


def _picture(figure: Figure) -> str:
    alt = escape(figure.alt or figure.caption)
    if figure.svg is not None:
        if not figure.svg.lstrip().startswith("<svg"):
            raise ValueError(f"figure {figure.caption!r}: its svg is not one <svg> element")
        return f'<div role="img" aria-label="{alt}">{figure.svg}</div>'
    assert figure.png is not None
    kind = "" if figure.dark else ' class="paper"'
    image = f'<img{kind} src="{_data(figure.png)}" alt="{alt}">'
    if figure.dark is None:
        return image
    source = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_data(figure.dark)}">'
    return f"<picture>{source}{image}</picture>"


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_LIGHT = "--page:#fff;--text:#1c1e21;--faint:#5b6167;--line:#d5d9de;--band:#f5f6f8;--link:#0b57a4;"
_DARK = "--page:#16181c;--text:#e4e6e9;--faint:#a0a7af;--line:#3a3f46;--band:#1f2227;--link:#8ab8f0;"
_STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}--old:#8a4b00;--new:#0a6640}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}--old:#f0b060;--new:#66cc99}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:66rem;background:var(--page);color:var(--text);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}}
h1{{font-size:1.75rem;line-height:1.25;margin:0 0 .5rem;overflow-wrap:anywhere}}
h2{{font-size:1.25rem;line-height:1.3;margin:2.5rem 0 .5rem;padding-top:.75rem;overflow-wrap:anywhere;
border-top:1px solid var(--line)}}
p{{margin:.5rem 0;max-width:48rem;overflow-wrap:anywhere}}
a{{color:var(--link)}}
code{{font:.9em ui-monospace,SFMono-Regular,Consolas,"Liberation Mono",monospace;background:var(--band);
padding:.1em .3em;border-radius:3px;overflow-wrap:anywhere}}
nav ol{{columns:17rem;column-gap:2.5rem;margin:1rem 0 0;padding-left:1.5rem;font-size:.95rem}}
nav li{{break-inside:avoid}}
.label{{font-size:.75rem;font-weight:600;vertical-align:.15em;padding:.1rem .45rem;border:1px solid;
border-radius:1rem;display:inline-block;line-height:1.2}}
.published{{color:var(--old)}}.corrected{{color:var(--new)}}
.wide{{overflow-x:auto;margin:1rem 0;max-width:100%}}
:focus-visible{{outline:2px solid var(--link);outline-offset:2px}}
table{{border-collapse:collapse;font-size:.9rem;line-height:1.4}}
caption{{text-align:left;color:var(--faint);padding:0 0 .35rem;min-width:16rem}}
th,td{{text-align:left;vertical-align:top;padding:.3rem .75rem;border-bottom:1px solid var(--line)}}
thead th{{color:var(--faint);font-weight:600;vertical-align:bottom}}
tbody th{{font-weight:400}}
tbody tr:nth-child(even){{background:var(--band)}}
.n,.s{{white-space:nowrap}}
.n{{text-align:right;font-variant-numeric:tabular-nums}}
figure{{margin:1.25rem 0}}
figure>div{{overflow-x:auto}}
figure img,figure svg{{display:block;max-width:100%;min-width:36rem;height:auto}}
.paper{{background:#fff;padding:.4rem;border-radius:4px}}
figcaption{{color:var(--faint);font-size:.9rem;margin-top:.35rem;max-width:48rem}}
@media (max-width:40rem){{th,td{{padding:.3rem .45rem}}}}
@media print{{
body{{max-width:none;padding:0;font-size:10pt}}
nav{{display:none}}
h2{{break-after:avoid}}
figure,tr{{break-inside:avoid}}
.wide,figure>div{{overflow:visible}}
figure img,figure svg{{min-width:0}}
table{{font-size:8pt}}
}}
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
{note}{contents}</header>
<main>
{sections}</main>
</body>
</html>
"""


def figure(paint: drawing.Paint, size: tuple[float, float], *, alt: str, caption: str = "") -> Figure:
    """For a page: `paint` on light and on dark ground. Raises PgolfError without matplotlib."""
    return Figure(drawing.png(paint, size), drawing.png(paint, size, dark=True), caption=caption, alt=alt)
