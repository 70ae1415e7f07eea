"""Sampling through the real entry point: what is written, and that it depends on prompt and seed alone."""

import json
import shutil
import weakref
from types import SimpleNamespace

import av
import pytest
import torch
import twins
from sampling_runs import SCHEDULER, contents, entries, picture, random_adapter, sample

from Core.backbones.opensora import OpenSora
from Core.backbones.opensora_conditions import OpenSoraConditions
from Core.config import build_config
from Core.data.video import read_video
from Core.generation import generate as inference
from Core.generation.jobs import Variant, plan_of
from Core.generation.manifest import PARTIAL, unfinished
from Core.sampling.kept_frames import KeptFrames


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("runs") / "fox" / "adapter")


@pytest.fixture(scope="module")
def plain(twin, tmp_path_factory):
    """Folder with one video of each of the twin's four prompts, base model, made one by one."""
    folder = tmp_path_factory.mktemp("sampling") / "plain"
    assert sample(twin, folder) == 0
    return folder


def test_a_run_leaves_playable_videos_and_their_settings(plain):
    videos = contents(plain)
    assert list(videos) == [
        "0000_0_a_red_fox_runs_through_snow.mp4",
        "0001_0_a_blue_bird_sits_on_a_branch.mp4",
        "0002_0_a_green_boat_on_a_calm_lake.mp4",
        "0003_0_a_dancer_turns_under_warm_light.mp4",
    ]
    with av.open(str(plain / "0000_0_a_red_fox_runs_through_snow.mp4")) as container:
        stream = container.streams.video[0]
        codec = (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate))
        assert codec == ("h264", "yuv420p", 24.0)
        assert sum(1 for _ in container.decode(stream)) == 17
    entry = entries(plain)["0000_0_a_red_fox_runs_through_snow"]
    told = {key: entry[key] for key in ("prompt", "seed", "adapter", "num_frames", "loop")}
    assert told == {
        "prompt": "a red fox runs through snow", "seed": 200, "adapter": None, "num_frames": 17, "loop": 1,
    }  # fmt: skip
    assert {path.name for path in plain.iterdir()} == {
        *videos,
        "prompts.jsonl",
        "gallery.html",
        "log.txt",
        "environment.json",
    }


def watch_pixels(monkeypatch):
    """Pixels of every video on their way to the encoder, by sample name."""
    seen, real = {}, inference.write_sample

    def watched(pixels, folder, name, *args):
        seen[name] = pixels
        return real(pixels, folder, name, *args)

    monkeypatch.setattr(inference, "write_sample", watched)
    return seen


def test_batches_change_nothing_but_rounding(twin, tmp_path, monkeypatch):
    """Products of other sizes add up in another order: 1e-5 of the range [-1, 1], far below one grey level."""
    made = {}
    for batch in (1, 3):
        seen = watch_pixels(monkeypatch)
        assert sample(twin, tmp_path / str(batch), val_batch_size=batch) == 0
        made[batch] = seen
    assert list(made[1]) == list(made[3]) and len(made[1]) == 4
    for name, pixels in made[1].items():
        torch.testing.assert_close(made[3][name], pixels, atol=1e-4, rtol=0)


def test_a_video_depends_on_its_prompt_and_seed_alone(twin, plain, tmp_path):
    """Other prompts, other numbers of copies and the place in the list change nothing."""
    assert sample(twin, tmp_path / "later", start_index=2, seed=199, num_sample=2) == 0
    assert list(contents(tmp_path / "later"))[::2] == [
        "0002_0_a_green_boat_on_a_calm_lake.mp4",
        "0003_0_a_dancer_turns_under_warm_light.mp4",
    ]
    later = entries(tmp_path / "later")
    assert [entry["seed"] for entry in later.values()] == [199, 200, 199, 200]
    again = (tmp_path / "later" / "0003_1_a_dancer_turns_under_warm_light.mp4").read_bytes()
    assert again == contents(plain)["0003_0_a_dancer_turns_under_warm_light.mp4"]
    assert len(set(contents(tmp_path / "later").values())) == 4


