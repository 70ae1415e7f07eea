"""Caption cleaning: what Open-Sora 1.2's captions went through before its text encoder saw them.

The routine comes from DeepFloyd-IF and is applied twice. It is not idempotent (a second pass finds what the
first one uncovered), and the model was trained on its output, so each oddity below is deliberate: the order
of the rules and their blind spots are part of the text format, and tests/golden/prompts.json pins them.
"""

import html
import re
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

import ftfy

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0"
    r"\uFE31\uFE32\uFE58\uFE63\uFF0D"
)


def _rules(*pairs):
    """Compile (pattern, replacement) pairs; they are applied in the order given."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# Before the markup is read: addresses would otherwise swallow or hide tags.
_ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)

# On plain text, up to the repair of broken Unicode.
_SYMBOLS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31C0-\u9FFF]+", ""),  # CJK strokes to unified ideographs, seven adjacent blocks
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article ids
    (r"\\n", " "),  # an escaped newline, the two characters
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_EXTENSIONS})", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

# On repaired text: shop and web-page residue, then spacing and stray quotes.
_RESIDUE = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_EXTENSIONS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # 1024x768, with a Latin x, a Cyrillic kha or a times sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

_JOINERS = re.compile("[-_]")


class _TextCollector(HTMLParser):
    """Gathers the text of a piece of HTML: no tags, comments, scripts or styles."""

    _HIDDEN = ("script", "style")

    def __init__(self):
        # Character references are resolved by the handlers below: the parser's own conversion also resolves
        # references without a semicolon inside words ("&notit"), which the reference routine leaves alone.
        super().__init__(convert_charrefs=False)
        self.parts = []
        self._hidden_depth = 0

    def handle_starttag(self, tag, attrs):
        self._hidden_depth += tag in self._HIDDEN

    def handle_startendtag(self, tag, attrs):
        """A tag that closes itself hides nothing."""

    def handle_endtag(self, tag):
        if tag in self._HIDDEN and self._hidden_depth:
            self._hidden_depth -= 1

    def handle_data(self, data):
        if not self._hidden_depth:
            self.parts.append(data)

    def handle_charref(self, name):
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name):
        self.handle_data(html5.get(f"{name};", f"&{name}"))


def _strip_markup(text):
    """The text content of ``text`` read as HTML."""
    collector = _TextCollector()
    try:
        collector.feed(text)
        collector.close()
    except AssertionError:  # html.parser's way to refuse an unknown "<![": then it is not markup
        return text
    return "".join(collector.parts)


def _apply(rules, text):
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def clean_caption(caption):
    """``caption`` after one pass of the cleaning routine: lower case, no markup, no web residue."""
    text = unquote_plus(str(caption)).strip().lower()
    text = _strip_markup(_apply(_ADDRESSES, text))
    text = _apply(_SYMBOLS, text)
    if len(_JOINERS.findall(text)) > 3:  # this-is-my-cute-cat, this_is_my_cute_cat
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_RESIDUE, text).strip()
