"""Regular expressions of an adapter's config: they mean what ``re`` says, and take few steps whatever they are."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loreg.adapters.peft import patterns
from loreg.adapters.peft.config import check_pattern, first_match
from loreg.errors import BadInput, Unsupported

ATOMS = [
    *("a", "b", "1", ".", r"\.", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S"),
    *("A", "B", "Ä", r"\ ", "[A-Z]", "[^A]", "ſ", "K", "[i-k]"),
    *("[ab]", "[^a]", "[a-b1.]", r"[^\d.]", "[^ab]"),
    *("^", "$", r"\b", r"\B", r"\A", r"\Z", "", "layers", "_", "ä"),
]  # fmt: skip
REPEATS = ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{,3}?"]


def _extended(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    wrapped = st.tuples(st.sampled_from(["(", "(?:", "(?=", "(?!"]), inner).map(lambda pair: f"{pair[0]}{pair[1]})")
    behind = st.tuples(st.sampled_from(["(?<=", "(?<!"]), st.sampled_from(["a", r"\.", "[ab]", "ab|1a"])).map(
        lambda pair: f"{pair[0]}{pair[1]})"
    )
    flagged = st.tuples(st.sampled_from(["i", "s", "m", "x", "is", "-i", "i-s", "m-s", "u"]), inner).map(
        lambda pair: f"(?{pair[0]}:{pair[1]})"
    )
    repeated = st.tuples(inner, st.sampled_from(REPEATS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
    together = st.lists(inner, min_size=1, max_size=3).map("".join)
    either = st.lists(inner, min_size=1, max_size=3).map("|".join)
    return wrapped | behind | flagged | repeated | together | either


expressions = st.recursive(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)).map(
        lambda pair: "".join(pair) if pair[0] not in ("", "^", "$", r"\b", r"\B", r"\A", r"\Z") else pair[0]
    ),
    _extended,
    max_leaves=6,
)
paths = st.text("abAB1._äÄ\n", min_size=1, max_size=8) | st.sampled_from(
    ["a\n", "a.b\n", "layers.1", "a.layers", "a.LAYERS", "S", "K", "k\u212a", "\na\n\nb"]
)


@settings(max_examples=600, deadline=None)
@given(expressions, paths)
@example(r"(?:.*\.)?layers", "a.layers")
@example(r"a{2,}$", "aaa\n")
@example("layers.1", "a.layers_1")
@example("(?s:.*)a", "\na")
@example("(?i:[A-Z]K(?-i:a))", "bka")
@example("(?i:[A-Z]K(?-i:a))", "bkA")
@example("(?m:^a$\n^b$)", "a\nb")
@example("(?m:a$)", "a\n")
@example("(?x: a  b )1", "ab1")
def test_an_expression_fits_what_it_fits_in_re(pattern: str, path: str) -> None:
    assert patterns.fits(pattern, path) == bool(re.fullmatch(pattern, path))
    assert patterns.fits_end(pattern, path) == bool(re.match(rf"(.*\.)?({pattern})$", path))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["i", "s", "m", "x", "im", "u", "sx"]), expressions, paths)
@example("i", "[a-z]", "\u212a")
def test_flags_for_all_of_an_expression(flags: str, inner: str, path: str) -> None:
    """PEFT takes them where it matches the expression as it is; inside its own, Python has them at the beginning."""
    pattern = f"(?{flags}){inner}"
    assert patterns.fits(pattern, path) == bool(re.fullmatch(pattern, path))
    patterns.check(pattern, "config: target_modules", inside=False)
    with pytest.raises(re.error, match="global flags not at the start"):
        re.match(rf"(.*\.)?({pattern})$", path)
    with pytest.raises(BadInput, match=r"rank_pattern: .*global flags not at the start.*such as '\(\?i:…\)'"):
        check_pattern({pattern: 4}, "config: rank_pattern")


@pytest.mark.parametrize("pattern", [r"(?i).*Q_PROJ", r"(?s:.*)q_proj", "(?x) .* q_proj  # the queries"])
def test_flags_as_they_are_written(pattern: str) -> None:
    assert patterns.fits(pattern, "model.layers.0.q_proj")
    assert not patterns.fits(pattern, "model.layers.0.k_proj")


@settings(max_examples=300, deadline=None)
@given(st.text("ab.-", max_size=5), st.text("ab.-", min_size=1, max_size=8), st.booleans())
def test_names_fit_as_expressions(name: str, path: str, escaped: bool) -> None:
    """What most keys are, whole paths or ends of them, is compared without any matching."""
    pattern = re.escape(name) if escaped else name
    assert patterns.fits_end(pattern, path) == bool(re.match(rf"(.*\.)?({pattern})$", path))


def test_the_first_of_several_is_taken() -> None:
    keys = ["k_proj", r".*layers\.\d+\.q_proj", "q_proj"]
    assert first_match("model.layers.12.q_proj", keys) == keys[1]
    assert first_match("model.q_proj", keys) == "q_proj"
    assert first_match("model.xq_proj", keys) == "model.xq_proj"


# Of a list of towers, kinds of layers and projections, as Unsloth writes it for models that see.
LONG = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj)))"
)

# Each takes ``re`` longer than anybody waits, on a path of so many characters.
SLOW = [
    (".*.*.*x", "a." * 250),
    ("(a|a)*b", "a" * 500),
    ("(a|a)" * 40 + "b", "a" * 40),
    ("a?" * 40 + "b" * 40, "a" * 40),
    ("((a*)*)*b", "a" * 500),
    ("(?:a{0,500}){0,500}b", "a" * 500),
    ("(?=(a+)+b)c", "a" * 500),
    (".*" * 2000 + "x", "a" * 500),
]


@pytest.mark.parametrize(("pattern", "path"), SLOW)
def test_an_expression_takes_few_steps(pattern: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: 20,000 steps are the most that is allowed, and these need fewer, or are refused there."""
    monkeypatch.setattr(patterns, "_STEPS", 15_000)
    assert not patterns.fits(pattern, path)
    assert not patterns.fits_end(pattern, path)


