"""The end-to-end benchmark: that its published peer gives our gates, that a wrong one is refused, and that
its accounts add up.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from mingle.bench import e2e
from mingle.bench.endtoend import agreement, contenders, growth, judge, staged, whole
from mingle.bench.endtoend.cases import CASES, Problem
from mingle.bench.endtoend.clock import STAGES, Stopwatch
from mingle.bench.endtoend.contenders import BF16, EAGER, OURS, PUBLISHED
from mingle.bench.peers.published import Published
from mingle.tasks import TaskData, get

CPU = torch.device("cpu")
SETTINGS = dict(rank=4, steps=6, lr=5e-3, batch_size=8, gate_init="normal")


@pytest.fixture(autouse=True)
def _one_thread():
    """Models as small as these are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def problem(base_model, tuned_states, samples, tmp_path):
    return make(base_model, tuned_states, samples, tmp_path)


def make(base_model, tuned_states, samples, folder, dtype=torch.float32, **options) -> Problem:
    """The three tasks of the other tests, as a case of the benchmark."""
    base = CLIPModel(base_model.config).to(dtype).eval()
    base.load_state_dict(base_model.state_dict())
    for i, state in enumerate(tuned_states):
        (folder / str(i)).mkdir(parents=True)
        tensors = {f"vision_model.{name}": tensor.to(dtype) for name, tensor in state.items()}
        save_file(tensors, folder / str(i) / "model.safetensors", {"format": "pt"})
        (folder / str(i) / "config.json").write_text(json.dumps(base.config.vision_config.to_dict()))

    def data(i: int) -> TaskData:
        inputs, shared = (
            {name: tensor.to(dtype) for name, tensor in part.items()}
            for part in (samples[i].inputs, samples[i].shared)
        )
        return TaskData(inputs, shared, samples[i].labels)

    case = replace(CASES["glyphs8"], name="tiny", title="tiny")
    return Problem(case, get("clip"), base, 3, SETTINGS | options, lambda i: folder / str(i), data, data)


@pytest.mark.parametrize(("dtype", "gate_init"), [(torch.float32, "normal"), (torch.float64, "zeros")])
@pytest.mark.parametrize("reduce", ["batch", "sample"])
def test_the_published_procedure_gives_our_gates(
    reduce, gate_init, dtype, base_model, tuned_states, samples, tmp_path
):
    problem = make(base_model, tuned_states, samples, tmp_path, dtype, reduce=reduce, gate_init=gate_init)
    merges = {name: contenders.start(name, problem, Stopwatch(CPU)) for name in (OURS, EAGER, PUBLISHED)}
    for merge in merges.values():
        for i in range(problem.tasks):
            merge.add(problem.expert(i), problem.seeds(i))
    limit = {torch.float32: 1e-4, torch.float64: 1e-6}[dtype]
    for name in (EAGER, PUBLISHED):
        verdict = agreement.gates(merges[name].gates(), merges[OURS].gates())
        assert verdict["ok"] and verdict["error"] < limit and verdict["tolerance"] == limit, verdict
        assert agreement.bases(merges[name].bases(), merges[OURS].bases())["ok"]
    first = next(iter(merges[OURS].gates().values()))[0]
    assert first.shape[0] == 3 and first.dtype == dtype


def test_the_published_procedure_refuses_what_was_not_published(base_model):
    for options in (dict(reduce="token"), dict(gates="all"), dict(constraint="none"), dict(precision="bf16")):
        with pytest.raises(ValueError, match="published procedure"):
            Published(base_model, get("clip"), contenders.MingleOptions(**options), ("q_proj",))


def test_a_clock_gives_every_second_to_one_stage():
    clock = Stopwatch(CPU)
    began = time.perf_counter()
    with clock("decompose"):
        time.sleep(0.02)
        with clock("project"):
            time.sleep(0.03)
        time.sleep(0.01)
    with clock("adapt"):
        time.sleep(0.01)
    passed = time.perf_counter() - began
    assert sum(clock.seconds.values()) == pytest.approx(passed, rel=0.05)
    assert clock.seconds["project"] >= 0.03 and 0.03 <= clock.seconds["decompose"] < passed - 0.04
    with pytest.raises(RuntimeError, match="inside"), clock("load"):
        raise RuntimeError("inside")
    assert clock.seconds["load"] > 0 and not clock._running


