"""The live page: what the server answers, to whom, and how watching begins and ends."""

import http.client
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
from browsers import wait_until
from report_runs import training_run

from Core.commands.watch import main
from Core.evaluation import watch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return training_run(tmp_path_factory.mktemp("runs") / "fox", steps=20)


@pytest.fixture
def served(monkeypatch):
    """A function that serves a folder and returns the port; the page is made anew for every request."""
    monkeypatch.setattr(watch, "RENDER_EVERY", 0.0)
    servers = []

    def serve(run: Path) -> int:
        server = watch.serving(run, 0)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server.server_port

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str):
    """The answer's status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_and_the_run_s_own_videos_are_served_and_nothing_else(served, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "samples/step_000000/unlisted.mp4").write_bytes(b"private")
    port = served(run)
    status, headers, body = ask(port)
    page = body.decode()
    assert status == 200 and "Refreshes itself" in page and "data:video" not in page
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert "media-src &#39;self&#39;; connect-src &#39;self&#39;" in page
    (first, *_) = re.findall(r'data-src="(/media/[^"]+)"', page)
    status, headers, video = ask(port, first)
    assert (status, headers["Content-Type"]) == (200, "video/mp4")
    assert video == next(run.glob("samples/step_000000/0000*.mp4")).read_bytes()
    status, headers, part = ask(port, first, Range="bytes=10-19")
    assert (status, part) == (206, video[10:20])
    assert headers["Content-Range"] == f"bytes 10-19/{len(video)}"
    assert ask(port, first, Range=f"bytes={len(video)}-")[0] == 416
    for path in (
        "/media/samples/step_000000/unlisted.mp4",
        "/config.json",
        "/media/../config.json",
        "/%2e%2e/x",
    ):
        assert ask(port, path)[0] == 404
    assert {ask(port, method=method)[0] for method in ("POST", "HEAD", "PUT", "DELETE")} == {501}


def test_only_this_machine_is_answered(served, finished):
    port = served(finished)
    assert ask(port, "/nothing", Host=f"localhost:{port}")[0] == 404
    for host in (
        "attacker.example",
        f"attacker.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port}.attacker.example",
    ):
        assert ask(port, Host=host)[0] == 403
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    addresses = re.findall(rf"^\s*\d+: ([0-9A-F]+):{port:04X} \S+ 0A ", listening, re.MULTILINE)
    assert addresses == ["0100007F"]


def test_a_run_that_has_written_nothing_is_waited_for_and_shown_once_it_has(
    visit, served, finished, tmp_path
):
    open_page, complaints = visit
    run = tmp_path / "run"
    run.mkdir()
    port = served(run)
    page = open_page(f"http://127.0.0.1:{port}/", 1200, 900)
    assert "Waiting for the first step" in page.inner_text("#live")
    assert page.evaluate("document.querySelectorAll('h2').length") == 0, "no heading without content"
    shutil.copytree(finished, run, dirs_exist_ok=True)
    page.evaluate("refresh()")
    wait_until(page, "document.getElementById('validation') !== null")
    assert page.evaluate("[...document.querySelectorAll('main > [id]')].map(e => e.id)") == [
        "top", "validation", "curves", "warnings", "reproduce",
    ]  # fmt: skip
    page.locator("#validation").scroll_into_view_if_needed()
    videos = "[...document.querySelectorAll('#validation video')]"
    wait_until(page, f"{videos}.length == 2 && {videos}.every(v => v.currentTime > 0)")
    before = page.evaluate("document.querySelector('#validation').outerHTML.length")
    with open(run / "metrics.csv", "a") as table:
        table.write("21,30,0.7,0.01,0.0002,0,1.2,0.7,0.3,0.2\n")
    page.evaluate("refresh()")
    wait_until(page, "document.querySelector('.facts dd').innerText.startsWith('21')")
    assert page.evaluate("document.querySelector('#validation').outerHTML.length") == before, "it played on"
    assert complaints == []


def test_a_table_that_is_half_written_costs_an_answer_and_not_the_server(served, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    port = served(run)
    sound = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(sound.replace("\n1,", "\none,"))
    status, _, body = ask(port)
    assert status == 503 and b"cannot be read now" in body
    (run / "metrics.csv").write_text(sound)
    assert ask(port)[0] == 200


def test_what_is_no_run_or_no_port_ends_with_a_sentence(tmp_path, finished, served, capsys):
    (tmp_path / "notes.txt").write_text("private")
    taken = str(served(finished))
    for arguments, said in (
        ([str(tmp_path / "nothing")], "there is no folder"),
        ([str(tmp_path)], "is no folder of a run"),
        ([str(finished), "--port", taken], f"port {taken} cannot be used"),
        ([str(finished), "--port", "70000"], "give 0 to 65535"),
    ):
        assert main(arguments) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert said in sentence


def test_ctrl_c_ends_it_in_one_sentence(tmp_path, capfd):
    # A shell's background jobs ignore Ctrl-C, and so would this test where the suite is one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt_soon(server) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    try:
        watch.watch(tmp_path, 0, interrupt_soon)
    finally:
        signal.signal(signal.SIGINT, before)
    told, rest = capfd.readouterr().out.split("\n", 1)
    assert re.search(r"http://127\.0\.0\.1:\d+/ ", told)
    assert rest.strip() == "no longer watching; the run goes on"
