"""Many conversations over one loaded bundle: python examples/server.py BUNDLE [--port 8000]

    curl -N localhost:8000/chats/anna -d 'def add(a, b):'      # streams; the conversation keeps its state
    curl    localhost:8000/chats/anna/state -o anna.safetensors  # goes on anywhere: examples/move_chat.py
    curl    localhost:8000/chats

The weights are in memory once. A conversation costs its state, whose size never grows.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import liger_deploy as ld
from liger_deploy.bundle import Bundle
from liger_deploy.generate import generate
from liger_deploy.runtimes.session import BaseSession
from liger_deploy.text import Stream, Text


class Chats:
    """A session for each name, forked from an empty one; one call at a time on each."""

    def __init__(self, bundle: Path) -> None:
        opened = Bundle.open(bundle)
        self.text, self.ends = Text(opened), opened.manifest.generation.eos_token_ids
        self._empty = ld.load_session(opened)
        self._sessions: dict[str, tuple[BaseSession, threading.Lock]] = {}
        self._guard = threading.Lock()

    def get(self, name: str) -> tuple[BaseSession, threading.Lock]:
        """The session of this name, and what to hold while using it."""
        with self._guard:
            if name not in self._sessions:
                self._sessions[name] = (self._empty.fork(), threading.Lock())
            return self._sessions[name]

    def sizes(self) -> dict[str, int]:
        """Bytes of each conversation's state."""
        with self._guard:
            return {name: s.spec.nbytes() for name, (s, _) in self._sessions.items()}


def handler(chats: Chats) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            match = re.fullmatch(r"/chats/([\w-]{1,64})", self.path)
            if not match:
                return self.send_error(404)
            prompt = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 1 << 20)).decode(
                "utf-8", "replace"
            )
            session, lock = chats.get(match[1])
            with lock:
                try:
                    ids, stream = chats.text.encode(prompt), Stream(chats.text)
                    tokens = generate(session, ids, 100, stop=chats.ends)
                    first = next(tokens, None)  # what is wrong with the prompt shows here
                except ld.UserError as error:
                    return self.send_error(400, str(error))
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.end_headers()
                for token in [] if first is None else [first, *tokens]:
                    self.wfile.write(stream.feed(token).encode())
            return None

        def do_GET(self) -> None:
            if self.path == "/chats":
                return self._answer(json.dumps(chats.sizes()).encode(), "application/json")
            match = re.fullmatch(r"/chats/([\w-]{1,64})/state", self.path)
            if not match or match[1] not in chats.sizes():
                return self.send_error(404)
            session, lock = chats.get(match[1])
            with lock, tempfile.TemporaryDirectory() as folder:
                session.state().save(Path(folder) / "state")
                return self._answer((Path(folder) / "state").read_bytes(), "application/octet-stream")

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """No line a request."""

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), handler(Chats(arguments.bundle)))
    print(f"http://127.0.0.1:{server.server_port}/chats", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
