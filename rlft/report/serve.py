"""`rlft report RUN --serve`: the report of a run at an address of this machine, updated while the run goes on.

The page is made from the run folder when it is asked for and something has changed since; nothing is written. The
server listens on 127.0.0.1 only, answers nothing but the page, and only requests whose Host header names this machine:
a page elsewhere whose name resolves to 127.0.0.1 (DNS rebinding) cannot read it. Every user of this machine can.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rlft.errors import ConfigError, RlftError
from rlft.report.page import page
from rlft.runs.disk import reason
from rlft.runs.folder import Run

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
"""Names in the Host header of requests that are answered, with any port: a tunnel may have another one here."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Page:
    """The report of a run with its version, made again when the folder has changed."""

    def __init__(self, run: Run) -> None:
        """Make nothing yet."""
        self._run = run
        self._made: tuple[str, bytes] = ("", b"")
        self._lock = threading.Lock()

    def version(self) -> str:
        """Return a short text that changes with what the page is made of."""
        parts = []
        for path in (self._run.metrics_file, self._run.config, self._run.rollouts, self._run.evaluations):
            try:
                status = path.stat()
                parts.append(f"{status.st_mtime_ns:x}.{status.st_size:x}")
            except OSError:
                parts.append("-")
        return "_".join(parts)

    def read(self) -> tuple[str, bytes]:
        """Return the version and the page. Raises RlftError for a folder whose files cannot be read."""
        if not self._run.exists():
            raise ConfigError(f"{self._run.path}: holds no run any more; put the folder back (it was moved or removed)")
        with self._lock:  # one request makes the page, the others wait for it
            version = self.version()
            if self._made[0] != version:
                self._made = (version, page(self._run, version).encode())
            return self._made


class Server(ThreadingHTTPServer):
    """A server on the loopback address."""

    daemon_threads = True

    def __init__(self, run: Run, port: int) -> None:
        """Listen on a port; 0: on a free one. Raises ConfigError where that is not possible."""
        self.page = Page(run)
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: cannot be listened on: {reason(error)}; give another one, or leave out --port"
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a browser that went away; the default prints a traceback."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of "/"."""

    server: Server  # type: ignore[assignment]
    server_version, sys_version = "rlft", ""
    timeout = 30.0

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        host, _, port = self.headers.get("Host", "").partition(":")
        if host.lower() not in HOSTS or (port and not port.isdigit()):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"the Host header does not name this machine\n", body)
        elif self.path != "/":
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is one page here: /\n", body)
        elif not body:
            self._send(HTTPStatus.OK, "text/html", b"", body, self.server.page.version())
        else:
            try:
                version, made = self.server.page.read()
            except RlftError as error:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n".encode(), body)
            else:
                self._send(HTTPStatus.OK, "text/html", made, body, version)

    def _send(self, status: HTTPStatus, kind: str, data: bytes, body: bool, version: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if version:
            self.send_header("ETag", f'"{version}"')
        if body:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing about requests."""


def serve(folder: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve the report of a run until Ctrl-C. port: 0 for a free one. say: called with the address.

    Raises ConfigError when the folder has no run, or the port cannot be listened on.
    """
    with Server(Run.resume(folder), port) as server:
        say(f"{server.url} shows {folder} and is updated with each step; Ctrl-C ends it")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("the page is not served any more")
