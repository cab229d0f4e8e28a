"""Loading the compiled extension: what a stale build says."""

from __future__ import annotations

import pytest
import torch

from fastpo import _extension, backends
from fastpo.backends import cpp

if cpp.unavailable() is not None:
    pytest.skip("the extension is not built", allow_module_level=True)


@pytest.fixture
def stale(monkeypatch):
    """As if an operator of this version were not in the build yet."""
    monkeypatch.setitem(_extension._FAKES, "cpp_of_tomorrow", None)
    _extension.load_error.cache_clear()
    yield
    monkeypatch.undo()
    _extension.load_error.cache_clear()


def test_a_stale_extension_says_what_to_run(stale):
    """REGRESSIONS 55: one warning, since calls without backend= go on; refused where asked for."""
    with pytest.warns(UserWarning, match=r"has no cpp_of_tomorrow.*run `pip install") as caught:
        assert backends.resolve(None, torch.device("cpu"), torch.float32) == "torch"
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with pytest.raises(ValueError, match=r"has no cpp_of_tomorrow.*run `pip install") as refused:
        backends.resolve("cpp", torch.device("cpu"), torch.float32)
    assert "\n" not in str(refused.value)
    assert _extension.devices() == ()
