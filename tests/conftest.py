import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import twin_runs
from twins import save_twin

from Core.backbones import base
from Core.training.trainer import Trainer

torch.set_num_threads(1)
MANY = 100_000  # objects that a garbage collection looks through in a tenth of a second


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """No garbage collection looks through the libraries, which takes a third of a second."""
    if len(gc.get_objects()) > MANY:  # of those that are not frozen
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """Folder of a tiny Open-Sora 1.2, CLIP and prompts."""
    return save_twin(tmp_path_factory.mktemp("twin"))


@pytest.fixture
def double_trainer(twin, tmp_path, monkeypatch) -> Callable[..., Trainer]:
    """Builds trainers whose whole chain computes in float64, with an adapter that is no longer zero.

    The decoder's contrast is turned down so that no pixel leaves [-1, 1]: out there rewards replace the gradient
    of the clamp, which is zero, by one that leads back into the range (``clamp_towards_range``).
    """
    monkeypatch.setitem(base.DTYPES, "fp32", torch.float64)

    def build(steps: int = 4, **overrides) -> Trainer:
        scheduler = dict(type="rflow", use_timestep_transform=True, num_sampling_steps=steps, cfg_scale=3.0)
        options = dict(scheduler=scheduler, image_size=twin_runs.SIZE, grad_checkpoint=False)
        trainer = twin_runs.built_trainer(twin, tmp_path / "run", **{**options, **overrides})
        trainer.backbone.vae.spatial_vae.module.decoder.conv_out.weight.data *= 0.2
        generator = torch.Generator().manual_seed(5)
        for name, parameter in trainer.named_parameters.items():
            assert parameter.dtype == torch.float64
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return trainer

    return build


@pytest.fixture(scope="module")
def chromium():
    """An installed Chromium or Chrome, driven by playwright."""
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed (requirements-dev.txt): the page is not seen",
    )
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium): the page is not seen")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--disable-gpu", "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """A function that opens a file or an address, and a list of what the browser complains about.

    Complaints are errors and warnings of the console, exceptions, dialogs, and requests beyond the page's folder.
    """
    complaints: list[str] = []

    def note_message(message) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def open_page(place: Path | str, width: int, height: int, colors: str = "light"):
        address = place if isinstance(place, str) else place.as_uri()

        def note_request(request) -> None:
            if not request.url.startswith(("data:", address.rpartition("/")[0] + "/")):
                complaints.append(request.url)

        def note_dialog(dialog) -> None:
            complaints.append(dialog.message)
            dialog.dismiss()

        page = chromium.new_page(
            viewport={"width": width, "height": height}, color_scheme=colors, is_mobile=width < 500
        )
        page.on("console", note_message)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", note_dialog)
        page.on("request", note_request)
        page.goto(address)
        return page

    yield open_page, complaints
    for context in list(chromium.contexts):
        context.close()
