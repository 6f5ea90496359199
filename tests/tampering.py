"""What happens to a stored copy behind the store's back, wherever it is."""

from __future__ import annotations

import os

import s3_server

from loreg.store import BlobKey, LocalStore, Store


def overwrite(store: Store, key: BlobKey, data: bytes) -> None:
    """Other bytes under the same key."""
    if isinstance(store, LocalStore):
        path = store.path(key)
        if path.exists():
            path.chmod(0o644)
        path.write_bytes(data)
        return
    bucket, name = _object(store, key)
    s3_server.client(os.environ["AWS_ENDPOINT_URL"]).put_object(Bucket=bucket, Key=name, Body=data)


def remove(store: Store, key: BlobKey) -> None:
    """No bytes at all."""
    if isinstance(store, LocalStore):
        store.path(key).unlink()
        return
    bucket, name = _object(store, key)
    s3_server.client(os.environ["AWS_ENDPOINT_URL"]).delete_object(Bucket=bucket, Key=name)


def _object(store: Store, key: BlobKey) -> tuple[str, str]:
    address = repr(store).split("s3://")[1].rstrip("')")
    bucket, _, prefix = address.partition("/")
    return bucket, f"{prefix}/{key.location}".lstrip("/")
