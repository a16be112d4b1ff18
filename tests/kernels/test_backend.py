"""The backend is chosen by device and by what is installed; a forced choice that cannot run there is an error."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from lota.kernels import TileIndex, backend, backend_name, cpu_ops, gather, using

CPU = torch.device("cpu")


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """The compiled library is built anew, into an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_ops.library.cache_clear()
    yield tmp_path / "lota"
    cpu_ops.library.cache_clear()


def test_forced_choices_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with using("torch"):
        assert backend_name(CPU) == "torch"
    with pytest.raises(ValueError, match="needs tensors on a CUDA or ROCm device, got cpu"), using("triton", CPU):
        raise AssertionError("refused too late")
    index = TileIndex.from_flat(torch.arange(3), 5)
    with using("triton"), pytest.raises(ValueError, match="got cpu; use 'auto' or 'torch'"):
        gather(torch.zeros(5), index)
    with pytest.raises(ValueError, match="kernels must be one of auto, torch, triton, got 'cuda'"), using("cuda"):
        pass


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton"), using("triton", "cuda"):
        pass
    assert backend_name(torch.device("cuda")) == "torch"


def test_auto_on_a_cpu_compiles_once_and_logs_once(fresh_library, monkeypatch, caplog):
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, "lota.kernels"):
        names = {backend_name(CPU) for _ in range(3)}
    (library,) = fresh_library.glob("*")
    assert names == {"c"} and library.suffix == ".so", "needs a C compiler, as DeepSpeed does on CPU ranks"
    assert [record.getMessage() for record in caplog.records] == ["operations run on c (kernels=auto)"]
    before = library.stat().st_mtime_ns
    cpu_ops.library.cache_clear()
    assert backend_name(CPU) == "c" and library.stat().st_mtime_ns == before, "taken from the cache"


def test_auto_without_a_compiler_is_plain_torch(fresh_library, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert backend_name(CPU) == "torch"


def test_auto_without_a_home_is_plain_torch(fresh_library, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cpu_ops.Path, "home", _no_home)
    assert backend_name(CPU) == "torch"


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_auto_without_a_cache_directory_is_plain_torch(fresh_library):
    fresh_library.write_text("in the way")
    assert backend_name(CPU) == "torch"


def test_nothing_imports_triton_before_it_is_used():
    code = "import sys, lota.kernels; sys.exit('lota.kernels.triton_ops' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
