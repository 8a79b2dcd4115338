"""What adapters say of packages that are missing or too old."""

from importlib import metadata

import pytest

from fastll.interop import require


def test_missing():
    with pytest.raises(
        ImportError, match=r'needs nothing-of-that-name, .*: pip install "nothing-of-that-name>=1"'
    ):
        require("nothing-of-that-name", "1")


@pytest.mark.parametrize("found", ["2.13.0+cpu", "2.5", "2.5.0rc1", "10.0"])
def test_new_enough(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda package: found)
    require("torch", "2.5")


def test_too_old(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: "2.4.1+cu121")
    with pytest.raises(
        ImportError, match=r'needs torch 2.5 or later, not 2.4.1\+cu121: pip install "torch>=2.5"'
    ):
        require("torch", "2.5")
