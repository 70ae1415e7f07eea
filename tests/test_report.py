"""The report: complete, self-contained, small, and seen in a real browser."""

import base64
import hashlib
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import report_runs
from browsers import wait_until
from report_runs import PROMPTS, evaluation, training_run, write_manifest
from sampling_runs import picture

from Core.data.video import read_video
from Core.evaluation.charts import Line, line_chart, moving_average, stack_chart
from Core.evaluation.gallery import write_gallery
from Core.evaluation.report import (
    VideoBudget,
    charts,
    headline,
    main_measure,
    spread,
    validation_films,
    write_report,
)

HEADLINE = re.compile(r"took\s+<b>hps</b> from (\S+) to <b class=\"up\">(\S+)</b>")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run with an evaluation, reported."""
    folder = training_run(tmp_path_factory.mktemp("runs") / "fox run")
    evaluation(folder / "evaluation")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_headline_is_the_held_out_gain_of_the_evaluation(run, page):
    result = json.loads((run / "evaluation" / "evaluation.json").read_text())
    row = next(r for r in result["summary"] if (r["measure"], r["prompts_are"]) == ("hps", "held-out"))
    before, after = HEADLINE.search(page).groups()
    assert (before, after) == (f"{row['before']:.4g}", f"{row['after']:.4g}")
    assert row["prompts"] == 7 and "on 7 held-out prompts" in page


def test_everything_of_the_run_is_there(run, page):
    for title in ("Before and after", "Side by side", "Curves", "Every prompt", "How to repeat it"):
        assert f">{title}</h2>" in page
    for title in (
        "Reward",
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Seconds per step",
        "Validation: motion",
    ):
        assert f"<h3>{title}</h3>" in page
    assert "motion falls while the reward rises" in page
    assert "lora_rank" in page and "newest checkpoint" not in page  # this run has no checkpoint
    start = json.loads((run / "environment.json").read_text())["starts"][0]
    assert start["versions"]["torch"] in page and start["hardware"]["cpu"] in page
    assert all(prompt in page for prompt in PROMPTS)


def test_every_figure_names_a_file_that_is_there(run, page):
    named = set(re.findall(r"<code>((?:evaluation/)?\w+\.(?:csv|json|py|txt))</code>", page))
    named |= set(re.findall(r'<figcaption class="source">(\w+\.csv)', page))
    named |= set(re.findall(r'<figcaption title="([^"]+)"', page))
    assert len(named) > 8
    assert [n for n in named if not (run / n).is_file() and not (run / "evaluation" / n).is_file()] == []


def test_one_file_without_network_and_small(run, page):
    assert (run / "report.html").stat().st_size < 20_000_000
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "url(http" not in page and "@import" not in page


def test_ids_are_unique(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_most_improved_and_most_harmed_are_in_order(run, page):
    result = json.loads((run / "evaluation" / "evaluation.json").read_text())
    gains = {line["prompt"]: line["hps_gain"] for line in result["per_prompt"]}
    improved, harmed = page[page.index("Most improved") :].split("Most harmed")
    shown = [re.findall(r'class="prompt">([^<]+)<', part)[:3] for part in (improved, harmed)]
    ranked = sorted(gains, key=gains.get)
    assert shown[0] == ranked[::-1][: len(shown[0])] and shown[1] == ranked[: len(shown[1])]
    assert gains[shown[0][0]] > 0 > gains[shown[1][0]]


def test_a_run_without_evaluation_shows_its_validations(tmp_path):
    page = write_report(training_run(tmp_path / "run")).read_text()
    assert "Over training" in page and "step 60" in page and "Before and after" not in page
    assert "have not been compared on held-out prompts yet" in page


@pytest.mark.parametrize("line", ["open({!r}, 'w')", "lr = open({!r}, 'w')", "import os; os.mknod({!r})"])
def test_code_in_a_run_s_config_is_told_and_not_run(tmp_path, caplog, line):
    run = training_run(tmp_path / "run")
    (run / "config.json").unlink()  # as earlier versions left it
    trace = tmp_path / "trace"
    with open(run / "config.py", "a") as file:
        file.write(line.format(str(trace)) + "\n")
    page = write_report(run).read_text()
    assert not trace.exists()
    assert "Over training" in page and "lora_rank" not in page
    (told,) = caplog.messages
    assert str(run / "config.py") in told and "object at 0x" not in told


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """An evaluation of two adapters, reported with the validations of a run in the same folder."""
    folder = evaluation(tmp_path_factory.mktemp("several") / "evaluation", ("fox", "bird"))
    for step in (0, 20, 60):
        picture(folder / f"samples/step_{step:06d}/0000_0_a_fox", frames=9, seed=step)
        entry = {"name": "0000_0_a_fox", "file": "0000_0_a_fox.mp4", "prompt": PROMPTS[0], "seed": 200}
        (folder / f"samples/step_{step:06d}/prompts.jsonl").write_text(json.dumps(entry) + "\n")
    write_report(folder)
    return folder


def test_an_evaluation_alone_and_several_adapters(several):
    page = (several / "report.html").read_text()
    assert page.count("<b>bird</b>") == page.count("<b>fox</b>") >= 6
    rows = re.findall(r'<td class="name">(.*?)</td>\s*<td class="adapter">(\w+)</td>', page)
    assert [measure for measure, _ in rows if measure] == ["<b>hps</b>", "<b>motion</b>"]
    assert [adapter for _, adapter in rows] == ["fox", "bird"] * 6, "beside each other, kind by kind"
    assert "Curves" not in page


def test_large_videos_are_made_smaller_or_left_out(tmp_path):
    file = Path(picture(tmp_path / "large", frames=9, size=(270, 480)))
    write_manifest(tmp_path)
    budget = VideoBudget(file.stat().st_size, tmp_path)
    assert len(budget.uri(file)) < file.stat().st_size
    assert VideoBudget(100, tmp_path).uri(file) is None
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "prompts.jsonl"}


def test_only_videos_that_the_run_made_are_embedded(tmp_path, caplog):
    """A run is somebody else's data: what its tables name may lie anywhere on the reader's disk."""
    run = tmp_path / "run"
    run.mkdir()
    secret = Path(picture(tmp_path / "secret", frames=9))
    mine, other = Path(picture(run / "mine", frames=9)), Path(picture(run / "other", frames=9))
    (run / "link.mp4").symlink_to(secret)
    (run / "notes.txt").write_text("private")
    write_manifest(run)
    other.rename(run / "unlisted.mp4")
    listed = [{"name": name, "file": name} for name in ("../secret.mp4", str(secret), "notes.txt")]
    with open(run / "prompts.jsonl", "a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in listed)
    budget = VideoBudget(1 << 20, run)
    assert budget.uri(mine).startswith("data:video/mp4;base64,")
    for name in ("../secret.mp4", str(secret), "link.mp4", "notes.txt", "unlisted.mp4", "gone.mp4"):
        caplog.clear()
        assert budget.uri(run / name) is None
        assert name in caplog.text


def test_the_page_runs_its_own_script_and_reaches_no_network(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    policy = html.unescape(policy)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert len(scripts) == 2 and policy.startswith(f"default-src 'none'; script-src {hashes}; ")
    assert "http" not in policy and "unsafe-eval" not in policy and "connect-src 'none'" in policy


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither metrics.csv nor evaluation.json"):
        write_report(tmp_path)


def test_the_main_measure_is_the_reward_asked_for():
    assert main_measure({"rewards": {"b": {}, "a": {}}, "summary": [{"measure": "c"}]}) == "b"


def test_charts_take_the_page_s_colours():
    lines = [Line("a", [1, 2, 3], [1, float("nan"), 2]), Line("b", [1], [2], dots=True)]
    svg = line_chart("name", lines, "score").svg
    assert svg.startswith("<svg") and "var(--series-1)" in svg and "var(--series-2)" in svg
    assert not re.search(r"#0[123]0", svg) and "font-family" not in svg


def places_of_text(svg: str) -> dict[str, tuple[float, float]]:
    """Where each text of a picture stands: x from the left and y from the top."""
    pattern = r'<text[^>]*?(?:translate\(([\d.]+) ([\d.]+)\)|x="([\d.]+)" y="([\d.]+)")[^>]*>([^<]+)</text>'
    return {text: (float(x or u), float(y or v)) for x, y, u, v, text in re.findall(pattern, svg)}


def test_labels_stand_beside_their_lines_and_clear_of_each_other():
    steps = list(range(10))
    lines = [Line(name, steps, [value] * 10) for name, value in (("low", 1.0), ("high", 5.0), ("same", 5.0))]
    plot = line_chart("name", lines, "score (points)")
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot.svg).groups())
    places = places_of_text(plot.svg)
    assert {"optimiser step", "score (points)"} <= set(places)
    assert all(plot.data["box"][2] * width < places[name][0] < width for name in ("low", "high", "same"))
    heights = sorted((places[name][1] for name in ("low", "high", "same")), reverse=True)
    assert heights[0] == places["low"][1] and heights[1] - heights[2] > 8  # units of a picture 169 high
    assert height > heights[0] > heights[2] > 0


def test_a_single_step_stands_between_whole_steps():
    """As the page of a run shows it until the second validation."""
    plot = line_chart("name", [Line("validation", [40], [2.0], dots=True)], "score")
    low, high = plot.data["range"]
    assert low <= 39 and high >= 41 and {"39", "40", "41"} <= set(places_of_text(plot.svg))


def test_few_prompts_are_shown_once(tmp_path, monkeypatch):
    monkeypatch.setattr(report_runs, "PROMPTS", report_runs.PROMPTS[:2])
    page = write_report(evaluation(tmp_path / "evaluation")).read_text()
    assert "First prompts of the list" in page and "Most improved" not in page


def test_a_noisy_line_is_smoothed_over_its_values():
    steps, values = list(range(8)), [0.0, 1.0] * 4
    plot = line_chart("name", [Line("training", steps, values, smooth=True)], "reward")
    raw, smooth = plot.data["lines"]
    assert raw["values"] == values and np.ptp(smooth["values"]) < np.ptp(values)
    assert "opacity: 0.35" in plot.svg


def test_each_phase_has_a_colour_of_its_own_and_those_that_cost_nothing_are_left_out():
    parts = {f"phase {number}": [float(number > 0), 1.0 * (number > 0)] for number in range(10)}
    plot = stack_chart("name", [1, 2], parts | {"tiny": [0.01, 0.01]}, "time (s)")
    shown = {line["label"]: line["colour"] for line in plot.data["lines"]}
    assert list(shown) == [f"phase {number}" for number in range(9, 0, -1)]  # as they lie on each other
    assert len(set(shown.values())) == 9 and all(colour in plot.svg for colour in shown.values())


def test_the_parts_of_a_mixture_are_shown_with_their_weights():
    metrics = [
        {"step": s, "reward": 1.5 * s, "hps": s, "aesthetic": s / 2, "skipped": 0.0} for s in (1.0, 2.0)
    ]
    validation = [{"step": 0.0, "reward": 2.0, "hps": 1.0, "aesthetic": 2.0, "motion": 0.1}]
    found = list(charts(metrics, validation, {"hps": 1.0, "aesthetic": 0.5}))
    assert [chart.title for chart in found] == [
        "Reward", "Part of the reward: 1 × hps", "Part of the reward: 0.5 × aesthetic", "Validation: motion",
    ]  # fmt: skip
    assert [line["label"] for line in found[1].plot.data["lines"]] == ["training", "validation"]
    single = [row | {"hps": row["reward"]} for row in metrics]
    assert "hps" not in " ".join(c.source for c in charts(single, [], "hps")), "the reward by another name"


def test_all_validations_are_on_the_slider_from_the_ends_inwards(tmp_path):
    assert spread(6) == [0, 5, 2, 1, 3, 4]
    assert spread(2) == [0, 1]
    run = training_run(tmp_path / "run")
    for step in (20, 40):
        shutil.copytree(run / "samples/step_000000", run / f"samples/step_{step:06d}")
    found = validation_films(run, [{"step": 20.0, "reward": 21.0}], VideoBudget(1 << 20, run))
    assert found["names"] == ["step 0", "step 20 · reward 21", "step 40", "step 60"]
    assert [video.step for video in found["pairs"][0].videos] == [None, 1, 2, 3]


def test_the_moving_average_leaves_gaps_out():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert moving_average(values, 1).tolist() == [1.0, 2.0, 4.0, 4.0]


def test_videos_play_in_a_browser_without_a_complaint(visit, run, tmp_path):
    open_page, complaints = visit
    page = open_page(run / "report.html", 1200, 900)
    page.evaluate("document.querySelector('.screens').scrollIntoView()")
    videos = "[...document.querySelector('.screens').querySelectorAll('video')]"
    wait_until(page, f"{videos}.every(v => v.currentTime > 0)")
    assert page.evaluate(f"{videos}.length") == 2
    page.click("#videos .play")
    wait_until(page, "[...document.querySelectorAll('video')].every(v => v.paused)")
    assert page.evaluate("[...document.querySelectorAll('video')].filter(v => v.error).length") == 0
    assert complaints == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert read_video(tmp_path / "page.png").std() > 0.1


def test_a_chart_tells_its_values_to_pointer_and_keys(visit, run):
    open_page, complaints = visit
    page = open_page(run / "report.html", 1200, 900)
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    (step,) = re.findall(r"^step (\d+)", plot.locator(".values").inner_text())
    rows = (run / "metrics.csv").read_text().splitlines()
    value = float(rows[int(step)].split(",")[1])
    assert f"training {value:.4g}" in plot.locator(".values").inner_text()
    plot.focus()
    page.keyboard.press("ArrowRight")
    assert plot.locator(".values").inner_text().startswith(f"step {int(step) + 1}")
    assert complaints == []


def test_cards_stay_in_a_row_and_the_slider_shows_its_step(visit, several):
    open_page, complaints = visit
    page = open_page(several / "report.html", 1200, 900)
    tops = "e => new Set([...e.children].filter(c => c.offsetParent).map(c => c.offsetTop)).size"
    for row in page.locator(".facts, .screens").all():
        assert row.evaluate(tops) == 1
    width = "[...document.querySelectorAll('.screens')].every(e => e.scrollWidth <= e.clientWidth)"
    assert page.evaluate(width)
    seen = "[...document.querySelectorAll('#validation figure')].filter(f => !f.hidden).map(f => f.innerText.trim())"
    assert page.evaluate(seen) == ["step 0", "step 60"]
    page.locator(".steps").fill("1")
    assert page.evaluate(seen) == ["step 0", "step 20"]
    assert "step 20" in page.locator(".slide output").inner_text()
    assert complaints == []


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_readable_at_phone_width_in_both_schemes(visit, run, colors):
    open_page, complaints = visit
    page = open_page(run / "report.html", 375, 800, colors)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness < 60) if colors == "dark" else (brightness > 200)
    sizes = (
        "[...document.querySelectorAll('p, td, li, dd')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert page.evaluate(f"Math.min(...{sizes})") >= 12
    assert complaints == []


LONG = "a_rather_long_name-checkpoints-step_000100"


@pytest.mark.parametrize("width", [375, 1280])
def test_a_long_name_breaks_and_covers_nothing(visit, tmp_path, monkeypatch, width):
    monkeypatch.setattr(report_runs, "PROMPTS", report_runs.PROMPTS[:2])
    folder = evaluation(tmp_path / "evaluation", ("fox", LONG))
    open_page, complaints = visit
    for file in (write_report(folder), write_gallery(folder)):
        page = open_page(file, width, 800)
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page = open_page(folder / "report.html", width, 800)
    right = "e => e.getBoundingClientRect().right"
    frame = page.locator("#gains .scroll").evaluate(right)
    for row in page.locator("#gains tbody tr").all():
        chip = row.locator(".verdict .chip")
        assert chip.evaluate(right) <= frame
        name = row.locator(".adapter").bounding_box()
        box = chip.bounding_box()
        assert name["x"] + name["width"] <= box["x"] or name["y"] >= box["y"] + box["height"]
    assert complaints == []


@pytest.mark.parametrize(("lower", "shown"), [([], 3.0), (["size"], -5.0)])
def test_the_headline_is_the_best_adapter(lower, shown):
    row = dict(measure="size", prompts_are="all", significant=True)
    rows = [row | {"gain": gain} for gain in (-5.0, 0.0, 3.0)]
    result = {"rewards": {"size": {}}, "summary": rows, "lower_is_better": lower}
    found = headline(result, [], [])
    assert (found["gain"], found["good"]) == (shown, True)
