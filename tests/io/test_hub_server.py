"""Fetching from a hub that is a small server on this machine, through the hub's own client."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

from standin_hub import images, table
from tiny_merge import TinyMerge, contents

import mingle

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOS = {
    "models/org/model": {
        "config.json": b'{"a": 1}',
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"pickle",
        "code.py": b"print()",
    },
    "datasets/tanganke/eurosat": {
        "data/test-00000-of-00002.parquet": table(images(3, 3)),
        "data/test-00001-of-00002.parquet": table(images(4, 3)),
        "data/train-00000-of-00001.parquet": table(images(5, 3)),
        "eurosat.py": b"print()",
        "README.md": b"# EuroSAT",
    },
}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fetched: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client needs for a snapshot."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, head: bool) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        if path.startswith("api/"):
            name = re.split("/(?:revision|tree)/", path.removeprefix("api/"))[0]
            files = REPOS.get(name)
            if files is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, head)
            if "/tree/" in path:
                found: object = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
            else:
                found = {
                    "id": name.partition("/")[2],
                    "sha": COMMIT,
                    "siblings": [{"rfilename": file} for file in files],
                }
            return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, head)
        name, _, file = path.partition(f"/resolve/{COMMIT}/")
        data = REPOS[name if name.startswith("datasets/") else f"models/{name}"][file]
        if not head:
            self.server.fetched.append(file)
        return self._send(
            200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, head
        )

    def _send(self, status: int, data: bytes, headers: dict[str, str], head: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def user(server: Server, home: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    kept |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment, timeout=120
    )


MODEL = """
from mingle.io import hub
revisions = {}
folder = hub.resolve("org/model", None, revisions)
print(sorted(path.name for path in folder.iterdir()), revisions)
"""
DATA = """
from mingle.suites.fusionbench.datasets import Source
from mingle.suites.fusionbench.loading import Split
revisions = {}
print(len(Split(Source("tanganke/eurosat"), revisions)), revisions)
"""


@pytest.mark.slow
def test_a_model_s_data_is_fetched_once_and_found_offline_afterwards(server, tmp_path):
    expected = f"['config.json', 'model.safetensors'] {{'org/model': '{COMMIT}'}}\n"
    done = user(server, tmp_path, MODEL)
    assert done.stdout == expected, done.stderr
    assert sorted(server.fetched) == ["config.json", "model.safetensors"]
    assert user(server, tmp_path, MODEL).stdout == expected
    assert len(server.fetched) == 2
    server.shutdown()
    for code in (MODEL, MODEL.replace("None", f"'{COMMIT}'")):
        assert user(server, tmp_path, code, HF_HUB_OFFLINE="1").stdout == expected


def test_of_a_data_set_only_the_split_is_fetched(server, tmp_path):
    done = user(server, tmp_path, DATA)
    assert done.stdout == f"7 {{'datasets/tanganke/eurosat': '{COMMIT}'}}\n", done.stderr
    assert user(server, tmp_path, DATA, HF_HUB_OFFLINE="1").stdout == done.stdout
    assert sorted(server.fetched) == [
        "README.md",
        "data/test-00000-of-00002.parquet",
        "data/test-00001-of-00002.parquet",
    ]


def test_a_repository_that_does_not_exist_is_named(server, tmp_path):
    done = user(server, tmp_path, MODEL.replace("org/model", "org/modle"))
    assert (
        "CheckpointError: org/modle: is not a local folder and cannot be fetched from the hub" in done.stderr
    )


MERGE = """
import mingle
model = mingle.load("me/merged")
print(float(sum(parameter.double().sum() for parameter in model.state_dict().values())))
"""


@pytest.mark.slow
def test_of_a_merge_only_the_generation_in_use_is_fetched(server, tmp_path, monkeypatch):
    tiny = TinyMerge(tmp_path / "tiny")
    files = contents(tiny.root / "merged") | {"notes.txt": b"mine", "code.py": b"print()"}
    monkeypatch.setitem(REPOS, "models/me/merged", files)
    done = user(server, tmp_path, MERGE)
    expected = sum(float(t.double().sum()) for t in mingle.load(tiny.root / "merged").state_dict().values())
    assert float(done.stdout) == pytest.approx(expected), done.stderr
    manifest = json.loads(files["manifest.json"])
    base = [name for name in files if name.startswith("base-")]
    assert len(base) == 2 and len([name for name in files if name.startswith("state-")]) == 2
    assert sorted(server.fetched) == sorted(["manifest.json", manifest["state"]["file"], *base])
    server.shutdown()
    assert user(server, tmp_path, MERGE, HF_HUB_OFFLINE="1").stdout == done.stdout
