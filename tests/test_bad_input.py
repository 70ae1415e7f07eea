"""What a user gets wrong is answered by sentences and exit code 2, before any network is loaded."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import reward_twins
import torch
import twin_runs
import twins
from huggingface_hub.errors import LocalEntryNotFoundError

from Core import build
from Core.backbones.opensora import OpenSora

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "Open-Sora" / "scripts" / "train_t2v_lora.py"


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch):
    def refuse(self):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(OpenSora, "load", refuse)
    monkeypatch.setattr(OpenSora, "text_encoder", refuse)


@pytest.fixture
def answer(twin, tmp_path, capfd):
    """Sentences that a run with these flags and changed settings is refused with."""

    def run(*flags: str, **overrides) -> list[str]:
        assert twin_runs.start(twin, tmp_path / "run", *flags, **overrides) == 2
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        return [line.removeprefix("error: ") for line in lines]

    return run


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (dict(decode_frames=1), "unknown key 'decode_frames': did you mean 'decode_frame'?"),
        (dict(lr="fast"), "lr must be a number, got 'fast'"),
        (dict(decode_frame=17), "decode_frame 17 is out of range: the video has 5 latent frames, 0 to 4"),
        (dict(image_size=None, resolution="100p"), "resolution='100p' is unknown; choose one of 144p"),
        (dict(image_size=(3, 3)), "image_size must be at least 8 pixels each way"),
        (dict(num_frames=0), "num_frames"),
        (dict(reward_fn="beauty"), "beauty"),
        (dict(reward_args=dict(model="nowhere/at/all")), "nowhere/at/all"),
        (
            dict(model=dict(type="STDiT3-XL/2", from_pretrained="./gone")),
            "model.from_pretrained: there is no file",
        ),
        (dict(prompt_path="gone.txt"), "prompt_path: prompt file 'gone.txt' does not exist"),
        (dict(project_dir="/proc/vader"), "project_dir: cannot write to '/proc/vader'"),
        (dict(resume="./gone"), "resume"),
    ],
)
def test_one_fault_is_one_sentence(answer, overrides, sentence):
    sentences = answer(**overrides)
    assert len(sentences) == 1 and sentence in sentences[0], sentences


def test_prompt_files(answer, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("")
    latin.write_bytes("Füchse".encode("latin-1"))
    assert "holds no prompts; write one a line" in answer(prompt_path=str(empty))[0]
    assert "is not UTF-8 text; save it as UTF-8" in answer(prompt_path=str(latin))[0]


def test_a_project_folder_that_is_a_file(answer, tmp_path):
    (tmp_path / "taken").write_text("")
    (sentence,) = answer(project_dir=str(tmp_path / "taken"))
    assert "project_dir: cannot write to" in sentence and "choose a folder you may write to" in sentence


def test_hub_ids_out_of_reach_are_reported_together(answer, monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    entry = dict(type="STDiT3-XL/2", from_pretrained="someone/stdit")
    sentences = answer(model=entry, reward_args=dict(model="someone/clip"))
    assert [sentence.startswith("model.from_pretrained: ") for sentence in sentences] == [True, False]
    assert len(sentences) == 2


def test_prompts_the_reward_cannot_score_are_reported_together(answer, tmp_path):
    classifier = str(reward_twins.videomae_folder(tmp_path / "videomae"))
    prompts = ["a boy riding a bike", "a fox", "a cloud"]
    sentences = answer(prompt=prompts, reward_fn="actpred", reward_args=dict(model=classifier))
    assert [sentence.split(";")[0] for sentence in sentences] == [
        f"no action class occurs in the prompt {prompt!r}" for prompt in prompts[1:]
    ]
    watched = dict(monitors=["actpred"], monitor_args={"actpred": dict(model=classifier)})
    assert len(answer(prompt=prompts, **watched)) == 2


def test_all_faults_are_reported_at_once(answer):
    sentences = answer("--lr", "0", learnrate=1, decode_frame=99, prompt_path="gone.txt", reward_fn="beauty")
    for word in ("lr must be above 0", "learnrate", "decode_frame 99", "gone.txt", "beauty"):
        assert sum(word in sentence for sentence in sentences) == 1, word
    assert len(sentences) == 5


def test_unknown_flags_and_files(answer, tmp_path, capfd):
    assert answer("--learning-rate", "1")[0].startswith("unknown flag --learning-rate")
    assert "--cfg-options takes KEY=VALUE" in answer("--cfg-options", "lr")[0]


def test_a_check_finds_all_this_and_leaves_nothing_behind(answer, tmp_path, twin):
    assert twin_runs.start(twin, tmp_path / "fine", "--check-only") == 0
    assert list((tmp_path / "fine").iterdir()) == []
    assert "decode_frame 99" in answer("--check-only", decode_frame=99)[0]
    prompt = 'a fox {"reference_path": "fox.mp4", "mask_strategy": "0"}'
    assert "training prompts cannot have references" in answer("--check-only", prompt=prompt)[0]


def test_one_process_of_a_machine_says_what_is_wrong(twin, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert twin_runs.start(twin, tmp_path / "run", lr=-1.0) == 2
    assert "error: " not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (
            {},
            "set train_batch_size=1, activation_offloading=True, grad_checkpoint='parts', stream_blocks=True, "
            "use_AdamW8bit=True, dtype='fp8', guidance_grad='cond', a smaller resolution",
        ),
        (
            dict(is_vader_training=False, val_batch_size=4),
            "set val_batch_size=1, stream_blocks=True, dtype='fp8', a smaller",
        ),
        (
            dict(compile_blocks=True, train_batch_size=1),
            "set use_AdamW8bit=True, guidance_grad='cond', a smaller",
        ),
    ],
)
def test_too_small_a_memory_is_one_sentence_and_an_exit_code_of_its_own(
    twin, tmp_path, capfd, monkeypatch, overrides, advice
):
    def fill_up(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total …")

    monkeypatch.setattr(OpenSora, "load", fill_up)
    monkeypatch.setattr(build, "encode_prompts", lambda *_: [])
    assert twin_runs.start(twin, tmp_path / "run", **overrides) == 3
    printed = capfd.readouterr().err
    (sentence,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "which tried to allocate 2.50 GiB more; " + advice in sentence and "Traceback" not in printed
    assert logging.getLogger("vader").propagate  # the log was started, and is left as it was


def test_too_small_a_memory_for_the_text_encoder_says_where_else_it_can_run(
    twin, tmp_path, capfd, monkeypatch
):
    def fill_up(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has a total …")

    monkeypatch.setattr(build, "encode_prompts", fill_up)
    assert twin_runs.start(twin, tmp_path / "run") == 3
    assert "for the text encoder; set text_encoding='8bit' or 'cpu'" in capfd.readouterr().err
    assert twin_runs.start(twin, tmp_path / "run", text_encoding="8bit") == 3
    assert "set text_encoding='cpu'" in capfd.readouterr().err


def test_inference_faults(answer):
    sentences = answer(is_vader_training=False, lora_ckpt_path="gone", loop=2, condition_frame_length=5)
    assert any("lora_ckpt_path: there is no file or folder 'gone'" in sentence for sentence in sentences)
    assert any("condition_frame_length" in sentence for sentence in sentences)
    assert len(sentences) == 2


def test_the_script_itself_answers_the_same_way(twin, tmp_path):
    values = twins.settings(twin, tmp_path / "run", lrr=1, reward_fn="beauty", prompt_path="gone.txt")
    config = twins.config_file(tmp_path / "config.py", values)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(config)],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 3 and not (tmp_path / "run").exists()
