"""Run Triton's ops with every tensor beside a page that may not be touched: python guard_pages.py end|start CASE...

The interpreter does not notice a load or store out of bounds. Here each input, workspace and output lies against the
end or the start of its pages, next to a page without access, so that one ends the process. Reports each op before it
runs. With a case "wrong_load" or "wrong_store" it runs a kernel whose mask is wrong by one element.
"""

import ctypes
import importlib
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ejmp_kernels import registry
from support.interpreter import patch_once
from support.small_cases import Setup, derivatives, make_case

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
PROT_NONE = 0


def report(name):
    """Write what comes next, before the process may end."""
    sys.stdout.write(f"{name}\n")
    sys.stdout.flush()


def guarded(tensor, side):
    """Return a copy whose last byte is just before a forbidden page, or whose first byte is just after one."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    guard, first = (pages * PAGE, pages * PAGE - size) if side == "end" else (0, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if LIBC.mprotect(ctypes.c_void_p(address + guard), ctypes.c_size_t(PAGE), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first).view(tensor.shape)
    return copy.copy_(tensor)


class Guard(TorchDispatchMode):
    """Places what Triton's ops take, and within them every new tensor, beside a guard page."""

    def __init__(self, side):
        super().__init__()
        self.side, self.inside = side, False

    def place(self, tensors):
        return tree_map_only(torch.Tensor, lambda x: guarded(x, self.side), tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == registry.NAMESPACES["triton"]:
            name = func.name().split("::")[1]
            report(name)
            self.inside = True
            with self:
                result = implementation(name)(*self.place(args))
            self.inside = False
            return result
        result = func(*args, **(kwargs or {}))
        fresh = self.inside and not any(r.alias_info for r in func._schema.returns)
        return self.place(result) if fresh else result


def implementation(name):
    """Return the function behind an op, which torch calls with this mode switched off."""
    package = importlib.import_module("ejmp_kernels.triton_kernels")
    modules = [getattr(package, module) for module in package.__all__]
    return next(getattr(m, name) for m in modules if callable(getattr(m, name, None)))


@triton.jit
def _wrong_kernel(x, out, size, BEFORE: tl.constexpr, AFTER: tl.constexpr, STORE: tl.constexpr):
    i = tl.arange(0, 64) - 1
    wide, right = (i >= -BEFORE) & (i < size + AFTER), (i >= 0) & (i < size)
    tl.store(out + i, tl.load(x + i, right if STORE else wide, 0.0), wide if STORE else right)


def run_wrong(side, *, store):
    x, out = (guarded(torch.zeros(5), side) for _ in range(2))
    _wrong_kernel[(1,)](x, out, 5, 0, 0, store)
    report("right")
    _wrong_kernel[(1,)](x, out, 5, int(side == "start"), int(side == "end"), store)


def main(side, *names):
    torch.use_deterministic_algorithms(True, warn_only=True)
    registry.load_backend("triton")
    patch_once()
    for name in names:
        if name.startswith("wrong"):
            run_wrong(side, store=name == "wrong_store")
            continue
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(name, Setup("triton", dtype))
            with Guard(side):
                with torch.no_grad():
                    results = [[case.call(*(x.clone() for x in case.inputs))]]
                if dtype == torch.float32:
                    results += derivatives(case.call, case.inputs)
            assert all(x.isfinite().all() for part in results for x in part)


if __name__ == "__main__":
    main(*sys.argv[1:])
