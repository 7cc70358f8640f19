"""The documentation site is built, leads everywhere, and needs no network."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_docs import DOCUMENTED

ROOT = Path(__file__).resolve().parent.parent
#: Attributes that make a browser load something.
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src")}


class Page(HTMLParser):
    """The links, identifiers and paragraphs of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.ids: set[str] = set()
        self.paragraphs: list[str] = []
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.update(value for name, value in values.items() if name in ("id", "name"))
        self.links += [(tag, name, values[name]) for name in ("href", "src") if name in values]
        if tag == "p":
            self.paragraphs.append("")
        if tag in ("p", "code"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside == ["p"]:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    files = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(files) > 30
    return {path: Page(path.read_text(encoding="utf-8")) for path in files}


def test_links_and_anchors_exist(pages: dict[Path, Page]):
    missing = []
    for path, page in pages.items():
        for _, _, link in page.links:
            url = urlsplit(link)
            if url.scheme or not (url.path or url.fragment):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchor = unquote(url.fragment)
            known = pages[target].ids if target in pages else set()
            # `__…` are states of the theme's own switches.
            if not target.exists() or (anchor and anchor not in known and anchor[:2] != "__"):
                missing.append(f"{path.name}: {link}")
    assert not missing, "\n".join(missing)


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page], site: Path):
    loaded = {
        link
        for page in pages.values()
        for tag, name, link in page.links
        if (tag, name) in LOADED and re.match(r"([a-z]+:)?//", link)
    }
    assert not loaded
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*", styles)


def test_markdown_is_rendered(pages: dict[Path, Page]):
    """A list needs an empty line before it, and so does a table."""
    raw = re.compile(r"\n(?:[-*] |\d\. |\|)|\]\(|\*\*|```|\{options\}")
    left = [
        f"{path.name}: {text.strip()[:80]}"
        for path, page in pages.items()
        for text in page.paragraphs
        if raw.search(text)
    ]
    assert not left, "\n".join(left)


def test_every_public_name_is_in_the_reference(pages: dict[Path, Page]):
    names = {
        f"keras_alds.{name}" for name, thing in DOCUMENTED.items() if not inspect.ismodule(thing)
    }
    # Named there, and described under its other name.
    names -= {f"keras_alds.Factorized{kind}" for kind in ("Conv1D", "Conv2D", "Dense")}
    described = {
        name for path, page in pages.items() if path.parent.name == "reference" for name in page.ids
    }
    missing = sorted(names - described)
    assert not missing


def test_search_works_without_a_server(site: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000")
    address = f"{(site / 'index.html').as_uri()}?q=min_max"
    command = [browser, *options, "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    results = re.findall(r'href="[^"]*/([^"/?]*)\?[^"]*" class="md-search-result__link"', shown)
    assert "paper.html" in results
