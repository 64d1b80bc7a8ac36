"""How the extension is found, and the reasons why it is not used."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from layouts import layouts

from mingle.cli import main
from mingle.ops import extension, small_kernels
from mingle.ops import small_factorizations as small

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MINGLE_EXTENSION", raising=False)
    caches = (extension.why_not, extension._record, extension._module, extension._tell)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "_build.json").write_text(text)
    monkeypatch.setattr(extension, "RECORD", folder / "_build.json")


def built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], problem: str | None = None
) -> None:
    """A module that claims to be built, and a GPU of this compute capability."""

    def check(device: int) -> None:
        if problem:
            raise RuntimeError(problem)

    write(folder, monkeypatch, json.dumps({"extension": "built"}))
    monkeypatch.setitem(
        sys.modules,
        "mingle._C",
        SimpleNamespace(architectures=["80", "90", "100"], cuda_version="13.0.88", check=check),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")


def test_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "RECORD", tmp_path / "_build.json")
    assert (
        extension.why_not(GPU)
        == "mingle._C was not built: _build.json, which an installation writes, is missing"
    )
    assert extension.load(GPU) is None


def test_what_replaces_it_is_said_once(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(extension, "RECORD", tmp_path / "_build.json")
    for _ in range(3):
        assert extension.load(GPU) is None
    (message,) = caplog.messages
    assert message.startswith(
        "small factorisations on cuda:0 are computed by plain torch: mingle._C was not built"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '"built"'])
def test_a_record_that_cannot_be_read(text, tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, text)
    assert "_build.json: " in extension.why_not(GPU)


def test_left_out(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, json.dumps({"extension": "left out", "reason": "no nvcc was found in PATH"}))
    reason = "mingle._C was left out when mingle was installed: no nvcc was found in PATH"
    assert extension.why_not(GPU) == reason and extension.summary() == reason


def test_a_corrupt_module(tmp_path, monkeypatch):
    """An import that fails is a reason, not an error."""
    (tmp_path / f"_C{__import__('sysconfig').get_config_var('EXT_SUFFIX')}").write_bytes(
        b"\x7fELF and then nothing"
    )
    write(tmp_path, monkeypatch, json.dumps({"extension": "built"}))
    monkeypatch.setattr(sys.modules["mingle"], "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mingle._C", raising=False)
    assert extension.why_not(GPU).startswith("mingle._C cannot be loaded: ")


def test_disabled(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, (9, 0))
    monkeypatch.setenv("MINGLE_EXTENSION", "0")
    assert extension.why_not(GPU) == "MINGLE_EXTENSION=0 disables mingle._C"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)])
def test_a_gpu_that_some_code_fits(capability, tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, capability)
    assert extension.why_not(GPU) is None and extension.load(GPU) is sys.modules["mingle._C"]
    assert extension.summary() == "built for sm_80, sm_90, sm_100 by CUDA 13.0.88"


def test_a_gpu_that_no_code_fits_is_named_beside_the_built_architectures(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, (7, 5))
    reason = "mingle._C was built for sm_80, sm_90, sm_100; this GPU is sm_75"
    assert extension.why_not(GPU) == reason
    assert extension.summary() == f"built for sm_80, sm_90, sm_100 by CUDA 13.0.88; not used: {reason}"


def test_a_driver_that_is_too_old(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, (9, 0), "mingle: device: CUDA driver version is insufficient")
    assert (
        extension.why_not(GPU)
        == "mingle._C cannot run on some GPU: mingle: device: CUDA driver version is insufficient"
    )


def test_no_gpu_and_other_devices(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, (9, 0))
    assert extension.why_not(torch.device("cpu")) == "the tensors are on cpu, the kernels run on CUDA devices"
    extension.why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extension.why_not(GPU) == "no CUDA device"


def test_kernels_asked_for_and_missing_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "RECORD", tmp_path / "_build.json")
    with pytest.raises(RuntimeError, match=r"the kernels cannot run: mingle\._C was not built"):
        small_kernels.effective_rank(torch.ones(1, 2, dtype=torch.float64))


def test_env_prints_it(tmp_path, monkeypatch, capsys):
    write(tmp_path, monkeypatch, json.dumps({"extension": "left out", "reason": "[no] nvcc"}))
    assert main(["env"]) == 0
    assert (
        "extension     mingle._C was left out when mingle was installed: [no] nvcc" in capsys.readouterr().out
    )


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(layouts, layouts, layouts)
def test_the_kernels_find_the_values_of_strided_tensors(gram_lies, matrix_lies, sigma_lies):
    """What lies at the addresses, with the sizes and strides that `mingle._C` is told, is what was given."""

    def at(address, strides, *sizes):
        reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, sizes, strict=True))
        memory = (ctypes.c_double * reach).from_address(address)
        found.append(torch.frombuffer(memory, dtype=torch.float64).as_strided(sizes, strides).clone())

    found: list[torch.Tensor] = []
    recorder = SimpleNamespace(
        cholesky_inverse=lambda gram, b, n, *_: at(gram, (n * n, n, 1), b, n, n),
        small_eigh=lambda gram, b, n, *_: at(gram, (n * n, n, 1), b, n, n),
        rescale=lambda M, strides, single, b, m, n, *_: at(M, strides, b, m, n),
        effective_rank=lambda sigma, b, k, *_: at(sigma, (k, 1), b, k),
        rescale_workspace=lambda batch, m, n: 24 * batch,
    )
    G = gram_lies.of(torch.arange(18, dtype=torch.float64).view(2, 3, 3))
    M = matrix_lies.of(torch.arange(24, dtype=torch.float64).view(2, 3, 4))
    sigma = sigma_lies.of(torch.arange(6, dtype=torch.float64).view(2, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load", lambda device: recorder)
        patch.setattr(small_kernels, "_queue", lambda tensor: (0, 0))
        small_kernels.cholesky_inverse(G, 1e-9, torch.float64)
        small_kernels.small_eigh(G)
        small_kernels.rescale(M)
        small_kernels.effective_rank(sigma)
    assert all(torch.equal(a, b) for a, b in zip(found, (G, G, M, sigma), strict=True))


def test_the_kernels_receive_what_the_tensors_hold(monkeypatch):
    """Sizes, strides and addresses as `mingle._C` declares them, with a recorder in its place."""
    calls = []
    recorder = SimpleNamespace(
        cholesky_inverse=lambda *arguments: calls.append(arguments),
        small_eigh=lambda *arguments: calls.append(arguments),
        rescale=lambda *arguments: calls.append(arguments),
        fix_signs=lambda *arguments: calls.append(arguments),
        effective_rank=lambda *arguments: calls.append(arguments),
        rescale_workspace=lambda batch, m, n: 24 * batch,
    )
    monkeypatch.setattr(extension, "load", lambda device: recorder)
    monkeypatch.setattr(small_kernels, "_queue", lambda tensor: (3, 99))
    G = torch.eye(4, dtype=torch.float64).expand(2, 4, 4).contiguous()
    inverse, flags = small_kernels.cholesky_inverse(G, 1e-9, torch.float32)
    assert calls.pop() == (G.data_ptr(), 2, 4, 1e-9, True, inverse.data_ptr(), flags.data_ptr(), 3, 99)
    values, vectors, flags = small_kernels.small_eigh(G)
    assert calls.pop() == (G.data_ptr(), 2, 4, values.data_ptr(), vectors.data_ptr(), flags.data_ptr(), 3, 99)
    M = torch.randn(2, 5, 9)[:, :, 1:7]
    outputs = [output.data_ptr() for output in small_kernels.rescale(M)]
    call = calls.pop()
    assert (
        call[:6] == (M.data_ptr(), (45, 9, 1), True, 2, 5, 6)
        and list(call[7:11]) == outputs
        and call[11:] == (3, 99)
    )
    small_kernels.rescale(M.mT)
    assert calls.pop()[1:6] == ((30, 5, 1), True, 2, 6, 5)
    U, Vh = torch.randn(2, 7, 3), torch.randn(2, 8, 3).mT
    small_kernels.fix_signs_(U, Vh)
    assert calls.pop() == (U.data_ptr(), (21, 3, 1), Vh.data_ptr(), (24, 1, 3), True, 2, 7, 3, 8, 3, 99)
    sigma = torch.rand(2, 6, dtype=torch.float64)
    ranks = small_kernels.effective_rank(sigma)
    assert calls.pop() == (sigma.data_ptr(), 2, 6, ranks.data_ptr(), 3, 99) and not calls
    # and nothing on the CPU is ever given to them
    small.effective_rank(sigma)
    assert not calls
