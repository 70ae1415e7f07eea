"""The report: complete, self-contained, small, and seen in a real browser."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import PROMPTS, evaluation, training_run, write_manifest
from sampling_runs import picture

from Core.data.video import read_video
from Core.evaluation.charts import Line, line_chart, moving_average
from Core.evaluation.report import VideoBudget, headline, main_measure, write_report

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
    named |= {f"evaluation/{file}" for file in re.findall(r'<figcaption title="([^"]+)"', page)}
    assert len(named) > 8
    assert [name for name in named if not (run / name).is_file()] == []


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
    assert "Validation videos" in page and "step 60" in page and "Before and after" not in page
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
    assert "Validation videos" in page and "lora_rank" not in page
    (told,) = caplog.messages
    assert str(run / "config.py") in told and "object at 0x" not in told


def test_an_evaluation_alone_and_several_adapters(tmp_path):
    page = write_report(evaluation(tmp_path / "evaluation", ("fox", "bird"))).read_text()
    assert page.count("<b>bird</b>") == page.count("<b>fox</b>") >= 6
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
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")
    assert "http" not in policy and "unsafe-eval" not in policy


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither metrics.csv nor evaluation.json"):
        write_report(tmp_path)


def test_the_main_measure_is_the_reward_asked_for():
    assert main_measure({"rewards": {"b": {}, "a": {}}, "summary": [{"measure": "c"}]}) == "b"


def test_charts_take_the_page_s_colours():
    svg = line_chart("name", [Line("a", [1, 2, 3], [1, float("nan"), 2]), Line("b", [1], [2], dots=True)])
    assert svg.startswith("<svg") and "var(--series-1)" in svg and "var(--series-2)" in svg
    assert not re.search(r"#0[123]0", svg) and "font-family" not in svg


def test_the_moving_average_leaves_gaps_out():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert moving_average(values, 1).tolist() == [1.0, 2.0, 4.0, 4.0]


@pytest.fixture
def opened(chromium, run):
    """A function that opens the report, and a list of what the browser complains about.

    Complaints are errors and warnings of the console, exceptions, and requests beyond the page itself.
    """
    complaints: list[str] = []

    def note_message(message) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def note_request(request) -> None:
        if not request.url.startswith(("file:", "data:")):
            complaints.append(request.url)

    def open_report(width: int, height: int, colors: str = "light"):
        page = chromium.new_page(
            viewport={"width": width, "height": height}, color_scheme=colors, is_mobile=width < 500
        )
        page.on("console", note_message)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", note_request)
        page.goto((run / "report.html").as_uri())
        return page

    yield open_report, complaints
    for context in chromium.contexts:
        context.close()


def test_videos_play_in_a_browser_without_a_complaint(opened, tmp_path):
    open_report, complaints = opened
    page = open_report(1200, 900)
    page.evaluate("document.querySelector('.screens').scrollIntoView()")
    videos = "[...document.querySelector('.screens').querySelectorAll('video')]"
    page.wait_for_function(f"{videos}.every(v => v.currentTime > 0)", timeout=60_000)
    assert page.evaluate(f"{videos}.length") == 2
    page.click("#play")
    assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
    assert page.evaluate("[...document.querySelectorAll('video')].filter(v => v.error).length") == 0
    assert complaints == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert read_video(tmp_path / "page.png").std() > 0.1


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_readable_at_phone_width_in_both_schemes(opened, colors):
    open_report, complaints = opened
    page = open_report(375, 800, colors)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness < 60) if colors == "dark" else (brightness > 200)
    sizes = (
        "[...document.querySelectorAll('p, td, li, dd')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert page.evaluate(f"Math.min(...{sizes})") >= 12
    assert complaints == []


@pytest.mark.parametrize(("lower", "shown"), [([], 3.0), (["size"], -5.0)])
def test_the_headline_is_the_best_adapter(lower, shown):
    row = dict(measure="size", prompts_are="all", significant=True)
    rows = [row | {"gain": gain} for gain in (-5.0, 0.0, 3.0)]
    result = {"rewards": {"size": {}}, "summary": rows, "lower_is_better": lower}
    found = headline(result, [], [])
    assert (found["gain"], found["good"]) == (shown, True)
