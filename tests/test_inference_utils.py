"""Prompts, conditions and references; text formats against golden/prompts.json from the public release."""

import json
from pathlib import Path

import pytest
import torch

from opensora.datasets import save_sample
from opensora.models.text_encoder.caption_cleaning import clean_caption
from opensora.utils import inference_utils as iu

GOLDEN = json.loads((Path(__file__).parent / "golden" / "prompts.json").read_text())
PROMPTS = pytest.mark.parametrize("case", GOLDEN["prompts"], ids=lambda case: case["prompt"])


@PROMPTS
def test_json_suffix_of_the_release(case):
    extracted = iu.extract_json_from_prompts([case["prompt"]], [""], [""])
    assert [field[0] for field in extracted] == case["extracted"]


@PROMPTS
def test_segments_and_scores_of_the_release(case):
    segments, loops = iu.split_prompt(case["extracted"][0])
    assert (segments, loops) == (case["segments"], case["loop_idx"])
    assert iu.append_score_to_prompts(segments, aes=6.5) == case["scored"]
    assert iu.append_score_to_prompts(segments, 7.0, 3.0, "pan left") == case["scored2"]


@PROMPTS
def test_loops_of_the_release(case):
    merged = iu.merge_prompt(
        [clean_caption(clean_caption(text)) for text in case["scored"]], case["loop_idx"]
    )
    assert merged == case["merged"]
    assert iu.extract_prompts_loop([merged], 0) == [case["loop0"]]
    assert iu.extract_prompts_loop([merged], 2) == [case["loop2"]]


@pytest.mark.parametrize(("text", "groups"), GOLDEN["mask_strategy"])
def test_mask_strategies_of_the_release(text, groups):
    assert [list(group) for group in iu.parse_mask_strategy(text)] == groups


def test_json_suffix_overrides_the_defaults_and_leaves_them_alone():
    references, strategies = ["default.png", "default.png"], ["0", "0"]
    prompts = ["a cat", 'a dog{"reference_path": "dog.png"}']
    extracted = iu.extract_json_from_prompts(prompts, references, strategies)
    assert extracted == (["a cat", "a dog"], ["default.png", "dog.png"], ["0", "0"])
    assert references == ["default.png", "default.png"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a {red} cat", "malformed JSON"),
        ('a cat{"reference_path": "a.png"', "malformed JSON"),
        ('a cat{"reference": "a.png"}', "sets reference in its JSON suffix; only reference_path"),
        ('a cat{"mask_strategy": 0}', "put them in quotes"),
    ],
)
def test_bad_json_suffix(prompt, reason):
    with pytest.raises(ValueError, match=reason):
        iu.extract_json_from_prompts([prompt], [""], [""])


@pytest.mark.parametrize("prompt", ["|0|a|1", "|0|a|x|b", "|0|a|2|b|1|c", "|0|a|0|b"])
def test_bad_segments(prompt):
    with pytest.raises(ValueError, match="malformed segments; write"):
        iu.split_prompt(prompt)


@pytest.mark.parametrize(
    "strategy", ["a", "0,", "0,0,0,0,1,0,0", "0.5", "-1", "0,-1", "0,0,0,0,0", "0,0,0,0,1,2"]
)
def test_bad_mask_strategy(strategy):
    with pytest.raises(ValueError, match="has a bad group .* write up to six numbers"):
        iu.parse_mask_strategy(strategy)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa café\n\n  two \nthree\n", encoding="utf-8")
    assert iu.load_prompts(path) == ["a café", "two", "three"]
    assert iu.load_prompts(path, 1, 2) == ["two"]
    with pytest.raises(ValueError, match="has 3 prompts and start_index=3, end_index=None selects none"):
        iu.load_prompts(path, 3)
    with pytest.raises(FileNotFoundError, match="set prompt_path"):
        iu.load_prompts(tmp_path / "none.txt")


def test_video_info_is_repeated_over_the_batch():
    info = iu.prepare_multi_resolution_info("STDiT2", 2, (240, 426), 51, 24, "cpu", torch.float32)
    expected = dict(height=240, width=426, num_frames=51, fps=24, ar=240 / 426)
    assert info.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(info[name], torch.full((2,), float(value)))


def test_a_still_picture_has_its_own_frame_rate():
    info = iu.prepare_multi_resolution_info("STDiT2", 1, (240, 426), 1, 24, "cpu", torch.bfloat16)
    assert info["fps"].tolist() == [120]
    assert info["fps"].dtype == torch.bfloat16


def test_other_info_types():
    assert iu.prepare_multi_resolution_info(None, 2, (240, 480), 1, 24, "cpu", torch.float32) == {}
    with pytest.raises(ValueError, match="multi_resolution='STDiT9' is unknown"):
        iu.prepare_multi_resolution_info("STDiT9", 2, (240, 480), 1, 24, "cpu", torch.float32)


def frames(*values):
    """A latent [1, T, 1, 1] with one value per frame."""
    return torch.tensor(values, dtype=torch.float)[None, :, None, None]


