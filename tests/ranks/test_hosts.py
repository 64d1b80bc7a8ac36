"""Under torchrun itself, and on two hosts: network namespaces, each with an address and a name of its own."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bare_methods import tuned_states
from merge_files import merge_file
from tiny_merge import contents
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import free_port

from mingle.cli import main
from mingle.merging import streamed

pytestmark = pytest.mark.slow

#: merges with small parts; before the second of rank 1 it is killed, or its host's link is cut
SCRIPT = """
import os, signal, subprocess, sys, time
from mingle.cli import main
from mingle.io import journal
from mingle.merging import streamed
from mingle.ranks import watch

streamed.PART_BYTES = 3000
fault, written, write = sys.argv.pop(1), [], journal.write_tensors
if fault == "cut":
    watch.LOST = 4.0

def writing(path, tensors):
    if written and os.environ["RANK"] == "1":
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "cut":
            subprocess.run(["ip", "link", "set", "link1", "down"], check=True)
    if written and fault != "none":
        time.sleep(60)  # what others hear interrupts this
    written.append(path)
    return write(path, tensors)

journal.write_tensors = writing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the script, a merge file, and the merge that one process makes of it."""
    folder = tmp_path_factory.mktemp("merge")
    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, intermediate_size=24
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder / "base")
    tuned = copy.deepcopy(model)
    tuned.load_state_dict(tuned_states(model)[0])
    tuned.save_pretrained(folder / "one")
    merge_file(folder, folder / "base", {"one": folder / "one"}, "opcm")
    (folder / "script.py").write_text(SCRIPT)
    merge(folder, "alone")
    return folder


def merge(place, out):
    """In this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "PART_BYTES", 3000)
        assert main(["merge", str(place / "merge.yaml"), "--out", str(place / out)]) == 0


def call(place, fault, out):
    return [str(place / "script.py"), fault, "merge", str(place / "merge.yaml"), "--out", str(place / out)]


def test_a_process_that_is_killed_ends_a_torchrun_that_names_it(place):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    began = time.monotonic()
    shown = subprocess.run(
        [*torchrun, *call(place, "kill", "killed")], capture_output=True, text=True, check=False
    )
    assert shown.returncode != 0 and time.monotonic() - began < 120
    assert "rank      : 1 " in shown.stderr and "SIGKILL" in shown.stderr
    assert list((place / "killed").glob("state-*"))
    merge(place, "killed")
    assert contents(place / "killed") == contents(place / "alone")


def has_namespaces():
    return os.geteuid() == 0 and shutil.which("ip") is not None


@pytest.fixture
def hosts():
    """What starts a command on host 0 and on host 1, which have a link between them."""
    if not has_namespaces():
        pytest.skip("network namespaces need root and the command ip")
    names = [f"mingle{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "link0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "link1",
            "netns",
            names[1],
        )
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"link{number}")
            ip("-n", name, "link", "set", f"link{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name, "unshare", "--uts"] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespaces: {done.stderr.strip()}")


def started(hosts, place, fault, out):
    """The processes of both hosts."""
    port, root = str(free_port()), str(Path(__file__).parents[2])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": port, "PYTHONPATH": root}
    return [
        subprocess.Popen(
            [
                *host,
                "sh",
                "-c",
                f'hostname host{number}; exec "$0" "$@"',
                sys.executable,
                *call(place, fault, out),
            ],
            env=os.environ | variables | {"RANK": str(number), "GLOO_SOCKET_IFNAME": f"link{number}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, host in enumerate(hosts)
    ]


def test_two_hosts_make_the_merge_of_one(hosts, place):
    processes = started(hosts, place, "none", "two")
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "merged model: " in said[0] and "merged" not in said[1]
    assert contents(place / "two") == contents(place / "alone")


def test_a_host_that_is_cut_off_is_named(hosts, place):
    processes = started(hosts, place, "cut", "cut")
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert "rank 1 on host host1" in said[0].replace("\n", " "), said
    assert "cannot be reached" in said[1], said
    merge(place, "cut")
    assert contents(place / "cut") == contents(place / "alone")
