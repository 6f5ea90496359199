from __future__ import annotations

from collections.abc import Iterator

import pytest

from loreg.algebra import native


@pytest.fixture(scope="module", params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The laws of an edit hold for both that can compute it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "library", None)
        elif native.library is None:
            pytest.skip("loreg was installed where there was no C compiler: only torch's operations are tested")
        yield request.param
