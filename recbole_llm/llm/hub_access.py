"""Whether the model hub answers: its client tries for half a minute a file before it says that it does not."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE = 5  # seconds


def hub_answers() -> bool:
    """Whether a connection to the hub can be opened; behind a proxy nothing is tried, and it is taken to answer."""
    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    if getproxies().keys() & {hub.scheme, "all"}:
        return True
    try:
        socket.create_connection((hub.hostname, hub.port or {"http": 80}.get(hub.scheme, 443)), PATIENCE).close()
    except OSError:
        return False
    return True
