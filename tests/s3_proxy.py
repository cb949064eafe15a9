"""A server between a client and an S3 server, which refuses requests or loses answers when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_OWN = {"connection", "content-length", "transfer-encoding"}
_ERROR = b"<Error><Code>%s</Code><Message>As the test says.</Message></Error>"


class S3Proxy:
    """Hands requests on as they are: what the client signed, its Host among it, stays as it was.

    Args:
        endpoint: URL of the server.
    """

    def __init__(self, endpoint: str) -> None:
        self.busy = 0  # so many requests are answered with 503
        self.code = ""  # if set, every request is answered with this error
        self.lost = 0  # so many answers do not come back, after the server has done what was asked
        self.before: dict[str, Callable[[], object]] = {}  # what to do before the first request, "GET /path", with this
        self.methods: list[str] = []
        self._target = endpoint.removeprefix("http://")
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        self.methods.append(handler.command)
        for part in [part for part in self.before if part in f"{handler.command} {handler.path}"]:
            with self._lock:  # which others of such a path wait for, the client's next tries among them
                if part in self.before:
                    self.before[part]()
                    del self.before[part]
        if self.busy:
            self.busy -= 1
            _send(handler, 503, _ERROR % b"SlowDown")
            return
        if self.code:
            _send(handler, 400, _ERROR % self.code.encode())
            return
        server = HTTPConnection(self._target)
        try:
            server.connect()
        except ConnectionError:  # then the client gets no answer either
            handler.close_connection = True
            return
        server.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            if name.lower() not in ("connection", "expect"):
                server.putheader(name, value)
        server.endheaders(body)
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if self.lost:
            self.lost -= 1
            handler.close_connection = True
            return
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else None
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
        _send(handler, answer.status, data, {**headers, "Content-Length": length or str(len(data))})


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response_only(status)
    for name, value in (headers or {"Content-Length": str(len(body))}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(b"" if handler.command == "HEAD" else body)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """What follows the headers, as it came: chunks with their lengths and trailers too."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = b""
    while size := int((line := handler.rfile.readline()).partition(b";")[0], 16):
        body += line + handler.rfile.read(size + 2)
    while line.strip():
        body, line = body + line, handler.rfile.readline()
    return body + line


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # clients keep their connections open
    proxy: S3Proxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.proxy.answer(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None: ...
