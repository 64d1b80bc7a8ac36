"""Hooks of the site's build: committed results become parts of the pages that name them.

A paragraph that is nothing but a link called "table", to a ``table.md`` or ``results.json`` under
``bench/results``, is replaced by what that file holds, and pictures from there are copied into the site.
The section of a method ends with its rows of all committed tables.  On a code host, where nothing is
replaced, the links and pictures of a page work as they are.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "bench/results/"
_TABLE = re.compile(rf"^\[table\]\((?:\.\./)+({RESULTS}[\w/.-]+)\)$", re.MULTILINE)
_SECTION = re.compile(r"^## ([\w-]+)\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
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
    markdown = _TABLE.sub(lambda match: tables(root / match[1]), markdown)
    if page.file.src_uri == "methods.md":
        rows = measured(root / RESULTS / "cpu" / "tables")
        markdown = _SECTION.sub(lambda match: match[0] + rows.get(match[1], ""), markdown)
    return _PICTURE.sub(
        lambda match: f"]({posixpath.relpath(f'measured/{match[1]}', here or '.')})", markdown
    )


def tables(file: Path) -> str:
    """The tables in a committed file: those of ``reproduce`` as they are, their captions in italics; of a
    ``demo`` one row per method.
    """
    text = file.read_text()
    if file.suffix == ".md":
        return re.sub(r"^(?=[^|\n])(.+)$", r"*\1*", text, flags=re.MULTILINE)
    methods = json.loads(text)["methods"]
    columns = {"acc": "ACC (%)", "acc_unknown": "task unknown (%)", "bwt": "BWT", "seconds": "seconds"}
    kept = {key: title for key, title in columns.items() if all(key in rows for rows in methods.values())}
    lines = [f"| method | {' | '.join(kept.values())} |", "|---" + "|---:" * len(kept) + "|"]
    for method, measured in methods.items():
        cells = [f"{value:.1f}" if (value := measured[key][0]) is not None else "–" for key in kept]
        lines.append(f"| {' | '.join([method, *cells])} |".replace(" -", " −"))
    return "\n".join(lines)


def measured(folder: Path) -> dict[str, str]:
    """Method → its row of every ``table.json`` below the folder, as one table.

    A row is a method's where it is labelled with its name: those of sweeps and ablations are not.
    """
    lines: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*/table.json")):
        for table in json.loads(file.read_text())["tables"]:
            for row in (row for row in table["rows"] if row["label"] == row["method"]):
                for suite, cell in row["cells"].items():
                    spreads = [cell["acc"], cell.get("acc_unknown", {}), cell["bwt"]]
                    seconds = {"mean": cell["seconds"]}
                    numbers = " | ".join(map(_number, [*spreads, seconds]))
                    where = f"{file.parent.name} | {suite} | {table['protocol']}"
                    lines.setdefault(row["label"], []).append(f"| {where} | {numbers} |")
    head = "| table | suite | protocol | ACC (%) | task unknown (%) | BWT (points) | seconds |"
    about = "*Measured*, as in the [tables](results.md):"
    rule = "|---|---|---|---:|---:|---:|---:|"
    return {name: "\n".join([about, "", head, rule, *rows, "", ""]) for name, rows in lines.items()}


def _number(spread: dict[str, float | None]) -> str:
    """Mean ± standard deviation, as far as they are there."""
    known = [f"{value:.1f}" for key in ("mean", "std") if (value := spread.get(key)) is not None]
    return " ± ".join(known).replace("-", "−") or "–"
