"""Nothing is collected while libraries are imported, and afterwards as before."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.importing import collector_off, import_class


def test_the_collector_is_off_inside_and_then_as_it_was():
    with collector_off():
        with collector_off():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_class_is_imported_with_the_collector_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "looks_at_the_collector.py").write_text("import gc\nclass Name:\n    was_on = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not import_class("looks_at_the_collector.Name").was_on
    assert gc.isenabled()


def test_the_collector_is_on_after_an_import_that_fails():
    with pytest.raises(ModuleNotFoundError):
        import_class("simpletuner.no_such_module.Name")
    assert gc.isenabled()


def test_importing_storage_imports_no_torch():
    code = "import sys, simpletuner.storage; assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
