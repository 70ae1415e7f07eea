"""One self-contained HTML page of the videos in a folder: each prompt and noise side by side, base model and adapters.

It is made from the files that sampling (``prompts.jsonl``, ``scores.csv`` where they were scored) or an evaluation
(``evaluation.json``, ``videos.csv``) leave.
"""

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from Core.config import BASE
from Core.evaluation.page import IN_PAGE, MadeVideos, data_uri, kind_of_media, render
from Core.generation.jobs import adapter_names
from Core.generation.manifest import MANIFEST, read_manifest
from Core.utils.damage import reason_of
from Core.utils.files import read_object, write_whole
from Core.utils.tables import read_text_table

logger = logging.getLogger("vader")
GALLERY = "gallery.html"
TEMPLATE = "gallery_page.html"
# Bytes of video up to which they are in the page, which base64 makes a third larger; above, they stay beside it.
EMBED_LIMIT = 40_000_000
# A page from a file has no origin of its own in some browsers: its files are "file:" there, and 'self' on a server.
BESIDE = "'self' file:"
BASE_LABEL = "base model"


@dataclass(frozen=True)
class Film:
    """A video of a card: the variant that made it, its file, its scores by measure."""

    variant: str
    file: Path
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """The videos of one prompt and noise, the base model's first where there is one; ``place``: in the given order."""

    place: int
    prompt: str
    note: str
    films: list[Film]


@dataclass(frozen=True)
class Content:
    """What a gallery shows.

    Attributes:
        variants: labels by name, in the order in which they stand beside each other.
        base: the variant that the others are compared with; None where there is none.
        measures: names, the one to sort by first; ``lower``: those of which less is better.
    """

    variants: Mapping[str, str]
    base: str | None
    cards: list[Card]
    measures: list[str]
    lower: list[str]


@dataclass(frozen=True)
class Screen:
    """What the page shows of a film."""

    label: str
    variant: str
    uri: str
    kind: str
    scores: Mapping[str, float]


def write_gallery(folder: Path, embed_limit: int = EMBED_LIMIT) -> Path:
    """Write ``gallery.html`` into ``folder`` and return its path.

    Args:
        folder: of an evaluation, or of sampled videos, in one folder or one for each variant.
        embed_limit: bytes of video that the page holds; with more, it refers to the files beside it.

    Raises:
        FileNotFoundError: the folder holds no videos that this project made.
        ValueError: a table of it is damaged.
    """
    folder = Path(folder).expanduser()
    try:
        content = read_evaluation(folder) if (folder / "evaluation.json").is_file() else read_samples(folder)
        page = gallery_page(folder, content, embed_limit)
    except (LookupError, TypeError, AttributeError, ValueError, csv.Error, jinja2.TemplateError) as error:
        raise ValueError(
            f"a table of {str(folder)!r} is damaged ({reason_of(error)}); make it again, or move it away"
        ) from error
    write_whole(folder / GALLERY, page)
    return folder / GALLERY


def leave_gallery(folder: Path) -> None:
    """Write the page and say where it is; whatever goes wrong with it costs a message, never the videos."""
    try:
        logger.info("the gallery is %s", write_gallery(folder))
    except Exception as error:
        logger.warning("no gallery: %s: %s; `vader gallery` writes it", type(error).__name__, error)


def read_evaluation(folder: Path) -> Content:
    """The videos of an evaluation with all scores, those first that gain most."""
    result = read_object(folder / "evaluation.json")
    rows = read_text_table(folder / "videos.csv")
    measures = list(dict.fromkeys([*result["rewards"], *(row["measure"] for row in result["summary"])]))
    measures = [name for name in measures if rows and name in rows[0]]
    cards: dict[tuple[int, str], Card] = {}
    for row in rows:
        status = {"yes": "trained on · ", "no": "held out · "}.get(row["in_training"], "")
        key = (int(row["index"]), row["seed"])
        card = cards.setdefault(key, Card(len(cards), row["prompt"], f"{status}seed {row['seed']}", []))
        scores = {name: float(row[name]) for name in measures if row[name]}
        card.films.append(Film(row["variant"], folder / row["file"], scores))
    names = {BASE: BASE_LABEL} | {adapter["name"]: adapter["name"] for adapter in result["adapters"]}
    lower = list(result["lower_is_better"])
    return Content(names, BASE, by_gain(list(cards.values()), measures, lower), measures, lower)


