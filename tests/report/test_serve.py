"""The served report: loopback, one page, no other host's name, and a page that follows its run."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlft.cli.main import main
from rlft.errors import ConfigError
from rlft.report.page import page
from rlft.report.serve import Server
from rlft.runs.folder import Run
from rlft.runs.lines import append_line

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text('model = "m"\ndata = "d.jsonl"\nout = "o"\nsteps = 3\n')
    (tmp_path / "secret.txt").write_text("secret")
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "reward": 0.25, "loss": 0.5})
    return tmp_path


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with Server(Run.resume(run), 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: Server, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_page_is_the_report_and_asks_only_its_own_server(server: Server, run: Path) -> None:
    status, headers, body = ask(server)
    assert status == 200 and "0.25" in body and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    policy = re.search(r'content="(default-src[^"]*)"', body)
    assert policy and policy[1].endswith("; connect-src 'self'") and "default-src 'none'" in policy[1]
    written = page(Run.resume(run))  # the file asks nobody, as before
    assert "connect-src" not in written and "fetch(" not in written and "data-version" not in written


def test_a_new_step_is_a_new_version_and_a_new_page(server: Server, run: Path) -> None:
    _, first, body = ask(server)
    assert f'data-version="{first["ETag"][1:-1]}"' in body
    status, same, nothing = ask(server, method="HEAD")
    assert (status, same["ETag"], nothing) == (200, first["ETag"], "")
    append_line(run / "metrics.jsonl", {"step": 2, "reward": 0.625, "loss": 0.5})
    assert ask(server, method="HEAD")[1]["ETag"] != first["ETag"]
    assert "0.625" in ask(server)[2] and "0.625" not in body


def test_nothing_is_made_twice_or_written(server: Server, run: Path, monkeypatch) -> None:
    before = sorted(path.name for path in run.iterdir())
    ask(server)
    monkeypatch.setattr("rlft.report.serve.page", lambda *_: pytest.fail("made again"))
    assert ask(server)[0] == 200 and sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "//secret.txt",
        "/config.toml",
        "/?x",
        "/.",
        "",
        "*",
        "http://127.0.0.1/",
    ],
)
def test_there_is_no_other_page(server: Server, path: str) -> None:
    status, _, body = ask(server, path or "x")
    assert status in (400, 404) and "secret" not in body and "config" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_reading_is_possible(server: Server, method: str) -> None:
    assert ask(server, method=method)[0] == 501


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("LOCALHOST:9000", 200),
        ("evil.example", 403),
        ("", 403),
        ("evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1:80@evil.example", 403),
    ],
)
def test_a_name_that_resolves_to_this_machine_reads_nothing(server: Server, host: str, status: int) -> None:
    answer, _, body = ask(server, Host=host)
    assert answer == status and ("0.25" in body) == (status == 200)


def test_a_request_without_a_host_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 403 " in connection.recv(100)


def test_only_this_machine_is_listened_to(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_folder_that_is_moved_away_is_no_empty_page(server: Server, run: Path) -> None:
    run.rename(run.with_name("moved"))
    status, _, body = ask(server)
    assert status == 500 and body.endswith("holds no run any more; put the folder back (it was moved or removed)\n")
    run.with_name("moved").rename(run)
    assert ask(server)[0] == 200


def test_a_damaged_run_is_an_answer_and_no_end(server: Server, run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{\n{}\n")
    status, _, body = ask(server)
    assert status == 500 and "metrics.jsonl: line 2 is no row of metrics" in body
    assert ask(server, method="HEAD")[0] == 200


def test_what_cannot_be_served_is_refused(run: Path, server: Server, capsys) -> None:
    for args, wanted in {
        ("--port", "80000", "--serve"): "--port 80000: want a number from 1 to 65535",
        ("--port", "8000"): "--port 8000: belongs to --serve",
        ("--serve", "--out", "x.html"): "--out x.html: --serve writes no file",
        (str(run), "--serve"): "--serve: shows one run, and 2 are given",
        ("--serve", "--port", str(server.server_port)): f"--port {server.server_port}: cannot be listened on",
    }.items():
        assert main(["report", str(run), *args]) == 2
        assert wanted in capsys.readouterr().err
    assert (
        main(["report", str(run / "missing"), "--serve"]) == 2 and "missing: not the folder" in capsys.readouterr().err
    )
    with pytest.raises(ConfigError):
        Server(Run.resume(run), server.server_port)


def test_the_command_prints_the_address_and_ctrl_c_ends_it(run: Path) -> None:
    command = [sys.executable, "-m", "rlft", "report", str(run), "--serve"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        port = re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", line)
        assert port, line
        connection = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=30)
        connection.request("GET", "/")
        assert b"0.25" in connection.getresponse().read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err, out) == (0, b"", b"the page is not served any more\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port[1])), timeout=10)
