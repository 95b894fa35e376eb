"""A stand-in for `herd serve` without a model: the page's own server for developing it and for its tests.

Its model is an echo: it answers with the last message, in small pieces that split characters where it hurts. `{n}` in a
message becomes the number of answers given so far. A first line of `/delay 0.05` sets the seconds between pieces.

    python tests/serve/page_server.py --port 8000 --key secret
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from herd.serve.page import chat_page

POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
MODELS = [
    {"id": "echo-1b", "object": "model", "created": 0, "owned_by": "herd", "context_length": 8192},
    {"id": "echo-8b", "object": "model", "created": 0, "owned_by": "herd", "context_length": 131072},
]
DELAY = re.compile(r"^/delay ([\d.]+)\n")


def words(text: str) -> list[str]:
    """What counts as tokens here."""
    return re.findall(r"\s*\S+|\s+$", text)


def pieces(text: str) -> list[str]:
    """A text in pieces of 1 to 5 characters."""
    cuts, at = [], 0
    while at < len(text):
        size = 1 + at * 7 % 5
        cuts.append(text[at : at + size])
        at += size
    return cuts


class PageServer(ThreadingHTTPServer):
    """The server with what it needs to know."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, key: str | None = None, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.key = key
        self.delay = delay
        self.answers = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away is no error here."""


class Handler(BaseHTTPRequestHandler):
    """The page, the models and the answers."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/":
            self.send_page()
        elif self.path != "/v1/models":
            self.send_problem(404, f"no such path: {self.path[:100]}", "not_found")
        elif self.is_allowed():
            self.send_json(200, {"object": "list", "data": MODELS})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions":
            self.send_problem(404, f"no such path: {self.path[:100]}", "not_found")
        elif self.is_allowed():
            self.send_answer(body)

    def is_allowed(self) -> bool:
        if self.server.key in (None, self.headers.get("authorization", "").removeprefix("Bearer ")):
            return True
        self.send_problem(401, "a valid API key is needed", "invalid_api_key")
        return False

    def send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = chat_page(nonce).encode()
        self.send_response(200)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-security-policy", POLICY.format(nonce=nonce))
        self.send_header("content-length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def send_json(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status, HTTPStatus(status).phrase)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_problem(self, status: int, message: str, code: str) -> None:
        self.send_json(status, {"error": {"message": message, "type": "error", "param": None, "code": code}})

    def send_answer(self, body: dict[str, Any]) -> None:
        prompt = sum(len(words(message["content"])) for message in body["messages"])
        room = next((model["context_length"] for model in MODELS if model["id"] == body["model"]), 0)
        if prompt > room:
            message = f"This model's context is {room} tokens; the request needs {prompt}. Shorten the prompt."
            self.send_problem(400, message, "context_length_exceeded")
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("connection", "close")
        self.end_headers()
        for event in self.events(body, prompt):
            # A network cuts anywhere: here in the middle of an event, or of its first character that has several bytes.
            wide = next((at for at, byte in enumerate(event) if byte > 127), None)
            cut = len(event) // 2 if wide is None else wide + 1
            self.wfile.write(event[:cut])
            time.sleep(0 if wide is None else 0.002)
            self.wfile.write(event[cut:])
        self.close_connection = True

    def events(self, body: dict[str, Any], prompt: int) -> Iterator[bytes]:
        text = body["messages"][-1]["content"]
        delay = self.server.delay
        if match := DELAY.match(text):
            delay, text = float(match[1]), text[match.end() :]
        self.server.answers += 1
        text = text.replace("{n}", str(self.server.answers))
        yield b": ping\n\n"
        yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for piece in pieces(text):
            time.sleep(delay)
            yield event(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        completion = len(words(text))
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        yield event(choices=[], usage=usage)
        yield b"data: [DONE]\n\n"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def event(**fields: Any) -> bytes:
    """One event of the stream; not escaped to ASCII, so that its parts split characters."""
    data = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "echo", **fields}
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key", help="ask for this API key")
    parser.add_argument("--delay", type=float, default=0.01, help="seconds between the pieces of an answer")
    options = parser.parse_args()
    server = PageServer(options.port, options.key, options.delay)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
