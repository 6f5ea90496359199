"""Cases for names, references and expressions."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vector_cases.record import Vector, rejected, valid

HEX = "0123456789abcdef" * 4


def references() -> list[Vector]:
    def parsed(
        name: str,
        description: str,
        clauses: str,
        text: str,
        *,
        owner_and_name: str | None,
        tag: str | None = None,
        number: int | None = None,
        prefix: str | None = None,
    ) -> Vector:
        result = {"name": owner_and_name, "tag": tag, "number": number, "digest_prefix": prefix}
        return valid(name, description, clauses, {"operation": "parse", "text": text}, result)

    def refused(name: str, description: str, clauses: str, text: str) -> Vector:
        return rejected(name, description, clauses, {"operation": "parse", "text": text})

    def tag(name: str, description: str, text: str, accepted: bool) -> Vector:
        given = {"operation": "set_tag", "text": text}
        return valid(name, description, "E2", given) if accepted else rejected(name, description, "E2", given)

    long = "a" * 128
    return [
        parsed("name", "A name.", "E1 E2", "sql", owner_and_name="sql"),
        parsed("owner", "An owner and a name.", "E1", "acme/sql", owner_and_name="acme/sql"),
        parsed("signs", "Every sign that a name may hold.", "E1", "0a._-z", owner_and_name="0a._-z"),
        parsed("longest", "The longest name.", "E1", f"{long}/{long}", owner_and_name=f"{long}/{long}"),
        parsed("tag", "A tag.", "E2", "sql:prod", owner_and_name="sql", tag="prod"),
        parsed("number", "A version number.", "E2", "sql:v12", owner_and_name="sql", number=12),
        parsed("number-limit", "The largest version number.", "E2", "sql:v999999999", owner_and_name="sql",
               number=999999999),
        parsed("number-beyond", "Ten digits are a tag.", "E2", "sql:v1000000000", owner_and_name="sql",
               tag="v1000000000"),
        parsed("not-a-number", "v0 and v01 are tags.", "E2", "sql:v01", owner_and_name="sql", tag="v01"),
        parsed("digest", "A whole digest.", "E2", f"sql@blake3:{HEX}", owner_and_name="sql", prefix=HEX),
        parsed("prefix", "Eight digits of a digest.", "E2", "acme/sql@blake3:01234567", owner_and_name="acme/sql",
               prefix="01234567"),
        parsed("bare-digest", "A digest without a name.", "E2", "blake3:01234567", owner_and_name=None,
               prefix="01234567"),
        parsed("named-blake3", "What has no eight digits after it is a name.", "E2", "blake3:prod",
               owner_and_name="blake3", tag="prod"),
        *(
            refused(f"bad-name-{i}", description, "E1", text)
            for i, (description, text) in enumerate(
                (
                    ("No name.", ""), ("Upper case.", "Sql"), ("A leading dash.", "-sql"), ("A leading dot.", ".sql"),
                    ("A parent directory.", "../sql"), ("An inner parent.", "a/.."), ("Three parts.", "a/b/c"),
                    ("An empty owner.", "/sql"), ("An empty name.", "acme/"), ("A space.", "s ql"),
                    ("A newline at the end.", "sql\n"), ("129 characters.", long + "a"), ("A letter beyond ASCII.",
                            "é"),
                    ("A plus sign.", "a+b"), ("A NUL.", "a\0"), ("A backslash.", "a\\b"), ("A tag alone.", ":prod"),
                )
            )
        ),
        *(
            refused(f"bad-reference-{i}", description, "E2", text)
            for i, (description, text) in enumerate(
                (
                    ("An empty tag.", "sql:"), ("Two tags.", "sql:a:b"), ("An upper-case tag.", "sql:Prod"),
                    ("A tag with a slash.", "sql:a/b"), ("An empty digest.", "sql@"), ("Seven digits.",
                            "sql@blake3:0123456"),
                    ("65 digits.", f"sql@blake3:{HEX}0"), ("Upper-case digits.", "sql@blake3:0123456A"),
                    ("Another algorithm.", "sql@sha256:01234567"), ("A digest without its algorithm.",
                            "sql@01234567"),
                    ("A tag and a digest.", "sql:prod@blake3:01234567"), ("A digest, no name.", "@blake3:01234567"),
                )
            )
        ),
        tag("set-tag", "A tag that may be set.", "prod-2.1", True),
        tag("set-v0", "v0 names no version, so it may be set.", "v0", True),
        tag("set-number", "A tag that would hide a version number.", "v3", False),
        tag("set-empty", "An empty tag.", "", False),
        tag("set-upper", "An upper-case tag.", "Prod", False),
    ]  # fmt: skip


def expressions() -> list[Vector]:
    def parsed(name: str, description: str, text: str, *terms: tuple[float, str]) -> Vector:
        result = [
            {"weight": weight, "bits": struct.pack(">d", weight).hex(), "reference": reference}
            for weight, reference in terms
        ]
        return valid(name, description, "E3", {"text": text}, result)

    def refused(items: Sequence[tuple[str, str, str]]) -> list[Vector]:
        return [rejected(name, description, "E3", {"text": text}) for name, description, text in items]

    return [
        parsed("one", "An adapter alone.", "sql", (1.0, "sql")),
        parsed("sum", "A sum without spaces.", "sql+humor", (1.0, "sql"), (1.0, "humor")),
        parsed("weights", "Weights.", "0.7*sql + 0.3*humor", (0.7, "sql"), (0.3, "humor")),
        parsed("spaces", "Spaces around every sign.", "  2 * sql  +  .5 * humor ", (2.0, "sql"), (0.5, "humor")),
        parsed("tabs", "Tabs and newlines are spaces.", "sql\t+\nhumor", (1.0, "sql"), (1.0, "humor")),
        parsed("minus", "A difference.", "both - 0.5*humor", (1.0, "both"), (-0.5, "humor")),
        parsed("minus-no-space-after", "A minus sign after a space needs none after it.", "a -b", (1.0, "a"), (-1.0,
                "b")),
        parsed("dash-in-name", "Without a space before it a dash belongs to the name.", "a-b", (1.0, "a-b")),
        parsed("leading-minus", "A minus sign first.", "-sql", (-1.0, "sql")),
        parsed("leading-plus", "A plus sign first.", "+sql", (1.0, "sql")),
        parsed("number-forms", "The forms of a number.", "1.*a + .5*b + 1e-3*c + 2E+1*d", (1.0, "a"), (0.5, "b"),
               (0.001, "c"), (20.0, "d")),
        parsed("nearest-double", "A weight is the nearest double.", "0.1000000000000000055511151231257827*a", (0.1,
                "a")),
        parsed("references", "References of every form.", "a:v2 + x/y:prod - 2*c@blake3:01234567", (1.0, "a:v2"),
               (1.0, "x/y:prod"), (-2.0, "c@blake3:01234567")),
        parsed("name-of-digits", "A name may be all digits: a weight is followed by *.", "2*3", (2.0, "3")),
        parsed("same-twice", "An adapter twice.", "a + a", (1.0, "a"), (1.0, "a")),
        parsed("zero", "A weight of zero is a term here; a recipe leaves it out.", "0*a + b", (0.0, "a"), (1.0, "b")),
        parsed("many", "1,024 terms.", "+".join(["a"] * 1024), *[(1.0, "a")] * 1024),
        *refused(
            (
                ("empty", "Nothing.", ""), ("blank", "A space.", " "), ("no-term-after", "A sign at the end.", "a +"),
                ("sign-alone", "A sign alone.", "-"), ("two-signs", "Two signs.", "a + -0.5*b"), ("double", "--.",
                        "--a"),
                ("no-sign", "No sign between two terms.", "a b"), ("no-star", "No * after a weight.", "0.5 a"),
                ("no-adapter", "A weight without an adapter.", "0.5*"), ("two-weights", "Two weights.", "2*3*a"),
                ("star-first", "A * first.", "*a"), ("product", "A product of adapters.", "a*b"),
                ("parentheses", "Parentheses.", "2*(a+b)"), ("overflow", "A weight that no double holds.", "1e400*a"),
                ("nan", "A weight that is no number.", "nan*a"), ("hexadecimal", "A hexadecimal weight.", "0x1p3*a"),
                ("comma", "A decimal comma.", "0,5*a"), ("other-digits", "Digits beyond ASCII.", "\u0661*a"),
                ("bad-reference", "A reference that is none.", "a + B"), ("no-break-space", "A no-break space.",
                        "a\u00a0+ b"),
                ("too-many", "1,025 terms.", "+".join(["a"] * 1025)),
                ("digits", "Digits without an end: a matcher that backtracks is slow.", "1" * 4000),
            )
        ),
    ]  # fmt: skip
