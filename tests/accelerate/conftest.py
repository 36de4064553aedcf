import logging

import pytest

from fastbert.nn import watch


@pytest.fixture
def said(caplog, monkeypatch):
    """The sentences of the log, each said anew."""
    monkeypatch.setattr(watch, "_logged", set())
    caplog.set_level(logging.INFO, "fastbert")
    return lambda: [r.getMessage() for r in caplog.records]
