"""Every example runs, and says what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml
from few_samples import draw_few

from mingle import methods
from mingle.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

#: script → what it has to print, as a pattern
SAYS = {
    "1_one_layer.py": r"2 experts, 65 of 2978 .*bias of the gate (0\.9|1\.0)\d\nbase layer again: True",
    "2_merge_two_models.py": r"greek-inverted: .*ACC 9\d\.\d %, BWT [+-]\d",
    "3_resume_and_extend.py": r"the same bits as without a stop: True",
    "4_adapters_in_one_model.py": r"\[2, 2, 2, 2\].*first adapter again: True\nthe base model again: True",
    "5_your_own_method.py": r"average .*fading \{'keep': 0\.5\}: ACC \d.*fading \{'keep': 0\.8\}: ACC \d",
    "7_your_own_task_type.py": r"average: ACC \d+ %\nmingle: ACC [678]\d %",
}


def test_every_example_is_tested():
    numbered = {path.name for path in EXAMPLES.iterdir() if re.match(r"\d", path.name)}
    assert numbered == {*SAYS, "6_merge.yaml"}


@pytest.mark.parametrize(
    # those that merge whole models have tutorials, whose blocks run as tests too and make the like
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name[0] in "2357")) for name in SAYS],
)
def test_an_example_runs_as_a_script(name, capsys, monkeypatch):
    if "adapters" in name:
        pytest.importorskip("peft", reason="the example reads LoRA adapters that PEFT writes")
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))  # one example adds a method
    if "resume" in name:  # which says nothing of how accurate a merge is
        draw_few(monkeypatch)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(SAYS[name], capsys.readouterr().out, re.DOTALL)


@pytest.mark.slow
def test_the_yaml_file_is_checked_and_merges(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = EXAMPLES / "6_merge.yaml"
    assert main(["check", str(file)]) == 0
    assert main(["merge", str(file), "--out", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert "all 3 experts fit the base" in out and "ACC 9" in out
    names = [expert["name"] for expert in yaml.safe_load(file.read_text())["experts"]]
    assert all(name in out for name in names)


def test_examples_are_short():
    for path in EXAMPLES.glob("[0-9]*"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, path.name
        assert max(map(len, lines)) <= 110, path.name
