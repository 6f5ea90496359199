"""Good terms of every form, with what they mean in rational numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = Mapping[str, Any]
"""Role → NumPy array of Fractions."""


@dataclass(frozen=True)
class Case:
    """A good term. ``truth``: the sum without its scale, in rational numbers, straight from the definition."""

    form: str
    shapes: Mapping[str, tuple[int, ...]]
    out_in: tuple[int, int]
    truth: Callable[[Arrays], Any] | None = None
    exact: bool = True
    rank: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    loose: tuple[tuple[str, int], ...] = ()
    """(role, dimension) that may be one larger."""


def merged(t: Arrays) -> Any:
    """loralib's MergedLinear with [True, False, True], block by block."""
    blocks = [b @ a for b, a in zip(np.split(t["B"], 2), np.split(t["A"], 2), strict=True)]
    return np.concatenate([blocks[0], 0 * blocks[0], blocks[1]])


def grouped(t: Arrays) -> Any:
    return np.concatenate([b @ a for b, a in zip(np.split(t["B"], 2), np.split(t["A"], 2), strict=True)])


def blocks_in(t: Arrays) -> Any:
    left, right = np.split(t["A"], 2)
    first, second = np.split(t["B"], 2, axis=1)
    return np.concatenate([first @ left, second @ right], axis=1)


def expert(t: Arrays, e: int, experts: int) -> Any:
    r = len(t["A"]) // experts
    return t["B"][:, e::experts] @ t["A"][e * r : (e + 1) * r]


def tucker(core: Any, a: Any, b: Any) -> Any:
    """a (p, out), b (q, in), core (p, q, k…): (out, in·k)."""
    core = core.reshape(*core.shape[:2], -1)
    return np.einsum("pqk,po,qi->oik", core, a, b).reshape(a.shape[1], -1)


def loha(t: Arrays) -> Any:
    if "t1" in t:
        return tucker(t["t1"], t["w1_a"], t["w1_b"]) * tucker(t["t2"], t["w2_a"], t["w2_b"])
    return (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])


def lokr(t: Arrays) -> Any:
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    if "t2" in t:
        w2 = tucker(t["t2"], t["w2_a"], t["w2_b"])
    else:
        w2 = t["w2"].reshape(len(t["w2"]), -1) if "w2" in t else t["w2_a"] @ t["w2_b"]
    return np.kron(w1, w2)


def trailing(t: Arrays) -> Any:
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    return np.kron(w1[None], t["w2"]).reshape(6, -1)


LEADING, TRAILING = {"align": "leading"}, {"align": "trailing"}
ROTATION = {"side": "in", "factor": 0.5, "total_limit": None}
OFT = {**ROTATION, "series": None, "block_limit": None}
WHOLE = {"w1": (2, 3), "w2": (3, 2, 3)}

