"""A parser and checks for HTML pages: well-formed, self-contained and accessible."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VOID = {"meta", "link", "img", "source", "br", "hr"}


@dataclass
class Part:
    """One `<section>` as a browser shows it."""

    text: str = ""
    tables: list[list[list[str]]] = field(default_factory=list)
    """Cells of each table by row, with the header."""
    pictures: int = 0


class Page(HTMLParser):
    """A parsed page. Raises AssertionError for tags that do not match."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.titles: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.paragraphs: list[str] = []
        self.code: list[str] = []
        self._texts = {
            **{"title": self.titles, "h2": self.headings, "p": self.paragraphs, "code": self.code},
            **{"td": self.cells, "th": self.cells},
        }
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._parts: list[Part] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    @property
    def sections(self) -> dict[str, Part]:
        """The sections by heading."""
        return dict(zip(self.headings, self._parts, strict=True))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in self._texts:
            self._texts[tag].append("")
        if tag == "section":
            self._parts.append(Part())
        if self._parts:
            part = self._parts[-1]
            part.text += "\n" if tag in ("p", "tr") else " " if tag in ("td", "th") else ""
            part.pictures += tag == "img"
            if tag == "table":
                part.tables.append([])
            elif tag == "tr":
                part.tables[-1].append([])
            elif tag in ("td", "th"):
                part.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        for tag in self._texts.keys() & set(self._open):
            self._texts[tag][-1] += data
        if "section" in self._open:
            self._parts[-1].text += data
            if {"td", "th"} & set(self._open):
                self._parts[-1].tables[-1][-1][-1] += data


def check_page(source: str) -> Page:
    """Check that a page loads nothing, that images have text, and that anchors and ids are sound."""
    text = source
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
                assert not value.startswith("#") or value[1:] in ids
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme:dark" in style[1]
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    return page


def browser() -> str | None:
    """Return the Chromium of this machine, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


def visit(program: str, text: str, profile: Path) -> tuple[list[str], list[str], str]:
    """Open a page in a browser that resolves no names: return the requests, the console lines and the DOM."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"--user-data-dir={profile}",
                "--enable-logging=stderr",
                "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    finally:
        server.shutdown()
        server.server_close()
    return asked, [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout
