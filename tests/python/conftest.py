"""Fixtures that every test file may use."""

import pytest


@pytest.fixture
def variant(request, monkeypatch) -> str:
    """Forces one kernel variant; parametrize it with `formats.variant_params`."""
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", request.param)
    return request.param


@pytest.fixture(scope="module")
def plain_bitsandbytes():
    """bitsandbytes' layers as they are on processors without AVX512-BF16: with it they repack
    weights in eval mode, round to bf16, and refuse some shapes."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "has_avx512bf16", lambda: False)
        yield
