"""Imports that are made meanwhile are made, and hide nothing."""

import sys

import pytest

from gfl_platform.cluster.resources import imported_meanwhile


def test_what_is_imported_meanwhile_is_there_after(monkeypatch):
    monkeypatch.delitem(sys.modules, "quopri", raising=False)
    with imported_meanwhile("this_is_absent", "quopri"):
        pass
    assert "quopri" in sys.modules


def test_a_failure_meanwhile_is_the_failure():
    with pytest.raises(ValueError, match="the reason"), imported_meanwhile("this_is_absent"):
        raise ValueError("the reason")
