"""From prompt files and config keys to prompts."""

from types import SimpleNamespace

import pytest

from Core.data.prompts import check_prompt_file, parse_prompts, read_prompts, read_validation_prompts

LINES = [f"prompt number {i}" for i in range(6)]


@pytest.fixture
def prompt_file(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n\n", encoding="utf-8")
    return str(path)


def config(**changes) -> SimpleNamespace:
    """The keys of a Config that concern prompts."""
    values = dict(prompt=None, prompt_path=None, start_index=None, end_index=None)
    values |= dict(reference_path=None, mask_strategy=None)
    values |= dict(val_prompt_path=None, val_batch_size=2, num_val_runs=2, debug=False)
    return SimpleNamespace(**{**values, **changes})


def texts(prompts) -> list[str]:
    return [prompt.text() for prompt in prompts]


def test_a_plain_line_is_one_segment():
    (prompt,) = parse_prompts(["a red fox"])
    assert (prompt.segments, prompt.reference, prompt.mask_strategy) == (((0, "a red fox"),), "", "")


def test_segments_hold_until_the_next_one_begins():
    (prompt,) = parse_prompts(["|0|dawn|2|noon|5|dusk"])
    assert [prompt.text(loop) for loop in range(7)] == ["dawn"] * 2 + ["noon"] * 3 + ["dusk"] * 2
    assert prompt.reward_text == "dawn"


def test_a_json_suffix_names_references_and_their_strategy():
    (prompt,) = parse_prompts(['a boat{"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,0,1"}'])
    assert texts([prompt]) == ["a boat"]
    assert (prompt.reference, prompt.mask_strategy) == ("a.png;b.mp4", "0;0,1,0,0,1")


def test_references_of_the_config_go_to_their_prompts():
    prompts = parse_prompts(["one", "two"], ["a.png", ""], ["0", ""])
    assert [(p.reference, p.mask_strategy) for p in prompts] == [("a.png", "0"), ("", "")]
    with pytest.raises(ValueError, match="reference_path needs one entry per prompt: 2 prompts, 1 entries"):
        parse_prompts(["one", "two"], ["a.png"])


@pytest.mark.parametrize(
    "suffix",
    [
        " aesthetic score: 6.5.",
        " aesthetic score: 6.5. motion score: 10. camera motion: pan left.",
        " Motion Score: 2.5.",
        "",
    ],
)
def test_rewards_read_the_prompt_without_scores(suffix):
    (prompt,) = parse_prompts(["A fox runs. It is red." + suffix])
    assert prompt.reward_text == "A fox runs. It is red."


def test_a_part_of_a_file_is_read(prompt_file):
    assert texts(read_prompts(config(prompt_path=prompt_file))) == LINES
    part = config(prompt_path=prompt_file, start_index=2, end_index=4)
    assert texts(read_prompts(part)) == LINES[2:4]
    with pytest.raises(
        ValueError, match=r"no prompts between start_index \(8\) and end_index \(9\).*change them"
    ):
        read_prompts(config(prompt_path=prompt_file, start_index=8, end_index=9))


def test_prompts_of_the_config_win_over_the_file(prompt_file):
    assert texts(read_prompts(config(prompt=["mine"], prompt_path=prompt_file))) == ["mine"]


def test_validation_takes_the_first_training_prompts_or_its_own_file(prompt_file, tmp_path):
    training = parse_prompts(["one", "two", "three", "four", "five"])
    assert texts(read_validation_prompts(config(), training)) == ["one", "two", "three", "four"]
    assert texts(read_validation_prompts(config(debug=True), training)) == ["one", "two"]
    own = config(val_prompt_path=prompt_file, num_val_runs=1)
    assert texts(read_validation_prompts(own, training)) == LINES[:2]


def test_files_that_hold_no_prompts_are_named(tmp_path, prompt_file):
    assert check_prompt_file("prompt_path", prompt_file) == []
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("ein roter Fuchs läuft".encode("latin-1"))
    faults = {
        name: check_prompt_file("prompt_path", str(tmp_path / name))
        for name in ("empty.txt", "latin.txt", "no")
    }
    assert all(
        len(sentences) == 1 and sentences[0].startswith("prompt_path: ") for sentences in faults.values()
    )
    assert "holds no prompts" in faults["empty.txt"][0]
    assert "UTF-8" in faults["latin.txt"][0]
    assert "no" in faults["no"][0]
