"""``spec/variants.md``, written by ``python -m tests.peers.variants.table``, which runs every case."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.peers.variants import Case

PATH = Path(__file__).resolve().parents[3] / "spec" / "variants.md"
COLUMNS = ("variant", "written by", "import", "merge", "unmerge", "compose", "export", "note")

_HEAD = """# What merges

Every row is a test (`tests/peers/test_variants.py`): the library writes an adapter, loreg takes it through each
step, and the outputs of the merged model are compared with the library's own, unmerged. *compose*: one adapter at
weight 1 is itself to the bit, and at another weight what the merge of the expression is. *export*: the pushed bytes
again, and a PEFT directory that PEFT loads with the same outputs. Written by `python -m tests.peers.variants.table`;
no cell by hand.

"""


@dataclass(frozen=True)
class Row:
    """What was found for a case."""

    case: Case
    imported: str = "yes"
    merge: str = "-"
    unmerge: str = "-"
    compose: str = "-"
    export: str = "-"

    @classmethod
    def refused(cls, case: Case, reason: str) -> Row:
        return cls(case, f"refused: {reason}")

    def cells(self) -> list[str]:
        found = (self.imported, self.merge, self.unmerge, self.compose, self.export, self.case.note)
        return [_cell(text) for text in (self.case.variant, self.case.library, *found)]


def _cell(text: str) -> str:
    """One line, without paths of the machine that it was found on."""
    text = re.sub(r"/[\w./-]*/(adapter|base)\b", r"\1", " ".join(text.split()))
    return text.replace("|", "\\|")


def render(rows: Iterable[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return _HEAD + "\n".join(lines) + "\n"


def parse(text: str) -> list[list[str]]:
    """Heading and rows of the table."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def main() -> None:
    import pytest

    from tests.peers import test_variants

    class Keep:
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            items[:] = [item for item in items if "test_the_table" not in item.name]

    code = pytest.main(["-q", test_variants.__file__], plugins=[Keep()])
    found = sys.modules["test_variants"]._found  # type: ignore[attr-defined]
    if code:
        sys.exit(int(code))
    PATH.write_text(render(found[case.id] for case in test_variants.CASES), encoding="utf-8")


if __name__ == "__main__":
    main()
