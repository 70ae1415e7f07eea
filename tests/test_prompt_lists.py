"""The committed prompt lists: enough of them, each line a prompt of its own that is read as it stands."""

from pathlib import Path

import pytest

LISTS = sorted((Path(__file__).resolve().parents[1] / "assets" / "prompts").glob("*.txt"))


def test_lists_are_many_and_share_no_prompt():
    prompts = [line for path in LISTS for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(LISTS) >= 10
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_list_is_plain_sentences(path):
    prompts = path.read_text(encoding="utf-8").splitlines()
    assert len(prompts) >= 40
    for prompt in prompts:
        assert prompt == prompt.strip() and prompt.endswith("."), prompt
        assert not set(prompt) & set("|{}\t"), f"{prompt!r} has a mark that prompt parsing gives a meaning"
