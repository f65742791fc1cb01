"""Fixtures that every test file may use."""

import pytest


@pytest.fixture
def variant(request, monkeypatch) -> str:
    """Forces one kernel variant; parametrize it with `formats.variant_params`."""
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", request.param)
    return request.param
