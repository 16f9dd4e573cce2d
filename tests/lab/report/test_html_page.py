"""HTML pages: well-formed, escaped, self-contained."""

import base64

import pytest
from pages import Page, browser, check_page, visit

from pgolf_fast.console import Table
from pgolf_fast.lab.report.html_page import Figure, Section, portable, render, table_html

EVIL = "<script>alert('1')</script> & \"quotes\" `</code>`"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def page(title, sections):
    return render("analysis", title, sections)


def test_all_text_is_escaped():
    everywhere = Section(
        EVIL, EVIL, (Table((EVIL, EVIL), ((EVIL, EVIL),), EVIL),), (Figure(png=PNG, caption=EVIL, alt=EVIL),)
    )
    parsed = check_page(page(EVIL, [everywhere] * 3))
    shown = EVIL.replace("`", "")  # backticks mark code
    assert parsed.headings == [EVIL] * 3
    assert parsed.cells == [shown] * 4 * 3
    assert parsed.paragraphs[1:] == [shown] * 3
    assert {a["alt"] for tag, a in parsed.tags if tag == "img"} == {EVIL}
    assert parsed.titles == [EVIL]


def test_light_and_dark_pictures():
    dark = b"another"
    both, light = (
        check_page(page("t", [Section("s", figures=(figure,))]))
        for figure in (Figure(png=PNG, dark=dark, alt="a"), Figure(png=PNG, alt="a"))
    )
    (source,) = [a for tag, a in both.tags if tag == "source"]
    assert source["media"] == "screen and (prefers-color-scheme: dark)"
    assert source["srcset"] == f"data:image/png;base64,{base64.b64encode(dark).decode()}"
    assert [tag for tag, _ in light.tags if tag in ("picture", "source", "img")] == ["img"]


def test_a_row_has_a_name_unless_it_starts_with_a_number():
    header = ("what", "n")
    tables = (Table(header, [("a", "1")]), Table(header, [("5", "1")]))
    parsed = Page(page("t", [Section("s", tables=tables)]))
    scopes = [a.get("scope") for tag, a in parsed.tags if tag in ("th", "td")]
    assert scopes == ["col", "col", "row", None, "col", "col", None, None]
    assert parsed.sections["s"].tables == [[["what", "n"], ["a", "1"]], [["what", "n"], ["5", "1"]]]


def test_labels_and_contents():
    sections = [Section("one", label="published"), Section("two", label="corrected"), Section("three")]
    parsed = check_page(page("t", sections))
    assert parsed.headings == ["one published", "two corrected", "three"]
    assert [a["href"] for t, a in parsed.tags if t == "a"] == ["#s1", "#s2", "#s3"]
    assert "nav" not in {tag for tag, _ in Page(page("t", sections[:2])).tags}


def test_text_is_split_into_paragraphs():
    parsed = check_page(page("t", [Section("s", "one\ntwo\n\n\nthree `four`\n")]))
    assert parsed.paragraphs[1:] == ["one\ntwo", "three four"]
    assert parsed.code[-1] == "four"


def test_empty_tables_and_pages():
    check_page(page("t", []))
    check_page(page("t", [Section("s", tables=(Table(("what", "n"), []),))]))


def test_paths_lose_their_folders():
    text = "shards in /home/me/data belong to '/srv/x/tokenizer.model' (see a/b and 1/31)"
    assert portable(text) == "shards in data belong to 'tokenizer.model' (see a/b and 1/31)"


def test_the_checker_detects_each_violation():
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
def test_a_browser_reports_no_errors(tmp_path):
    section = Section("s", "text", (Table(None, [("a", "1")]),), (Figure(png=PNG, dark=PNG, alt="a"),))
    asked, console, seen = visit(browser(), page("title", [section] * 3), tmp_path)
    assert asked == ["/"]
    assert console == []
    assert seen.count("<h2") == 3
    # A page that had to load something would be blocked by its own policy, and the console would say so
    loading = page("title", [section]).replace("data:image/png", "/image?")
    asked, console, _ = visit(browser(), loading, tmp_path / "again")
    assert asked == ["/"]
    assert console


def test_table_without_rows():
    assert table_html(Table(None, [])) == "<table><tbody></tbody></table>"
