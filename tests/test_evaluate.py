"""Paired evaluation: statistics, tables, the two command lines, and what they refuse."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import twins
from huggingface_hub.errors import LocalEntryNotFoundError
from sampling_runs import SCHEDULER, contents, picture, random_adapter
from twin_runs import built_trainer

from Core.backbones import Backbone, Prompt
from Core.cli import exit_code
from Core.commands import evaluate, score
from Core.config import ConfigError
from Core.data.video import read_video
from Core.evaluation import compare as comparison
from Core.evaluation import metrics
from Core.evaluation.compare import Row, per_prompt, summary, training_prompts
from Core.evaluation.metrics import diversity, motion, paired_gain
from Core.evaluation.score_videos import Clip, Scorers, find_clips, parse_reward_arguments, prompt_from_name
from Core.evaluation.vbench_files import read_vbench_prompts
from Core.rewards import build_reward
from Core.training import validation
from Core.utils.distributed import Distributed
from opensora.datasets import save_sample


def test_the_interval_covers_the_true_gain_as_often_as_it_says(monkeypatch):
    """Simulated: 40 prompts, 2 seeds, prompts that differ more than seeds, true gain 0.3."""
    monkeypatch.setattr(metrics, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(500):
        before = rng.normal(size=(40, 1)) + rng.normal(size=(40, 2))
        gain = rng.normal(0.3, 0.5, size=(40, 1)) + rng.normal(0, 0.4, size=(40, 2))
        found = paired_gain(before, before + gain, seed=trial)
        covered.append(found.low <= 0.3 <= found.high)
    # Binomial: 500 trials at 0.95 stay within 0.92 and 0.98 but once in 300 times; the bootstrap is a little low.
    assert 0.915 <= np.mean(covered) <= 0.98


def test_missing_weights_are_named_before_the_first_video(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr(comparison, "make_videos", lambda *_: pytest.fail("videos came first"))
    rewards = {"pick_score": {"model": "someone/clip"}, "motion": {}, "actpred": {"model": "someone/actions"}}
    with pytest.raises(ConfigError) as error:
        comparison.compare(SimpleNamespace(backbone=Backbone), Distributed(), [], rewards, tmp_path)
    assert len(error.value.errors) == 1, "each reason once, however many weights lack for it"


def test_no_difference_is_no_gain():
    scores = np.random.default_rng(0).normal(size=(16, 2))
    gain = paired_gain(scores, scores)
    assert (gain.gain, gain.low, gain.high, gain.win_rate, gain.significant) == (0, 0, 0, 0.5, False)
    noise = paired_gain(scores, np.random.default_rng(1).permutation(scores))
    assert noise.low < 0 < noise.high and not noise.significant


def test_a_gain_is_worked_out_by_hand():
    gain = paired_gain([[1, 2], [3, 4]], [[2, 2], [5, 3]])
    assert (gain.before, gain.after, gain.gain, gain.videos) == (2.5, 3.0, 0.5, 4)
    assert gain.win_rate == (2 + 0.5) / 4
    assert (gain.low, gain.high) == (0.5, 0.5)  # both prompts gain the same


def test_motion_and_diversity_by_hand():
    still = torch.zeros(3, 4, 2, 2)
    moving = torch.stack([torch.full((3, 2, 2), float(step % 2)) for step in range(4)], dim=1)
    assert motion(torch.stack([still, moving])).tolist() == [0.0, 1.0]
    assert diversity(torch.stack([still, still + 0.5])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least 2 videos"):
        diversity(still[None])


def rows(seen=(True, False, False)):
    """Three prompts, two seeds; the adapter raises ``up`` by 1 and ``size`` by 2."""
    return [
        Row(
            variant,
            index,
            f"prompt {index}",
            seed,
            "file",
            known,
            {"up": index + number, "size": 2.0 * number},
        )
        for number, variant in enumerate(("base", "fox"))
        for index, known in enumerate(seen)
        for seed in (7, 8)
    ]


def test_held_out_prompts_are_summed_up_apart():
    table = {(r["measure"], r["prompts_are"]): r for r in summary(rows(), {"size"})}
    assert {kind for _, kind in table} == {"all", "held-out", "training"}
    assert table["up", "held-out"]["prompts"] == 2 and table["up", "held-out"]["gain"] == 1
    assert table["up", "all"]["win_rate"] == 1 and table["size", "all"]["win_rate"] == 0
    assert {r["prompts_are"] for r in summary(rows((None,) * 3), set())} == {"all"}
    assert {r["prompts_are"] for r in summary(rows((False,) * 3), set())} == {"held-out"}
    lines = per_prompt(rows(), set())
    assert [line["in_training"] for line in lines] == ["yes", "no", "no"]
    assert (lines[2]["up_before"], lines[2]["up_after"], lines[2]["up_gain"]) == (2, 3, 1)


@pytest.fixture(scope="module")
def trained(twin, tmp_path_factory):
    """Config of a run whose adapter was trained on the twin's first two prompts."""
    run = tmp_path_factory.mktemp("runs") / "fox"
    random_adapter(run / "adapter")
    values = twins.settings(twin, run, scheduler=SCHEDULER, val_batch_size=4, end_index=2)
    twins.config_file(run / "config.py", values)
    return run


