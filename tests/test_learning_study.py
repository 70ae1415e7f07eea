"""The learning study's table: what runs say at a common time, and which runs it takes."""

import numpy as np
import pytest

from scripts.demo import study_windows


def course(rewards):
    return {
        "reward": np.array(rewards, dtype=float),
        "motion": np.array([0.02, 0.02, 0.01]),
        "diversity": np.array([0.5, 0.5, 0.5]),
        "steps": np.array([0, 10, 20]),
    }


def test_settings_are_compared_at_the_time_that_all_of_them_had():
    runs = {
        "window 1": [course([40, 45, 50]), course([40, 44, 46])],
        "window 3": [course([40, 48, 60])],
    }
    budget, (first, second) = study_windows.table_of(runs, {"window 1": 5.0, "window 3": 20 / 3})
    assert budget == 100.0
    assert (first["setting"], first["reward_gain"], first["seeds"]) == ("window 3", 14.0, 1)
    assert (second["reward_gain"], second["lowest"], second["highest"]) == (8.0, 6.0, 10.0)
    assert second["motion_gain"] == pytest.approx(-0.01) and second["diversity_gain"] == 0.0
    assert (first["steps"], second["steps"]) == (15, 20)
    assert study_windows.conclusion([first, second]).startswith("`window 3` has the highest mean. ")
    assert "cannot be told apart" in study_windows.conclusion(
        [{**first, "setting": "full", "lowest": 9.0}, second | {"setting": "window 3"}]
    )
    assert study_windows.kept([first, second]).endswith("kept in equal time: `window 1` 57%.")


@pytest.mark.parametrize("steps, finished", [(2, True), (4, False)])
def test_a_run_that_was_stopped_does_not_count(tmp_path, monkeypatch, steps, finished):
    monkeypatch.setattr(study_windows, "FOLDER", tmp_path)
    folder = study_windows.folder_of("window 1", 0)
    folder.mkdir()
    (folder / "config.py").write_text(f"max_train_steps = {steps}\n")
    (folder / "validation.csv").write_text("step,reward,motion,diversity\n0,40,1,1\n2,45,1,1\n")
    found = study_windows.course("window 1", 0)
    assert (found is not None) == finished
    assert not finished or found["steps"].tolist() == [0, 2]
