"""What MkDocs runs when it builds the site: each cell of a table learns its column's name.

style.css shows a table's rows below each other on a phone, and then the name stands before the cell.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig


class NameCells(Treeprocessor):
    def run(self, root: Element) -> None:
        for table in root.iter("table"):
            names = ["".join(name.itertext()) for name in table.iter("th")]
            for row in table.iterfind("tbody/tr"):
                for name, cell in zip(names, row.iterfind("td"), strict=False):
                    cell.set("data-column", name)


class NamedCells(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name is Markdown's
        # Before the inline texts are parsed, while a name is still plain text.
        md.treeprocessors.register(NameCells(md), "named_cells", 25)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extension to those of mkdocs.yml."""
    config.markdown_extensions.append(NamedCells())  # type: ignore[arg-type]
    return config
