#!/usr/bin/env bash
# The openai client's `timeout` bounds each wait for bytes, not the request: an answer that comes a few bytes at a time is
# waited for to its end, here twelve times as long as the number says. A judge that is asked through a slow gateway stops a
# training run for as long as that goes on; whoever needs a bound has to set one around the call.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
env -u OPENAI_BASE_URL -u HTTP_PROXY -u HTTPS_PROXY -u http_proxy -u https_proxy NO_PROXY=127.0.0.1 \
  "$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

from openai import OpenAI

assert version("openai") == "3.57.0"
TIMEOUT, PAUSE, PIECES = 0.3, 0.15, 24
message = {"role": "assistant", "content": "4 of 5"}
choice = {"index": 0, "message": message, "finish_reason": "stop"}
BODY = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}).encode()


class Slow(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        size = -(-len(BODY) // PIECES)
        for start in range(0, len(BODY), size):
            time.sleep(PAUSE)
            self.wfile.write(BODY[start : start + size])
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        return


server = HTTPServer(("127.0.0.1", 0), Slow)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0, timeout=TIMEOUT)
began = time.monotonic()
answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "how good?"}])
took = time.monotonic() - began
print(f"timeout {TIMEOUT} s; answered after {took:.1f} s: {answer.choices[0].message.content!r}")
assert answer.choices[0].message.content == "4 of 5"
assert took > 5 * TIMEOUT, took
PYTHON
