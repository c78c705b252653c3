"""What a name says of the hub before anything is asked of it, and whether the hub can be asked at all."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

WAIT = 4.0  # seconds for a first connection; the hub's own client tries for half a minute
# Models of the hub's first days, which have no owner in their name. Every other id is OWNER/NAME.
_WITHOUT_OWNER = re.compile(
    r"(albert|bert|camembert|distilbert|distilroberta|gpt2|roberta|t5|transfo-xl|xlm|xlnet)(-[\w.-]+)?"
    r"|ctrl|distilgpt2|gpt2|openai-gpt"
)


def may_be_on_hub(name: str) -> bool:
    """Whether a name can be a model's on the hub: OWNER/NAME, one of the few without an owner, or one that
    the local cache has."""
    return "/" in name or _WITHOUT_OWNER.fullmatch(name) is not None or is_cached(name)


def is_cached(name: str) -> bool:
    """Whether the hub's local cache has anything of this model."""
    return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def go_offline_if_unreachable() -> bool:
    """Ask nothing of a hub that does not answer: whether that was found now. From then on this process takes
    models from the local cache alone, and says at once what it does not have."""
    if constants.HF_HUB_OFFLINE or _answers():
        return False
    constants.HF_HUB_OFFLINE = True
    return True


def _answers() -> bool:
    """Whether the hub, or the proxy before it, takes a connection."""
    asked = urlsplit(constants.ENDPOINT)
    host, scheme = asked.hostname or "", asked.scheme or "https"
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    if proxy:
        asked = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    place = asked.hostname or "", asked.port or (443 if asked.scheme == "https" else 80)
    connected = threading.Event()

    def connect() -> None:  # in a thread, since looking up a name knows no time limit
        try:
            with socket.create_connection(place, timeout=WAIT):
                connected.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(WAIT)
    return connected.is_set()