CASES = {
    "lora": Case(
        "lora", {"A": (2, 5), "B": (4, 2)}, (4, 5), lambda t: t["B"] @ t["A"], rank=2, parameters={"groups": 1}
    ),
    "lora-conv": Case(
        "lora",
        {"A": (2, 3, 1, 2), "B": (4, 2, 1, 1)},
        (4, 6),
        lambda t: t["B"].reshape(4, 2) @ t["A"].reshape(2, 6),
        rank=2,
        parameters={"groups": 1},
    ),
    "lora-grouped": Case("lora", {"A": (4, 5), "B": (6, 2)}, (6, 5), grouped, rank=4, parameters={"groups": 2}),
    "lora-blocks-in": Case(
        "lora", {"A": (4, 3), "B": (5, 4)}, (5, 6), blocks_in, rank=4, parameters={"groups": 1, "groups_in": 2}
    ),
    "lora_merged": Case(
        "lora_merged", {"A": (4, 5), "B": (4, 2)}, (6, 5), merged, rank=2, parameters={"enable": [True, False, True]}
    ),
    "lora_reshaped": Case(
        "lora_reshaped", {"A": (2, 4), "B": (6, 2)}, (3, 8), lambda t: (t["B"] @ t["A"]).reshape(3, 8), rank=2
    ),
    "lora_reshaped-uneven": Case(
        "lora_reshaped", {"A": (1, 12), "B": (6, 1)}, (8, 9), lambda t: (t["B"] @ t["A"]).reshape(8, 9), rank=1
    ),
    "lora_reshaped-dense": Case(
        "lora_reshaped", {"A": (3, 12), "B": (6, 3)}, (8, 9), lambda t: (t["B"] @ t["A"]).reshape(8, 9), False, 3
    ),
    "lora_expert": Case(
        "lora_expert",
        {"A": (6, 5), "B": (4, 6)},
        (2, 5),
        lambda t: expert(t, 1, 3)[1:3],
        rank=2,
        parameters={"experts": 3, "expert": 1, "rows": [1, 3]},
        loose=(("B", 0),),
    ),
    "lora_experts": Case(
        "lora_experts",
        {"A": (6, 5), "B": (4, 6)},
        (4, 5),
        lambda t: np.stack([expert(t, e, 3) for e in range(3)]),
        rank=2,
        parameters={"experts": 3},
    ),
    "adalora": Case(
        "adalora", {"A": (2, 5), "B": (4, 2), "E": (2, 1)}, (4, 5), lambda t: t["B"] @ (t["E"] * t["A"]), rank=2
    ),
    "vera": Case(
        "vera",
        {"A": (2, 6), "B": (7, 2), "lambda_d": (2,), "lambda_b": (4,)},
        (4, 5),
        lambda t: t["lambda_b"][:, None] * (t["B"][:4] @ (t["lambda_d"][:, None] * t["A"][:, :5])),
        rank=2,
        loose=(("A", 1), ("B", 0)),
    ),
    "loha": Case("loha", {"w1_a": (4, 2), "w1_b": (2, 5), "w2_a": (4, 3), "w2_b": (3, 5)}, (4, 5), loha, rank=2),
    "loha-dense": Case(
        "loha", {"w1_a": (2, 3), "w1_b": (3, 5), "w2_a": (2, 3), "w2_b": (3, 5)}, (2, 5), loha, False, 3
    ),
    "loha-tucker": Case(
        "loha",
        {"w1_a": (2, 4), "w1_b": (2, 5), "t1": (2, 2, 3, 1), "w2_a": (2, 4), "w2_b": (2, 5), "t2": (2, 2, 3, 1)},
        (4, 15),
        loha,
        False,
        2,
    ),
    "lokr-whole": Case("lokr", WHOLE, (6, 18), lokr, parameters=LEADING),
    "lokr-trailing": Case("lokr", WHOLE, (6, 18), trailing, parameters=TRAILING),
    "lokr-trailing-in-two": Case(
        "lokr", {"w1_a": (2, 2), "w1_b": (2, 3), "w2": (3, 2, 3)}, (6, 18), trailing, False, 2, TRAILING
    ),
    "lokr-w1-in-two": Case(
        "lokr", {"w1_a": (2, 1), "w1_b": (1, 3), "w2": (3, 2, 1, 2)}, (6, 12), lokr, rank=1, parameters=LEADING
    ),
    "lokr-w2-in-two": Case(
        "lokr", {"w1": (3, 2), "w2_a": (2, 1), "w2_b": (1, 4)}, (6, 8), lokr, rank=1, parameters=LEADING
    ),
    "lokr-both-in-two": Case(
        "lokr",
        {"w1_a": (2, 2), "w1_b": (2, 3), "w2_a": (3, 2), "w2_b": (2, 2)},
        (6, 6),
        lokr,
        rank=2,
        parameters=LEADING,
    ),
    "lokr-dense": Case(
        "lokr", {"w1_a": (1, 3), "w1_b": (3, 3), "w2_a": (2, 3), "w2_b": (3, 1)}, (2, 3), lokr, False, 3, LEADING
    ),
    "lokr-tucker": Case(
        "lokr",
        {"w1": (2, 3), "w2_a": (2, 3), "w2_b": (2, 2), "t2": (2, 2, 3)},
        (6, 18),
        lokr,
        rank=2,
        parameters=LEADING,
    ),
    "lokr-tucker-dense": Case(
        "lokr", {"w1": (1, 5), "w2_a": (2, 3), "w2_b": (2, 2), "t2": (2, 2, 3)}, (3, 30), lokr, False, 2, LEADING
    ),
    "lokr-tucker-both-in-two": Case(
        "lokr",
        {"w1_a": (2, 1), "w1_b": (1, 3), "w2_a": (2, 3), "w2_b": (2, 2), "t2": (2, 2, 3)},
        (6, 18),
        lokr,
        False,
        1,
        LEADING,
    ),
    "locon": Case(
        "locon",
        {"up": (4, 2, 1, 1), "mid": (2, 3, 1, 2), "down": (3, 5, 1, 1)},
        (4, 10),
        lambda t: tucker(t["mid"], t["up"].reshape(4, 2).T, t["down"].reshape(3, 5)),
        rank=3,
    ),
    "locon-dense": Case(
        "locon",
        {"up": (2, 3, 1), "mid": (3, 3, 2), "down": (3, 5, 1)},
        (2, 10),
        lambda t: tucker(t["mid"], t["up"].reshape(2, 3).T, t["down"].reshape(3, 5)),
        False,
        3,
    ),
    "dense": Case("dense", {"value": (4, 3, 2)}, (4, 6), lambda t: t["value"].reshape(4, 6)),
    "dense-bias": Case("dense", {"value": (4,)}, (4, 1), lambda t: t["value"].reshape(4, 1)),
    "ia3-in": Case("ia3", {"l": (3,)}, (4, 6), parameters={"on": "in"}),
    "ia3-in-grouped": Case("ia3", {"l": (6,)}, (4, 6), parameters={"on": "in", "groups": 2}),
    "ia3-out": Case("ia3", {"l": (4, 1)}, (4, 6), parameters={"on": "out", "neutral": 0}),
    "replaced": Case("replaced", {"value": (4, 3, 2)}, (4, 6), parameters={"turned": False}),
    "replaced-turned": Case("replaced", {"value": (6, 4)}, (4, 6), parameters={"turned": True}),
    "rows": Case("rows", {"rows": (2, 4)}, (4, 6), parameters={"indices": [5, 0]}),
    "oft": Case("oft", {"R": (2, 3, 3), "s": (4, 1)}, (4, 6), exact=False, parameters=OFT),
    "oft-triangles": Case("oft", {"R": (3, 3)}, (4, 8), exact=False, parameters=OFT),
    "oft-shared": Case("oft", {"R": (1, 2, 2)}, (4, 6), exact=False, parameters={**OFT, "series": [1, 2.5]}),
    "boft": Case(
        "boft",
        {"R": (2, 4, 2, 2)},
        (4, 8),
        exact=False,
        parameters={**ROTATION, "order": "halves"},
        loose=(("R", 0),),
    ),
}
