"""The gallery: which videos stand beside each other and in what order, and the page in a real browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
import report_runs
from browsers import wait_until
from sampling_runs import picture

from Core.evaluation.gallery import leave_gallery, write_gallery
from Core.evaluation.score_videos import write_csv

HOSTILE = "a fox </script><script>alert(1)</script><img src=x onerror=alert(2)> \"' {{ 7 * 7 }}"
VIDEOS = "[...document.querySelectorAll('.card:first-child video')]"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of two adapters; one of its prompts tries to be a program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_runs, "PROMPTS", [*report_runs.PROMPTS[:8], HOSTILE])
        folder = report_runs.evaluation(tmp_path_factory.mktemp("runs") / "evaluation", ("fox", "bird"))
    write_gallery(folder)
    return folder


def sampled(folder: Path, variant: str, adapter: str | None, scale: float = 1.0) -> Path:
    """A variant's folder of two videos, as sampling leaves it."""
    place = folder / variant
    lines = []
    for index, prompt in enumerate(("a fox", "a bird")):
        name = f"{index:04d}_0_{prompt.replace(' ', '_')}"
        picture(place / name, frames=9, seed=index)
        entry = {"name": name, "prompt": prompt, "seed": 7, "file": f"{name}.mp4", "adapter": adapter}
        lines.append(json.dumps(entry | {"lora_scale": scale if adapter else None}))
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return place


def cards(page: str) -> list[str]:
    return page.split('<article class="pair card"')[1:]


def labels(card: str) -> list[str]:
    return re.findall(r"<figcaption><b>([^<]+)</b>", card)


def test_an_evaluation_s_rows_are_sorted_by_gain_with_base_and_adapters_in_each(evaluated):
    page = (evaluated / "gallery.html").read_text()
    assert len(cards(page)) == 18 and all(
        labels(card) == ["base model", "fox", "bird"] for card in cards(page)
    )
    found = [[json.loads(scores) for scores in re.findall(r"data-scores='([^']+)'", c)] for c in cards(page)]
    gains = [scores[1]["hps"] - scores[0]["hps"] for scores in found]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0 > gains[-1]
    assert "seed 200" in page and "held out" in page


