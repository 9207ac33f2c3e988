"""A small server with OpenAI's chat interface, run as a process of its own.

``python openai_server.py <key> [<pad> [<refusals>]]``: the first requests are refused with the statuses that
``refusals`` lists ("429,503"; 0 = no answer at all); 429 says to come again after no seconds.

Prints its port, then one line a request: the answer depends on the question and the seed alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRITES = threading.Lock()  # requests are answered side by side
PAD = int(sys.argv[2]) if len(sys.argv) > 2 else 0  # characters before the key in what a refusal tells
REFUSALS = [int(status) for status in sys.argv[3].split(",")] if len(sys.argv) > 3 else []


class Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions for those who know the key."""

    def do_POST(self) -> None:  # noqa: N802 - the library's name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers.get("Authorization") == f"Bearer {sys.argv[1]}"
        status = 404 if self.path != "/v1/chat/completions" else 200 if known else 401
        with WRITES:
            status = REFUSALS.pop(0) if REFUSALS else status
        question = body["messages"][0]["content"]
        told = json.dumps([question, body.get("seed"), body["temperature"], body["max_tokens"]])
        words = f"likes {hashlib.sha256(told.encode()).hexdigest()[:12]}"
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": words}},
            ],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
        }
        refusal = {"error": {"message": f"{'.' * PAD} {self.headers['Authorization']}"}}
        data = json.dumps(answer if status == 200 else refusal).encode()
        if not status:
            return
        keep = {key: body.get(key) for key in ("model", "seed", "temperature", "top_p", "max_tokens")}
        line = json.dumps({**keep, "status": status, "question": question})
        with WRITES:  # before the answer, after which a test may end this process
            print(line, flush=True)
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