def run_evaluation(trained, out, *flags):
    argv = [str(trained / "config.py"), "--adapter", str(trained / "adapter"), "--out", str(out), *flags]
    return exit_code(lambda: evaluate.evaluate(argv))


def test_evaluation_writes_tables_that_agree_and_repeat(twin, trained, tmp_path, capsys):
    out = tmp_path / "evaluation"
    flags = (
        "--prompts",
        str(twin / "prompts.txt"),
        "--end-index",
        "None",
        "--num-sample",
        "2",
        "--seed",
        "5",
    )
    assert run_evaluation(trained, out, *flags) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["prompts"], result["seeds"], result["training_prompts"]) == (4, [5, 6], 2)
    found = {(row["measure"], row["prompts_are"]): row for row in result["summary"]}
    assert list(dict.fromkeys(measure for measure, _ in found)) == [
        "pick_score", "sharpness", "motion", "diversity",
    ], "the reward first"  # fmt: skip
    assert found["pick_score", "held-out"]["prompts"] == 2 and "2 held-out" in printed
    with open(out / "videos.csv", newline="") as file:
        videos = list(csv.DictReader(file))
    assert len(videos) == 16 and all((out / row["file"]).is_file() for row in videos)
    assert [row["in_training"] for row in videos[:4]] == ["yes"] * 4
    means = {
        v: np.mean([float(r["pick_score"]) for r in videos if r["variant"] == v]) for v in ("base", "fox")
    }
    row = found["pick_score", "all"]
    assert (row["before"], row["after"]) == pytest.approx((means["base"], means["fox"]), rel=1e-5)
    assert row["low"] <= row["gain"] <= row["high"]

    tables = contents(out, ".csv") | contents(out, ".json")
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert run_evaluation(trained, out, *flags) == 0
    assert contents(out, ".csv") | contents(out, ".json") == tables
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == made
    shutil.rmtree(out / "videos" / "fox")
    assert run_evaluation(trained, out, *flags) == 0
    with open(out / "videos.csv", newline="") as file:
        again = list(csv.DictReader(file))
    # Made in other batches, a score may differ in its last digits.
    for measure in ("pick_score", "motion", "sharpness"):
        was, now = ([float(row[measure]) for row in rows] for rows in (videos, again))
        assert now == pytest.approx(was, rel=1e-4)


VBENCH_LIST = [
    {"prompt_en": "a red fox, front view", "dimension": ["spatial_relationship"], "auxiliary_info": {"a": 1}},
    {"prompt_en": "a blue bird", "dimension": ["dynamic_degree", "subject_consistency"]},
    {"prompt_en": "a green dog's tail", "dimension": ["dynamic_degree"]},
    {"prompt_en": "a blue bird", "dimension": ["motion_smoothness"]},
]


@pytest.fixture
def vbench_list(tmp_path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(VBENCH_LIST), encoding="utf-8")
    return path


def test_vbench_s_prompts_are_read_by_dimension(vbench_list):
    every = ["a red fox, front view", "a blue bird", "a green dog's tail"]
    assert read_vbench_prompts(vbench_list) == every
    assert read_vbench_prompts(vbench_list, ["dynamic_degree"]) == every[1:]
    assert read_vbench_prompts(vbench_list, ["motion_smoothness"]) == every[1:2]
    with pytest.raises(ValueError, match="did you mean 'dynamic_degree'"):
        read_vbench_prompts(vbench_list, ["dynamic_degre"])