def test_adapters_stand_side_by_side(twin, plain, adapter, tmp_path):
    other = random_adapter(tmp_path / "bird" / "checkpoints" / "step_000005" / "adapter", seed=1)
    run = tmp_path / "run"
    assert sample(twin, run, lora_ckpt_path=["base", adapter, other], end_index=2, save_gif=True) == 0
    base, fox, bird = (contents(run / name) for name in ("base", "fox", "step_000005"))
    assert base == dict(list(contents(plain).items())[:2])
    assert list(base) == list(fox) == list(bird)
    assert all(len({base[name], fox[name], bird[name]}) == 3 for name in base)
    assert {path.stem for path in (run / "fox").glob("*.gif")} == {name[:-4] for name in fox}
    recorded = entries(run / "fox")["0000_0_a_red_fox_runs_through_snow"]
    assert (recorded["adapter"], recorded["lora_scale"]) == (adapter, 1.0)
    assert len(recorded["adapter_sha256"]) == 64


def test_the_adapter_s_strength_counts(twin, plain, adapter, tmp_path):
    flags = dict(lora_ckpt_path=adapter, end_index=1)
    name = "0000_0_a_red_fox_runs_through_snow.mp4"
    made = {}
    for scale in (0.0, 0.5, 1.0):
        assert sample(twin, tmp_path / str(scale), lora_scale=scale, **flags) == 0
        made[scale] = contents(tmp_path / str(scale))[name]
    assert made[0.0] == contents(plain)[name]
    assert len(set(made.values())) == 3


def test_one_frame_is_a_picture(twin, tmp_path):
    assert sample(twin, tmp_path / "run", num_frames=1, end_index=1, save_gif=True) == 0
    assert [path.name for path in (tmp_path / "run").glob("0*")] == ["0000_0_a_red_fox_runs_through_snow.png"]


def watch_sampler(monkeypatch):
    """(mask, result) of every call of the sampler; None for the mask where no frame is given."""
    calls, real = [], inference.run_steps

    def watched(step, *args):
        mask = step.mask if isinstance(step, KeptFrames) else None
        calls.append((mask, real(step, *args)))
        return calls[-1][1]

    monkeypatch.setattr(inference, "run_steps", watched)
    return calls


@pytest.mark.parametrize(("length", "overlap"), [(1, 1), (2, 5), (4, 13)])
def test_long_video_keeps_the_frames_it_takes_over(twin, tmp_path, monkeypatch, length, overlap):
    calls = watch_sampler(monkeypatch)
    encoded, real = [], OpenSoraConditions.follow

    def watched(conditions, clip, number):
        encoded.append(conditions.vae.encode(clip[:, :, -overlap:]))
        real(conditions, clip, number)

    monkeypatch.setattr(OpenSoraConditions, "follow", watched)
    flags = dict(loop=4, condition_frame_length=length, end_index=2, val_batch_size=2)
    assert sample(twin, tmp_path / "run", **flags) == 0
    assert [mask is None for mask, _ in calls] == [True, False, False, False]
    for tail, (mask, result) in zip(encoded, calls[1:], strict=True):
        assert torch.equal(mask, torch.tensor([[0.0] * length + [1.0] * (5 - length)] * 2))
        torch.testing.assert_close(result[:, :, :length], tail, atol=1e-5, rtol=0)
    for path in (tmp_path / "run").glob("*.mp4"):
        assert read_video(path).shape[1] == 17 + 3 * (17 - overlap)


def test_a_whole_chunk_can_be_taken_over(twin, tmp_path):
    """Upstream's setting: 5 of the 10 latent frames of a 34-frame clip."""
    assert sample(twin, tmp_path / "run", num_frames=34, loop=3, end_index=1) == 0
    assert read_video(next((tmp_path / "run").glob("*.mp4"))).shape[1] == 34 + 2 * 17


