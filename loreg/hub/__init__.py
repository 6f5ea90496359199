"""The Hugging Face Hub as a transport: files of exactly one commit, by name and digest.

Everything goes through ``huggingface_hub`` (its login, its proxies, its cache, its ``HF_*`` variables), and
nothing that it hands back is believed: it compares sizes only, so every file is hashed again after a download.
This module sees bytes and digests, never tensors.

Each function takes ``endpoint``, the address of the Hub; without it, ``HF_ENDPOINT`` as it is at the call, and
without that, the public Hub. Whatever goes wrong on the way is one sentence: NotFound if the Hub says that there
is no such thing, UsageError for a malformed name, RemoteError for all the rest. No login token is ever in it.
"""

from __future__ import annotations

from loreg.hub.names import SCHEME, HubFile, HubPin, HubRef
from loreg.hub.transfer import BASE_FILES, fetch, pin, send, snapshot

__all__ = ["BASE_FILES", "SCHEME", "HubFile", "HubPin", "HubRef", "fetch", "pin", "send", "snapshot"]
