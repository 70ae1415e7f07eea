"""What a config, --cfg-options and flags inherit, and what they replace."""

import json
from pathlib import Path

import pytest
import yaml

from Core.config import ConfigError, load_config

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "Open-Sora" / "configs" / "opensora-v1-2" / "vader" / "vader_demo.py"
PICK = {"model": "somebody/clip"}
BASE = {"reward_fn": "pick_score", "reward_args": PICK, "monitors": ["motion"], "seed": 3}


@pytest.fixture
def load(tmp_path):
    """The configuration of a child of a child of ``base``, itself a child of the demo's."""

    def configured(child: dict, *flags: str, base: dict = BASE, suffix: str = "py"):
        for name, parent, values in (("base.py", DEMO, base), (f"child.{suffix}", "base.py", child)):
            values = {"_base_": [str(parent)], **values}
            lines = "".join(f"{key} = {value!r}\n" for key, value in values.items())
            text = {"py": lines, "yaml": yaml.safe_dump(values), "json": json.dumps(values)}
            (tmp_path / name).write_text(text[name.partition(".")[2]])
        (tmp_path / "last.py").write_text(f"_base_ = 'child.{suffix}'\nlr = 1e-4\n")
        return load_config([str(tmp_path / "last.py"), *flags])

    return configured


@pytest.mark.parametrize("suffix", ["py", "yaml", "json"])
def test_a_mixture_over_one_scorer_and_back(load, suffix, caplog):
    mixture = {"pick_score": 1.0, "motion": 0.1}
    config = load({"reward_fn": mixture}, suffix=suffix)
    assert config.reward.reward_fn == mixture and config.reward.reward_args == {"pick_score": PICK}
    assert not caplog.records and config.run.seed == 3 and config.optimizer.lr == 1e-4
    base = {"reward_fn": mixture, "reward_args": {"pick_score": PICK}}
    config = load({"reward_fn": "pick_score"}, base=base, suffix=suffix)
    assert config.reward.reward_fn == "pick_score" and config.reward.reward_args == PICK


def test_a_mixture_replaces_a_mixture(load, caplog):
    base = {"reward_fn": {"motion": 1.0, "sharpness": 1.0}, "reward_args": {"motion": {"target": 0.5}}}
    config = load({"reward_fn": {"saturation": 2.0}}, base=base)
    assert config.reward.reward_fn == {"saturation": 2.0} and config.reward.reward_args == {}
    assert [record.getMessage() for record in caplog.records] == [
        "reward_fn={'saturation': 2.0}: left out the arguments of motion"
    ]


def test_arguments_monitors_and_early_stop_replace(load):
    base = {**BASE, "monitors": ["motion", "sharpness"], "early_stop": {"monitor": "motion", "fall": 0.5}}
    base["monitor_args"] = {"motion": {"target": 0.1}, "sharpness": {"target": 0.2}}
    child = {
        "reward_args": {"resize": "squash"},
        "monitors": ["sharpness"],
        "early_stop": {"monitor": "reward"},
    }
    config = load(child, base=base)
    assert config.reward.reward_args == {"resize": "squash"}
    assert config.validation.monitor_args == {"sharpness": {"target": 0.2}}
    assert config.validation.early_stop == {"monitor": "reward"}
    config = load({"early_stop": None, "monitor_args": {"motion": {}}, "monitors": ["motion"]}, base=base)
    assert config.validation.early_stop is None and config.validation.monitor_args == {"motion": {}}


def test_entries_of_the_family_merge(load):
    config = load({"scheduler": {"cfg_scale": 3.0}})
    assert config.family.scheduler["cfg_scale"] == 3.0 and config.family.scheduler["num_sampling_steps"] == 12


@pytest.mark.parametrize(
    "flags", [["--reward-fn", "motion"], ["--cfg-options", "reward_fn=motion"]], ids=["flag", "cfg-options"]
)
def test_another_reward_leaves_the_arguments_of_the_former_one(load, caplog, flags):
    assert load({}, *flags).reward.reward_args == {}
    assert [record.getMessage() for record in caplog.records] == [
        "reward_fn='motion': left out the arguments of pick_score"
    ]
    caplog.clear()
    given = ["--reward-args", '{"target": 0.2}']
    assert load({}, *flags, *given).reward.reward_args == {"target": 0.2}
    last = flags if "--cfg-options" in flags else [*flags, "--cfg-options"]
    assert load({}, *last, "reward_args.target=0.3").reward.reward_args == {"target": 0.3}
    assert load({}, *last, "reward_args={'target': 0.4}").reward.reward_args == {"target": 0.4}


def test_the_same_reward_keeps_its_arguments(load, caplog):
    assert load({"reward_fn": "pick_score"}, "--reward-fn", "pick_score").reward.reward_args == PICK
    merged = load({}, "--cfg-options", "reward_args.resize=squash").reward.reward_args
    assert merged == {**PICK, "resize": "squash"}
    assert load({}, "--cfg-options", "reward_args={'resize': 'squash'}").reward.reward_args == {
        "resize": "squash"
    }
    assert not caplog.records


def test_one_process_of_a_machine_says_it(load, caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    load({}, "--reward-fn", "motion")
    assert not caplog.records


@pytest.mark.parametrize("wrong", [3, ["motion"], [["motion"]], {3: 1.0}, None, {"motion": []}])
def test_a_reward_of_the_wrong_type_is_a_sentence(load, wrong):
    with pytest.raises(ConfigError, match="reward"):
        load({"reward_fn": wrong})
    with pytest.raises(ConfigError, match="reward"):
        load({}, base={**BASE, "reward_fn": wrong})


def test_cfg_options_that_no_entry_can_take_are_a_sentence(load):
    with pytest.raises(ConfigError, match="--cfg-options: "):
        load({}, "--cfg-options", "lr.a=1")
