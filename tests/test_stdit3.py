"""STDiT3 against the public release, and what the release does not show: exact batches and fused attention."""

import golden_data
import pytest
import torch
import twins
from golden_data import relative_error
from operators import Recorder
from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora.acceleration.checkpoint import set_grad_checkpoint
from opensora.models.stdit.stdit3 import STDiT3_3B_2, STDiT3_XL_2
from opensora.schedulers.rf.rectified_flow import RFlowScheduler

GOLDEN, METADATA = golden_data.tensors("stdit3_tiny")
CASES = ("video", "image", "odd_size", "frame_mask")
INPUTS = ("mask", "x_mask", "fps", "height", "width")
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@pytest.fixture(scope="module")
def model():
    return golden_data.golden_stdit(GOLDEN, METADATA)


def arguments(name: str) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """(x, timestep, y) and the keyword arguments of a golden case."""
    case = golden_data.case(GOLDEN, name)
    return (case["x"], case["timestep"], case["y"]), {key: case[key] for key in INPUTS if key in case}


def video_inputs(captions: int, frames: int = 3, size: tuple[int, int] = (4, 6)) -> tuple[tuple, dict]:
    """Random inputs for the twin, one caption of another length per sample."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(captions, 4, frames, *size, generator=generator)
    y = torch.randn(captions, 1, twins.TEXT_LENGTH, twins.TEXT_WIDTH, generator=generator)
    lengths = torch.tensor([3, 24, 7, 11][:captions])
    sizes = {
        key: torch.full((captions,), value) for key, value in dict(fps=24.0, height=32.0, width=48.0).items()
    }
    mask = (torch.arange(twins.TEXT_LENGTH) < lengths[:, None]).long()
    return (x, torch.linspace(900, 100, captions), y), {"mask": mask, **sizes}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradient_are_those_of_the_release(model, name):
    (x, t, y), kwargs = arguments(name)
    x = x.clone().requires_grad_()
    out = model(x, t, y, **kwargs)
    assert relative_error(out, GOLDEN[f"{name}.out"]) <= 1e-5
    (gradient,) = torch.autograd.grad(out.square().mean(), x)
    assert relative_error(gradient, GOLDEN[f"{name}.grad_x"]) <= 1e-4


@pytest.mark.parametrize("build", [STDiT3_XL_2, STDiT3_3B_2], ids=["XL/2", "3B/2"])
def test_full_sizes_have_the_keys_and_shapes_of_the_checkpoints(build):
    manifest = golden_data.shapes("stdit3_manifest")
    with torch.device("meta"):
        built = golden_data.shapes_of(build(qk_norm=True))
    assert built == manifest[{STDiT3_XL_2: "STDiT3-XL/2", STDiT3_3B_2: "STDiT3-3B/2"}[build]]


def test_text_encoded_once_gives_the_same(model):
    (x, t, y), kwargs = arguments("video")
    context = model.encode_text(y, kwargs.pop("mask"))
    assert torch.equal(model(x, t, context, **kwargs), model(*arguments("video")[0], **arguments("video")[1]))


def test_guidance_gives_the_null_caption_as_many_tokens_as_its_prompt(model):
    """A mask with fewer rows than captions repeats, as the released sampler relies on."""
    (x, t, y), kwargs = arguments("video")
    double = {key: value.repeat(2) for key, value in kwargs.items() if key != "mask"}
    inputs = x.repeat(2, 1, 1, 1, 1), t.repeat(2), torch.cat([y, y.flip(-1)])
    short = model(*inputs, mask=kwargs["mask"], **double)
    assert torch.equal(short, model(*inputs, mask=kwargs["mask"].repeat(2, 1), **double))


def test_captions_of_unequal_length_stay_exact_in_one_batch():
    model = twins.stdit()
    inputs, kwargs = video_inputs(captions=4)
    together = model(*inputs, **kwargs)
    for i in range(4):
        alone = model(*(v[i : i + 1] for v in inputs), **{key: v[i : i + 1] for key, v in kwargs.items()})
        assert relative_error(together[i : i + 1], alone) <= 1e-6


def test_tokens_behind_the_mask_are_never_read():
    model = twins.stdit()
    (x, t, y), kwargs = video_inputs(captions=2)
    before = model(x, t, y, **kwargs)
    hidden = kwargs["mask"][:, None, :, None] == 0
    assert torch.equal(before, model(x, t, torch.where(hidden, 1e4, y), **kwargs))


def test_a_mask_of_all_frames_changes_nothing(model):
    (x, t, y), kwargs = arguments("video")
    everything = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
    torch.testing.assert_close(model(x, t, y, x_mask=everything, **kwargs), model(x, t, y, **kwargs))


def record(model, inputs: tuple, kwargs: dict) -> Recorder:
    with Recorder() as ran:
        model(*inputs, **kwargs).square().mean().backward()
    return ran


def test_attention_is_fused_in_all_places_and_no_score_matrix_exists():
    model = twins.stdit()
    inputs, kwargs = video_inputs(captions=2, frames=13, size=(14, 10))
    spatial, temporal, text = 7 * 5, 13, int(kwargs["mask"].any(0).sum())
    scores = {(spatial, spatial), (temporal, temporal), (spatial * temporal, text)}
    fused = record(model, inputs, kwargs)
    attentions = 2 * 2 * twins.STDIT["depth"]  # to itself and to the text, in each spatial and temporal block
    assert fused.calls.count(FUSED) == fused.calls.count(FUSED_BACKWARD) == attentions
    assert not scores & {shape[-2:] for shape in fused.shapes}
    with sdpa_kernel(SDPBackend.MATH):  # the reference path, to see that the recorder would notice
        assert scores <= {shape[-2:] for shape in record(model, inputs, kwargs).shapes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_float32(dtype):
    model = twins.stdit()
    exact = model.rope.freqs.clone()
    model.to(dtype)
    assert model.rope.freqs.dtype == torch.float32 and torch.equal(model.rope.freqs, exact)
    assert next(model.parameters()).dtype == dtype


@torch.no_grad()
def test_tokens_lie_in_one_order_in_memory_all_along_the_blocks():
    model = twins.stdit()
    contiguous = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: contiguous.append(output.is_contiguous()))
    inputs, kwargs = video_inputs(captions=2)
    model(*inputs, **kwargs)
    assert contiguous == [True] * len(model.blocks)


def test_one_video_is_multiplied_in_one_go_along_time():
    """PyTorch makes a product for each row of what is not contiguous, unless the weight needs a gradient."""
    args, kwargs = video_inputs(1)
    model = twins.stdit().requires_grad_(False)
    with Recorder() as recorder:
        model(*args, **kwargs)
    assert torch.ops.aten.bmm not in recorder.calls


def test_half_precision_computes_in_its_type_and_answers_in_float32():
    model = twins.stdit()
    inputs, kwargs = video_inputs(captions=2)
    exact = model(*inputs, **kwargs)
    rounded = model.to(torch.bfloat16)(*inputs, **kwargs)
    assert rounded.dtype == torch.float32
    assert relative_error(rounded, exact) < 0.05


def test_checkpointing_keeps_output_and_gradient():
    model = twins.stdit()
    inputs, kwargs = video_inputs(captions=2)
    results = []
    for switch in (False, True):
        if switch:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        out = model(*inputs, **kwargs)
        out.square().mean().backward()
        results.append((out, model.spatial_blocks[0].attn.qkv.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("keep_attention", [False, True])
def test_kept_attention_is_not_computed_again(keep_attention):
    model = twins.stdit()
    inputs, kwargs = video_inputs(captions=2)
    plain = record(model, inputs, kwargs)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    set_grad_checkpoint(model, keep_attention=keep_attention)
    checkpointed = record(model, inputs, kwargs)
    assert checkpointed.calls.count(FUSED) == plain.calls.count(FUSED) * (1 if keep_attention else 2)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], gradients)


def test_training_from_noise_lowers_the_rectified_flow_loss():
    """The loss a velocity network is pretrained with falls on the batch it is fitted to."""
    torch.manual_seed(0)
    model = twins.stdit()
    (x, _, y), kwargs = video_inputs(captions=4)
    scheduler, optimizer = RFlowScheduler(), torch.optim.Adam(model.parameters(), lr=2e-3)
    noise, t = torch.randn_like(x), torch.full((4,), 500.0)
    losses = []
    for _ in range(12):
        loss = scheduler.training_losses(model, x, {"y": y, **kwargs}, noise=noise, t=t)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