def conditioned(strategy, references, length=15, loop_i=0, align=None):
    """Frame values [T] and mask [T] (or None) after a strategy was applied to a zero latent."""
    z = torch.zeros(1, 1, length, 1, 1)
    mask = iu.apply_mask_strategy(z, [references], [strategy], loop_i, align=align)
    return z[0, 0, :, 0, 0].tolist(), None if mask is None else mask[0].tolist()


def test_one_reference_frame_is_kept():
    values, mask = conditioned("0", [frames(7)], length=4)
    assert values == [7, 0, 0, 0]
    assert mask == [0, 1, 1, 1]


def test_starts_count_from_either_end_and_length_stops_at_the_ends():
    assert conditioned("0,0,-2,0,9", [frames(1, 2, 3)], length=4) == ([2, 3, 0, 0], [0, 0, 1, 1])
    assert conditioned("0,0,0,-1,2,0.5", [frames(1, 2, 3)], length=4) == ([0, 0, 0, 1], [1, 1, 1, 0.5])


def test_groups_name_their_reference_and_their_loop():
    references = [frames(1), frames(2)]
    assert conditioned("0,1;0,0,0,2;1", references, length=3) == ([2, 0, 1], [0, 1, 0])
    assert conditioned("0;1,1", references, length=3, loop_i=1) == ([2, 0, 0], [0, 1, 1])


# A start moves to the nearest chunk of 5; a tie moves down, and only a whole chunk can be moved up to.
@pytest.mark.parametrize(("start", "aligned"), [(0, 0), (2, 0), (3, 5), (6, 5), (8, 10), (12, 10), (14, 10)])
def test_starts_are_aligned_to_chunks(start, aligned):
    values, mask = conditioned(f"0,0,0,{start}", [frames(7)], align=5)
    assert values.index(7) == mask.index(0) == aligned


def test_an_even_alignment_breaks_ties_downwards():
    assert conditioned("0,0,0,2", [frames(7)], length=8, align=4)[0].index(7) == 0


def test_reference_starts_are_aligned_too():
    reference = frames(*range(1, 16))
    assert conditioned("0,0,-5,0,5", [reference], length=5, align=5)[0] == [11, 12, 13, 14, 15]
    assert conditioned("0,0,-3,0,5", [reference], length=5, align=5)[0] == [11, 12, 13, 14, 15]


def test_there_is_no_mask_where_nothing_is_given():
    assert conditioned("", [])[1] is None
    assert conditioned("1", [frames(7)], loop_i=0)[1] is None


def test_each_sample_of_a_batch_has_its_own_row():
    z = torch.zeros(2, 1, 3, 1, 1)
    mask = iu.apply_mask_strategy(z, [[], [frames(7)]], ["", "0,0,0,1"], 0)
    assert mask.tolist() == [[1, 1, 1], [1, 0, 1]]
    assert z[:, 0, :, 0, 0].tolist() == [[0, 0, 0], [0, 7, 0]]


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("0,1", "names reference 1, but the sample has 1"),
        ("0,0,0,15", "target_start 15, but there are only 15 latent frames; use -15 to 14"),
        ("0,0,-3", "reference_start -3, but there are only 2"),
    ],
)
def test_a_frame_or_reference_that_does_not_exist(strategy, reason):
    with pytest.raises(ValueError, match=reason):
        conditioned(strategy, [frames(1, 2)])


class FrameMeans:
    """A VAE whose latent is the mean of each frame, [B, 1, T, 1, 1]."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, x):
        return x.mean((1, 3, 4), keepdim=True)


def test_references_are_read_and_encoded(tmp_path):
    light = save_sample(torch.ones(3, 1, 8, 8), tmp_path / "light", verbose=False)
    dark = save_sample(-torch.ones(3, 4, 16, 16), tmp_path / "dark", verbose=False)
    none, both = iu.collect_references_batch(["", f"{light};{dark}"], FrameMeans(), (8, 8))
    assert none == []
    assert [latent.shape for latent in both] == [(1, 1, 1, 1), (1, 4, 1, 1)]
    assert [latent.mean().item() for latent in both] == pytest.approx([1, -1], abs=0.02)


def test_the_end_of_a_clip_becomes_the_start_of_the_next():
    clip = torch.arange(10.0).view(1, 1, 10, 1, 1).expand(2, 3, 10, 2, 2)
    vae = FrameMeans()
    refs, strategy = iu.append_generated(vae, clip, [None, [frames(7)]], [None, "0"], 1, 5, 0.25)
    assert strategy == ["1,0,-5,0,5,0.25", "0;1,1,-5,0,5,0.25"]
    z = torch.zeros(2, 1, 10, 1, 1)
    mask = iu.apply_mask_strategy(z, refs, strategy, 1, align=5)
    assert z[:, 0, :, 0, 0].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0, 0, 0]] * 2
    assert mask.tolist() == [[0.25] * 5 + [1] * 5] * 2
