"""One side of a comparison, as a process: it builds cases with the code of a checkout and answers questions about them.

Started as `python -P worker.py SETTINGS` with PYTHONPATH at the checkout, which may be older than this file: nothing of
`ejmp.track` is imported, and what the checkout lacks makes a case unavailable, with the reason. SETTINGS is JSON:
root (folder of the checkout), benchmarks (folder with op_cases.py, of the running checkout), cores, device, backend,
and slow (shares of its own time that a case waits after each call, by name: a known slowdown for tests of the
comparison). Questions and answers are lines of JSON on stdin and stdout; the process ends with its stdin.
"""

import ast
import copy
import dataclasses
import fnmatch
import functools
import gc
import importlib
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Who imports this file, as what lists all modules does, asks it nothing.
SETTINGS: dict[str, Any] = json.loads(sys.argv[1]) if __name__ == "__main__" else {"cores": [], "device": "cpu"}
if SETTINGS["cores"]:
    os.sched_setaffinity(0, SETTINGS["cores"])

import numpy as np  # noqa: E402 - after the cores are chosen, so that thread pools have their number
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

DEVICE = torch.device(SETTINGS["device"])
BLOCKS = (6, 5, 4, 3, 2)
"""Numbers of blocks of the models."""
WIDTHS = {"emb_size_atom": 64, "emb_size_edge": 128}
"""Widths of the models; the rest is JMP-L's."""
CLOCK = time.process_time if DEVICE.type == "cpu" and len(SETTINGS["cores"]) == 1 else time.perf_counter
"""What times are read from. On one core it is the processor time of this process, to which others on the core add
nothing; with more, or on a GPU, what a clock on the wall shows."""
LEAST_CALLS, MOST_CALLS = 3, 100
"""How many calls a block of a case has at least and at most."""
LONG_CALL = 3
"""How many blocks a call must last to be timed alone."""
CALLS_TOGETHER = {
    **dict.fromkeys(("edge_to_edge", "atom_to_edge", "edge_to_atom", "atom_sum", "gather_add", "gather_add_atoms"), 32),
    **dict.fromkeys(("activate", "activate_factor", "activate_residual", "activate_all", "swap_add"), 32),
    **dict.fromkeys(("swap_add_to", "pair", "pair_from_distances", "radial"), 32),
    "quadruplet": 8,
}
"""How many forward calls of an op are timed together, about as many as last a millisecond; of its gradients half as
many, of their gradients a quarter. With 64 atoms the arrays of most ops lie in the cache that all cores share, whose
speed depends on the pages that a process was given and on what other cores do. On a CPU these ops are therefore timed
with 8 atoms, whose arrays fit into the core's own cache."""
FEWER = {"forward": 1, "backward": 2, "second": 4}
"""By what the number of calls that are timed together is divided, by pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Something to time."""

    call: Callable[[], Any]
    """What is timed."""
    error: Callable[[], float]
    """Gives the largest error against float64, over the largest value."""
    facts: Callable[[], dict[str, Any]]
    """Gives what can be said of a call without timing it."""


