"""The study of objectives: equal tuning for each, and what its courses say of queries."""

import json

import pytest

from scripts.demo import study_objectives as study

COURSE = {"steps": [0, 10, 20], "reward": [40.0, 44.0, 60.0], "diversity": [0.5, 0.5, 0.4]}
COURSE |= {name: [1.0, 1.0, 1.1] for name in ("motion", "dynamic_degree")}


def test_each_objective_is_tuned_at_the_same_cost():
    assert len({len(trials) for trials in study.TRIALS.values()}) == 1


@pytest.mark.parametrize("objective", study.TRIALS)
def test_every_trial_is_a_sound_configuration(objective, tmp_path):
    for number in range(len(study.TRIALS[objective])):
        for reward in study.REWARDS if objective in study.GRADIENT_FREE else ["pick_score"]:
            config = study.Trial(objective, number, reward).config(tmp_path, 4, **study.VALIDATED)
            assert not config.objective_class.batch_errors(config.objective, config.optimizer.global_batch(1))


def test_queries_are_interpolated_along_a_course():
    assert study.queries_to_reach(COURSE, 8, 52.0) == 8 * 15
    assert study.queries_to_reach(COURSE, 8, 39.0) == 0
    assert study.queries_to_reach(COURSE, 8, 61.0) is None
    assert study.reward_after(COURSE, 8, 40) == 42
    assert study.said([1000.0, None], [4000, 4000], 500) == "takes 2.0, more than 8 times as many, by seed"


def test_the_table_is_made_of_kept_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "objectives.json")
    gains = {name: {"gain": 0.1} for name in study.MEASURES}
    for objective, gain in (("leap", 12.0), ("grpo", 2.0)):
        trial = study.Trial(objective, 2, "pick_score")
        result = COURSE | {"held_out": gains | {"reward": {"gain": gain}}, "share_of_gap": 0.4}
        cost = {"step_seconds": 2.0, "step_queries": 8.0, "step_evaluations": 288.0, "peak_gb": 1.2}
        trial.pilot.keep("pilot", cost)
        for seed in (0, 1):
            trial.keep(f"seed_{seed}", result)
    study.Trial("leap", 2, "pick_score").keep("search", COURSE)
    first, second = study.rows_of("pick_score")
    assert (first["objective"], second["objective"], first["seeds"]) == ("leap", "grpo", 2)
    assert (first["queries"], first["evaluations"], first["seconds"]) == (160, 5760, 40)
    gains = study.gains_table([first]).splitlines()[-1]
    assert gains.startswith("| `leap` | nested_grad=0.3, lr=0.003 | +12.0 | +12.0 to +12.0 | 40% | +10.0 |")
    assert gains.endswith("| +10.0% | +10.0% | -20.0% |")
    assert study.costs_table([first]).endswith("| `leap` | 20 | 160 | 5760 | 40 | 1.2 |")
    assert study.search_table("pick_score").endswith(
        "| `leap` | nested_grad=0.3, lr=0.003 | 20 | 40.0 | 60.0 |"
    )
    assert study.query_ratios("pick_score")[1].startswith("`grpo` takes 1.0, 1.0 times as many")
    assert json.loads(json.dumps(first)) == first
