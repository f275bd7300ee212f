"""A module that is named by `Later` is loaded when something of it is asked for, and then stands where that stood."""

from __future__ import annotations

import sys

import pytest

from lorakit.later import Later


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_late_one.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_late_one"
    sys.modules.pop("a_late_one", None)


def test_it_gives_way_to_the_module(module):
    namespace = {}
    namespace[module] = Later(module, namespace)
    assert module not in sys.modules
    assert namespace[module].VALUE == 3
    assert namespace[module] is sys.modules[module]


def test_what_the_module_lacks_is_said_by_the_module(module):
    with pytest.raises(AttributeError, match=r"a_late_one.*nothing"):
        Later(module, {}).nothing  # noqa: B018