def test_vbench_finds_the_videos_under_the_names_it_looks_for(trained, tmp_path, vbench_list, capsys):
    """Its standard mode wants ``{prompt}-{0…4}.mp4`` of each prompt, in one folder."""
    out = tmp_path / "evaluation"
    flags = ("--prompts", str(vbench_list), "--dimensions", "dynamic_degree", "--rewards", "dynamic_degree")
    assert run_evaluation(trained, out, *flags, "--num-sample", "2", "--end-index", "None") == 0
    expected = {f"{prompt}-{i}.mp4" for prompt in ("a blue bird", "a green dog's tail") for i in (0, 1)}
    for variant in ("base", "fox"):
        folder = out / "vbench" / variant
        assert {path.name for path in folder.iterdir()} == expected
        assert all(read_video(path).shape[1] == 17 for path in folder.iterdir())
    printed = capsys.readouterr().out
    assert f"--videos_path {out / 'vbench' / 'fox'} --full_json_dir {vbench_list}" in printed
    assert "for dimension in dynamic_degree; do vbench evaluate" in printed and "set --num-sample" in printed


def test_other_prompts_are_laid_out_for_vbench_s_own_tool_too(trained, tmp_path, capsys):
    prompts = tmp_path / "subject_consistency.txt"
    prompts.write_text("a red fox\n", encoding="utf-8")
    flags = ("--prompts", str(prompts), "--rewards", "temporal_flickering", "--vbench", "--end-index", "None")
    assert run_evaluation(trained, tmp_path / "out", *flags) == 0
    assert [path.name for path in (tmp_path / "out" / "vbench" / "base").iterdir()] == ["a red fox-0.mp4"]
    assert "--mode custom_input" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no prompt list of VBench"),
        ('[{"prompt": "a"}]', "KeyError"),
        ("[]", "holds no prompts"),
        ('[{"prompt_en": "a/b", "dimension": ["color"]}]', "holds a slash"),
        (json.dumps([{"prompt_en": "fox " * 70, "dimension": ["color"]}]), "is too long"),
    ],
)
def test_a_list_that_vbench_could_not_use_is_refused_in_a_sentence(trained, tmp_path, capsys, content, words):
    path = tmp_path / "list.json"
    path.write_text(content, encoding="utf-8")
    assert run_evaluation(trained, tmp_path / "out", "--prompts", str(path), "--rewards", "sharpness") == 2
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told


def test_the_base_model_against_itself_shows_nothing(trained, tmp_path):
    """At strength 0 the adapter is the base model, and its videos the same to the byte."""
    out = tmp_path / "evaluation"
    assert run_evaluation(trained, out, "--lora-scale", "0", "--rewards", "sharpness") == 0
    assert contents(out / "videos" / "base") == contents(out / "videos" / "fox")
    for row in json.loads((out / "evaluation.json").read_text())["summary"]:
        assert (row["gain"], row["low"], row["high"], row["significant"]) == (0, 0, 0, False)
        assert row["win_rate"] == 0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rewards", "picks_score"), "unknown reward 'picks_score': did you mean 'pick_score'?"),
        (("--rewards", "sharpness", "--reward-arguments", "{"), "--reward-arguments is no JSON"),
        (("--rewards", "sharpness", "--reward-arguments", '{"hps": {}}'), "'hps', which is not among"),
        (("--adapter", "nowhere"), "there is no file or folder 'nowhere'"),
        (("--prompts", "nowhere.txt"), "'nowhere.txt' does not exist"),
        (("--dimensions", "color"), "--dimensions chooses from VBench's list"),
        (("--seeed", "1"), "did you mean '--seed'?"),
    ],
)
def test_bad_input_is_one_sentence(trained, tmp_path, capsys, flags, words):
    assert run_evaluation(trained, tmp_path / "out", *flags) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and told.startswith("error: ") and "\n" not in told


def test_training_prompts_are_found_from_run_and_checkpoint(trained, tmp_path):
    expected = twins.PROMPTS[:2]
    assert training_prompts(trained / "adapter") == expected
    assert training_prompts(trained / "checkpoints" / "step_000004" / "adapter") == expected
    assert training_prompts(tmp_path / "loose" / "adapter") is None


