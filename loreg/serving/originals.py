"""What a live model has where adapters are merged into it, as digests: compared before, and again after a restore."""

from __future__ import annotations

from loreg.errors import BaseMismatch, CheckFailed
from loreg.merge.inputs import AdapterInput
from loreg.serving.live import Merged, Ready, State, state_of
from loreg.serving.places import Place
from loreg.serving.targets import Leaves, mismatch


class Originals:
    """Of every tensor of the checkpoint that was edited, or looked at, what the model had before any merge."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Place, State, Leaves]] = {}
        self._edited: dict[str, Place] = {}

    def compare(self, ready: Ready, merged: Merged | None, touched: bool) -> None:
        """Before ``ready`` is merged in place of ``merged``. ``touched``: raises BaseMismatch unless what its
        adapters know of their base is here; else what is here is taken to be right."""
        now = _Spans(merged)
        for adapter in ready.adapters if touched else ():
            self._check(adapter, ready, now)
        for edit in ready.edits:
            self._leaves(edit.target.name, edit.target.place, now)
        self._edited |= {edit.target.name: edit.target.place for edit in ready.edits}

    def verify(self) -> None:
        """That everything that was edited since is what it was, but for what somebody else has changed after it was
        restored. Raises CheckFailed, naming tensors."""
        wrong = [
            place.name
            for name, place in self._edited.items()
            if state_of(place.tensor) == self._known[name][1] and Leaves(name, place).own != self._known[name][2].own
        ]
        if wrong:
            raise CheckFailed(
                f"{len(wrong)} of {len(self._edited)} restored parameters do not have their bytes back, first "
                f"{min(wrong)!r}: expected the digests that they had before; load the model again."
            )
        self._edited.clear()

    def _check(self, adapter: AdapterInput, ready: Ready, now: _Spans) -> None:
        follows = {name for name, tie in adapter.manifest.ties.items() if not tie.untied}
        wrong = []
        for name, leaf in sorted(adapter.manifest.base.touched.items()):
            if name in ready.places:
                if not self._leaves(name, ready.places[name], now).has(leaf):
                    wrong.append(ready.places[name].name)
            elif name not in follows:
                wrong.append(name)
        if wrong:
            raise mismatch(adapter, wrong)

    def _leaves(self, name: str, place: Place, now: _Spans) -> Leaves:
        state = state_of(place.tensor)
        place_, known, leaves = self._known.get(name, (None, None, None))
        same = leaves is not None and place_ is not None and place_.tensor is place.tensor
        if now.edits(place):
            if same and leaves is not None:
                return leaves
            raise BaseMismatch(
                f"What the base has in {place.name!r} is not known while another adapter is merged there that calls "
                "it otherwise: restore the model, and apply this one then."
            )
        if same and leaves is not None and known == state:
            return leaves
        leaves = Leaves(name, place)
        _ = leaves.own  # now, as long as it is what was there
        self._known[name] = place, state, leaves
        return leaves


class _Spans:
    """The memory that a merge has edited."""

    def __init__(self, merged: Merged | None) -> None:
        self._by_storage: dict[int, list[Place]] = {}
        for editing in merged.editings if merged is not None else ():
            place = editing.edit.target.place
            self._by_storage.setdefault(place.span[0], []).append(place)

    def edits(self, place: Place) -> bool:
        return any(place.overlaps(other) for other in self._by_storage.get(place.span[0], ()))
