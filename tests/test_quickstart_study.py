"""The study of the quickstart's settings: sound configurations, and tables of kept results alone."""

import pytest

from Core.config import load_config
from scripts.demo import study_objectives
from scripts.demo import study_quickstart as study


@pytest.mark.parametrize("name", study.RUNS)
def test_every_run_is_a_sound_configuration(name, tmp_path, monkeypatch):
    monkeypatch.setattr(study_objectives, "FOLDER", tmp_path)
    own = load_config([str(study.CONFIG)]).optimizer.max_train_steps
    assert study.config_of(name).optimizer.max_train_steps == study.RUNS[name].get("max_train_steps", own)


def test_a_result_of_other_numbers_of_steps_is_not_taken_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr(study_objectives, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "quickstart.json")
    trained = []
    monkeypatch.setattr(study, "run", lambda config: trained.append(config.optimizer.max_train_steps))
    monkeypatch.setattr(study, "course_of", lambda folder, steps: {"steps": [0, steps]})
    for _ in range(2):
        study.measure(["search: half the rate"])
    assert trained == [study.SEARCHED_STEPS]
    study.keep("search: half the rate", {"steps": [0, 96]})
    study.measure(["search: half the rate"])
    assert len(trained) == 2


def test_the_section_is_made_of_kept_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "quickstart.json")
    monkeypatch.setattr(study, "PAGE", tmp_path / "quickstart.md")
    course = {"steps": [0, 96], "reward": [45.0, 60.0], "motion": [2.0, 1.88]}
    course |= {"dynamic_degree": [4.0, 4.2], "diversity": [0.2, 0.2]}
    study.keep("search: half the rate", {"step_seconds": 1.5})
    study.keep("search: half the rate", course | {"steps": [0, 120]})
    for seed, share in ((0, 0.5), (1, 0.6)):
        gains = {name: {"gain": share * 10} for name in study_objectives.MEASURES}
        study.keep(f"seed {seed}", course | {"held_out": gains, "share_of_gap": share})
    study.keep("seed 2", study.read_results()["seed 1"] | {"steps": [0, 95]})
    study.PAGE.write_text("# Quickstart\n", encoding="utf-8")
    study.write_docs()
    study.write_docs()
    page = study.PAGE.read_text(encoding="utf-8")
    assert page.startswith("# Quickstart\n\n<!-- study") and page.count("<!-- study") == 1
    assert "| mean of 2 | 96 | +5.5 | 55% | +550.0 | +550.0 | -6.0% | +5.0% | +0.0% |  |" in page
    assert "| seed 0 | 96 | +5.0 | 50% | +500.0 | +500.0 | -6.0% | +5.0% | +0.0% | 60.0 |" in page
    assert "dynamic degree is 4.0 against 1.1, and motion 2.0000 against 0.0145." in page
    assert "| half the rate | 120 | 180 | 45.0 | 60.0 |" in page and "cosine schedule |" not in page


def test_the_readme_says_what_the_seeds_reached():
    shares = [study.read_results()[f"seed {seed}"]["share_of_gap"] for seed in study.SEEDS]
    readme = (study.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Three other seeds closed {min(shares):.0%} to {max(shares):.0%} of the" in readme
