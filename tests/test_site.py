"""The documentation as a reader's browser gets it: built once, with nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from close_engine.diagram import svg
from tests.prose import ROOT, blocks

#: What a browser loads by itself when it shows a page; a link that a reader may click is not among it.
LOADED = {"src", "srcset", "data", "poster", "xlink:href"}
LINKS_LOADED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload", "manifest", "dns-prefetch"}


class Page(HTMLParser):
    """What a page loads, which classes it has, and which attributes name its parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.classes: set[str] = set()
        self.names: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loads += [value for name, value in values.items() if name in LOADED]
        if tag == "link" and LINKS_LOADED & set(values.get("rel", "").split()):
            self.loads.append(values["href"])
        self.loads += re.findall(r"url\(['\"]?([^#'\")]+)", values.get("style", ""))
        self.classes |= set(values.get("class", "").split())
        self.names.append(f"{tag} {values.get('data-md-component', '')}".strip())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    return place


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}

    assert {path.stem for path in pages} == {path.stem for path in (ROOT / "docs").glob("*.md")} | {"404"}
    loads = [(path.name, address) for path, page in pages.items() for address in page.loads]
    assert any(address.endswith(".js") for _, address in loads)
    assert [load for load in loads if re.match(r"(https?:)?//", load[1])] == []
    styles = [(path.name, found) for path in site.rglob("*.css") for found in imported(path.read_text())]
    assert [style for style in styles if re.match(r"(https?:)?//", style[1])] == []
    # The theme would load Mermaid for a diagram of that class, and stars from GitHub for a repository.
    assert [path for path, page in pages.items() if "mermaid" in page.classes or "a source" in page.names] == []


def imported(style: str) -> list[str]:
    """Return what a style sheet loads."""
    return re.findall(r"url\(['\"]?([^'\")]+)", style) + re.findall(r"@import\s+['\"]([^'\"]+)", style)


def test_code_is_highlighted_and_the_diagram_stands_in_the_guide(site: Path) -> None:
    guide = (site / "guide.html").read_text()

    python = [block for block in blocks(ROOT / "docs/guide.md") if block.language == "python"]
    assert guide.count('<div class="language-python highlight">') == len(python)
    assert '<span class="kn">import</span>' in guide
    assert svg() in guide


def test_each_cell_of_a_table_knows_its_columns_name_for_a_phone(site: Path) -> None:
    guide = (site / "guide.html").read_text()

    assert '<td data-column="What to do">decide again</td>' in guide
    assert re.findall(r"<td(?! data-column)", guide) == []


def test_the_picture_in_the_docs_is_the_machines() -> None:
    assert (ROOT / "docs/stages.svg").read_text() == svg() + "\n", "run close-engine graph --svg > docs/stages.svg"