def test_one_page_without_a_request_or_a_program_of_a_prompt(evaluated):
    page = (evaluated / "gallery.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert page.count("<script>") == 2 and "<img src=x" not in page and "{{ 7 * 7 }}" in page
    assert "media-src data:;" in page and "connect-src &#39;none&#39;" in page


def test_adapters_and_strengths_of_a_sampling_stand_beside_the_base_model(tmp_path):
    for variant, adapter, scale in (("a_fox", "runs/fox/adapter", 1.0), ("half", "runs/fox/adapter", 0.5)):
        sampled(tmp_path, variant, adapter, scale)
    base = sampled(tmp_path, "base", None)
    page = write_gallery(tmp_path).read_text()
    assert [labels(card) for card in cards(page)] == [["base model", "a_fox", "half × 0.5"]] * 2
    assert "most improved first" not in page, "nothing was scored"
    scores = {"a_fox": (1.0, 5.0), "half": (1.0, 3.0), "base": (1.0, 2.0)}
    for variant, values in scores.items():
        files = sorted(path.name for path in (tmp_path / variant).glob("*.mp4"))
        rows = [{"file": f, "prompt": "p", "hps": v} for f, v in zip(files, values, strict=True)]
        write_csv(tmp_path / variant / "scores.csv", rows)
    page = write_gallery(tmp_path).read_text()
    assert "a bird" in cards(page)[0] and "most improved first" in page, "the one that gained comes first"
    single = write_gallery(base).read_text()
    assert [labels(card) for card in cards(single)] == [["base model"]] * 2


def test_videos_too_large_for_a_page_stay_beside_it_and_play(visit, tmp_path):
    sampled(tmp_path, "base", None)
    sampled(tmp_path, "a fox, 100%", "runs/fox/adapter")
    page = write_gallery(tmp_path, embed_limit=1000)
    assert "data:video" not in page.read_text() and page.stat().st_size < 40_000
    open_page, complaints = visit
    seen = open_page(page, 1200, 900)
    wait_until(seen, f"{VIDEOS}.length == 2 && {VIDEOS}.every(v => v.currentTime > 0)")
    assert complaints == []


def test_what_is_no_video_of_this_project_is_neither_shown_nor_fatal(tmp_path, evaluated, caplog):
    with pytest.raises(FileNotFoundError, match="holds no videos"):
        write_gallery(tmp_path)
    copy = shutil.copytree(evaluated, tmp_path / "evaluation")
    (tmp_path / "secret.mp4").write_bytes(b"private")
    table = (copy / "videos.csv").read_text()
    (copy / "videos.csv").write_text(table.replace("videos/base/0000_200.mp4", "../secret.mp4"))
    page = write_gallery(copy).read_text()
    assert sorted(len(labels(card)) for card in cards(page))[:2] == [2, 3]
    (copy / "videos.csv").write_text(table.replace("hps", "other"))
    (copy / "evaluation.json").write_text('{"rewards": 3}')
    with pytest.raises(ValueError, match="is damaged"):
        write_gallery(copy)
    leave_gallery(copy)
    assert "no gallery" in caplog.text


def test_videos_start_together_and_follow_one_slider(visit, evaluated):
    open_page, complaints = visit
    page = open_page(evaluated / "gallery.html", 1200, 900)
    wait_until(page, f"{VIDEOS}.every(v => v.currentTime > 0)")
    spread = f"(t => Math.max(...t) - Math.min(...t))({VIDEOS}.map(v => v.currentTime))"
    assert page.evaluate(f"{VIDEOS}.length") == 3 and page.evaluate(spread) < 0.2
    page.locator(".scrub").fill("0.5")
    half = f"{VIDEOS}.every(v => v.paused && !v.seeking && Math.abs(v.currentTime - v.duration / 2) < 0.02)"
    wait_until(page, half)
    assert page.locator(".play").inner_text() == "Play"
    page.locator(".play").click()
    wait_until(page, f"{VIDEOS}.every(v => !v.paused)")
    assert complaints == []


def test_filter_order_measure_and_full_screen(visit, evaluated):
    open_page, complaints = visit
    page = open_page(evaluated / "gallery.html", 1200, 900)
    shown = "[...document.querySelectorAll('.card')].filter(c => c.offsetParent)"
    prompts = f"{shown}.map(c => c.querySelector('.prompt').innerText)"
    by_gain = page.evaluate(prompts)
    page.locator(".order").select_option(label="fox: most harmed first")
    harmed = page.evaluate(prompts)
    assert harmed[0] == by_gain[-1] != by_gain[0]
    page.locator(".order").select_option(label="order of the prompts")
    assert page.evaluate(prompts)[::2] == [*report_runs.PROMPTS[:8], HOSTILE]
    page.locator(".measure").select_option("motion")
    chips = page.locator(".card:first-child .chip").all_inner_texts()
    assert chips == ["−0.1", "−0.2"]
    page.locator(".filter").fill("FOX script")
    assert page.evaluate(prompts) == [HOSTILE] * 2
    assert page.locator(".found").inner_text() == "2 of 18"
    page.locator(".card:visible .enlarge").first.click()
    wait_until(page, f"document.fullscreenElement && {prompts}.length == 1")
    page.locator(".next").click()
    assert page.evaluate(prompts) == [HOSTILE]
    page.locator(".close").click()
    wait_until(page, f"!document.fullscreenElement && {prompts}.length == 2")
    assert complaints == []


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_readable_at_phone_width_in_both_schemes(visit, evaluated, colors):
    open_page, complaints = visit
    page = open_page(evaluated / "gallery.html", 375, 800, colors)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness < 60) if colors == "dark" else (brightness > 200)
    tops = "e => new Set([...e.children].map(c => c.offsetTop)).size"
    assert page.locator(".screens").first.evaluate(tops) == 1
    assert complaints == []
