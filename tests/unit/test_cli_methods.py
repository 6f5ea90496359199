"""``loreg methods``: all that a person has to know to give a method what it needs, as a table and as data."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from loreg.cli import main
from loreg.cli.merging import _parameters
from loreg.format.methods import METHODS, REQUIRED, parameters

DATA = json.loads(CliRunner().invoke(main, ["methods", "--json"]).stdout)["methods"]
COUNTS = {(1, None): "any", (2, None): "2+", (2, 2): "2"}


def lines() -> list[str]:
    result = CliRunner().invoke(main, ["methods"])
    assert result.exit_code == 0 and result.stderr == ""
    return result.stdout.splitlines()


def test_the_data_is_every_row() -> None:
    assert [one["name"] for one in DATA] == list(METHODS)
    for one, row in zip(DATA, METHODS.values(), strict=True):
        assert (one["adapters"]["least"], one["adapters"]["most"]) == row.adapters
        assert (one["space"], one["arithmetic"]) == (row.space, row.arithmetic)
        assert one["summary"] == row.summary and one["source"] == row.source
        assert [parameter["name"] for parameter in one["parameters"]] == list(row.parameters)
        for said in one["parameters"]:
            known = row.parameters[said["name"]]
            assert said["required"] == (known.default is REQUIRED)
            assert said["required"] or said["default"] == known.default
            assert said["help"] == known.help


def test_the_table_is_the_data() -> None:
    header, *told = lines()
    assert re.split("  +", header) == ["METHOD", "ADAPTERS", "SPACE", "HELP"]
    expected = []
    for one in DATA:
        count = COUNTS[one["adapters"]["least"], one["adapters"]["most"]]
        expected.append([one["name"], count, one["space"], one["summary"]])
        expected += [["", said["name"], said["help"]] for said in one["parameters"]]
    found = [re.split("  +", line) for line in told]
    assert [[*row[:1], re.split("[= ]", row[1])[0], row[2]] if row[0] == "" else row for row in found] == expected
    columns = [header.index(title) for title in ("ADAPTERS", "SPACE", "HELP")]
    for line in told:  # each column begins where its title does
        assert line[columns[2] - 1] == " " != line[columns[2]]
        assert line.startswith(" ") or all(line[column] != " " for column in columns)


def test_what_it_shows_can_be_given_back() -> None:
    """Each default in the form of --param is that default; what is required is so."""
    name, shown = "", {}
    for line in lines()[1:]:
        first, *_ = re.split("  +", line.strip())
        if not line.startswith(" "):
            name = first
        elif first.endswith(" (required)"):
            assert METHODS[name].parameters[first.removesuffix(" (required)")].default is REQUIRED
        else:
            shown.setdefault(name, []).append(first)
    assert {"svd", "ties:mergekit", "knots"} <= set(shown)
    for name, given in shown.items():
        none = {"rank": None, "energy": None, "density": None, "seed": None}
        values = _parameters({**none, "rest": given})
        assert values == {key: METHODS[name].parameters[key].default for key in values}
        needed = {"rank": 1} if name == "svd" else {}
        needed |= {key: 0.5 for key, one in METHODS[name].parameters.items() if one.default is REQUIRED}
        parameters(name, {**values, **needed})


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_on_a_terminal_it_is_wrapped_and_not_cut(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    whole = " ".join(" ".join(lines()[1:]).split())
    monkeypatch.setattr("loreg.cli.text.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = [re.sub(r"\x1b\[\d*m", "", line) for line in lines()]
    assert max(map(len, shown)) <= columns
    assert not any("…" in line for line in shown)
    assert sorted(" ".join(shown[1:]).split()) == sorted(whole.split())
