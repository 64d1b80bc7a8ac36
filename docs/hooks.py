"""Hooks of the site's build: committed results become parts of the pages that name them.

A paragraph that is nothing but a link to a ``table.md`` under ``bench/results`` is replaced by the tables in
that file, and pictures from there are copied into the site.  The pages themselves read as well on a code host.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "bench/results/"
_TABLE = re.compile(rf"^\[table\]\((?:\.\./)+({RESULTS}[\w/.-]+\.md)\)$", re.MULTILINE)
_PICTURE = re.compile(rf"\]\((?:\.\./)+{RESULTS}([\w/.-]+\.png)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures among the results, as ``measured/…``."""
    root = Path(config.config_file_path).parent
    for picture in sorted((root / RESULTS).rglob("*.png")):
        address = f"measured/{picture.relative_to(root / RESULTS).as_posix()}"
        files.append(File.generated(config, address, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put committed tables into the page, and let it show the pictures' copies."""
    root = Path(config.config_file_path).parent
    here = posixpath.dirname(page.file.src_uri)
    markdown = _TABLE.sub(lambda match: captioned((root / match[1]).read_text()), markdown)
    return _PICTURE.sub(
        lambda match: f"]({posixpath.relpath(f'measured/{match[1]}', here or '.')})", markdown
    )


def captioned(tables: str) -> str:
    """A committed file's tables, with the line above each in italics."""
    return re.sub(r"^(?=[^|\n])(.+)$", r"*\1*", tables, flags=re.MULTILINE)
