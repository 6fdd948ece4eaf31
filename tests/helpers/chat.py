"""A stand-in for an OpenAI-compatible server, on the loopback interface."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: What a judge may do: a status, headers and a body for what it was asked.
Answer = Callable[[dict[str, Any]], tuple[int, dict[str, str], str]]


def completion(text: str | None, usage: dict[str, int] | None = None) -> tuple[int, dict[str, str], str]:
    """A chat completion as servers write it."""
    content = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage}
    return 200, {}, json.dumps(content)


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """The two answers that a request shows, in its order."""
    text = request["messages"][-1]["content"]
    a = text.partition("[Response A]\n")[2].partition("\n\n[Response B]")[0]
    return a, text.partition("[Response B]\n")[2].partition("\n\n[End of the responses]")[0]


class StandIn(ThreadingHTTPServer):
    """Answers every request by `answer`, and keeps path, headers and content of each."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), request))
        status, headers, body = self.server.answer(request)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a test's output is its own."""
