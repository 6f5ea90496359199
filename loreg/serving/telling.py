"""What engines that are told over HTTP have in common: they load and unload, and say what they have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from loreg.digest import Digest
from loreg.errors import Conflict, RemoteError
from loreg.serving.calling import Again, Answer, Server


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an engine is told: a name, and the path of a directory. ``digest``: of the version. ``stacked``, ``form``:
    as of ``Preflight``. ``versions``: the digests of all that have the name."""

    name: str
    path: str
    digest: str
    stacked: bool = False
    form: str = "peft"
    versions: Collection[Digest] = ()


class Speaker:
    """One engine at one address. ``load`` and ``unload`` begin by looking what it has: they can be called again."""

    engine: ClassVar[str]
    reads: ClassVar[bool] = True
    """Whether it is told of a directory, where it may read at any time."""
    replaces: ClassVar[bool] = True
    """Whether what is loaded under a name takes the place of what was under it: so no request uses that any more."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def require(self, *, unload: bool, named: bool) -> None:
        """Raises Unsupported for what the engine cannot be told at all."""

    def load(self, adapter: Adapter) -> Literal["loaded", "replaced", "present"]:
        raise NotImplementedError

    def unload(self, adapter: Adapter) -> Literal["unloaded", "absent"]:
        raise NotImplementedError

    def request(self, adapter: Adapter) -> Mapping[str, Any]:
        """The fields of a request by which it uses the adapter."""
        return {"model": adapter.name}

    def place(self, adapter: Adapter) -> str:
        """The path of what it has of the adapter."""
        return adapter.path

    def may_have(self, adapter: Adapter) -> bool:
        """After an error: whether the engine may have been given the directory all the same."""
        return self.server.lost

    def models(self) -> dict[str, dict[str, Any]]:
        """What ``/v1/models`` lists, by id."""
        path = "/v1/models"
        answer = self.server.call(path)
        found = answer.json()
        listed = found.get("data") if isinstance(found, dict) else None
        if answer.status != 200 or not isinstance(listed, list):
            raise self.server.refusal(path, answer, f"expected the models that {self.engine} serves")
        return {str(model["id"]): model for model in listed if isinstance(model, dict) and "id" in model}

    def tell(self, path: str, body: Mapping[str, Any] | list[Any], without: str = "") -> Answer:
        """``without``: what to do about an engine that has no such path."""
        answer = self.server.call(path, body)
        if answer.status == 200:
            return answer
        # FastAPI's answer to a path that is none; one of the engine's own has more to say.
        nowhere = answer.status == 405 or (answer.status == 404 and answer.said in ("Not Found", ""))
        raise self.server.refusal(path, answer, without if nowhere else "")


class Named(Speaker):
    """Engines that hold adapters under names. ``former``: the path that was under the name when it was first looked
    at; ``begun``: whether anything was asked for since, the answer to which may have been lost."""

    RETURNED: ClassVar[str] = "somebody else may have loaded it again"

    former: str | None = None
    begun = False

    def held(self, adapter: Adapter) -> str | None:
        """The path that the engine has under that name."""
        model = self.models().get(adapter.name)
        if model is None:
            return None
        if model.get("parent") is None:
            raise Conflict(
                f"{self.server.shown} serves its base model as {adapter.name!r}: give the adapter another name, as "
                "with --name."
            )
        return str(model.get("root"))

    def load(self, adapter: Adapter) -> Literal["loaded", "replaced", "present"]:
        before = self.held(adapter)
        if not self.begun:
            self.former = before
            if before == adapter.path:
                return "present"
        self.begun = True
        if before != adapter.path:
            self.bring(adapter, before)
        if (now := self.held(adapter)) != adapter.path:
            raise RemoteError(
                f"{self.server.shown} said that it has loaded {adapter.name!r}: expected it to list {adapter.path}, "
                f"found {now or 'no such model'}; somebody else may load another version under this name."
            )
        return "loaded" if self.former is None else "replaced"

    def unload(self, adapter: Adapter) -> Literal["unloaded", "absent"]:
        there = self.held(adapter) is not None
        if not there and not self.begun:
            return "absent"
        self.begun = True
        if there:
            self.drop(adapter)
        if self.held(adapter) is not None:
            raise RemoteError(
                f"{self.server.shown} said that it has unloaded {adapter.name!r}, and still lists it; "
                f"{self.RETURNED}."
            )
        return "unloaded"

    def may_have(self, adapter: Adapter) -> bool:
        if not self.begun:
            return False
        try:
            return self.held(adapter) == adapter.path
        except Conflict:
            return False
        except (Again, RemoteError):
            return self.server.lost

    def bring(self, adapter: Adapter, before: str | None) -> None:
        raise NotImplementedError

    def drop(self, adapter: Adapter) -> None:
        raise NotImplementedError
