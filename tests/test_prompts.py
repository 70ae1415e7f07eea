"""From prompt files and config keys to prompts."""

import pytest
import twins

from Core.backbones.opensora_prompts import parse_prompts
from Core.config import build_config
from Core.data.prompts import PromptSettings, prompt_file_errors, read_prompts, read_validation_prompts

LINES = [f"prompt number {i}" for i in range(6)]


@pytest.fixture
def prompt_file(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n\n", encoding="utf-8")
    return str(path)


def texts(prompts) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_a_plain_line_is_one_segment():
    (prompt,) = parse_prompts(["a red fox"])
    assert (prompt.segments, prompt.reference, prompt.mask_strategy) == (((0, "a red fox"),), "", "")


def test_segments_hold_until_the_next_one_begins():
    (prompt,) = parse_prompts(["|0|dawn|2|noon|5|dusk"])
    assert prompt.texts == ("dawn", "noon", "dusk")
    assert [prompt.text_number(clip) for clip in range(7)] == [0] * 2 + [1] * 3 + [2] * 2
    assert prompt.text == prompt.reward_text == "dawn"
    assert prompt.written == "|0|dawn|2|noon|5|dusk"


def test_a_json_suffix_names_references_and_their_strategy():
    (prompt,) = parse_prompts(['a boat{"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,0,1"}'])
    assert texts([prompt]) == ["a boat"]
    assert (prompt.reference, prompt.mask_strategy) == ("a.png;b.mp4", "0;0,1,0,0,1")
    given = {"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,0,1"}
    assert prompt.identity == {"prompt": "a boat"} | given


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


def read(**keys) -> list[str]:
    return texts(read_prompts(PromptSettings(**keys), parse_prompts))


def test_a_part_of_a_file_is_read(prompt_file):
    assert read(prompt_path=prompt_file) == LINES
    assert read(prompt_path=prompt_file, start_index=2, end_index=4) == LINES[2:4]
    with pytest.raises(
        ValueError, match=r"no prompts between start_index \(8\) and end_index \(9\).*change them"
    ):
        read(prompt_path=prompt_file, start_index=8, end_index=9)


def test_prompts_of_the_config_win_over_the_file(prompt_file):
    assert read(prompt=["mine"], prompt_path=prompt_file) == ["mine"]


def test_validation_takes_the_first_training_prompts_or_its_own_file(prompt_file):
    training = parse_prompts(["one", "two", "three", "four", "five"])

    def chosen(count, **keys):
        return texts(read_validation_prompts(PromptSettings(**keys), parse_prompts, training, count))

    assert chosen(4) == ["one", "two", "three", "four"]
    assert chosen(9) == ["one", "two", "three", "four", "five"]
    assert chosen(2, val_prompt_path=prompt_file) == LINES[:2]


def test_a_validation_has_num_val_runs_batches_and_one_when_debugging(twin, tmp_path):
    def chosen(**keys):
        values = twins.settings(twin, tmp_path / "run", val_batch_size=2, num_val_runs=2, **keys)
        return texts(build_config(values).validation_prompt_list)

    prompts = ["one", "two", "three", "four", "five"]
    assert chosen(prompt=prompts) == prompts[:4]
    assert chosen(prompt=prompts, debug=True) == prompts[:2]


def test_a_config_parses_its_prompts_in_the_grammar_of_the_family(twin, tmp_path):
    text = "|0|dawn|1|noon"
    flags = dict(is_vader_training=False, loop=2, condition_frame_length=2)
    config = build_config(twins.settings(twin, tmp_path / "run", prompt=[text], **flags))
    assert config.prompt_list == parse_prompts([text]) and config.prompt_list is config.prompt_list


def faults_of(training: bool = True, **keys) -> list[str]:
    return prompt_file_errors(PromptSettings(**keys), training)


def test_files_that_hold_no_prompts_are_named(tmp_path, prompt_file):
    assert faults_of(prompt_path=prompt_file) == []
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("ein roter Fuchs läuft".encode("latin-1"))
    said = {"empty.txt": "holds no prompts", "latin.txt": "UTF-8", "no": "does not exist"}
    for name, words in said.items():
        (sentence,) = faults_of(prompt_path=str(tmp_path / name))
        assert sentence.startswith("prompt_path: ") and words in sentence
        (sentence,) = faults_of(prompt=["a fox"], val_prompt_path=str(tmp_path / name))
        assert sentence.startswith("val_prompt_path: ") and words in sentence
    # Of what is not read nothing is wrong.
    nowhere = str(tmp_path / "no")
    assert faults_of(prompt=["a fox"], prompt_path=nowhere) == []
    assert faults_of(training=False, prompt=["a fox"], val_prompt_path=nowhere) == []
