"""What the quickstart leaves to look at, from a comparison that was not made by training."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from report_runs import training_run
from sampling_runs import random_adapter

from Core.config import load_config
from scripts.demo import quickstart
from scripts.demo.common import heldout
from scripts.demo.compare import Comparison, Scores, save_evaluation
from scripts.figures.animation import animation

COUNT = 12


def scores(seed: int, reward: float, right: int) -> Scores:
    rng = np.random.default_rng(seed)
    verdict = np.array([1.0] * right + [0.0] * (COUNT - right))
    ones = np.ones(COUNT)
    return Scores(reward + rng.normal(size=COUNT), verdict, ones, ones, 0.02 * ones)


@pytest.fixture(scope="module")
def result():
    _, captions = heldout(COUNT)
    videos = np.random.default_rng(0).integers(0, 255, (2, COUNT, 5, 64, 64, 3), dtype=np.uint8)
    return Comparison(captions, scores(1, 50, 4), scores(2, 61, 9), 78.1, *videos)


def test_the_report_is_written_last_listed_first_and_holds_the_comparison(
    result, tmp_path, monkeypatch, capsys
):
    folder = training_run(tmp_path / "quickstart", steps=3)
    config = load_config([str(quickstart.CONFIG), "--project-dir", str(folder)])
    for name in ("side_by_side", "contact_sheet", "reward_curve"):
        monkeypatch.setattr(quickstart, name, lambda path, *_: path.touch() or path)
    save_evaluation(result, config, random_adapter(folder / "adapter"), folder / "evaluation")
    quickstart.show_paths(result, folder)
    listed = re.findall(r"^  (/\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert listed[0] == str(folder / "report.html") and str(folder / "evaluation/gallery.html") in listed
    others = [
        path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "report.html" and path.is_file()
    ]
    assert (folder / "report.html").stat().st_mtime_ns >= max(others)
    page = (folder / "report.html").read_text()
    assert "quickstart took <b>reward</b>" in page and "on 12 held-out prompts" in page
    assert "not been compared" not in page and result.distance in page
    ticks = re.findall(r'class="(tick|cross)"[^>]*>[✓✗]</span>', page)
    assert len(ticks) == 4 * COUNT and ticks.count("tick") == 4 + 9 + 2 * COUNT
    assert page.count("<video") >= 2 * 6
    shares = re.search(r"colour and shape right, %  (.*)", quickstart.table(result, {}))[1]
    (row,) = re.findall(r"<b>colour and shape right</b>, %.*?</tr>", page, re.DOTALL)
    shown = re.findall(r">([+−]?[\d.]+)<", row)
    assert [*map(float, shares.split()[:3])] == [*map(float, shown[:3])] == [33.3, 75, 41.7]
    with Image.open(io.BytesIO(animation(folder))) as moving:
        assert (moving.format, moving.n_frames) == ("WEBP", 5)
