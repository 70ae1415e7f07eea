"""The table of costs: what it counts, and that no scorer is left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import reward_costs  # noqa: E402

from Core.rewards import REGISTRY, build_reward, resolve_reward  # noqa: E402


def test_live_bytes_are_those_of_tensors_alive_at_once():
    x = torch.ones(1000)
    with reward_costs.LiveBytes() as live:
        y = x + 1
        z = y.view(10, 100) * 2  # a view is no new memory
        del y
        w = z + 1
        w.add_(1)  # nor is what is changed in place
    assert live.peak == 2 * 4000 and live.now == 2 * 4000


def test_operations_and_bytes_of_a_layer_by_hand():
    """A frozen linear layer: the product forward, and the one with the gradient backward."""
    real = reward_costs.Real(lambda: nn.Linear(64, 32, bias=False), (1, 10, 64), 2, lambda model, x: model(x))
    predicted = reward_costs.predict(real)
    assert predicted.weights == 2 * 64 * 32
    assert predicted.operations == 2 * 2 * 10 * 64 * 32 / 2
    assert predicted.peak_bytes >= 2 * 10 * 64 / 2


def test_a_scorer_is_measured():
    measured = reward_costs.measure(build_reward("sharpness"))
    assert measured.seconds > 0 and measured.peak_bytes > 3 * 4 * 64 * 64  # more than a frame


def test_every_scorer_has_a_row_and_every_network_a_prediction():
    page = reward_costs.PAGE.read_text(encoding="utf-8")
    lines = reward_costs.old_lines(page)
    assert reward_costs.render(page, {}) == page
    rows = {name: line.split("|")[4:7] for name, line in lines.items()}
    assert set(rows) == set(REGISTRY) - set(reward_costs.WRAPPERS)
    without = {name for name in rows if not resolve_reward(name).info.weights} | {"vjepa"}
    assert {name for name, predicted in rows.items() if "–" in predicted[0]} == without


@pytest.mark.parametrize("name", ["subject_consistency", "background_consistency"])
def test_predicted_networks_are_the_published_ones(name):
    """Parameters of ViT-B/16 and of CLIP's ViT-B/32, as their papers count them, in two bytes each."""
    millions = {"subject_consistency": 85.8, "background_consistency": 87.5}[name]
    assert reward_costs.predict(reward_costs.REAL[name]).weights / 2e6 == pytest.approx(millions, rel=0.01)
