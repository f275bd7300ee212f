"""The names that a save leaves in a folder and in a header, shared by reading and writing."""

from __future__ import annotations

import hashlib

DIGEST_FIELD = "lorakit.digest"
CONFIG_FIELD = "lorakit.config"
TEMPORARY = ".lorakit-"
"""Every temporary name starts with this; the next save removes what a killed one left."""
SUFFIX = ".tmp"


def pending_config_name(digest: str) -> str:
    """The temporary name of the config that belongs to the weights of this digest."""
    return f"{TEMPORARY}config-{hashlib.sha256(digest.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}{SUFFIX}"