def clips_folder(folder, names=("a_red_fox-0", "a_red_fox-1", "0003_blue_bird")):
    for number, name in enumerate(names):
        picture(folder / name, frames=5, seed=number)
    return folder


def test_a_clip_is_read_as_it_was_written(tmp_path):
    clip = torch.linspace(-1, 1, 3 * 32 * 48).view(3, 1, 32, 48).repeat(1, 4, 1, 1)
    read = read_video(tmp_path / save_sample(clip, str(tmp_path / "clip"), verbose=False))
    assert read.shape == clip.shape and (read - clip).abs().mean() < 0.05
    image = read_video(tmp_path / save_sample(clip[:, :1], str(tmp_path / "image"), verbose=False))
    assert (image - clip[:, :1]).abs().max() <= 1 / 255


def test_prompts_of_a_folder(tmp_path):
    folder = clips_folder(tmp_path / "clips")
    assert [clip.prompt.text for clip in find_clips(folder)] == ["blue bird", "a red fox", "a red fox"]
    (tmp_path / "list.txt").write_text("one\n\ntwo\nthree\n")
    assert [clip.prompt.text for clip in find_clips(folder, tmp_path / "list.txt")] == [
        "one",
        "two",
        "three",
    ]
    (tmp_path / "list.csv").write_text(
        'file,prompt\na_red_fox-0.mp4,"fox, red"\na_red_fox-1.mp4,b\n0003_blue_bird.mp4,c\n'
    )
    assert [clip.prompt.text for clip in find_clips(folder, tmp_path / "list.csv")] == [
        "c",
        "fox, red",
        "b",
    ]
    assert prompt_from_name("0012_0_a_fox_runs") == "a fox runs"
    assert prompt_from_name("123") == "123"


def recorded(folder, **entry):
    """A folder of one video with this entry of a manifest."""
    picture(folder / "clip", frames=5)
    (folder / "prompts.jsonl").write_text(json.dumps({"name": "clip", "file": "clip.mp4", **entry}) + "\n")
    return folder


BRACES = ["a fox {red", "a sign that says {open}", '{"a": 1} in neon']


@pytest.mark.parametrize("text", BRACES)
def test_a_brace_in_a_manifest_without_a_family_is_a_brace(tmp_path, text):
    """Another tool's manifest knows no grammar of this one."""
    (clip,) = find_clips(recorded(tmp_path / "clips", prompt=text, seed=0))
    assert clip.prompt.reward_text == clip.prompt.text == clip.prompt.written == text


@pytest.mark.parametrize("text", BRACES)
def test_a_brace_in_a_list_or_a_file_s_name_is_a_brace(tmp_path, text):
    folder = tmp_path / "clips"
    picture(folder / "a_fox_{red_0", frames=5)
    (tmp_path / "list.txt").write_text(f"{text}\n")
    (tmp_path / "list.jsonl").write_text(json.dumps({"file": "a_fox_{red_0.mp4", "prompt": text}) + "\n")
    for list_name in ("list.txt", "list.jsonl"):
        (clip,) = find_clips(folder, tmp_path / list_name)
        assert clip.prompt.reward_text == clip.prompt.text == clip.prompt.written == text
    (clip,) = find_clips(folder)
    assert clip.prompt.reward_text == "a fox {red"


def test_a_recorded_prompt_is_read_in_the_grammar_of_its_family(tmp_path):
    segments = "|0|a fox aesthetic score: 6.5.|2|a bird"
    (clip,) = find_clips(recorded(tmp_path / "new", prompt=segments, seed=0, backbone="opensora"))
    assert clip.prompt.reward_text == "a fox" and clip.prompt.written == segments
    # Open-Sora's own videos were recorded without a family while there was no other.
    (older,) = find_clips(recorded(tmp_path / "old", prompt=segments, seed=0, reference_path=""))
    assert older.prompt == clip.prompt


def score_videos_of(reward, pixels) -> float:
    return metrics.score_videos(reward, pixels[None], [Prompt("a fox")]).score.item()


