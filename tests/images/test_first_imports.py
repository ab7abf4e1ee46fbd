"""Modules of mlenv that are imported while an image is built are there: a missing one is passed over in silence."""

from __future__ import annotations

from importlib.util import find_spec

from mlenv.images.first_imports import MODULES


def test_modules_of_mlenv_are_there() -> None:
    assert [name for name in MODULES if name.startswith("mlenv.") and find_spec(name) is None] == []
    assert any(name.startswith("mlenv.") for name in MODULES)
