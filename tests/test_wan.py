"""Wan through its own sampler and decoder equals the pipeline of diffusers."""

import json
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from pipelines import (
    CAPTIONS,
    assert_learns_and_resumes,
    config_for,
    gradient_error,
    in_float64,
    loaded,
    sample,
    save_wan,
    saved_bytes,
    train,
    with_adapter,
)
from safetensors.torch import load_file

from Core.backbones import ModelSettings, VideoSpec
from Core.backbones.wan import Wan, WanSettings
from Core.build import new_backbone
from Core.config import ConfigError
from Core.estimate.live_bytes import LiveBytes
from Core.generation.export import export
from Core.modules import lora
from Core.sampling.euler import step_ends

KINDS = ("2.1", "ti2v", "a14b")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_wan(tmp_path_factory.mktemp("wan") / kind, kind) for kind in (*KINDS, "i2v")}


@pytest.fixture
def pictures(tmp_path):
    """Two that differ."""
    paths = [tmp_path / "fox.png", tmp_path / "boats.png"]
    for path, extent in zip(paths, [(-2, -1, 1, 1), (-1, 0, 0, 1)], strict=True):
        Image.effect_mandelbrot((50, 40), extent, 20).convert("RGB").save(path)
    return paths


@pytest.fixture
def picture(pictures):
    return pictures[0]


def with_pictures(pictures):
    """Two prompts, each with its first frame."""
    return [
        f'{text} {{"reference_path": "{path}"}}' for text, path in zip(CAPTIONS[:2], pictures, strict=True)
    ]


SHAPE = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 3}


def pipeline_video(folder, noise, *, shift=3.0, sampler="euler", lora=None, **arguments):
    """Pixels [B, 3, F, H, W] in [0, 1] of the pipeline itself."""
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    cls = DiffusionPipeline
    if "image" in arguments:
        from diffusers import WanImageToVideoPipeline as cls  # noqa: N813
    pipeline = cls.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=shift)
    if lora:
        pipeline.load_lora_weights(lora)
    frames = pipeline(latents=noise.clone(), output_type="pt", max_sequence_length=24, **arguments).frames
    return torch.as_tensor(frames).transpose(1, 2)


def noise_for(backbone, batch):
    return torch.randn(batch, *backbone.latent_shape(), generator=torch.Generator().manual_seed(7))


