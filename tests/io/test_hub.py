"""Models and data sets from the hub's cache: pinned commits, and what a user is told of what is not there."""

from __future__ import annotations

import pytest

from mingle.io import hub as hubs
from mingle.io.files import CheckpointError


def test_a_model_is_found_in_the_cache_and_its_commit_noted(hub):
    commit = hub.add("org/model", {"model.safetensors": b"", "config.json": b"{}", "extra/notes.txt": b""})
    revisions: dict[str, str] = {}
    folder = hubs.resolve("org/model", None, revisions)
    assert folder == hub.snapshot("org/model") and revisions == {"org/model": commit}


def test_the_noted_commit_is_kept_when_the_branch_moves_on(hub):
    first = hub.add("org/model", {"config.json": b"1"})
    revisions: dict[str, str] = {}
    before = hubs.resolve("org/model", None, revisions)
    second = hub.add("org/model", {"config.json": b"2"})
    assert hubs.resolve("org/model", None, revisions) == before
    assert hubs.resolve("org/model").name == second
    assert hubs.resolve("org/model", first).name == first
    with pytest.raises(
        CheckpointError, match=f"org/model: revision 'main' is commit {second}, but commit {first} is in use"
    ):
        hubs.resolve("org/model", "main", revisions)


def test_a_tag_stands_for_its_commit(hub):
    commit = hub.add("org/model", {"config.json": b"1"}, ref="v1.0")
    assert hubs.resolve("org/model", "v1.0").name == commit


def test_what_is_not_cached_is_named_with_the_command_that_fetches_it(hub):
    with pytest.raises(CheckpointError) as caught:
        hubs.resolve("org/model", "0123456789012345678901234567890123456789")
    for part in (
        "org/model",
        str(hub.cache),
        "offline",
        "hf download org/model",
        "*.safetensors",
        "--revision 0123456789",
    ):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="hf download org/data --repo-type dataset"):
        hubs.snapshot("org/data", "dataset")


@pytest.mark.parametrize("revision", ["../../../elsewhere", "..", "a/../../../.."])
def test_a_revision_does_not_lead_out_of_the_cache(hub, revision):
    hub.add("org/model", {"config.json": b"1"})
    (hub.cache / "elsewhere").mkdir()
    with pytest.raises(CheckpointError, match="not in the hub's cache"):
        hubs.resolve("org/model", revision)


def test_a_revision_that_is_a_path_is_not_read(hub):
    """The file names the commit; if it were followed, the model would be found."""
    commit = hub.add("org/model", {"config.json": b"1"})
    outside = hub.cache / "outside"
    outside.write_text(commit)
    assert hubs.resolve("org/model", commit).name == commit
    with pytest.raises(CheckpointError, match="not in the hub's cache"):
        hubs.resolve("org/model", str(outside))


@pytest.mark.parametrize("model", ["x" * 3000, "~nobody-of-that-name/model", "a\0b", "org/a\0b", "\ud800/x"])
def test_a_name_that_no_folder_can_have_is_refused(hub, model):
    with pytest.raises(CheckpointError) as caught:
        hubs.resolve(model)
    assert len(str(caught.value)) < 4000


def test_a_snapshot_without_any_data_is_refused(hub):
    hub.add("org/model", {"modeling_custom.py": b"", "pytorch_model.bin": b""})
    with pytest.raises(CheckpointError, match=r"org/model: none of \*.safetensors"):
        hubs.resolve("org/model")


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_the_hub_s_own_switch_is_respected(monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hubs.offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not hubs.offline()


class Api:
    """What `HfApi` says of one repository."""

    def __init__(self, commit: str, files: list[str]) -> None:
        self.commit, self.files = commit, files

    def model_info(self, repo: str, revision: str):
        from types import SimpleNamespace

        return SimpleNamespace(
            sha=self.commit, siblings=[SimpleNamespace(rfilename=name) for name in self.files]
        )


def test_only_data_is_fetched_and_at_the_commit_that_was_found(hub, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    files = [
        "model-00001-of-00002.safetensors",
        "config.json",
        "merges.txt",
        "spiece.model",
        "pytorch_model.bin",
        "modeling.py",
        "a[1].json",
    ]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Api("c" * 40, files))
    asked, fetched = {}, tmp_path / ("c" * 40)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **given: asked.update(given, repo=repo) or str(fetched),
    )
    revisions: dict[str, str] = {}
    assert hubs.resolve("org/model", "v1", revisions) == fetched
    wanted = ["model-00001-of-00002.safetensors", "config.json", "merges.txt", "spiece.model", "a[[]1].json"]
    assert asked == {"repo": "org/model", "repo_type": "model", "revision": "v1", "allow_patterns": wanted}
    assert revisions == {"org/model": "c" * 40}
    fetched = tmp_path / ("d" * 40)
    with pytest.raises(
        CheckpointError, match=f"org/model: 'v1' moved from commit {'c' * 40} to {'d' * 40} meanwhile"
    ):
        hubs.resolve("org/model", "v1")


def test_without_a_network_what_is_cached_is_taken_with_a_warning(hub, monkeypatch, caplog):
    import huggingface_hub

    def unreachable():
        raise ConnectionError("no route to the hub")

    commit = hub.add("org/model", {"config.json": b"1"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "HfApi", unreachable)
    assert hubs.resolve("org/model").name == commit
    assert "org/model" in caplog.text and commit in caplog.text and "no route" in caplog.text
    with pytest.raises(
        CheckpointError, match="org/other: is not a local folder and cannot be fetched from the hub .no route"
    ):
        hubs.resolve("org/other")