def test_a_reward_named_like_a_measure_takes_its_place(tmp_path):
    clip = Clip(Path(picture(tmp_path / "clip", frames=5)), Prompt("a fox"))
    pixels = read_video(clip.path)
    measured = motion(pixels[None]).item()
    (plain,) = Scorers([], {})([clip])
    assert plain["motion"] == pytest.approx(measured, rel=1e-5)
    own = {"target": 0.5}
    (scored,) = Scorers(["motion"], {"motion": own})([clip])
    assert scored["motion"] == pytest.approx(score_videos_of(build_reward("motion", own), pixels), rel=1e-5)
    assert scored["motion"] != pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("role", ["reward", "part", "monitor"])
def test_a_validation_s_motion_is_that_of_the_scorer_of_that_name(twin, tmp_path, monkeypatch, role):
    own, clip = {"target": 0.5}, {"model": str(twin / "clip")}
    mixture = dict(
        reward_fn={"motion": 1.0, "pick_score": 1.0}, reward_args={"motion": own, "pick_score": clip}
    )
    keys = {
        "reward": dict(reward_fn="motion", reward_args=own, decode_frame="all"),
        "part": mixture | dict(decode_frame="all"),
        "monitor": dict(monitors=["motion"], monitor_args={"motion": own}),
    }[role]
    made, real = [], validation.write_videos

    def watched(*args, **kwargs):
        for video in real(*args, **kwargs):
            made.append(video.pixels)
            yield video

    monkeypatch.setattr(validation, "write_videos", watched)
    schedule = dict(SCHEDULER, num_sampling_steps=1)
    trainer = built_trainer(twin, tmp_path / "run", end_index=1, scheduler=schedule, **keys)
    result = trainer.validation.run(0, tmp_path / "samples")
    (pixels,) = made
    score = score_videos_of(build_reward("motion", own), pixels)
    assert result.means["motion"] == pytest.approx(score, rel=1e-4)
    assert motion(pixels[None]).item() != pytest.approx(score, rel=0.1)
    fps = trainer.config.video.file_fps
    moved = metrics.score_videos(build_reward("dynamic_degree"), pixels[None], [Prompt("")], fps)
    assert result.means["dynamic_degree"] == pytest.approx(
        moved.score.item(), rel=1e-4
    )  # without being asked for


@pytest.mark.parametrize(
    ("list_name", "text", "words"),
    [
        ("short.txt", "one\n", "has 1 prompt for 3 files"),
        ("other.jsonl", '{"file": "a_red_fox-0.mp4", "prompt": "a"}\n', "2 files have no prompt"),
        ("broken.jsonl", "{\n", "cannot be read"),
        ("columns.csv", "name,text\na,b\n", "each row needs file and prompt"),
    ],
)
def test_prompt_lists_that_do_not_fit_are_refused(tmp_path, list_name, text, words):
    (tmp_path / list_name).write_text(text)
    with pytest.raises(ValueError, match=words):
        find_clips(clips_folder(tmp_path / "clips"), tmp_path / list_name)


def test_a_folder_of_videos_is_scored_alone(twin, tmp_path, capsys):
    folder = clips_folder(tmp_path / "clips")
    (folder / "broken.mp4").write_bytes(b"no video")
    flags = SimpleNamespace(arguments=json.dumps({"pick_score": {"model": str(twin / "clip")}}))
    argv = [str(folder), "--rewards", "pick_score", "--reward-arguments", flags.arguments]
    assert score.main(argv) == 1
    assert "1 of 4 videos could not be scored" in capsys.readouterr().err
    with open(folder / "scores.csv", newline="") as file:
        table = {row["file"]: row for row in csv.DictReader(file)}
    assert set(table) == {"a_red_fox-0.mp4", "a_red_fox-1.mp4", "0003_blue_bird.mp4"}
    assert float(table["a_red_fox-0.mp4"]["diversity"]) > 0 and table["0003_blue_bird.mp4"]["diversity"] == ""
    means = json.loads((folder / "scores.json").read_text())
    assert (means["videos"], means["failed"]) == (3, 1) and set(means["means"]) >= {"pick_score", "motion"}

    (folder / "broken.mp4").unlink()
    assert score.main(argv) == 0
    assert "pick_score" in capsys.readouterr().out


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no videos"):
        find_clips(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_clips(tmp_path / "nowhere")


@pytest.mark.parametrize("given", ["[]", '{"hps": 3}', "{"])
def test_reward_arguments_of_another_form_are_refused(given):
    with pytest.raises(ConfigError, match="--reward-arguments"):
        parse_reward_arguments(given)