@pytest.mark.parametrize("frames", [1, 17])
def test_conditioning_keeps_the_reference(twin, tmp_path, monkeypatch, frames):
    """The given latents stay as they are, next to a prompt that is given none."""
    reference = picture(tmp_path / "reference", frames)
    calls = watch_sampler(monkeypatch)
    seen, real = [], OpenSora.conditions

    def watched(backbone, prompts):
        conditions = real(backbone, prompts)
        seen.append(conditions.references)
        return conditions

    monkeypatch.setattr(OpenSora, "conditions", watched)
    length = 1 if frames == 1 else 2
    suffix = json.dumps({"reference_path": reference, "mask_strategy": f"0,0,0,0,{length}"})
    assert sample(twin, tmp_path / "run", prompt=["a fox" + suffix, "a bird"], val_batch_size=2) == 0
    ((mask, result),), (references,) = calls, seen
    assert mask.tolist() == [[0.0] * length + [1.0] * (5 - length), [1.0] * 5]
    torch.testing.assert_close(result[0, :, :length], references[0][0][:, :length], atol=1e-5, rtol=0)
    assert entries(tmp_path / "run")["0000_0_a_fox"]["reference_path"] == reference


def test_a_conditioned_neighbour_changes_nothing(twin, tmp_path, monkeypatch):
    """A prompt without a reference is the same video whether or not its batch has one."""
    suffix = json.dumps({"reference_path": picture(tmp_path / "reference"), "mask_strategy": "0"})
    made = []
    for batch in (1, 2):
        seen = watch_pixels(monkeypatch)
        assert (
            sample(twin, tmp_path / str(batch), prompt=["a fox" + suffix, "a bird"], val_batch_size=batch)
            == 0
        )
        made.append(seen["0001_0_a_bird"])
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=0)


def test_segments_take_over_at_their_loop(twin, tmp_path, monkeypatch):
    told, encoded = [], []
    predictor, generate = OpenSora.predictor, inference.generate

    def watched(backbone, text):
        told.append(text)
        return predictor(backbone, text)

    monkeypatch.setattr(OpenSora, "predictor", watched)
    monkeypatch.setattr(inference, "generate", lambda *args: encoded.extend(args[2]) or generate(*args))
    texts = ["|0|a fox|2|a bird", "a boat"]
    flags = dict(loop=3, condition_frame_length=2, val_batch_size=2)
    assert sample(twin, tmp_path / "run", prompt=texts, **flags) == 0
    assert [text.prompt.texts for text in encoded] == [("a fox", "a bird"), ("a boat",)]
    (fox, bird), (boat,) = (text.features for text in encoded)
    assert not torch.equal(fox["features"], bird["features"])
    expected = [[fox, boat], [fox, boat], [bird, boat]]
    assert [[id(f) for f in clip] for clip in told] == [[id(f) for f in clip] for clip in expected]
    assert entries(tmp_path / "run")["0000_0_a_fox"]["prompt"] == "|0|a fox|2|a bird"


def test_what_is_there_is_not_made_again(twin, tmp_path, monkeypatch):
    run = tmp_path / "run"
    published, real = [], inference.publish

    def interrupted(path):
        if len(published) == 2:
            raise KeyboardInterrupt
        published.append(path.name)
        real(path)

    monkeypatch.setattr(inference, "publish", interrupted)
    assert sample(twin, run, save_gif=True) == 130
    assert list(contents(run)) == published
    assert any(path.name.startswith(PARTIAL) for path in run.iterdir())

    again = []
    monkeypatch.setattr(inference, "publish", lambda path: again.append(path.name) or real(path))
    assert sample(twin, run, save_gif=True) == 0
    assert sorted(published + again) == list(contents(run)) and len(again) == 2
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert len((run / "prompts.jsonl").read_text().splitlines()) == 4

    monkeypatch.setattr(OpenSora, "load", lambda self: pytest.fail("nothing is left to make"))
    assert sample(twin, run, save_gif=True) == 0


def test_other_settings_replace_with_a_warning(twin, plain, tmp_path, caplog):
    run = tmp_path / "run"
    for seed in (200, 201):
        assert sample(twin, run, end_index=1, seed=seed) == 0
    assert (
        "1 video in" in (run / "log.txt").read_text()
        and "choose another project_dir" in (run / "log.txt").read_text()
    )
    name = "0000_0_a_red_fox_runs_through_snow.mp4"
    assert contents(run)[name] != contents(plain)[name]