def video_of(backbone, encoded, noise):
    with torch.no_grad():
        return backbone.decode(sample(backbone, encoded, noise)).clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_videos_equal_the_pipelines(folders, kind, guidance):
    backbone, encoded = loaded("wan", folders[kind], guidance_scale=guidance, negative_prompt=CAPTIONS[3])
    noise = noise_for(backbone, 2)
    wanted = pipeline_video(
        folders[kind],
        noise,
        prompt=list(CAPTIONS[:2]),
        negative_prompt=[CAPTIONS[3]] * 2,
        guidance_scale=guidance,
        **SHAPE,
    )
    assert (video_of(backbone, encoded, noise) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "sampler", "frames", "low_guidance"),
    [
        ("2.1", "euler", 5, None),
        ("2.1", "unipc", 5, None),
        ("2.1", "euler", 1, None),
        ("ti2v", "euler", 1, None),
        ("ti2v", "unipc", 5, None),
        ("a14b", "euler", 1, 2.0),
        ("a14b", "unipc", 5, 2.0),
    ],
)
def test_other_shapes_lengths_and_samplers(folders, kind, sampler, frames, low_guidance):
    """An image, too, and another guidance of the low-noise expert."""
    keys = {"image_size": (64, 32), "num_frames": frames, "sampler": sampler, "num_sampling_steps": 4}
    backbone, encoded = loaded("wan", folders[kind], shift=5.0, guidance_scale_2=low_guidance, **keys)
    noise = noise_for(backbone, 2)
    extra = {"guidance_scale_2": low_guidance} if low_guidance else {}
    wanted = pipeline_video(
        folders[kind],
        noise,
        shift=5.0,
        prompt=list(CAPTIONS[:2]),
        guidance_scale=5.0,
        num_inference_steps=4,
        height=64,
        width=32,
        num_frames=frames,
        sampler=sampler,
        **extra,
    )
    assert (video_of(backbone, encoded, noise) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("guidance", "changes"),
    [(1.0, {}), (3.0, {}), (3.0, {"sampler": "unipc", "num_sampling_steps": 10, "image_size": (64, 32)})],
    ids=["no guidance", "guidance", "unipc, tall"],
)
@pytest.mark.parametrize("kind", ["ti2v", "i2v"])
def test_a_first_frame_is_taken_as_the_pipelines_take_it(folders, kind, guidance, changes, pictures):
    """Each prompt's own, and captions of unequal length; the pipeline takes one picture at a time."""
    prompts = with_pictures(pictures)
    backbone, encoded = loaded("wan", folders[kind], prompt=prompts, guidance_scale=guidance, **changes)
    noise, settings = noise_for(backbone, 2), backbone.settings
    shape = {"height": backbone.video.height, "width": backbone.video.width}
    ours = video_of(backbone, encoded, noise)
    for row, (caption, picture) in enumerate(zip(CAPTIONS[:2], pictures, strict=True)):
        wanted = pipeline_video(
            folders[kind],
            noise[[row]],
            sampler=settings.sampler,
            image=Image.open(picture),
            prompt=caption,
            guidance_scale=guidance,
            **{**SHAPE, **shape, "num_inference_steps": settings.num_sampling_steps},
        )
        assert (ours[[row]] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("tiled", [False, True], ids=["whole frames", "tiles"])
@pytest.mark.parametrize(
    ("kind", "context", "reach"),
    [("2.1", "isolated", 1), ("2.1", "causal", 1), ("2.1", "causal", 2), ("2.1", "whole", 1)]
    + [("ti2v", "isolated", 1), ("ti2v", "causal", 1), ("ti2v", "whole", 1), ("a14b", "isolated", 1)]
    + [("i2v", "causal", 1)],
)
def test_gradients_equal_central_differences(folders, kind, context, reach, tiled, monkeypatch, pictures):
    """Image to video, too: those of TI2V that decode whole clips begin with a picture."""
    given = kind == "i2v" or (kind, context) == ("ti2v", "whole")
    prompts = with_pictures(pictures) if given else list(CAPTIONS[:2])
    backbone, encoded = loaded("wan", folders[kind], vae_tiling=tiled, num_sampling_steps=2, prompt=prompts)
    if tiled:
        scale = backbone.vae.spatial_compression_ratio
        backbone.vae.enable_tiling(3 * scale, 3 * scale, 2 * scale, 2 * scale)
    with_adapter(in_float64(backbone, monkeypatch))
    backbone.denoiser.double()
    backbone.enable_checkpointing()
    frames = torch.tensor([[2], [2]])
    assert gradient_error(backbone, encoded, frames, context, reach) < 1e-4


def test_training_raises_a_reward_and_resumes(folders, tmp_path):
    assert_learns_and_resumes(
        "wan", folders["2.1"], tmp_path, 0.02, backprop_steps=2, decode_context="causal", schedule="unipc"
    )


@pytest.mark.parametrize("experts", ["both", "high_noise", "low_noise"])
def test_each_expert_can_have_the_adapter(folders, experts, tmp_path):
    keys = {"train_experts": experts, "max_train_steps": 2, "backprop_steps": 2}
    train("wan", folders["a14b"], tmp_path / "run", **keys)
    adapter = load_file(tmp_path / "run" / "adapter" / lora.WEIGHTS)
    trained = {key.split(".")[2] for key, value in adapter.items() if "lora_B" in key and value.any()}
    assert trained == ({"high_noise", "low_noise"} if experts == "both" else {experts})


@pytest.mark.parametrize("objective", ["grpo", "nft", "dpo", "direct_align"])
def test_terms_of_an_expert_without_an_adapter_are_passed_over(folders, objective, tmp_path):
    """All samples of the first sampling steps, and the noise levels that are drawn above the boundary."""
    keys = {"objective": objective, "train_experts": "low_noise", "max_train_steps": 3}
    keys |= {"train_batch_size": 1, "gradient_accumulation_steps": 2, "lr": 1e-3}
    grouped = {} if objective == "direct_align" else {"group_size": 2}
    rows = train("wan", folders["a14b"], tmp_path / "run", **keys, **grouped)
    assert len(rows) == 3 and any(float(row["grad_norm"]) > 0 for row in rows)


def test_a_window_that_never_reaches_the_trained_expert_ends_the_run(folders, tmp_path, capsys):
    keys = {"train_experts": "high_noise", "backprop_steps": 1, "max_bad_steps": 2}
    with pytest.raises(AssertionError):  # its exit code
        train("wan", folders["a14b"], tmp_path / "run", **keys)
    said = capsys.readouterr().err
    assert "the adapter took no part in 2 steps in a row; " in said
    assert "train_experts names the expert of other timesteps" in said


# The VAE of TI2V-5B as published, and the smaller one of the others by the class's defaults.
FINE_VAE = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
FINE_VAE |= {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
FINE_VAE |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
VAES = {"2.1": {}, "ti2v": FINE_VAE}
every_vae = pytest.mark.parametrize("kind", VAES)


def channel_twin(frames: int, kind: str) -> Wan:
    """The family with a VAE of the real channel ratios and 16 latent channels."""
    video = VideoSpec(32, 32, frames * 4 - 3, 16)
    backbone = Wan(WanSettings(), ModelSettings(dtype="fp32"), video, torch.device("cpu"))
    small = {"base_dim": 8, "z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    small |= {"base_dim": 5, "decoder_base_dim": 8} if kind == "ti2v" else {}
    backbone.vae = AutoencoderKLWan(**{**VAES[kind], **small}).eval().requires_grad_(False)
    return backbone


@every_vae
def test_a_causal_frame_costs_the_same_memory_in_any_video(kind):
    kept = {}
    for frames in (5, 21):
        backbone = channel_twin(frames, kind)
        backbone.checkpointing = True
        z = torch.randn(1, 16, frames, 2, 2, requires_grad=True)
        index = torch.tensor([[frames - 1]])
        # The latents themselves, and their gradient's shape, grow; what decoding keeps does not.
        kept[frames] = saved_bytes(lambda: backbone.decode_frames(z, index, "causal"))[0]  # noqa: B023
    assert kept[21] < 1.1 * kept[5]


@every_vae
def test_a_whole_clip_is_recomputed_by_latent_frame(kind):
    backbone = channel_twin(21, kind)
    z = torch.randn(1, 16, 21, 2, 2, requires_grad=True)
    plain, _ = saved_bytes(lambda: backbone.decode(z))
    backbone.checkpointing = True
    kept, _ = saved_bytes(lambda: backbone.decode(z))
    assert kept < 0.2 * plain


def test_a_latent_frame_that_none_follows_makes_no_cache(monkeypatch):
    """A causal frame of a long video costs the backward pass one cache, which it reads, and not a second one."""
    backbone = channel_twin(9, "2.1")
    backbone.denoiser = torch.nn.Identity()
    backbone.enable_checkpointing()
    z = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept = backbone._decode_step(z[:, :, :1], None)[1]
    cache = sum(t.nbytes for t in kept if isinstance(t, torch.Tensor))
    step, peaks, pixels = backbone._decode_step, [], []
    for forced in (False, True):
        if forced:
            monkeypatch.setattr(backbone, "_decode_step", lambda z, cache, last=False: step(z, cache))
        with LiveBytes() as live:
            pixels.append(backbone.decode_frames(z, torch.tensor([[2]]), "causal"))
            pixels[-1].square().sum().backward()
        peaks.append(live.peak)
    assert torch.equal(*pixels) and peaks[1] - peaks[0] > 0.5 * cache


@pytest.mark.parametrize(
    ("kind", "parameters", "size", "cache"),
    [("2.1", 126_892_531, (480, 832), 3_777_146_880), ("ti2v", 704_688_668, (704, 1280), 6_431_744_000)],
)
def test_what_a_whole_clip_keeps_of_a_latent_frame(kind, parameters, size, cache):
    """What docs/families/wan.md says, in float32: the published decoder on the meta device."""
    backbone = channel_twin(5, kind)
    with torch.device("meta"), torch.no_grad():
        backbone.vae = AutoencoderKLWan(**VAES[kind])
        assert sum(p.numel() for p in backbone.vae.parameters()) == parameters
        scale = backbone.vae.config.scale_factor_spatial
        z = torch.empty(1, backbone.vae.config.z_dim, 1, size[0] // scale, size[1] // scale)
        kept, held = None, []
        for _ in range(3):
            _, kept = backbone._decode_step(z, kept)
            held.append(sum(t.nbytes for t in kept if isinstance(t, torch.Tensor)))
    assert held[1] == held[2] == cache


def test_a_latent_frame_is_recomputed_block_by_block():
    """With the same gradient, and the graph of one residual block alive at a time."""
    peaks, gradients = {}, {}
    for by_block in (False, True):
        torch.manual_seed(0)
        backbone = channel_twin(5, "2.1")
        backbone.denoiser, backbone.checkpointing = torch.nn.Identity(), True
        if by_block:
            backbone.enable_checkpointing()
        z = torch.randn(1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with LiveBytes() as live:
            backbone.decode_frames(z, torch.tensor([[4]]), "causal").square().sum().backward()
        peaks[by_block], gradients[by_block] = live.peak, z.grad
    torch.testing.assert_close(gradients[True], gradients[False], rtol=0, atol=0)
    assert peaks[True] < 0.6 * peaks[False]


SIZES = {
    # denoiser's configuration as published → keys, parameters, and those of a rank-16 adapter
    "Wan2.1-T2V-1.3B": (
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        825,
        1_418_996_800,
        21_872_640,
    ),
    "Wan2.1-T2V-14B": (
        dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
        1095,
        14_288_491_584,
        76_677_120,
    ),
    "Wan2.2-I2V-A14B": (  # each expert
        dict(num_attention_heads=40, ffn_dim=13824, num_layers=40, in_channels=36),
        1095,
        14_288_901_184,
        76_677_120,
    ),
    "Wan2.2-TI2V-5B": (
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
        825,
        4_999_787_712,
        40_304_640,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes_on_the_meta_device(name):
    config, keys, parameters, adapter = SIZES[name]
    with torch.device("meta"):
        network = WanTransformer3DModel(text_dim=4096, **config)
        assert (len(network.state_dict()), sum(p.numel() for p in network.parameters())) == (keys, parameters)
        wrapped = lora.attach(network, Wan.lora_targets, rank=16, alpha=16)
    assert sum(p.numel() for p in lora.parameters(wrapped).values()) == adapter


REFUSALS = [
    (dict(num_frames=8), "num_frames must be a multiple of 4 plus 1, got 8; the nearest are 5 and 9"),
    (
        dict(image_size=(40, 64)),
        "height and width must be multiples of 16, got (40, 64); the nearest are (32, 64)",
    ),
    (
        dict(image_size=None, resolution="8k"),
        "resolution '8k' with aspect_ratio '3:4' is not in this family's table",
    ),
    (dict(grad_checkpoint="keep_attention"), "grad_checkpoint='keep_attention' has no meaning"),
    (
        dict(sampler="unipc", is_vader_training=True, reward_fn="saturation"),
        "sampler='unipc' is for inference",
    ),
    (dict(model_path=""), "model_path must not be empty"),
    (dict(guidance_scale=0.5), "guidance_scale must be at least 1"),
    (dict(base_adapters=[dict(path="x", expert="middle")]), "choose one of high_noise, low_noise"),
    (
        dict(objective="dpo_pairs", pairs="pairs.jsonl", is_vader_training=True, reward_fn="saturation"),
        "objective='dpo_pairs' needs a family that encodes videos, which 'wan' does not; use objective='dpo'",
    ),
    (dict(num_frames="a while"), "num_frames must be a number or seconds such as '5s', got 'a while'"),
    (dict(aes=6.5), "aes is a key of backbone 'opensora'"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS, ids=lambda value: str(value)[:40])
def test_wrong_values_are_refused_before_loading(folders, changes, sentence):
    with pytest.raises(ConfigError) as refused:
        config_for("wan", folders["2.1"], **changes)
    assert any(sentence in error for error in refused.value.errors), refused.value.errors


def test_wrong_repositories_are_refused(folders, tmp_path):
    other = shutil.copytree(folders["2.1"], tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "LTXPipeline"}))
    lacking = shutil.copytree(folders["2.1"], tmp_path / "lacking")
    (lacking / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for folder, words in [
        (other, "holds a LTXPipeline, and this family needs a WanPipeline or WanImageToVideoPipeline"),
        (lacking, "its component 'vae' has no complete .safetensors"),
    ]:
        with pytest.raises(ConfigError, match=words):
            loaded("wan", folder)


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_an_exported_adapter_makes_the_same_video_in_diffusers(folders, form, tmp_path):
    train("wan", folders["2.1"], tmp_path / "run", max_train_steps=2, lora_rank=4)
    out = tmp_path / ("exported" if form == "diffusers" else "exported.safetensors")
    export(str(tmp_path / "run" / "adapter"), out, form)
    backbone, encoded = loaded("wan", folders["2.1"])
    adapter = lora.read(str(out), Wan.original_names)
    backbone.denoiser = lora.attach(backbone.denoiser, adapter.targets, **adapter.sizes)
    lora.load(backbone.denoiser, adapter, str(out))
    noise = noise_for(backbone, 1)
    plain = video_of(loaded("wan", folders["2.1"])[0], encoded[:1], noise)
    ours = video_of(backbone, encoded[:1], noise)
    theirs = pipeline_video(folders["2.1"], noise, lora=out, prompt=CAPTIONS[0], **SHAPE)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "stored", [{"dtype": "bf16"}, {"dtype": "fp8"}, {"dtype": "bf16", "base_quant": "nf4"}]
)
def test_training_with_weights_in_fewer_bits(folders, stored, tmp_path):
    rows = train("wan", folders["2.1"], tmp_path / "run", max_train_steps=1, mixed_precision="bf16", **stored)
    assert all(math.isfinite(float(row["reward"])) for row in rows)
    assert load_file(tmp_path / "run" / "adapter" / lora.WEIGHTS)


def test_the_time_embedder_stays_in_float32(folders):
    """As diffusers keeps it, also where autocast would have it in bf16."""
    backbone, _ = loaded("wan", folders["2.1"], dtype="bf16")
    embedder = backbone.denoiser.condition_embedder.time_embedder
    with torch.autocast("cpu", torch.bfloat16):
        assert embedder(torch.ones(1, 16)).dtype == torch.float32
    assert backbone.denoiser.proj_out.weight.dtype == torch.bfloat16
    assert backbone.vae.dtype == torch.float32


def test_frames_by_time_are_those_of_the_video(folders):
    backbone, encoded = loaded("wan", folders["2.1"])
    z = noise_for(backbone, 2)
    with torch.no_grad():
        video = backbone.decode(z)
        chosen = backbone.decode_at(z, torch.tensor([[0, 3, 8]] * 2), "causal")
        one = backbone.decode_frames(z, torch.tensor([[0, 2], [1, 1]]), "causal")
    assert torch.allclose(chosen, video[:, :, [0, 3, 8]].transpose(1, 2), atol=1e-5)
    assert torch.allclose(one[0], video[0, :, [0, 8]].transpose(0, 1), atol=5e-5)  # of pixels in [-2, 2]
    assert torch.allclose(one[1], video[1, :, [4, 4]].transpose(0, 1), atol=1e-5)


def test_a_run_can_score_frames_by_time(folders, tmp_path):
    rows = train(
        "wan",
        folders["2.1"],
        tmp_path / "run",
        max_train_steps=1,
        decode_frame="3frames",
        decode_context="whole",
    )
    assert math.isfinite(float(rows[-1]["reward"]))
    with pytest.raises(
        ConfigError, match="asks for frames of the finished video; set decode_context to 'causal' or 'whole'"
    ):
        config_for("wan", folders["2.1"], is_vader_training=True, reward_fn="saturation", decode_frame="2fps")


def test_what_the_hub_does_not_give_is_said_by_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = config_for("wan", tmp_path, model_path="nobody/wan", prompt=["a"])
    errors = new_backbone(config, torch.device("cpu")).fetch()
    assert [error.partition(":")[0] for error in errors] == ["model_path", "text_encoder_path"]


@pytest.mark.parametrize(
    ("kind", "prompts", "sentence"),
    [
        ("ti2v", ['a {"reference_path": "PICTURE"}', "b"], "1 of 2 prompts name a first frame"),
        ("ti2v", ['a {"reference_path": "/no/such.png"}'], "'/no/such.png' cannot be read as a picture"),
        ("ti2v", ['a {"reference_path": ""}'], "must end in"),
        ("ti2v", ['a { "picture": "x", "reference_path": "PICTURE"}'], "must end in"),
        ("2.1", ['a { "reference_path": "PICTURE"}'], "this model takes no first frame"),
        ("i2v", ["a"], "this model makes videos of pictures"),
    ],
)
def test_first_frames_that_cannot_be_are_refused(folders, picture, kind, prompts, sentence):
    prompts = [prompt.replace("PICTURE", str(picture)) for prompt in prompts]
    with pytest.raises(ConfigError) as refused:
        config_for("wan", folders[kind], prompt=prompts)
    assert any(sentence in error for error in refused.value.errors), refused.value.errors


def test_another_picture_makes_another_run(folders, picture):
    """What a checkpoint and a video are recorded with changes with the picture, not only with its name."""
    (prompt,) = Wan.parse_prompts([f'a {{"reference_path": "{picture}"}}'])
    before = prompt.identity
    Image.new("RGB", (8, 8)).save(picture)
    assert prompt.identity != before and prompt.identity["prompt"] == before["prompt"]


@pytest.mark.parametrize("kind", ["ti2v", "i2v"])
def test_training_and_validation_from_first_frames(folders, kind, pictures, tmp_path, monkeypatch):
    """Each prompt with its own, in the steps and in the validation's videos, and the adapter learns."""
    seen = set()
    features = Wan.features

    def noted(self, encoded, clip=0):
        seen.add((encoded.prompt.text, encoded.prompt.reference))
        return features(self, encoded, clip)

    monkeypatch.setattr(Wan, "features", noted)
    prompts, swapped = with_pictures(pictures), with_pictures(pictures[::-1])
    (tmp_path / "validation.txt").write_text("\n".join(swapped))
    keys = {"prompt": prompts, "val_prompt_path": str(tmp_path / "validation.txt"), "val_batch_size": 2}
    keys |= {"num_frames": 9, "decode_frame": 2, "decode_context": "causal", "backprop_steps": 2}
    rows = train("wan", folders[kind], tmp_path / "run", max_train_steps=2, validation_steps=1, **keys)
    assert all(float(row["grad_norm"]) > 0 for row in rows)
    assert seen == {(prompt.text, prompt.reference) for prompt in Wan.parse_prompts([*prompts, *swapped])}
    adapter = load_file(tmp_path / "run" / "adapter" / lora.WEIGHTS)
    experts = {"high_noise", "low_noise"} if kind == "i2v" else {"blocks"}
    trained = {key.split(".")[2] for key, value in adapter.items() if "lora_B" in key and value.any()}
    assert trained == experts


@pytest.mark.parametrize("kind", ["ti2v", "i2v"])
def test_a_video_follows_its_own_first_frame(folders, kind, pictures):
    """A batch of two pictures makes what each makes alone, and TI2V's latents begin with the picture's."""
    backbone, encoded = loaded("wan", folders[kind], prompt=with_pictures(pictures), guidance_scale=1.0)
    noise = noise_for(backbone, 1).expand(2, -1, -1, -1, -1).clone()
    latents = sample(backbone, [encoded[0]] * 2, noise)
    swapped = sample(backbone, [encoded[0], encoded[1]], noise)
    torch.testing.assert_close(latents[0], swapped[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents[1], swapped[1], atol=1e-2)
    if kind == "ti2v":
        given = torch.stack([backbone.features(e)["image"] for e in encoded])
        torch.testing.assert_close(swapped[:, :, :1], given, rtol=1e-4, atol=1e-4)


def test_a_target_that_an_expert_lacks_is_named(folders):
    backbone, _ = loaded("wan", folders["a14b"], train_experts="low_noise")
    with pytest.raises(ValueError, match="is named 'to_typo'.* in the expert that train_experts='low_noise'"):
        backbone.adapter_targets(["to_q", "to_typo"])
    whole = backbone.adapter_targets(["low_noise.blocks.0.attn1.to_q"])
    assert whole == ["low_noise.blocks.0.attn1.to_q"]


def test_guidance_of_two_scales_is_known_without_the_weights(tmp_path):
    config = config_for("wan", tmp_path, model_path="nobody/wan", guidance_scale_2=3.0)
    assert new_backbone(config, torch.device("cpu")).negative_caption == ""


@pytest.mark.parametrize("schedule", ["euler", "unipc"])
def test_no_stochastic_step_draws_more_than_pure_noise(folders, schedule):
    """UniPC's first noise level lies a millionth below 1, where the formula of the stochastic step has its pole."""
    backbone, _ = loaded("wan", folders["2.1"], schedule=schedule, num_sampling_steps=30, shift=12.0)
    timesteps = backbone.timesteps(1)
    std = backbone.process.step_std(timesteps, step_ends(backbone.process, timesteps), 0.7)
    assert (std > 0).all() and (std < 1).all()


@pytest.mark.parametrize("schedule", ["euler", "unipc"])
@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_a_first_frame_is_led_to_from_the_noise_level_of_every_timestep(folders, picture, schedule, sampler):
    """Of the schedule's steps, of timesteps between them, and of UniPC's, whose sampler rounds what it asks at."""
    prompts = [f'a fox {{"reference_path": "{picture}"}}']
    keys = {"schedule": schedule, "sampler": sampler, "num_sampling_steps": 30, "shift": 5.0}
    backbone, encoded = loaded("wan", folders["ti2v"], prompt=prompts, guidance_scale=1.0, **keys)
    predict = backbone.predictor([backbone.features(text) for text in encoded])
    image = backbone.features(encoded[0])["image"]
    z = noise_for(backbone, 1)

    def levels(timesteps):
        with torch.no_grad():
            to_image = [predict(z, t)[:, :, :1] for t in timesteps]
        return torch.stack([((image - z[:, :, :1]) / velocity).median() for velocity in to_image])

    between = torch.tensor([[3.7], [24.4], [500.5], [999.9]])
    for timesteps in (backbone.timesteps(1)[[0, 9, -1]], between):
        torch.testing.assert_close(levels(timesteps), timesteps[:, 0] / 1000, rtol=1e-4, atol=0)
    step = backbone.inference_step(predict, [torch.Generator()])
    if sampler == "unipc":
        rounded, exact = step.timesteps[[0, 9, -1]], step.scheduler.sigmas[[0, 9, -2]]
        torch.testing.assert_close(levels(rounded), exact, rtol=1e-4, atol=0)
        assert (rounded[-1, 0] / 1000 - exact[-1]).abs() > 1e-4


def test_the_last_step_of_the_euler_schedule_is_short(folders):
    keys = {"num_sampling_steps": 30, "shift": 3.0}
    last = {
        name: loaded("wan", folders["2.1"], schedule=name, **keys)[0].timesteps(1)[-1].item()
        for name in ("euler", "unipc")
    }
    assert last["euler"] == pytest.approx(9, abs=0.2) and last["unipc"] > 90