def crystal(repeats: int) -> Any:
    """Return a rattled crystal of sodium chloride of 8 repeats^3 atoms, as a structure of the checkout."""
    import ejmp  # noqa: PLC0415

    cell = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]) / 2
    places = np.stack(np.meshgrid(*[np.arange(repeats)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    ideal = 5.64 * (places + cell).reshape(-1, 3)
    moved = ideal + np.random.default_rng(0).normal(0, 0.05, ideal.shape)
    numbers = np.tile([11] * 4 + [17] * 4, repeats**3)
    return ejmp.Structure(numbers=numbers, positions=moved, cell=5.64 * repeats * np.eye(3), pbc=True)


def graph_of(repeats: int, **options: Any) -> Any:
    """Return the graph of a crystal at 6 A and 20 neighbours."""
    import ejmp  # noqa: PLC0415

    return ejmp.build_graph([crystal(repeats)], 6.0, 20, device=DEVICE, **options)


class Meter(TorchDispatchMode):
    """Counts the operations that a call dispatches, and follows the bytes of all tensors that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.held = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, count it and note the storages it made."""
        self.count += 1
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}  # noqa: SLF001
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.seen | known:  # noqa: SLF001
                    self.seen.add(storage._cdata)  # noqa: SLF001
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())  # noqa: SLF001
        return out

    def _release(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.held -= size


def measured_facts(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what one call dispatches, holds at most, and multiplies by torch's count."""
    with Meter() as meter:
        call()
    with FlopCounterMode(display=False) as counter:
        call()
    return {"dispatches": meter.count, "peak_bytes": meter.peak, "flops": counter.get_total_flops()}


def largest_error(found: Any, exact: Any) -> float:
    """Return the largest difference over the largest value, over pairs of tensors; None on either side is no pair."""
    worst = 0.0
    for f, e in zip(found, exact, strict=True):
        if f is not None and e is not None and e.numel():
            scale = e.abs().max().clamp(min=1e-300)
            worst = max(worst, ((f.double() - e.double()).abs().max() / scale).item())
    return worst


def load_op_cases() -> Any:
    """Import the running checkout's op_cases.py on the checkout's kernels; an op it lacks raises when it is called."""
    path = Path(SETTINGS["benchmarks"], "op_cases.py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ejmp_kernels."):
            _fill_gaps(str(node.module), [alias.name for alias in node.names])
    spec = importlib.util.spec_from_file_location("op_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["op_cases"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fill_gaps(name: str, members: list[str]) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        module = sys.modules[name] = types.ModuleType(name)
    for member in members:
        if not hasattr(module, member):

            def missing(*_: Any, _what: str = f"{name}.{member}", **__: Any) -> Any:
                raise NotImplementedError(f"there is no {_what}")

            setattr(module, member, missing)


class Cases:
    """All cases by name; each is made when it is first asked for."""

    def __init__(self) -> None:
        self.ops = load_op_cases()
        self.makers: dict[str, Callable[[], Bench]] = {"machine/product": self._product, "graph/build": self._graph}
        for op in self.ops.CASES:
            for order in self.ops.ORDERS:
                self.makers[f"{op}/{order}"] = lambda op=op, order=order: self._op(op, order)
        for blocks in BLOCKS:
            self.makers[f"model/{blocks}-blocks"] = lambda blocks=blocks: self._model(blocks)
        self.made: dict[str, Bench] = {}
        self.graphs: dict[tuple[int, torch.dtype], Any] = {}

    def get(self, name: str) -> Bench:
        """Return a case, which is made once."""
        if name not in self.made:
            self.made[name] = self.makers[name]()
        return self.made[name]

    def names(self, globs: list[str]) -> dict[str, str | None]:
        """Try to make and run every case that is named like a glob; return why it cannot be, or None, by name.

        What has no sense, such as a second derivative of a linear op, is left out.
        """
        found: dict[str, str | None] = {}
        for name in self.makers:
            if not any(fnmatch.fnmatchcase(name, glob) for glob in globs):
                continue
            try:
                self.get(name).call()
                found[name] = None
            except self.ops.LinearOpError:
                continue
            except Exception as error:  # noqa: BLE001 - whatever an older checkout does not know
                found[name] = f"{type(error).__name__}: {error}"
        return found

    def _graph_in(self, repeats: int, dtype: torch.dtype) -> Any:
        if (repeats, dtype) not in self.graphs:
            self.graphs[repeats, dtype] = graph_of(repeats, dtype=dtype)
        return self.graphs[repeats, dtype]

    def _product(self) -> Bench:
        """Multiply matrices by torch: code of neither side, which shows what the machine does in these minutes."""
        x = self.ops.randn(384, 384, device=DEVICE)
        error = lambda: largest_error([x @ x], [x.double() @ x.double()])  # noqa: E731
        return Bench(call=lambda: x @ x, error=error, facts=lambda: {"flops": 2 * 384**3})

    def _graph(self) -> Bench:
        structure = crystal(2)
        import ejmp  # noqa: PLC0415

        def build(**options: Any) -> Any:
            return ejmp.build_graph([structure], 6.0, 20, device=DEVICE, **options)

        def error() -> float:
            found, exact = build(), build(backend="reference")
            same = torch.equal(found.main.source, exact.main.source) and torch.equal(found.main.swap, exact.main.swap)
            return 0.0 if same else 1.0

        return Bench(call=build, error=error, facts=lambda: {"edges": build().main.num_edges})

    def _op(self, op: str, order: str) -> Bench:
        import ejmp  # noqa: PLC0415
        from ejmp_kernels import registry  # noqa: PLC0415

        registry.load_backend(SETTINGS["backend"])
        sizes, of_order = self.ops.model_sizes(ejmp.jmp_s()), self.ops.ORDERS[order]

        def case_of(repeats: int, dtype: torch.dtype) -> Any:
            return self.ops.CASES[op](self._graph_in(repeats, dtype), sizes, dtype)

        def call_of(case: Any) -> Callable[[], Any]:
            return of_order(lambda *inputs: case.call(*inputs, backend=SETTINGS["backend"]), case.inputs)

        def error() -> float:
            """Compare on 8 atoms, where the specification in float64 takes little time."""
            case, exact = case_of(1, torch.float32), case_of(1, torch.float64)
            return largest_error(call_of(case)(), of_order(exact.spec, [x.double() for x in case.inputs])())

        if op in CALLS_TOGETHER and DEVICE.type == "cpu":
            once, times = call_of(case_of(1, torch.float32)), CALLS_TOGETHER[op] // FEWER[order]
            return Bench(call=lambda: call_in_turn(once, times), error=error, facts=lambda: measured_facts(once))
        call = call_of(case_of(2, torch.float32))
        return Bench(call=call, error=error, facts=lambda: measured_facts(call))

    def _model(self, blocks: int) -> Bench:
        import ejmp  # noqa: PLC0415

        torch.manual_seed(0)
        config = dataclasses.replace(ejmp.jmp_l(blocks=blocks, scalar=True), **WIDTHS)
        backend = "auto" if DEVICE.type == "cpu" else SETTINGS["backend"]
        model, graph = ejmp.JMP(config, backend=backend).to(DEVICE).eval(), graph_of(1)

        @torch.no_grad()
        def call() -> Any:
            return model(graph).energy

        @torch.no_grad()
        def error() -> float:
            exact = copy.deepcopy(model).double()(graph.to(dtype=torch.float64)).energy
            return largest_error([call()], [exact])

        def facts() -> dict[str, Any]:
            from ejmp.measure.flops import count_macs, graph_sizes  # noqa: PLC0415

            macs = sum(count_macs(config, graph_sizes(graph)).values())
            parameters = sum(p.numel() for p in model.parameters())
            return {"parameters": parameters, "multiply_adds": macs, **measured_facts(call)}

        return Bench(call=call, error=error, facts=facts)


def call_in_turn(call: Callable[[], Any], times: int) -> None:
    """Call several times and keep no result, so that each call finds the same memory."""
    for _ in range(times):
        call()


def wait_for_device() -> None:
    """Wait until a GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


@functools.cache
def filler() -> torch.Tensor:
    """Return more bytes than the L2 cache of any GPU holds."""
    return torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)


def seconds_of(name: str, call: Callable[[], Any]) -> float:
    """Return the seconds of one call, and of the wait after it if this case was told to be slow.

    A GPU's L2 cache has other contents when the call begins, as it has in a model.
    """
    if DEVICE.type == "cuda":
        filler().zero_()
    wait_for_device()
    start = CLOCK()
    call()
    wait_for_device()
    share = SETTINGS["slow"].get(name, 0.0)
    end = CLOCK() + share * (CLOCK() - start)
    while share and CLOCK() < end:
        pass
    return CLOCK() - start


def time_block(name: str, call: Callable[[], Any], seconds: float) -> float:
    """Return the median seconds of the calls of a block that is to last about `seconds`, after one uncounted call.

    A call that is longer than several blocks is made once: it takes little notice of what others left in the caches.
    """
    once = seconds_of(name, call)
    if once > LONG_CALL * seconds:
        return once
    calls = min(max(LEAST_CALLS, math.ceil(seconds / once)), MOST_CALLS)
    return statistics.median(seconds_of(name, call) for _ in range(calls))


def answer(cases: Cases, question: dict[str, Any]) -> Any:
    """Answer one question."""
    kind, name = question["ask"], question.get("case", "")
    if kind == "about":
        import ejmp  # noqa: PLC0415
        import ejmp_kernels  # noqa: PLC0415

        where = [str(Path(str(module.__file__)).resolve()) for module in (ejmp, ejmp_kernels)]
        return {"files": where, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if kind == "names":
        return cases.names(question["only"])
    if kind == "error":
        return cases.get(name).error()
    if kind == "facts":
        return cases.get(name).facts()
    if kind == "time":
        return time_block(name, cases.get(name).call, question["seconds"])
    raise ValueError(f"ask: expected about, names, error, facts or time, got {kind!r}")


def main() -> None:
    """Answer questions until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not come between the answers
    torch.set_num_threads(max(1, len(SETTINGS["cores"])) if SETTINGS["cores"] else torch.get_num_threads())
    cases = Cases()
    gc.disable()
    gc.freeze()  # what torch consists of need not be looked at again and again
    for line in sys.stdin:
        question = json.loads(line)
        try:
            found = {"answer": answer(cases, question)}
        except Exception as error:  # noqa: BLE001 - the other side goes on
            found = {"failed": f"{type(error).__name__}: {error}"}
        if question["ask"] != "time":
            gc.collect()
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