def read_samples(folder: Path) -> Content:
    """Sampled videos, in the order of the prompts; by gain where base model and adapters were scored.

    Raises:
        FileNotFoundError: there are none.
    """
    places = (
        [folder]
        if (folder / MANIFEST).is_file()
        else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    )
    made = {place: entries for place in places if (entries := read_manifest(place))}
    if not made:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no videos with their {MANIFEST}; give the folder of a sampling or an evaluation"
        )
    ordered = sorted(
        made, key=lambda place: made[place][0].get("adapter") is not None
    )  # the base model first
    cards: dict[tuple[str, Any], Card] = {}
    for place in ordered:
        scores = read_scores(place / "scores.csv")
        for entry in made[place]:
            key = (entry["name"], entry["seed"])
            card = cards.setdefault(key, Card(len(cards), str(entry["prompt"]), f"seed {entry['seed']}", []))
            card.films.append(Film(place.name, place / entry["file"], scores.get(entry["file"], {})))
    films = [film for card in cards.values() for film in card.films]
    measures = list(dict.fromkeys(name for film in films for name in film.scores))
    labels = {place.name: label_of(place, made[place][0], len(made) > 1) for place in ordered}
    base = ordered[0].name if len(ordered) > 1 and labels[ordered[0].name] == BASE_LABEL else None
    return Content(labels, base, by_gain(list(cards.values()), measures, []), measures, [])


def label_of(place: Path, entry: Mapping[str, Any], several: bool) -> str:
    """What the videos of a folder are called: the adapter's name, and its strength unless it is 1."""
    if entry.get("adapter") is None:
        return BASE_LABEL
    name = place.name if several else adapter_names([str(entry["adapter"])])[0]
    scale = entry.get("lora_scale")
    return name if scale in (None, 1) else f"{name} × {scale:g}"


def read_scores(table: Path) -> dict[str, dict[str, float]]:
    """Scores by file name, as ``vader score`` leaves them; none where nothing was scored."""
    if not table.is_file():
        return {}
    return {
        row["file"]: {
            name: float(cell) for name, cell in row.items() if cell and name not in ("file", "prompt")
        }
        for row in read_text_table(table)
    }


def by_gain(cards: list[Card], measures: Sequence[str], lower: Iterable[str]) -> list[Card]:
    """Cards whose second film gains most over the first in the first measure come first; others keep their order."""
    if not measures:
        return cards
    sign = -1 if measures[0] in lower else 1

    def gain(card: Card) -> float:
        scores = [film.scores[measures[0]] for film in card.films[:2] if measures[0] in film.scores]
        return sign * (scores[1] - scores[0]) if len(scores) == 2 else float("-inf")

    return sorted(cards, key=gain, reverse=True)


def title_of(folder: Path) -> str:
    """The folder's name, after that of its run for an evaluation in one."""
    return f"{folder.parent.name} · {folder.name}" if folder.name == "evaluation" else folder.name


def gallery_page(folder: Path, content: Content, embed_limit: int) -> str:
    """The page, with the videos in it if they are small enough together."""
    made = MadeVideos(folder)
    films = [film for card in content.cards for film in card.films if film.file in made]
    embedded = sum(film.file.stat().st_size for film in films) <= embed_limit

    def uri(file: Path) -> str:
        return (
            data_uri(file.read_bytes(), file.suffix)
            if embedded
            else quote(file.relative_to(folder).as_posix())
        )

    shown = [
        (card, [
            Screen(content.variants[film.variant], film.variant, uri(film.file), kind_of_media(film.file), film.scores)
            for film in card.films
            if film.file in made
        ])
        for card in content.cards
    ]  # fmt: skip
    others = {name: label for name, label in content.variants.items() if name != content.base}
    values = {
        "name": title_of(folder.resolve()),
        "cards": [(card, screens) for card, screens in shown if screens],
        "base": content.base,
        "others": others if content.base else {},
        "count": len(content.variants),
        "measures": content.measures,
        "lower": content.lower,
        "embedded": embedded,
    }
    return render(TEMPLATE, values, media=IN_PAGE if embedded else BESIDE)
