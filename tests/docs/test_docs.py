"""README and pages: what they show runs, what they name exists, and they say it in plain English."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from few_samples import every_tenth

import mingle
from mingle import cli, methods, suites, tasks
from mingle.cli import main
from mingle.runs import config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
#: pages whose blocks are run; those of the others only illustrate
TUTORIALS = [README, *sorted((DOCS / "tutorials").glob("*.md"))]
RESULTS = ROOT / "bench" / "results" / "cpu"
COMMANDS = tuple(cli.parsers()[1].choices)
#: described once, for all commands
COMMON = ("--help", "--offline", "--json", "--quiet")

#: pages whose blocks take more than a few seconds
SLOW = ("README.md", "reproduce.md", "adapters-elsewhere.md", "many-adapters.md", "several-gpus.md")
#: pages whose blocks measure much and say nothing of how accurate it is
ROUGH = ("reproduce.md", "your-own-method.md")
#: page → what its blocks have to print, as a pattern
SAYS = {
    "README.md": r"^[67]\d\.\d+$",
    "merge-two-clips.md": r"(?s)ACC (9|100).*'stripes': (9|100).*'colours': (9|100).*'corners': (9|100)",
    "life-after-the-merge.md": r"(?s)nothing of it stays.*would be freed.*\['spots', 'waves'\]",
    "adapters-elsewhere.md": r"(?s)merged: ACC (\d+\.\d).*9\d\.\d % with its adapter.*% folded\nback: ACC \1",
    "many-adapters.md": r"(?s)exact answers: (9|100).*one batch: \[3, 4, 5, 6, 7, 8\]\naverage: [1-8]\d %",
    "your-own-method.md": r"did you mean 'keep'\?$",
    "your-own-task-type.md": r"average: ACC [67]\d %\nmingle: ACC (8[5-9]|9\d) %",
    "several-gpus.md": r"(?s)merged model: shared.*the same bits: True",
    "reproduce.md": r"routed, 5 per class",
    "try-a-merged-model.md": r"task='cyrillic-checker', label='cyrillic capital letter a'",
}
#: how a dictionary of phrases would translate, and nobody would write
NOT_ENGLISH = ("so many", " is no ", "to be had", "of which")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its title, its text and where it begins."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    pattern = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    for match in pattern.finditer(text):
        yield Block(match[1], match[2] or "", match[3], text[: match.start()].count("\n") + 2)


def commands(block: Block) -> list[list[str]]:
    """The arguments of every ``python -m mingle`` in a block."""
    return [line[line.index("mingle") + 1 :] for line in lines(block) if line[0] in ("python", "torchrun")]


def lines(block: Block) -> list[list[str]]:
    """The words of every line that calls mingle, of lines that go on after a backslash put together."""
    text = block.text.replace("\\\n", " ")
    found = (line.removeprefix("$ ").partition("  #")[0] for line in text.splitlines())
    return [shlex.split(line) for line in found if re.match(r"(python|torchrun .*) -m mingle ", line)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (page.name in SLOW)) for page in TUTORIALS],
)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))  # one page adds a method,
    monkeypatch.setattr(tasks, "_registered", {})  # and one a task type
    if page.name in ROUGH:
        every_tenth(monkeypatch)
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # errors name the page's own lines
            exec(compile(source, str(page), "exec", dont_inherit=True), namespace)
        elif block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "console":
            for line, arguments in zip(lines(block), commands(block), strict=True):
                if line[0] == "torchrun":
                    run = [sys.executable, "-m", "torch.distributed.run", *line[1:]]
                    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
                    assert done.returncode == 0, done.stdout + done.stderr
                    print(done.stdout)
                else:
                    assert main(arguments) == 0, capsys.readouterr().out
        else:
            continue
        ran += 1
    assert ran
    assert re.search(SAYS.get(page.name, ""), capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_shown_exists_with_its_options(page, capsys):
    for block in blocks(page):
        for command, *arguments in commands(block) if block.language in ("bash", "console") else ():
            assert command in COMMANDS
            if command == "bench":  # whose arguments go to the benchmark's own parser
                continue
            known = help_of(command, capsys)
            for option in (argument for argument in arguments if argument.startswith("--")):
                assert option in known, f"{page.name}:{block.line}: {command} {option}"


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert len(README.read_text().split()) <= 1300
    tables_and_links = ("|", "[", "<", "!")
    assert [line for line in lines if len(line) > 110 and not line.startswith(tables_and_links)] == []


def test_the_readme_s_table_is_the_measured_one():
    [strict] = [t for t in measured("texts8")["tables"] if t["protocol"] == "strict"]
    rows = {row["label"]: row["cells"]["texts8"] for row in strict["rows"]}
    number = r"([−+]?[\d.]+|–)"
    line = rf"^\| `([\w-]+)` .*\| ([\d.]+) ± ([\d.]+) \| {number} \| {number} \|$"
    shown = re.findall(line, README.read_text(), re.MULTILINE)
    expected = "individual routed tsv-m mingle-routed mingle opcm task-arithmetic"
    assert [row[0] for row in shown] == expected.split()
    for label, acc, spread, bwt, unknown in shown:
        cell = rows[label]
        assert (acc, spread) == (f"{cell['acc']['mean']:.1f}", f"{cell['acc']['std']:.1f}")
        assert float(bwt.replace("−", "-")) == pytest.approx(cell["bwt"]["mean"], abs=0.05)
        found = cell["acc_unknown"]["mean"]
        assert unknown == ("–" if found is None else f"{found:.1f}")
    plain = [label for label in rows if leaves_plain_weights(methods.METHODS[label])]
    assert max(plain, key=lambda label: rows[label]["acc"]["mean"]) == "tsv-m"


def measured(table: str) -> dict:
    return json.loads((RESULTS / "tables" / table / "table.json").read_text())


def leaves_plain_weights(method: type[methods.MergeMethod]) -> bool:
    from mingle.methods.base import PlainMethod

    return issubclass(method, PlainMethod)


def test_the_page_on_interference_shows_what_was_measured():
    found = json.loads((RESULTS / "glyphs-interference.json").read_text())["suites"]
    page = (DOCS / "explanations" / "interference.md").read_text()
    rows = {
        "its own expert alone, with gate 1": "its expert, gate 1",
        "the same with its learnt gates": "its expert",
        "those and the older experts, as right after its merge": "it and older",
        "all experts": "all",
    }
    for label, key in rows.items():
        numbers = [f"{found[suite]['mean']['accuracy'][key]:.1f}" for suite in ("glyphs8", "glyphs20")]
        assert f"| {label} | {numbers[0]} | {numbers[1]} |" in page


def test_the_page_on_interference_shows_how_far_routing_gets():
    found = json.loads((RESULTS / "routing-limit.json").read_text())["suites"]
    page = (DOCS / "explanations" / "interference.md").read_text()
    for rows in zip(
        *(found[suite] for suite in ("texts8", "glyphs8", "glyphs20", "glyphs8-shared")), strict=True
    ):
        numbers = " | ".join(f"{row['right']:.1f}" for row in rows)
        assert f"| {rows[0]['samples per class']} | {numbers} |" in page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in ("".join(pair) for pair in targets):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both GitHub and the site make them for plain headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}\n" in navigation


def test_every_public_name_is_in_the_reference():
    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    public = {
        f"mingle.{each}" for each in mingle.__all__ if each not in ("__version__", "functional", "linalg")
    }
    public |= {
        f"mingle.linalg.{each}" for each in mingle.linalg.__all__ if callable(getattr(mingle.linalg, each))
    }
    for module in (mingle.functional, suites, tasks, methods):
        public |= {
            f"{module.__name__}.{each}"
            for each, member in inspect.getmembers(
                module, lambda one: inspect.isfunction(one) or inspect.isclass(one)
            )
            if member.__module__ == module.__name__ and not each.startswith("_")
        }
    public |= {"mingle.tasks.TaskType", "mingle.tasks.TaskData", "mingle.methods.published"}
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    assert public <= shown, public - shown


def test_every_command_and_option_is_in_the_reference(capsys):
    page = (DOCS / "reference" / "command-line.md").read_text()
    for command in COMMANDS:
        assert f"## {command}\n" in page
        section = page.partition(f"## {command}\n")[2].partition("\n## ")[0]
        for option in () if command == "bench" else re.findall(r"--[a-z-]+", help_of(command, capsys)):
            assert option in COMMON or f"`{option}" in section, f"{command} {option}"


def test_every_yaml_key_is_in_the_reference():
    page = (DOCS / "reference" / "yaml.md").read_text()
    sections = [
        each for _, each in inspect.getmembers(config, is_dataclass) if each.__module__ == config.__name__
    ]
    for key in (field.name for section in sections for field in fields(section)):
        assert f"`{key}`" in page, key


def test_every_method_and_option_has_its_section():
    page = (DOCS / "methods.md").read_text()
    for label, method in methods.METHODS.items():
        assert f"## {label}\n" in page
        section = page.partition(f"## {label}\n")[2].partition("\n## ")[0]
        if method not in (methods.PreTrained, methods.Individual):
            assert "*Take it* " in section and "*Costs* " in section, label
        inherited = dict.fromkeys(("mingle-light", "mingle-routed", "mingle-seq"), "mingle").get(label)
        known = {field.name for field in fields(methods.METHODS[inherited].Options)} if inherited else set()
        for option in (field.name for field in fields(method.Options)):
            assert option in known or f"`{option}`" in section, f"{label}: {option}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_in_plain_english(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        found = [phrase for phrase in NOT_ENGLISH if phrase in line.lower()]
        assert not found, f"{page.name}:{number}: {found}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mingle.__version__
    assert [reference["url"] for reference in citation["references"]] == ["https://arxiv.org/abs/2505.11883"]


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_workflows_and_forms_are_yaml(file):
    content = yaml.safe_load(file.read_text())
    assert content["name"] and (content.get("jobs") or content.get("body"))


def test_the_site_builds(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; the extra `docs` brings it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    results = (tmp_path / "results" / "index.html").read_text()
    assert "54.7 ± 3.6" in results  # of the committed table, which the page only names
    page = (tmp_path / "methods" / "index.html").read_text()
    for table in measured("glyphs8")["tables"]:
        for row in table["rows"]:
            section = page.partition(f'<h2 id="{row["label"]}">')[2].partition("<h2 ")[0]
            acc = row["cells"]["glyphs8"]["acc"]
            assert f">{acc['mean']:.1f} ± {acc['std']:.1f}<" in section, row["label"]