def test_a_whole_merge_is_accounted_for(problem):
    found = whole.measure(problem, [OURS, BF16, EAGER, PUBLISHED], CPU, rounds=1)
    assert {name: result["status"] for name, result in found.items()} == dict.fromkeys(found, "ok")
    for result in found.values():
        assert set(result["stages"]) == set(STAGES) and all(
            seconds > 0 for seconds in result["stages"].values()
        )
        assert sum(result["stages"].values()) + result["rest_seconds"] == pytest.approx(
            result["whole_seconds"]
        )
        assert 0 <= result["rest_seconds"] < 0.3 * result["whole_seconds"]
        assert (
            len(result["step_seconds"]) == 3
            and 0 < sum(result["step_seconds"]) * 5 < result["stages"]["adapt"]
        )
        assert result["peak_bytes"] is None or result["peak_bytes"] >= 0
    assert found[OURS]["accuracy"] == pytest.approx(found[PUBLISHED]["accuracy"], abs=5)
    assert found[PUBLISHED]["agreement"]["gates"]["ok"] and found[BF16]["agreement"]["gates"]["error"] > 0


@pytest.mark.parametrize(
    "fault",
    ["_without_earlier", "relaxation", "temperature", "basis"],
)
def test_a_wrong_peer_is_refused_and_not_timed(fault, problem, monkeypatch):
    if fault == "_without_earlier":
        monkeypatch.setattr("mingle.bench.peers.published._without_earlier", lambda delta, earlier: delta)
    elif fault == "basis":
        monkeypatch.setattr(Published, "protect", lambda self, seeds: None)
    elif fault == "relaxation":
        monkeypatch.setattr(Published, "_project", lambda self, layer, S: None)
    else:
        began = Published.__init__

        def colder(self, base, task, options, *rest):
            began(self, base, task, replace(options, temperature=1.0), *rest)

        monkeypatch.setattr(Published, "__init__", colder)
    found = whole.measure(problem, [OURS, PUBLISHED], CPU, rounds=1)
    assert found[OURS]["status"] == "ok" and "stages" in found[OURS]
    assert found[PUBLISHED]["status"] == "wrong" and "stages" not in found[PUBLISHED]
    assert "gates of" in found[PUBLISHED]["reason"]
    assert PUBLISHED not in judge.ratios(found)[OURS]


def test_gates_that_are_not_numbers_do_not_agree():
    good = {"layer": (torch.ones(2, 4), torch.zeros(2))}
    bad = {"layer": (torch.full((2, 4), float("nan")), torch.zeros(2))}
    assert agreement.gates(good, good)["ok"]
    verdict = agreement.gates(bad, good)
    assert not verdict["ok"] and verdict["error"] is None and verdict["layer"] == "layer"


def test_a_sum_says_what_it_is_made_of(problem, tmp_path):
    small = replace(problem, options=problem.options | {"steps": 50, "reduce": "batch"})
    found = staged.measure(small, [OURS, BF16, EAGER, PUBLISHED], CPU, 3, [1, 2, 3])
    assert {result["status"] for result in found.values()} == {"ok"}
    for name, result in found.items():
        last, adapt = result["at"]["3"], [one["adapt_seconds"] for one in result["at"].values()]
        assert result["stages"]["adapt"] == pytest.approx(sum(adapt))
        assert result["stages"]["project"] == pytest.approx(2 * last["seconds"]["project"])
        assert result["stages"]["subspace"] == pytest.approx(3 * last["seconds"]["subspace"])
        assert result["whole_seconds"] == pytest.approx(sum(result["stages"].values()))
        assert last["adapt_seconds"] == pytest.approx(last["adapt_once_seconds"] + 49 * last["step_seconds"])
        assert result["measured"]["adapt"] == "3 of 50 steps"
        assert result["measured"]["decompose"] == (
            "once" if name in (OURS, BF16) else "one layer of each shape"
        )
        assert last["layers"] == (
            None if name in (OURS, BF16) else {"32×32": "1 of 8", "64×32": "1 of 2", "32×64": "1 of 2"}
        )
    assert list(found[PUBLISHED]["agreement"]) == [
        *(f"gates after {count} tasks" for count in (1, 2, 3)),
        "bases after 3 tasks",
        "experts after 3 tasks",
    ]
    assert found[BF16]["stages"]["subspace"] == found[OURS]["stages"]["subspace"]


def test_between_measured_numbers_of_tasks_a_sum_is_linear():
    def at(adapt: float) -> dict:
        seconds = dict.fromkeys(STAGES, 1.0)
        return dict(adapt_seconds=adapt, step_seconds=adapt / 50, seconds=seconds, layers=None, steps_measured=3, peak_bytes=1,
                    cpus_used_by_others=None)  # fmt: skip

    found = staged.total({"1": at(10.0), "4": at(40.0)}, 4, 50)
    assert found["stages"] == {
        "load": 4.0,
        "project": 3.0,
        "decompose": 4.0,
        "adapt": 100.0,
        "subspace": 4.0,
        "evaluate": 4.0,
    }
    assert found["step_seconds"] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_exponents_are_slopes():
    values = [1, 2, 4, 8, 16]
    assert growth.exponents(values, [3.0 * v**1.5 for v in values]) == pytest.approx(
        {"all": 1.5, "upper": 1.5}
    )
    flat_then_linear = growth.exponents(values, [4.0, 4.0, 4.0, 8.0, 16.0])
    assert flat_then_linear["upper"] == pytest.approx(1.0) and 0 < flat_then_linear["all"] < 1


