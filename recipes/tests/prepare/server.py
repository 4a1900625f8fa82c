"""An OpenAI-compatible endpoint on this computer that can be told to fail, to throttle and to stall."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Act(NamedTuple):
    """What the server does with one request."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    error: str | None = None
    """Code of the error."""
    message: str | None = None
    """What the error says."""
    broken: bool = False
    """Half of a body, with status 200."""
    stall: float = 0.0
    """Seconds before anything is sent."""
    hang_up: bool = False
    text: str | None = None
    finish: str = "stop"
    refusal: str | None = None
    usage: bool = True


class Seen(NamedTuple):
    """A request as it came in."""

    time: float
    text: str
    body: dict[str, Any]
    key: str | None


Behaviour = Callable[[str, int], Act]
"""From a text and the number of times that it was asked for before to what is done."""


class Endpoint:
    """Listens while the block runs."""

    def __init__(self, behave: Behaviour = lambda text, before: Act()) -> None:
        self.behave = behave
        self.seen: list[Seen] = []
        self.paid: Counter[str] = Counter()
        """Good replies by text and seed: what would be charged for."""
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def asked(self) -> Counter[str]:
        return Counter(seen.text for seen in self.seen)

    def __enter__(self) -> "Endpoint":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint._serve(self)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self._lock:
            before = self.asked[text]
            self.seen.append(Seen(time.monotonic(), text, body, handler.headers.get("Idempotency-Key")))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        act = self.behave(text, before)
        if act.stall:
            self._over.wait(act.stall)
        with self._lock:
            self._now -= 1
        # Whoever asked may have gone.
        with contextlib.suppress(OSError):
            self._reply(handler, act, text, body)

    def _reply(self, handler: BaseHTTPRequestHandler, act: Act, text: str, body: dict[str, Any]) -> None:
        if act.hang_up:
            handler.close_connection = True
            handler.connection.close()
            return
        content = json.dumps(self._content(act, text, body)).encode()
        if act.broken:
            content = content[: len(content) // 2]
        elif act.status == 200:
            with self._lock:
                self.paid[f"{text}#{body.get('seed')}"] += 1
        handler.send_response(act.status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        for name, value in act.headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def _content(self, act: Act, text: str, body: dict[str, Any]) -> dict[str, Any]:
        if act.status != 200:
            return {"error": {"message": act.message or f"no: {act.status}", "code": act.error, "type": "error"}}
        said = act.text if act.text is not None else f"That is, number {body.get('seed')}: {text}"
        message = {"role": "assistant", "content": said, "refusal": act.refusal}
        content: dict[str, Any] = {"id": "x", "object": "chat.completion", "model": body["model"]}
        content["choices"] = [{"index": 0, "message": message, "finish_reason": act.finish}]
        if act.usage:
            content["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return content