def test_older_videos_count_as_made_with_the_defaults_of_newer_keys(twin, plain, tmp_path, monkeypatch):
    """As they were: a key that came later stood, in effect, at its default."""
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    newer = ("backbone", "base_quant", "text_encoding")
    older = [{key: entry[key] for key in entry if key not in newer} for entry in entries(plain).values()]
    (run / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in older))

    def missing(**changes):
        values = twins.settings(twin, run, is_vader_training=False, scheduler=SCHEDULER, **changes)
        config = build_config(values)
        return unfinished(plan_of(config), run, Variant("base").settings(config), config.defaults())

    assert missing() == []
    assert len(missing(base_quant="nf4")) == len(missing(text_encoding="8bit")) == 4
    monkeypatch.setattr(OpenSora, "load", lambda self: pytest.fail("nothing is left to make"))
    assert sample(twin, run) == 0
    assert contents(run) == contents(plain)


def test_a_video_of_other_weights_is_made_again(twin, plain, tmp_path):
    """Weights in 4 bits are others than those in 16, and so are the features of captions encoded in 8."""
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    assert sample(twin, run, base_quant="nf4", end_index=1) == 0
    name = "0000_0_a_red_fox_runs_through_snow"
    assert "1 video in" in (run / "log.txt").read_text()
    assert contents(run)[f"{name}.mp4"] != contents(plain)[f"{name}.mp4"]
    assert entries(run)[name]["base_quant"] == "nf4"


def test_an_adapter_retrained_at_the_same_path_is_another_one(twin, tmp_path):
    path = random_adapter(tmp_path / "run" / "adapter", seed=0)
    flags = dict(lora_ckpt_path=path, end_index=1)
    assert sample(twin, tmp_path / "out", **flags) == 0
    before = contents(tmp_path / "out")
    random_adapter(tmp_path / "run" / "adapter", seed=1)
    assert sample(twin, tmp_path / "out", **flags) == 0
    assert contents(tmp_path / "out") != before


def test_a_failed_prompt_is_named_and_the_rest_goes_on(twin, plain, tmp_path, monkeypatch, capsys):
    real = inference.generate

    def faulty(backbone, samples, *args):
        if any("boat" in s.prompt.text for s in samples):
            raise RuntimeError("out of memory")
        return real(backbone, samples, *args)

    monkeypatch.setattr(inference, "generate", faulty)
    run = tmp_path / "run"
    assert sample(twin, run, val_batch_size=4) == 1
    told = capsys.readouterr().err
    assert "no video for 0002_0_a_green_boat_on_a_calm_lake: out of memory" in told
    assert "error: 1 of 4 videos could not be made" in told
    made = contents(run)
    assert made == {name: data for name, data in contents(plain).items() if "boat" not in name}

    monkeypatch.setattr(inference, "generate", real)
    assert sample(twin, run, val_batch_size=4) == 0
    assert contents(run) == contents(plain)


def test_a_batch_that_failed_holds_no_memory_while_its_videos_are_tried_alone(monkeypatch):
    held = []

    def faulty(backbone, samples, *args):
        assert not [one for one in held if one() is not None]
        large = torch.zeros(len(samples))
        held.append(weakref.ref(large))
        try:
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise ValueError("another that came of it") from error

    monkeypatch.setattr(inference, "generate", faulty)
    backbone = SimpleNamespace(settings=SimpleNamespace(clips_per_video=1))
    pairs = [(SimpleNamespace(name=name), None) for name in "ab"]
    assert inference.generate_each(backbone, pairs, progress=False) == [None, None] and len(held) == 3