def test_many_merges_keep_experts_gates_and_bases_and_nothing_else():
    bystander = torch.eye(3).to_sparse()  # has no storage to ask for
    found = growth.kept(CPU, 6, "batch")
    assert bystander.is_sparse and found["ok"] and len(found["held_bytes"]) == 6
    assert found["accounted_bytes"][-1] == pytest.approx(6 * found["accounted_bytes"][0], rel=0.1)


def test_a_leak_is_seen(monkeypatch):
    leaked, add = [], contenders.Ours.add
    monkeypatch.setattr(
        contenders.Ours, "add", lambda self, *rest: (leaked.append(torch.zeros(10_000)), add(self, *rest))[1]
    )
    assert not growth.kept(CPU, 4, "batch")["ok"]


def test_the_command_line_writes_what_it_found(tmp_path, capsys, monkeypatch, problem):
    monkeypatch.setattr(
        e2e.cases,
        "problem",
        lambda case, tasks, options, seed: nullcontext(replace(problem, options=SETTINGS | options)),
    )
    assert e2e.main(["--quick", "--precision", "bf16", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"glyphs8-2-batch.json", "glyphs8-2-batch.png"}
    results = json.loads((tmp_path / "glyphs8-2-batch.json").read_text())
    assert results["format"] == "mingle-e2e" and results["mode"] == "whole" and results["quick"]
    assert {
        "device",
        "versions",
        "commit",
        "date",
        "case",
        "method",
        "contenders",
        "ratios",
        "targets",
    } <= set(results)
    assert set(results["ratios"][OURS][PUBLISHED]) >= {"whole", *STAGES}
    assert PUBLISHED in capsys.readouterr().out
    assert e2e.main(["--quick", "--alone", "--out", str(tmp_path)]) == 0
    alone = json.loads((tmp_path / "glyphs8-2-batch-alone.json").read_text())
    assert list(alone["contenders"]) == [OURS] and alone["contenders"][OURS]["status"] == "ok"


def test_a_peer_that_memory_does_not_suffice_for_is_left_out_and_said_so(problem, monkeypatch):
    needed = staged.published_bytes(problem)
    monkeypatch.setattr(staged, "available", lambda device: needed - 1)
    found = staged.measure(
        replace(problem, options=problem.options | {"reduce": "batch"}), [OURS, PUBLISHED], CPU, 3, [1, 3]
    )
    assert found[OURS]["status"] == "ok" and "stages" in found[OURS]
    assert (
        found[PUBLISHED]["status"] == contenders.LEFT_OUT
        and "GB" in found[PUBLISHED]["reason"]
        and found[PUBLISHED]["at"] == {}
    )
    assert list(judge.ratios(found)[OURS]) == []


def test_token_gates_have_no_published_peer(capsys):
    with pytest.raises(SystemExit):
        e2e.main(["--reduce", "token", "--peer", "published"])
    assert "gates of single tokens were not published" in capsys.readouterr().err


def test_targets_count_bf16_only_at_unchanged_accuracy():
    results = {
        "case": {"name": "glyphs8", "tasks": 8},
        "device": {"type": "cpu"},
        "quick": False,
        "ratios": {
            OURS: {PUBLISHED: {"whole": 3.5, "adapt": 2.0}},
            BF16: {PUBLISHED: {"whole": 4.0, "adapt": 5.0}},
        },
        "contenders": {
            OURS: {"accuracy": 80.0},
            BF16: {"accuracy": 79.0},
            PUBLISHED: {"cpus_used_by_others": 0.1},
        },
    }
    judged = {(target["ours"], target["part"]): target["met"] for target in judge.targets(results)}
    assert judged == {(OURS, "whole"): True, (OURS, "adapt"): False, (BF16, "adapt"): False}
    results["contenders"][BF16]["accuracy"] = 79.8
    assert judge.targets(results)[2]["met"]
    results["contenders"][PUBLISHED]["cpus_used_by_others"] = 0.5
    assert [target["met"] for target in judge.targets(results)] == [False] * 3 and judge.targets(results)[0][
        "disturbed"
    ]
    assert judge.targets(results | {"quick": True}) == []
