"""Weights pinned to a revision of the hub, and the commit that a run records."""

from pathlib import Path

import huggingface_hub
import pytest

from Core.utils.hub import Weight, commit_of, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[tuple[str, str | None]]:
    """Repositories and revisions that a simulated cache is asked for; it has all."""
    calls = []
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")

    def snapshot_download(repo_id: str, revision: str | None = None, **_) -> str:
        calls.append((repo_id, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("someone/clip", ("someone/clip", None)),
        ("someone/clip@v1.0", ("someone/clip", "v1.0")),
        (f"someone/clip@{COMMIT}", ("someone/clip", COMMIT)),
    ],
)
def test_a_revision_is_asked_for(asked, source, call):
    weight = Weight(source=source)
    assert not weight.is_local and locate(weight).name == COMMIT and set(asked) == {call}
    assert commit_of(weight) == COMMIT


def test_what_is_no_hub_id_has_no_commit(asked, tmp_path):
    assert commit_of(Weight(source=str(tmp_path))) is None
    assert commit_of(Weight(source="https://example.org/head.pth")) is None
    assert Weight(source="someone/clip@").is_local and asked == []
    assert Path(Weight(source="someone/clip@v1.0").name).name == "someone--clip@v1.0"
