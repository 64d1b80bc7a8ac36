"""The YAML file: every mistake is found before any heavy work, and named."""

from __future__ import annotations

import pytest

from mingle.methods import DEFAULT
from mingle.options import OptionError
from mingle.runs import config, settings
from mingle.runs.orders import shuffled

MINIMAL = "base: base\nexperts: [{name: a, model: m}]\n"


def parsed(tmp_path, text):
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    return config.load(path)


def resolved(merge):
    return settings.resolve(
        merge.method,
        task_type="clip",
        tasks=8,
        protocol=merge.adapt.protocol,
        suite=None,
        given=merge.method_options(),
    )


def test_defaults_and_protocol(tmp_path):
    minimal = parsed(tmp_path, MINIMAL)
    assert minimal.method == DEFAULT
    assert minimal.method_options() == {}
    mingle = MINIMAL + "method: mingle\n"
    assert resolved(parsed(tmp_path, mingle))["reduce"] == "sample"
    official = parsed(tmp_path, mingle + "adapt: {protocol: official}\n")
    assert resolved(official)["reduce"] == "batch"
    average = parsed(tmp_path, MINIMAL + "method: average\n")
    assert average.method_options() == resolved(average) == {}


def test_every_key_arrives(tmp_path):
    full = parsed(
        tmp_path,
        """
        base: base
        method: mingle
        experts: [{name: a, model: org/m, revision: abc}, {name: b, model: m}]
        order: {shuffle: true, seeds: [42, 43]}
        layers: [q_proj]
        rank: 8
        gate: {k: 2, gamma: 2, beta: 0.5, reduce: token}
        adapt: {steps: 7, lr: 1e-3, batch_size: 4, samples_per_class: 3, temperature: 1, protocol: official}
        eval: {suite: glyphs8, every_step: false, batch_size: 32}
        options: {constraint: hard}
        """,
    )
    assert full.experts[0] == config.Expert("a", "org/m", "abc")
    assert full.order == config.Order(True, (42, 43))
    assert full.eval == config.Eval("glyphs8", False, 32)
    assert full.adapt.samples_per_class == 3
    assert full.method_options() == dict(
        rank=8,
        layers=("q_proj",),
        k=2,
        gamma=2.0,
        beta=0.5,
        reduce="token",
        steps=7,
        lr=1e-3,
        batch_size=4,
        temperature=1.0,
        constraint="hard",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 3\n", "unknown option 'rnak'; did you mean 'rank'"),
        ("gate: {gama: 1}\n", "gate: unknown option 'gama'; did you mean 'gamma'"),
        ("adapt: {protocol: strikt}\n", "protocol: 'strikt'; did you mean 'strict'"),
        ("rank: lots\n", "rank: 'lots'"),
        ("rank: 0\n", "rank=0"),
        ("order: [42]\n", r"order: \[42\] is not a mapping"),
        ("method: mingel\n", "unknown method 'mingel'; did you mean 'mingle'"),
        ("method: average\nrank: 4\n", "method 'average': unknown option 'rank'"),
        ("options: {rnak: 4}\n", "did you mean 'rank'?.*; the file names no method, which means 'routed'$"),
        (
            "method: mingle\noptions: {constrain: hard}\n",
            "unknown option 'constrain'; did you mean 'constraint'",
        ),
        ("method: mingle\ngate: {reduce: batch}\n", "strict protocol"),
        ("eval: {batch_size: 0}\n", "batch_size"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(OptionError, match=message) as caught:
        parsed(tmp_path, MINIMAL + text)
    assert "merge.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping"),
        ("base: x\n", "'experts' is missing"),
        ("experts: [{name: a, model: m}]\n", "'base' is missing"),
        ("base: x\nexperts: []\n", "expected a list"),
        ("base: x\nexperts: [a]\n", r"experts\[0\]: 'a' is not a mapping"),
        ("base: x\nexperts: [{name: a}]\n", r"experts\[0\]: 'model' is missing"),
        ("base: x\nexperts: [{name: a, model: m}, {name: a, model: n}]\n", "two of them are called 'a'"),
        (
            "base: x\nexperts: [{name: a, model: m}, {name: '', model: n}]\n",
            r"experts\[1\]: name: a task needs",
        ),
        (
            "base: x\nexperts: [{name: a, model: m}]\norder: {seeds: []}\n",
            r"order: seeds=\[\]: expected at least",
        ),
        ("base: x\nexperts: [{name: a, model: m}]\norder: {seeds: [1, 1]}\n", r"order: seeds=\[1, 1\]"),
        ("base: [\n", "merge.yaml"),
        ("base: x\nbase: y\nexperts: [{name: a, model: m}]\n", "'base' appears twice"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, message):
    with pytest.raises(OptionError, match=message):
        parsed(tmp_path, text)
    with pytest.raises(OptionError, match="absent.yaml"):
        config.load(tmp_path / "absent.yaml")


def test_task_orders_are_the_published_ones():
    """Seed 42 on the suite's own order, for 8, 14 and 20 tasks."""
    expected = {
        8: "04 05 07 08 03 06 01 02",
        14: "09 13 08 07 14 12 06 03 10 04 05 01 02 11",
        20: "20 06 15 05 10 14 16 19 07 13 18 11 02 12 03 17 08 09 01 04",
    }
    for count, order in expected.items():
        assert " ".join(shuffled([f"{i:02d}" for i in range(1, count + 1)], 42)) == order
