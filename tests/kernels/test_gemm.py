"""The choice of the provider of matrix products."""

import errno
import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from support.inputs import require_native
from support.tolerances import relative_error, tolerance

from ejmp_kernels import gemm

require_native()
from ejmp_kernels.linear import linear  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of choices, on disk and in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EJMP_GEMM", raising=False)
    monkeypatch.setattr(gemm, "_known", {})
    monkeypatch.setattr(gemm, "_chosen", {})
    return gemm.cache_file()


def operands(dtype=torch.float32, m=300, k=200, n=100):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (k, n)))


def test_measured_once_and_kept(cache, monkeypatch):
    a, b = operands()
    first = gemm.choose(a, b)
    assert json.loads(cache.read_text()) == {"float32 n n 256 256 128": first}
    cache.write_text(json.dumps({"float32 n n 256 256 128": "onednn"}))
    monkeypatch.setattr(gemm, "_known", {})
    monkeypatch.setattr(gemm, "_chosen", {})
    monkeypatch.setattr(gemm, "_measure", lambda *_: pytest.fail("measured again"))
    assert gemm.choose(a, b) == "onednn"


def test_pinned(cache, monkeypatch):
    a, b = operands()
    for name in gemm.PROVIDERS:
        monkeypatch.setenv("EJMP_GEMM", name)
        assert gemm.choose(a, b) == name
        assert torch.equal(gemm.product(a, b), gemm.PROVIDERS[name](a, b))
    assert not cache.exists()
    monkeypatch.setenv("EJMP_GEMM", "cublas")
    with pytest.raises(ValueError, match=r"EJMP_GEMM.*'cublas'"):
        gemm.choose(a, b)


def test_small_products_do_not_ask_python(monkeypatch):
    """Up to where a choice is worth a measurement; EJMP_GEMM is heard for all."""
    asked = []
    monkeypatch.setattr(gemm, "choose", lambda a, b: asked.append(a.shape[0]) or "torch")
    rows = int(gemm.WORTH_MEASURING / (100 * 50))
    for m in (1, rows - 1, rows):
        a, b = operands(m=m, k=100, n=50)
        assert torch.equal(torch.ops.ejmp.matmul(a, b, False, False), a @ b)
    assert asked == [rows]
    monkeypatch.setenv("EJMP_GEMM", "torch")
    a, b = operands(m=2, k=3, n=4)
    torch.ops.ejmp.matmul(a, b, False, False)
    assert asked == [rows, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_providers_agree_in_every_layout(dtype):
    """Also for slices of a wider matrix, with gaps between the rows."""
    a, b = operands(dtype)
    exact = a.double() @ b.double()
    wide_a, wide_b = torch.cat([a, a], dim=1)[:, : a.shape[1]], torch.cat([b, b], dim=1)[:, : b.shape[1]]
    for x in (a, a.mT.contiguous().mT, wide_a):
        for y in (b, b.mT.contiguous().mT, wide_b):
            for name in gemm.providers(x):
                assert relative_error(gemm.PROVIDERS[name](x, y), exact) <= tolerance("product", dtype)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"float32 n n 256 256 128": "magic"}', "\0\xff"])
def test_a_damaged_cache_counts_as_empty(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    a, b = operands()
    assert gemm.choose(a, b) in gemm.PROVIDERS
    assert len(json.loads(cache.read_text())) == 1


def test_a_cache_that_cannot_be_written_is_no_error(cache):
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    a, b = operands()
    assert gemm.choose(a, b) in gemm.PROVIDERS


def test_small_products_and_other_types_are_torchs(cache):
    a, b = operands(m=3)
    assert gemm.choose(a, b) == "torch"
    for dtype in (torch.float64, torch.float16):
        assert gemm.choose(*operands(dtype, m=3000)) == "torch"
    assert not cache.exists()


def test_linear_refuses():
    with pytest.raises(ValueError, match="linear: expected"):
        linear(torch.zeros(3, 4), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="bfloat16"):
        linear(torch.zeros(3, 4), torch.zeros(5, 4, dtype=torch.bfloat16))


def test_a_full_disk_leaves_nothing(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gemm.json, "dump", full)
    a, b = operands()
    assert gemm.choose(a, b) in gemm.PROVIDERS
    assert list(cache.parent.iterdir()) == []


def test_a_user_without_a_home(monkeypatch):
    """As in a container that runs as a user whom its system does not know."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(gemm.Path, "home", home)
    assert gemm.cache_file().is_relative_to(tempfile.gettempdir())
    a, b = operands()
    assert gemm.choose(a, b) in gemm.PROVIDERS


def test_two_processes_write_one_cache(cache):
    """Whoever is last wins, and the file is whole at every moment."""
    text = "from ejmp_kernels import gemm\nfor i in range(300): gemm._write(gemm.cache_file(), {str(i): 'torch' * 200})"
    writers = [subprocess.Popen([sys.executable, "-c", text]) for _ in range(2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if cache.exists():
            seen.update(json.loads(cache.read_text()))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert "299" in json.loads(cache.read_text())
    assert seen
    assert list(cache.parent.iterdir()) == [cache]