def test_a_common_long_expression_is_matched_in_a_few_hundred_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_STEPS", 300)
    assert patterns.fits(LONG, "model.language_model.layers.31.self_attn.q_proj")
    assert patterns.fits(LONG, "model.layers.31.self_attn.q_proj")
    assert not patterns.fits(LONG, "model.layers.31.self_attn.o_proj")


def test_steps_are_bounded() -> None:
    with pytest.raises(Unsupported, match=r"takes over 20,000 steps.*fewer repetitions"):
        patterns.fits("(?:(?=a{0,400})a)*b", "a" * 500)


def test_a_repetition_of_any_size_ends() -> None:
    assert patterns.fits("(?:a?){4000000000}", "a" * 500)
    assert not patterns.fits("(?:a){4000000000}", "a" * 500)
    assert patterns.fits("(?:(?=a)|a){4000000000}b", "aab") == bool(re.fullmatch("(?:(?=a)|a)*b", "aab"))


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("(" * 600, BadInput, "is not a regular expression"),
        ("(" * 2000 + ")" * 2000, BadInput, "is not a regular expression: maximum recursion"),
        ("a{99999999999}", BadInput, "is not a regular expression"),
        ("[", BadInput, "is not a regular expression"),
        ("a)(b", BadInput, "is not a regular expression"),
        ("a" * 5000, Unsupported, "has 5000 characters, and 4096 at most"),
        (r"(a)\1", Unsupported, "GROUPREF"),
        ("(a)?(?(1)b|c)", Unsupported, "GROUPREF_EXISTS"),
        ("a*+b", Unsupported, "POSSESSIVE_REPEAT"),
        ("(?>a*)b", Unsupported, "ATOMIC_GROUP"),
        ("(?a:q)", Unsupported, "has flags other than i, m, s and x"),
        ("(?a)q", Unsupported, "has flags other than"),
        (r"(?:x(?!(?ia:a)))", Unsupported, "has flags other than"),
        ("[a-\uffff]", Unsupported, "has a range of over 1,000 characters"),
        ("(" * 150 + "a" + ")*" * 150, Unsupported, "is nested over 100 deep"),
    ],
)  # fmt: skip
def test_what_is_not_matched_is_refused_by_name(pattern: str, error: type[BadInput], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        check_pattern({pattern: 4}, "config: alpha_pattern")
    assert type(caught.value) is error and str(caught.value).startswith("config: alpha_pattern: ")
    assert len(str(caught.value)) < 300
    with pytest.raises(error):
        patterns.fits(pattern, "a")


def test_a_path_beyond_all_models_is_refused() -> None:
    assert patterns.fits_end("a", "a" * 510 + ".a")
    for fit in (patterns.fits, patterns.fits_end):
        with pytest.raises(BadInput, match="has 513 characters: expected 512 at most"):
            fit("b.*", "a" * 513)


@pytest.mark.parametrize("patterns_", [[1], "q", 3, {"q": "4"}, {"q": True}, {"q": None}, {"q": [4]}])
def test_patterns_are_numbers_by_expression(patterns_: object) -> None:
    with pytest.raises(BadInput, match=r"where: expected (an object|a number)"):
        check_pattern(patterns_, "where")