def test_pixels_that_are_no_numbers_are_a_failure(twin, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(OpenSora, "decode", lambda self, z: torch.full((1, 3, 17, 32, 32), float("nan")))
    assert sample(twin, tmp_path / "run", end_index=1) == 1
    assert "not finite" in capsys.readouterr().err
    assert not contents(tmp_path / "run")


def bad_inputs(tmp_path, adapter):
    """Name → (settings, what the one sentence says)."""
    unreadable = tmp_path / "broken.png"
    unreadable.write_bytes(b"no picture")
    image, clip = picture(tmp_path / "image"), picture(tmp_path / "clip", 17)
    conditioned, first = (
        dict(prompt=["a fox"], reference_path=[image]),
        dict(prompt=["a fox"], mask_strategy=["0"]),
    )
    return {
        "unreadable": (first | dict(reference_path=[str(unreadable)]), "cannot be decoded"),
        "missing reference": (first | dict(reference_path=["gone.png"]), "does not exist"),
        "no strategy": (conditioned, "no mask_strategy"),
        "no reference": (first, "names reference 0"),
        "reference number": (conditioned | dict(mask_strategy=["0,1"]), "names reference 1"),
        "target frame": (conditioned | dict(mask_strategy=["0,0,0,5"]), "target_start 5"),
        "source frame": (dict(prompt=["a"], reference_path=[clip], mask_strategy=["0,0,5"]), "reference_start 5"),
        "loop of strategy": (conditioned | dict(mask_strategy=["1"]), "names loop 1"),
        "malformed strategy": (conditioned | dict(mask_strategy=["0,x"]), "bad group"),
        "loops beyond segments": (dict(prompt=["|0|a|1|b"], loop=4, condition_frame_length=1), "set loop=2"),
        "segment never reached": (dict(prompt=["|0|a|3|b"], loop=2, condition_frame_length=1), "never reached"),
        "whole clip taken over": (dict(loop=2), "lower condition_frame_length"),
        "picture in loops": (dict(loop=2, num_frames=1, condition_frame_length=1), "lower condition_frame_length"),
        "missing adapter": (dict(lora_ckpt_path=["base", "nowhere/adapter"]), "no file or folder"),
        "uneven lists": (dict(reference_path=[image], mask_strategy=["0"]), "one entry per prompt"),
        "malformed suffix": (dict(prompt=['a {"reference_path": 1}']), "quotes"),
    }  # fmt: skip


def test_bad_input_is_one_sentence_before_anything_loads(twin, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(OpenSora, "fetch", lambda *_, **__: pytest.fail("looked for weights"))
    for name, (settings, words) in bad_inputs(tmp_path, adapter).items():
        assert sample(twin, tmp_path / "run", **settings) == 2, name
        told = capsys.readouterr().err.strip()
        assert words in told and told.count("error: ") == 1 and "\n" not in told, (name, told)
    assert not (tmp_path / "run" / "prompts.jsonl").exists()


def test_an_adapter_that_is_none_or_doubled_is_refused(twin, adapter, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, words in ((str(tmp_path / "empty"), "empty"), ([adapter, adapter], "twice")):
        assert sample(twin, tmp_path / "run", lora_ckpt_path=path) == 2
        assert words in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused_before_the_first_video(twin, adapter, tmp_path, capsys):
    other = random_adapter(tmp_path / "other", width=8)
    assert sample(twin, tmp_path / "run", lora_ckpt_path=[adapter, other]) == 2
    told = capsys.readouterr().err
    assert f"the adapter {str(other)!r} does not fit the model" in told
    assert not list(tmp_path.glob("run/*/*.mp4"))


def test_attaching_and_removing_leaves_the_model_as_it_was(twin, adapter, tmp_path, monkeypatch):
    """The base model after an adapter gives the videos of the base model before it."""
    assert sample(twin, tmp_path / "run", lora_ckpt_path=[adapter, "base"], end_index=1) == 0
    assert sample(twin, tmp_path / "base", end_index=1) == 0
    assert contents(tmp_path / "run" / "base") == contents(tmp_path / "base")


def test_names_of_adapters_tell_them_apart():
    from Core.generation.jobs import adapter_names

    assert adapter_names(["runs/a/adapter", "runs/b/adapter"]) == ["a", "b"]
    assert adapter_names(["x/run/adapter", "y/run/adapter"]) == ["x-run", "y-run"]
    assert adapter_names(["runs/a/checkpoints/step_000050/adapter", "runs/a/adapter"]) == ["step_000050", "a"]
    assert adapter_names(["peft_model_100.pt"]) == ["peft_model_100"]
    assert adapter_names(["runs/base/adapter"])[0] != "base"
