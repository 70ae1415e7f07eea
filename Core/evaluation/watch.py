"""The report of a run while it trains, served to browsers on this machine alone.

The server answers GET for the page and for the run's own videos, and nothing else. It refuses requests whose Host is
not this machine's, so that a web page of somebody else cannot read it under a name of its own (DNS rebinding).
"""

import re
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, urlsplit

from Core.config.files import RERUN, RESOLVED
from Core.evaluation.page import MEDIA_TYPES, MadeVideos, render
from Core.evaluation.report import TEMPLATE, find_evaluation, gather
from Core.utils.folder_lock import LOCK

PORT = 8421
ADDRESS = "127.0.0.1"
# Seconds between two renderings: charts cost time that the training wants.
RENDER_EVERY = 5.0
MEDIA = "/media/"
# What a run writes first; one of them tells its folder from others.
SIGNS = (LOCK, RESOLVED, RERUN, "log.txt", "metrics.csv", "evaluation.json")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def watch(
    run: Path, port: int = PORT, ready: Callable[[ThreadingHTTPServer], None] = lambda server: None
) -> None:
    """Serve the page of ``run`` until Ctrl-C; an empty folder is waited for.

    Args:
        port: 0 takes any that is free.
        ready: called with the server once it listens.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or it is no run's.
        OSError: the port is taken.
    """
    run = Path(run).expanduser()
    refuse_other_folder(run)
    with serving(run, port) as server:
        print(
            f"the page of {run} is http://{ADDRESS}:{server.server_port}/ (Ctrl-C ends it, not the run)",
            flush=True,
        )
        ready(server)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nno longer watching; the run goes on")


def refuse_other_folder(run: Path) -> None:
    """Raise where ``run`` is neither the folder of a run nor an empty one."""
    if not run.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(run)!r}; start the run first, or give its project_dir"
        )
    if any(run.iterdir()) and not any((run / name).exists() for name in SIGNS):
        raise ValueError(
            f"{str(run)!r} is no folder of a run: it has none of {', '.join(SIGNS)}; give a project_dir"
        )


def serving(run: Path, port: int) -> ThreadingHTTPServer:
    class Handler(RunHandler):
        live = LivePage(run)

    try:
        server = ThreadingHTTPServer((ADDRESS, port), Handler)
    except OverflowError as error:
        raise ValueError(f"--port is {port}; give 0 to 65535") from error
    except OSError as error:
        raise OSError(
            f"port {port} cannot be used ({error.strerror}); choose another, or --port 0"
        ) from error
    server.daemon_threads = True
    Handler.hosts = frozenset(f"{name}:{server.server_port}" for name in (ADDRESS, "localhost"))
    return server


class ServedVideos:
    """Gives the videos of a run their paths on the server, and finds them again."""

    def __init__(self, run: Path):
        self.run, self.made = run, MadeVideos(run)
        self.files: dict[str, Path] = {}

    def uri(self, file: Path) -> str | None:
        if file not in self.made:
            return None
        # A video that was made again is another one to the browser.
        path = f"{MEDIA}{quote(file.relative_to(self.run).as_posix())}"
        self.files[path] = file
        return f"{path}?{file.stat().st_mtime_ns}"


class LivePage:
    """The page as the run's files are now, rendered again at most every ``RENDER_EVERY`` seconds."""

    def __init__(self, run: Path):
        self.run = run
        self.lock = threading.Lock()
        self.content, self.made_at = "", -RENDER_EVERY
        self.state: list[tuple[str, int, int]] | None = None
        self.videos = ServedVideos(run)

    def html(self) -> str:
        """Raises ValueError or OSError where the files of the run cannot be read."""
        with self.lock:
            state = self._state()
            if state != self.state and time.monotonic() - self.made_at >= RENDER_EVERY:
                videos = ServedVideos(self.run)
                values = gather(self.run, find_evaluation(self.run), videos, videos, live=True)
                self.content = render(TEMPLATE, values, media="'self'", connect="'self'")
                self.videos, self.state, self.made_at = videos, state, time.monotonic()
            return self.content

    def _state(self) -> list[tuple[str, int, int]]:
        """Names, times and sizes of what the page is made from."""
        found = [path for pattern in ("*.csv", "*.json", "log.txt", "samples/*/prompts.jsonl", "evaluation/*.json")
                 for path in self.run.glob(pattern)]  # fmt: skip
        whole = [path for path in found if not path.name.startswith(".")]
        return [(str(path), (stat := path.stat()).st_mtime_ns, stat.st_size) for path in whole]


class RunHandler(BaseHTTPRequestHandler):
    """Answers for one run."""

    live: LivePage
    hosts: frozenset[str] = frozenset()
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vader", ""
    timeout = 60  # seconds after which an idle connection ends

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_ours():
            self._refuse(HTTPStatus.FORBIDDEN, "this server is for this machine alone")
        elif path == "/":
            self._page()
        elif file := self.live.videos.files.get(path):
            self._video(file)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is the page, /, and what it shows")

    def _is_ours(self) -> bool:
        return self.headers.get("Host", "") in self.hosts

    def _page(self) -> None:
        try:
            content = self.live.html()
        except Exception as error:  # a table that is being written; the next request sees it whole
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"the run cannot be read now: {error}")
            return
        self._answer(HTTPStatus.OK, "text/html; charset=utf-8", content.encode(errors="backslashreplace"))

    def _video(self, file: Path) -> None:
        """The file, or the range of bytes that a player asks for."""
        try:
            content = file.read_bytes()
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND, "the run has removed it")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._answer(HTTPStatus.OK, MEDIA_TYPES[file.suffix], content, {"Accept-Ranges": "bytes"})
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if first > last:
            self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"it has {len(content)} bytes")
            return
        span = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._answer(HTTPStatus.PARTIAL_CONTENT, MEDIA_TYPES[file.suffix], content[first : last + 1], span)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._answer(status, "text/plain; charset=utf-8", f"{sentence}\n".encode(errors="backslashreplace"))

    def _answer(
        self, status: HTTPStatus, kind: str, content: bytes, more: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            **(more or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the browser went on to something else

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not shown."""
