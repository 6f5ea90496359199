"""What the header of a file says of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loreg.errors import BadInput
from loreg.format import canonical_json

_KEPT = ("ss_network_module", "ss_network_args", "ss_network_dim", "ss_network_alpha", "ss_base_model_version")


@dataclass(frozen=True, slots=True)
class Notes:
    """``arguments``: of the network, as kohya's scripts record them, all as text; none where no scripts were used.
    ``kept``: what a version remembers."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Mapping[str, str], path: Path) -> Notes:
        """Raises BadInput for arguments that cannot be read, as they may change what the tensors mean."""
        text = metadata.get("ss_network_args", "{}")
        arguments = canonical_json.loads(text.encode(), what=f"ss_network_args in the header of {path}")
        if not isinstance(arguments, dict | None):
            raise BadInput(f"{path}: ss_network_args in its header is {text[:60]!r}, expected a JSON object.")
        return cls(arguments or {}, {key: metadata[key] for key in _KEPT if key in metadata})

    @property
    def algorithm(self) -> str | None:
        value = self.arguments.get("algo")
        return None if value is None else str(value).lower()

    def says(self, argument: str) -> bool:
        """Whether an argument is on: in LyCORIS whatever is not "false" is (4.1.3, ``utils.str_bool``)."""
        return argument in self.arguments and str(self.arguments[argument]).lower() != "false"
