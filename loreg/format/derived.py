"""What a plain model was made of, where that was a quantised one: the record that travels with it."""

from __future__ import annotations

from dataclasses import dataclass

from loreg.digest import Digest
from loreg.format import canonical_json
from loreg.format.fields import Fields
from loreg.format.recipe import FORMAT

DERIVED = "loreg-derived.json"


@dataclass(frozen=True, slots=True)
class Derived:
    """``loreg-derived.json`` [G2]: the quantised model by its weights_root, its scheme in words, and the dtype."""

    source: Digest
    scheme: str
    dtype: str
    weights_root: Digest

    def dump(self) -> bytes:
        return canonical_json.dumps(
            {
                "format": FORMAT,
                "kind": "derived",
                "source": str(self.source),
                "scheme": self.scheme,
                "dtype": self.dtype,
                "weights_root": str(self.weights_root),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Derived:
        """From canonical bytes [J6, G2]. Raises BadInput."""
        with Fields(canonical_json.loads_canonical(data, what=DERIVED), DERIVED) as f:
            f.choice("format", FORMAT)  # [M1]
            f.choice("kind", "derived")
            return cls(
                f.digest("source"), f.text("scheme"), f.choice("dtype", "BF16", "F16"), f.digest("weights_root")
            )
