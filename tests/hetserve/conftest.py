from __future__ import annotations

import pytest

from tests.hetserve.either import Either


@pytest.fixture(params=["sync", "async"])
def either(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETSERVE_URL", raising=False)
    monkeypatch.delenv("HETSERVE_API_KEY", raising=False)
