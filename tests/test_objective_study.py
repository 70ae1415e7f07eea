"""The study of objectives: equal tuning for each, and what its courses say of queries."""

import json

import pytest

from scripts.demo import study_objectives as study

COURSE = {"steps": [0, 10, 20], "reward": [40.0, 44.0, 60.0], "diversity": [0.5, 0.5, 0.4]}
COURSE |= {name: [1.0, 1.0, 1.1] for name in ("motion", "dynamic_degree")}
GAINS = {name: {"gain": 0.1} for name in study.MEASURES} | {"reward": {"gain": 10.0}}
COMPARED = COURSE | {"held_out": GAINS, "share_of_gap": 0.4}


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


def test_queries_are_multiples_or_a_bound_where_a_run_did_not_get_there(kept):
    keep_cost(trial := study.Trial("nft", 4, "pick_score"))
    assert study.ratios(trial, [COURSE, COURSE | {"reward": [40.0, 41.0, 49.0]}], 12.0, 64) == "1.9, > 2.5"


def test_a_kept_result_counts_once_it_is_long_enough_and_compared():
    assert study.is_complete(COURSE, "search", 20)
    assert not study.is_complete(COURSE, "long_0", 20)
    assert not study.is_complete(COMPARED, "long_0", 21)
    assert study.is_complete(COMPARED, "long_0", 15)
    assert not study.is_complete({}, "seed_0", 1)


def test_a_run_that_was_stopped_or_is_too_long_is_not_taken_for_one(tmp_path):
    (tmp_path / "validation.csv").write_text(
        "step,reward,motion,dynamic_degree,diversity\n0,40,1,1,1\n20,60,1,1,1\n", encoding="utf-8"
    )
    assert study.course_of(tmp_path, 20)["reward"] == [40, 60]
    with pytest.raises(SystemExit, match="the same command continues"):
        study.course_of(tmp_path, 21)
    with pytest.raises(SystemExit, match="holds a run of 20 steps, and 19 are asked for"):
        study.course_of(tmp_path, 19)


def test_another_reward_takes_the_settings_that_were_searched(kept):
    for number, reward in enumerate((50.0, 52.0, 58.0, 51.0, 53.0, 57.0)):
        course = COURSE | {"reward": [40.0, 44.0, reward]}
        study.Trial("nft", number, study.SEARCHED).keep("search", course)
    assert study.best("nft", "oracle", "seed") == study.Trial("nft", 2, "oracle")
    assert study.best("nft", "oracle", "long") == study.Trial("nft", 4, "oracle")
    for number in range(6):
        study.Trial("leap", number, study.SEARCHED).keep(
            "search", COURSE | {"reward": [40.0, 44.0, 50.0 + number]}
        )
    assert study.best("leap", study.SEARCHED, "long").keys["lr"] > study.LASTING_RATE
    with pytest.raises(SystemExit, match="pick_score_dpo_0 has not been searched"):
        study.best("dpo", "oracle", "seed")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Results and pages in a folder of their own."""
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    for name in ("RESULTS", "TABLE", "PLOT", "PAGE"):
        monkeypatch.setattr(study, name, tmp_path / getattr(study, name).name)
    study.PAGE.write_text("# Objectives\n", encoding="utf-8")


def keep_cost(trial: study.Trial) -> None:
    cost = {"step_seconds": 2.0, "step_queries": 8.0, "step_evaluations": 288.0, "peak_gb": 1.2}
    trial.pilot.keep("pilot", cost)


def test_longer_runs_have_a_table_of_their_own_and_may_differ_in_length(kept):
    longer = COMPARED | {"steps": [0, 10, 25, 40], "reward": [42.0, 44.0, 50.0, 70.0]}
    for objective, reward in (("leap", "pick_score"), ("nft", "pick_score"), ("nft", "oracle")):
        keep_cost(trial := study.Trial(objective, 2, reward))
        if reward == "pick_score":
            trial.keep("seed_0", COMPARED)
    keep_cost(trial := study.Trial("nft", 4, "pick_score"))
    for seed, course in enumerate((COMPARED, longer)):
        trial.keep(f"long_{seed}", course)
    further = {"steps": [0, 50, 63], "reward": [40.0, 62.0, 75.0]}
    study.Trial("leap", 2, "pick_score").keep("long_0", COMPARED | further)
    study.Trial("nft", 2, "oracle").keep("long_0", longer | {"reward": [0.5, 0.5, 0.6, 0.75]})
    study.write_docs()
    page = study.PAGE.read_text(encoding="utf-8")
    assert (
        "| objective | settings | 80 queries, +4.0 | 160 queries, +20.0 | 320 queries, +17.6 | 500 queries, +34.5 |"
        in page
    )
    nft = "| `nft` | group_size=16, lr=0.001, guided_sampling=True "
    assert nft + "| 1.0, 1.5 | 1.0, 1.7 | 0.5, 0.8 | > 0.3, > 0.6 |" in page
    leap, nft = study.rows_of("pick_score")
    assert (
        study.lasting(leap, "pick_score")[1] == [COMPARED] and len(study.lasting(nft, "pick_score")[1]) == 2
    )
    assert "| 2 | 240 | 60 | 41 → 65 | +10.0 |" in page
    assert "| 1 | 320 | 80 | 0.5 → 0.75 | +10.0 |" in page
    assert study.PLOT.is_file() and study.TABLE.is_file()


def test_the_table_is_made_of_kept_results_alone(kept):
    for objective, gain in (("leap", 12.0), ("grpo", 2.0)):
        keep_cost(trial := study.Trial(objective, 2, "pick_score"))
        for seed in (0, 1):
            gains = COMPARED["held_out"] | {"reward": {"gain": gain}}
            trial.keep(f"seed_{seed}", COMPARED | {"held_out": gains})
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
    *_, ratios = study.query_ratios("pick_score")
    assert ratios.endswith("| 1.0, 1.0 | 1.0, 1.0 |")
    assert json.loads(json.dumps(first)) == first
