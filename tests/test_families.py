"""Bars that all families of diffusers meet alike: memory of the gradient window, exported adapters, compiled blocks,
sizes that are said before a download, and the configs."""

import functools
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from families import FAMILIES, KEYS, MAKERS
from PIL import Image
from pipelines import loaded, sample, saved_bytes, with_adapter
from safetensors.torch import save_file

from Core.backbones import BACKBONES
from Core.build import new_backbone
from Core.config import load_config
from Core.estimate.live_bytes import LiveBytes
from Core.generation.export import write_for_others
from Core.modules import lora
from Core.modules.recompute import recompute_parts
from Core.training.objectives.reward_gradient import RewardGradientSettings, WindowRollout
from Core.utils.timing import Stopwatch

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*/*.py"))
TIMER = Stopwatch(torch.device("cpu"))
SMALL = {"num_frames": 9, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folder of a tiny pipeline by its name, made when it is first asked for."""
    return functools.cache(lambda name: MAKERS[name](tmp_path_factory.mktemp("pipeline") / "tiny"))


def tiny(name, folder, **keys):
    family = name.partition(" ")[0]
    return loaded(family, folder, **{**SMALL, **KEYS.get(family, {}), **keys})


def noise_for(backbone):
    return torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_grows_with_the_window_and_not_with_the_number_of_steps(folder_of, name):
    def kept(steps, window):
        backbone, encoded = tiny(name, folder_of(name), num_sampling_steps=steps, image_size=(32, 32))
        with_adapter(backbone).enable_checkpointing()
        rollout = WindowRollout(RewardGradientSettings(), backbone, 0)
        return saved_bytes(lambda: rollout.sample(encoded, (0, 1), steps - window, TIMER))[0]

    few, many, three = kept(3, 1), kept(6, 1), kept(3, 3)
    assert many == pytest.approx(few, rel=0.05)
    assert 2 * few < three < 3.2 * few


def gradient_of_a_step(backbone, encoded):
    """The adapter's gradient through one prediction, and the peak bytes of its backward pass."""
    predict = backbone.predictor([backbone.features(e) for e in encoded])
    parameters = list(lora.parameters(backbone.denoiser).values())
    with LiveBytes() as live:
        loss = predict(noise_for(backbone), torch.full((2,), 600.0)).square().sum()
        live.lap("forward")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]), live.peak


@pytest.mark.parametrize("name", [n for n in FAMILIES if "parts" in BACKBONES.resolve(n).recomputations])
def test_parts_that_are_recomputed_alone_have_the_same_gradient_in_less_memory(folder_of, name):
    outcomes = []
    for parts in (False, True):
        backbone, encoded = tiny(name, folder_of(name), image_size=(128, 128))
        if parts:
            recompute_parts(backbone.blocks)
        with_adapter(backbone)
        backbone.enable_checkpointing()
        outcomes.append(gradient_of_a_step(backbone, encoded))
    (whole, peak), (by_parts, lower) = outcomes
    assert torch.equal(by_parts, whole)
    assert lower < 0.95 * peak


@pytest.mark.parametrize("name", FAMILIES)
def test_branches_of_guidance_run_in_turn_where_activations_are_recomputed(folder_of, name):
    """In steps with a gradient, whose memory is a block's graph: of one branch, with the gradient of both at once."""
    outcomes = []
    for checkpointing in (False, True):
        backbone, encoded = tiny(name, folder_of(name), guidance_scale=4.0, negative_prompt="blurred")
        with_adapter(backbone)
        if checkpointing:
            backbone.enable_checkpointing()
        sizes = []
        backbone.predict = lambda z, t, condition, run=backbone.predict, sizes=sizes: (
            sizes.append(len(z)) or run(z, t, condition)
        )
        gradient, _ = gradient_of_a_step(backbone, encoded)
        sample(backbone, encoded, noise_for(backbone))
        outcomes.append((gradient, sizes))
    (together, sizes), (in_turn, sizes_in_turn) = outcomes
    assert (in_turn - together).norm() < 1e-5 * together.norm()
    assert set(sizes) == {4}
    assert sizes_in_turn == [2, 2, *sizes[1:]]


FORMATS = [("wan a14b", "diffusers"), ("wan a14b", "comfyui"), ("wan a14b", "kohya"), ("ltx", "diffusers")]
FORMATS += [("ltx", "comfyui"), ("cogvideox", "diffusers"), ("hunyuan_video15", "diffusers")]


@pytest.mark.parametrize(("name", "form"), FORMATS)
def test_an_exported_adapter_makes_the_same_video_in_diffusers(folder_of, name, form, tmp_path, monkeypatch):
    """Its layers differ in rank and alpha; of A14B each expert has a file of its own."""
    backbone, encoded = tiny(name, folder_of(name))
    plain = sample(backbone, encoded, noise_for(backbone))
    layers = [key for key, _ in backbone.denoiser.named_modules() if key.endswith("to_q")]
    backbone.denoiser = lora.attach(
        backbone.denoiser,
        backbone.lora_targets,
        rank=2,
        alpha=1,
        ranks={layers[0]: 3},
        alphas={layers[-1]: 4},
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.parameters(backbone.denoiser).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    lora.save(backbone.denoiser, tmp_path / "adapter")
    out = tmp_path / ("out" if form == "diffusers" else "out.safetensors")
    files = write_for_others(lora.read(tmp_path / "adapter"), out, form, type(backbone))

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder_of(name), dtype=torch.float32)
    if name == "hunyuan_video15":
        pipeline.transformer.load_lora_adapter(files[0], use_safetensors=True)
    else:
        pipeline.load_lora_weights(files[0])
    if len(files) > 1:
        pipeline.load_lora_weights(files[1], load_into_transformer_2=True)
    theirs, _ = tiny(name, folder_of(name))
    monkeypatch.setattr(theirs, "load_denoiser_part", lambda component: getattr(pipeline, component))
    theirs.denoiser = theirs.load_denoiser()
    latents = [sample(one, encoded, noise_for(backbone)) for one in (backbone, theirs)]
    videos = [backbone.decode(z).detach().clamp(-1, 1) / 2 + 0.5 for z in latents]
    assert (latents[0] - plain).abs().max() > 1e-2
    # Sums depend on where in memory a weight lies, and both experts in a row magnify their rounding.
    assert (videos[0] - videos[1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", [n for n in FAMILIES if "compile_blocks" in BACKBONES.resolve(n).obeys])
def test_compiled_blocks_have_the_plain_ones_gradient(folder_of, name, monkeypatch):
    """Of a block that is recomputed in the backward pass, as in training.

    Of one family PyTorch also makes kernels, which takes most of the time; the others are traced alone.
    """
    backend = "inductor" if name == "ltx" else "aot_eager"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    outcomes = []
    torch._dynamo.reset()
    for compiled in (False, True):
        backbone, encoded = tiny(name, folder_of(name), image_size=(32, 32))
        network = backbone.denoiser
        del (network.blocks if name == "wan" else network.transformer_blocks)[1:]
        with_adapter(backbone)
        backbone.enable_checkpointing()
        if compiled:
            backbone.compile_blocks()
        predict = backbone.predictor([backbone.features(e) for e in encoded])
        prediction = predict(noise_for(backbone), torch.full((2,), 600.0))
        parameters = list(lora.parameters(backbone.denoiser).values())
        gradients = torch.autograd.grad(
            prediction.square().sum(), parameters, allow_unused=True, materialize_grads=True
        )
        outcomes.append((prediction.detach().flatten(), torch.cat([g.flatten() for g in gradients])))
    for plain, compiled in zip(*outcomes, strict=True):
        assert (compiled - plain).norm() < 1e-5 * plain.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
XXL["feed_forward_proj"] = "gated-gelu"
T5_XXL = (transformers.T5EncoderModel, transformers.T5Config(vocab_size=32128, **XXL))
QWEN = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN |= {"num_attention_heads": 28, "num_key_value_heads": 4}
BYT5 = {"vocab_size": 1510, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
# The text encoders as published, the bytes of a parameter in the files, and parameters.
TEXT_ENCODERS = {
    "wan": (
        [(transformers.UMT5EncoderModel, transformers.UMT5Config(vocab_size=256384, **XXL))],
        4,
        5_680_910_336,
    ),
    "ltx": ([T5_XXL], 4, 4_762_310_656),
    "cogvideox": ([T5_XXL], 2, 4_762_310_656),
    "hunyuan_video15": (
        [
            (transformers.Qwen2_5_VLTextModel, transformers.Qwen2_5_VLTextConfig(**QWEN)),
            (transformers.T5EncoderModel, transformers.T5Config(**BYT5, feed_forward_proj="gated-gelu")),
        ],
        2,
        7_289_934_080,
    ),
    "modelscope": ([(transformers.CLIPTextModel, transformers.CLIPTextConfig(**CLIP))], 4, 340_387_840),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_encoder_has_the_size_that_is_said(name):
    kinds, width, expected = TEXT_ENCODERS[name]
    with torch.device("meta"):
        parameters = sum(p.numel() for kind, config in kinds for p in kind(config).parameters())
    assert parameters == expected
    for published in BACKBONES.resolve(name).published.values():
        assert published.licence
        assert published.text_size == pytest.approx(width * parameters, rel=0.01)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_builds_and_trains_with_settings_of_its_kind(path, tmp_path, monkeypatch):
    """Those that name files of the user's find such files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/fox.png")
    (tmp_path / "pictures" / "prompts.txt").write_text('a fox {"reference_path": "pictures/fox.png"}')
    (tmp_path / "loras").mkdir()
    pair = {f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(pair, "loras/wan_t2v_14b_4_steps.safetensors")
    config = load_config([str(path)])
    backbone = new_backbone(config, torch.device("cpu"))
    assert backbone.settings.model_path in type(backbone).published
    assert 1e-5 <= config.optimizer.lr <= 1e-4
