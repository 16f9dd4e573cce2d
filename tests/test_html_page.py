"""Pages: whole, escaped, self-contained."""

import base64

import pytest
from pages import Page, browser, check_page, visit

from pgolf_fast.lab.report.html_page import Figure, Section, Table, page

EVIL = "<script>alert('1')</script> & \"quotes\" `</code>`"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def table(*rows, header=("what", "n")):
    return Table(header, rows)


def alignments(rows):
    """Whether each column of the table is aligned as numbers are."""
    found = Page(page("t", [Section("s", tables=(table(*rows, header=("c",) * len(rows[0])),))]))
    return [a["class"] == "n" for t, a in found.tags if t == "th" and a["scope"] == "col"]


def test_whatever_is_passed_is_text():
    everywhere = Section(
        EVIL,
        EVIL,
        (Table((EVIL, EVIL), ((EVIL, EVIL),), EVIL),),
        (Figure(png=PNG, caption=EVIL, alt=EVIL), Figure(svg="<svg></svg>", caption=EVIL, alt=EVIL)),
    )
    found = check_page(page(EVIL, [everywhere] * 3, EVIL))
    shown = EVIL.replace("`", "")  # the mark of code
    assert found.headings == [EVIL] * 3
    assert found.cells == [EVIL, EVIL, shown, shown] * 3
    assert found.paragraphs == [shown] * 4


def test_light_and_dark_pictures():
    dark = b"another"
    both, light, drawn = (
        page("t", [Section("s", figures=(figure,))])
        for figure in (
            Figure(png=PNG, dark=dark, alt="a"),
            Figure(png=PNG, alt="a"),
            Figure(svg='<svg viewBox="0 0 1 1"><path stroke="currentColor"/></svg>', alt="a"),
        )
    )
    for text in (both, light, drawn):
        check_page(text)
    data = f"data:image/png;base64,{base64.b64encode(dark).decode()}"
    assert f'media="screen and (prefers-color-scheme: dark)" srcset="{data}"' in both
    assert 'class="paper"' in light  # a white ground of its own, on a dark page
    assert 'class="paper"' not in both
    assert '<div role="img" aria-label="a"><svg' in drawn


def test_numbers_are_aligned_and_words_are_not():
    rows = [
        ("a", "1,234", "1.5 ms", "-", "1 of 2", "+0.01", "", "3 %", "nan", "1.0 to 2.0", "C1"),
        ("b", "-", "-2e-05", "-", "3", "±0.02", "7", "~4", "2", "3", "2"),
    ]
    assert alignments(rows) == [False, True, True, False, False, True, True, True, True, False, False]


def test_a_row_has_a_name_unless_it_starts_with_a_number():
    found = Page(page("t", [Section("s", tables=(table(("a", "1")), table(("5", "1"))))]))
    scopes = [a.get("scope") for tag, a in found.tags if tag in ("th", "td")]
    assert scopes == ["col", "col", "row", None, "col", "col", None, None]


def test_labels_and_contents():
    sections = [Section("one", label="published"), Section("two", label="corrected"), Section("three")]
    found = check_page(page("t", sections))
    assert found.headings == ["one published", "two corrected", "three"]
    assert [a["href"] for t, a in found.tags if t == "a"] == ["#s1", "#s2", "#s3"]
    assert "<nav" not in page("t", sections[:2])


def test_text_in_paragraphs():
    found = check_page(page("t", [Section("s", "one\ntwo\n\n\nthree `four`\n")], "note"))
    assert found.paragraphs == ["note", "one\ntwo", "three four"]
    assert "<code>four</code>" in found.text


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Section("s", tables=(table(("a", "1"), ("b",)),)), "does not fit the header"),
        (Section("s", figures=(Figure(alt="picture"),)), "neither a PNG nor an SVG"),
        (Section("s", figures=(Figure(svg="<p>"),)), "not one <svg>"),
    ],
)
def test_what_cannot_be_shown_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        page("t", [section])


def test_empty_tables_and_pages():
    check_page(page("t", []))
    check_page(page("t", [Section("s", tables=(table(),))]))


def test_a_checker_that_sees_nothing_would_be_no_use():
    whole = page("t", [Section("s", figures=(Figure(png=PNG, alt="a"),))])
    for before, after in (
        ("data:image/png", "https://example.org/image"),
        ('alt="a"', 'alt=""'),
        ("</figure>", ""),
        ("<main>", "<main><script>1</script>"),
        ("body{", "body{background:url(x);"),
        ('id="s1h"', 'id="s1"'),
    ):
        assert before in whole
        with pytest.raises(AssertionError):
            check_page(whole.replace(before, after))


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_a_browser_finds_nothing_to_complain_about(tmp_path):
    section = Section("s", "text", (table(("a", "1")),), (Figure(png=PNG, dark=PNG, alt="a"),))
    asked, console, seen = visit(browser(), page("title", [section] * 3), tmp_path)
    assert asked == ["/"]
    assert console == []
    assert seen.count("<h2") == 3
    # and would say so: the page forbids what it would have to load
    loading = page("title", [section]).replace("data:image/png", "/image?")
    asked, console, _ = visit(browser(), loading, tmp_path / "again")
    assert asked == ["/"]
    assert console
