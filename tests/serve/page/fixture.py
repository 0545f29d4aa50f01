"""A server that replays recorded traces to the page, with the timing of a real one: for the browser tests only.

`python tests/serve/page/fixture.py PORT` serves it by hand. Prompts steer it: "fail" answers with a 400 that names a
field, "busy" with a 503, "break" ends the stream half-way, "slowly" stretches it tenfold, "large"
fills a canvas of 512 places, "markdown" answers with the text that tries to get out.
A key, when set, is asked for as the real server does.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hasten import registry
from hasten.serve.page import document

TRACES = Path(__file__).parent / "traces"
MODELS = [
    {"id": "smollm2-135m", "object": "model", "hasten": {"kind": "causal", "window": 8192, "backbone": "native", "parameters": 134_515_008, "dtype": "float32"}},
    {"id": "mini-dlm", "object": "model", "hasten": {"kind": "masked", "window": 1024, "backbone": "native", "parameters": 3_239_168, "dtype": "float32"}},
]  # fmt: skip
HOSTILE = (Path(__file__).parent / "hostile.md").read_text(encoding="utf-8")
CUT = 7  # bytes per write of the hostile answer, so that the parser sees cuts inside characters and line ends


class Replay(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: FixtureServer

    def log_message(self, *_: Any) -> None:
        """Silence: the tests print what they need."""

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, status: int, value: object, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _error(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._json(status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, **headers)

    def _allowed(self) -> bool:
        key = self.server.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._error(401, "an API key is needed", code="invalid_api_key")
        return False

    def do_GET(self) -> None:
        """The page, the models, the catalog, the state."""
        self.server.asked.append(self.path)
        if self.path == "/":
            body, headers = document()
            self._send(200, body, headers)
        elif not self._allowed():
            return
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": MODELS})
        elif self.path == "/hasten/methods":
            self._json(200, registry.served())
        elif self.path == "/ready":
            self._json(200, {"status": "ready", "running": 1, "waiting": 0})
        elif self.path == "/metrics":
            self._send(200, b"hasten_requests_in_flight 1\nhasten_requests_waiting 0\n", {"Content-Type": "text/plain"})
        else:
            self._error(404, "no such route")

    def do_POST(self) -> None:
        """A chat completion, streamed from a recorded trace."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.server.bodies.append(body)
        prompt = body["messages"][-1]["content"]
        if prompt == "fail":
            self._error(400, "temperature must be a number in [0, 100], not 101", "temperature", "out_of_range")
        elif prompt == "busy":
            self._error(503, "no room for this request now", code="overloaded", **{"Retry-After": "2"})
        else:
            self._stream(body, prompt)

    def _stream(self, body: dict[str, Any], prompt: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        cut = CUT if prompt == "markdown" else 1 << 20
        try:
            for piece in self._hostile() if prompt == "markdown" else self._chunks(body, prompt):
                data = piece.encode()
                for at in range(0, len(data), cut):
                    part = data[at : at + cut]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone += 1
            self.close_connection = True

    def _hostile(self) -> Iterator[str]:
        yield ": ping\n\n"
        for line in HOSTILE.splitlines(keepends=True):
            yield _sse({"choices": [{"index": 0, "delta": {"content": line}, "finish_reason": None}]}, "\r\n")
        yield _sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, "\r")
        yield "data: [DONE]\n\n"

    def _chunks(self, body: dict[str, Any], prompt: str) -> Iterator[str]:
        method = body["hasten"]["method"]
        if prompt == "large":
            yield from _large()
            return
        name = f"{body['model']}_{'plain' if method == 'plain' else 'auto'}"
        trace = json.loads((TRACES / f"{name}.json").read_text(encoding="utf-8"))
        start, slow = time.monotonic(), 10.0 if prompt == "slowly" else 1.0
        for number, events in enumerate(trace["steps"]):
            time.sleep(max(0.0, start + events[-1]["t"] * slow - time.monotonic()))
            if prompt == "break" and number == 3:
                return
            text = "".join(event.get("text", "") for event in events)
            delta = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": None}
            yield _sse({"id": "chatcmpl-1", "choices": [delta], "hasten": {"events": events}})
        end = {"index": 0, "delta": {}, "finish_reason": trace["finish_reason"]}
        yield _sse({"id": "chatcmpl-1", "choices": [end], "hasten": trace["hasten"]})
        yield "data: [DONE]\n\n"


def _large() -> Iterator[str]:
    """A canvas of 512 places in 128 forwards, every open place guessed anew in each: what the view must keep up with."""
    yield _sse(
        {
            "choices": [],
            "hasten": {"events": [{"kind": "block", "choice": 0, "step": 0, "t": 0.0, "position": 8, "total": 520}]},
        }
    )
    order = [8 + (i * 167) % 512 for i in range(512)]
    for step in range(128):
        events = [{"kind": "forward", "choice": 0, "step": step, "t": step * 0.02, "total": 520, "backbone": "native"}]
        for i, place in enumerate(order[step * 4 :]):
            kind = "commit" if i < 4 else "propose"
            events.append(
                {
                    "kind": kind,
                    "choice": 0,
                    "step": step,
                    "t": step * 0.02,
                    "position": place,
                    "token": place,
                    "piece": f" w{place}",
                    "confidence": 0.5,
                }
            )
        yield _sse({"choices": [], "hasten": {"events": events}})
        time.sleep(0.02)
    end = {"kind": "stop", "choice": 0, "step": 128, "t": 2.56}
    yield _sse(
        {"choices": [{"index": 0, "delta": {"content": "done"}, "finish_reason": "stop"}], "hasten": {"events": [end]}}
    )
    yield "data: [DONE]\n\n"


def _sse(value: object, line: str = "\n") -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}{line}{line}"


class FixtureServer(ThreadingHTTPServer):
    """The server; `asked` and `bodies` are what came in, `gone` counts hang-ups."""

    daemon_threads = True

    def __init__(self, port: int = 0, key: str = "") -> None:
        super().__init__(("127.0.0.1", port), Replay)
        self.key = key
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.gone = 0

    def __enter__(self) -> FixtureServer:
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


if __name__ == "__main__":
    FixtureServer(int(sys.argv[1]), *sys.argv[2:3]).serve_forever()
