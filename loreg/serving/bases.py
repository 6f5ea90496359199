"""``check_base``: how a model fits a version of an adapter, before anything is done with the two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loreg.errors import BaseMismatch, LoregError
from loreg.format.base import BaseReference, HubPin
from loreg.format.fingerprint import Match, match_base
from loreg.registry import Registry, Version
from loreg.registry.core import silent
from loreg.serving.twins import in_thread

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Fit:
    """``match``: the strongest level that holds [B5]. ``differing``: those of the tensors that the adapter adapts
    which the model lacks, or has with other bytes, by the names of the checkpoint."""

    match: Match
    differing: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the adapter may be served on it, or merged into it."""
        return self.match >= Match.TOUCHED

    def require(self, version: Version, what: str) -> None:
        """Raises BaseMismatch, naming tensors, unless it holds."""
        if self.holds:
            return
        shown = ", ".join(self.differing[:3])
        more = f" and {len(self.differing) - 3} more" if len(self.differing) > 3 else ""
        raise BaseMismatch(
            f"{version} was trained on {version.manifest.base.name!r}, and {what} differs from it in "
            f"{len(self.differing)} of the {len(version.manifest.base.touched)} tensors that it adapts: {shown}"
            f"{more}. Serve that base, or another adapter."
        )


def check_base(reference: str, base: str | Path | torch.nn.Module, registry: Registry | None = None) -> Fit:
    """How ``base`` fits the version: a live model, or the name, the path or the Hub id of one.

    Of a registered name nothing is read. Of a Hub id the commit and the sha256 of its files are asked for first:
    where they are those that the version names, nothing is downloaded. Files are hashed, once as long as nobody
    changes them. Of a live model the tensors that the adapter adapts are hashed, so ``touched`` is the most that is
    said of one; a wider dtype that holds the same values is as good. Raises NotFound, BadInput, RemoteError.
    """
    from loreg.serving.defaults import default_registry

    registry = registry or default_registry()
    version = registry.resolve(reference)
    if not isinstance(base, (str, Path)):
        return _fit_of_model(version, base)
    return fit(registry, version, base)


check_base_async = in_thread(check_base)


def fit(registry: Registry, version: Version, base: str | Path) -> Fit:
    """See ``check_base``."""
    reference = version.manifest.base
    if isinstance(base, str) and reference.hub is not None and _is_pinned(registry, reference, base):
        return Fit(Match.HUB_PIN)
    found = registry.bases.find(base, silent)
    match, differing = match_base(reference.identity, reference.touched, found.manifest.by_name())
    if match is Match.WEIGHTS and _same(found.hub, reference):
        match = Match.HUB_PIN
    return Fit(match, differing)


def _is_pinned(registry: Registry, reference: BaseReference, text: str) -> bool:
    """Whether ``text`` is a Hub id that stands for the very commit and files that the version names."""
    if Path(text).exists() or any(row.name == text for row in registry.list_bases()):
        return False
    from loreg import hub

    try:
        pin = hub.pin(hub.HubRef.parse_id(text))
    except LoregError:  # then the download, or what it says, tells
        return False
    weights = {path: sha256 for path, sha256 in pin.sha256s.items() if path.endswith(".safetensors")}
    return _same(HubPin(pin.repo, pin.commit, weights), reference)


def _same(hub: HubPin | None, reference: BaseReference) -> bool:
    return hub is not None and bool(hub.files) and hub == reference.hub


def _fit_of_model(version: Version, model: Any) -> Fit:
    from loreg.serving.places import Tensors
    from loreg.serving.targets import differing

    manifest = version.manifest
    places = Tensors(model).find(dict.fromkeys({*manifest.base.touched, *manifest.ties}, ()))
    wrong = differing(manifest, places)
    return Fit(Match.NONE if wrong or not manifest.base.touched else Match.TOUCHED, tuple(wrong))
