#!/usr/bin/env bash
# uvicorn.run ends orderly at SIGTERM, and then raises the signal again: the process dies within run. What stands after it, in
# its finally, or is registered by atexit never happens, and the exit status is no 0. At Ctrl-C (SIGINT) all of it happens.
# A server of labels that writes its export after run does so on a desk and loses it in a container.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check uvicorn==0.54.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

assert version("uvicorn") == "0.54.0"
server = Path(sys.argv[1]) / "server.py"
server.write_text('''
import atexit
import sys

import uvicorn

atexit.register(print, "atexit", flush=True)


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            print(message["type"], flush=True)
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return


try:
    uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
    print("after run", flush=True)
finally:
    print("finally", flush=True)
''')


def ended(number: signal.Signals) -> tuple[list[str], int]:
    """What the server printed, and its exit status, once it served and was sent the signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = subprocess.Popen([sys.executable, server, str(port)], stdout=subprocess.PIPE, text=True)
    for _ in range(600):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    child.send_signal(number)
    printed = child.communicate(timeout=60)[0].split("\n")
    return [line for line in printed if line], child.returncode


orderly = ["lifespan.startup", "lifespan.shutdown"]
by_hand, by_system = ended(signal.SIGINT), ended(signal.SIGTERM)
print("SIGINT: ", *by_hand)
print("SIGTERM:", *by_system)
assert by_hand == ([*orderly, "after run", "finally", "atexit"], 0), by_hand
assert by_system == (orderly, -signal.SIGTERM), by_system
PYTHON
