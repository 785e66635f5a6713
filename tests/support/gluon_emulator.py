"""Run kernels written in Gluon on a CPU, warps with different tasks as threads: for which Triton has no interpreter.

The functions run as plain Python on torch's tensors, with stand-ins for `gl`, `tma`, `mbarrier` and the tensor cores.
What is asynchronous on a GPU is so here, in an order drawn from a seed: copies arrive late and not in their order, and
products read shared memory only when they are waited for, so that a buffer that is refilled too early gives other
numbers. Waiting for ever, reading a product that is under way, and arriving too often are errors. Fences between
threads of one group of warps are not looked at: the compiler puts them in.
"""

import contextlib
import queue
import random
import threading
import time
import types

import torch
from triton.language import constexpr

PATIENCE = 5.0
"""Seconds after which a wait is taken for one for ever."""


class Barrier:
    """An mbarrier: a phase ends when so many have arrived and all bytes expected have come."""

    def __init__(self, world):
        self.world, self.count, self.phase = world, None, 0
        self.missing, self.bytes = 0, 0

    def _end_phase(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.world.changed.notify_all()

    def arrive(self, count=1, size=0):
        with self.world.changed:
            assert self.missing >= count, "more arrive at a barrier than it waits for"
            self.missing, self.bytes = self.missing - count, self.bytes + size
            self._end_phase()

    def receive(self, size):
        with self.world.changed:
            self.bytes -= size
            self._end_phase()

    def wait(self, parity):
        with self.world.changed:
            done = self.world.changed.wait_for(lambda: self.phase % 2 != parity or self.world.failed, PATIENCE)
            assert done, "a wait at a barrier has no end"
            assert not self.world.failed, "another group of warps failed"


class Shared:
    """A view of shared memory, at first of garbage."""

    def __init__(self, world, values):
        self.world, self.values, self.dtype = world, values, values.dtype

    def index(self, i):
        return Shared(self.world, self.values[int(i)])

    def slice(self, start, length, dim=0):
        return Shared(self.world, self.values.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.world, self.values.permute(*order))

    def load(self, _layout):
        self.world.pause(2e-3)  # longer than a tile takes: whoever reads may be late
        return self.values.clone()

    def store(self, values):
        self.values.copy_(values)


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Descriptor:
    """What stands for an array that is copied in blocks."""

    def __init__(self, array, block_shape):
        self.array, self.block_shape, self.layout = array, block_shape, None
        self.dtype = types.SimpleNamespace(primitive_bitwidth=8 * array.itemsize, torch=array.dtype)


class Pointer:
    """An array's memory, or some places in it."""

    def __init__(self, array, at=None):
        self.array, self.at = array, at
        self.dtype = types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, at):
        return Pointer(self.array, at)


class Product:
    """A tile of sums, the last of which may still be under way."""

    def __init__(self, value, pending):
        self.value, self.pending = value, pending

    def wait(self, outstanding):
        value, pending = self.value, list(self.pending)
        while len(pending) > outstanding:
            a, b, use_acc = pending.pop(0)
            product = a.values.float() @ b.values.float()
            value = value + product if use_acc else product
        return Product(value, pending)

    def to(self, dtype):
        assert not self.pending, "a product is read that is under way"
        return self.value.to(dtype)


class World:
    """One program's memory, copies and groups of warps."""

    def __init__(self, seed, program, programs):
        self.random, self.program, self.programs = random.Random(seed), program, programs
        self.changed, self.failed = threading.Condition(), []
        self.copies = queue.Queue()

    def pause(self, longest=1e-4):
        if self.random.random() < 0.3:
            time.sleep(self.random.random() * longest)

    def allocate(self, dtype, shape, _layout):
        if dtype == torch.int64:
            made = Barriers(Barrier(self) for _ in range(shape[0]))
            return made[0] if len(shape) == 1 else made
        return Shared(self, torch.full(shape, torch.nan, dtype=getattr(dtype, "torch", dtype)))

    def copy(self, descriptor, place, barrier, into, pred=True):
        if not pred:
            return
        part = descriptor.array[tuple(slice(int(i), int(i) + n) for i, n in zip(place, into.values.shape, strict=True))]
        block = into.values.new_zeros(into.values.shape)
        block[: part.shape[0], : part.shape[1]] = part
        self.copies.put((into, block, barrier))

    def carry_out_copies(self, done):
        """Copy until nobody asks for more, two requests at most out of order."""
        waiting = []
        while not (done.is_set() and self.copies.empty() and not waiting):
            with contextlib.suppress(queue.Empty):
                waiting.append(self.copies.get(timeout=1e-3))
            if waiting and (len(waiting) > 1 or self.copies.empty()):
                into, block, barrier = waiting.pop(self.random.randrange(len(waiting)))
                self.pause()
                into.values.copy_(block)
                barrier.receive(block.numel() * block.itemsize)

    def specialize(self, functions_and_arguments, _warps, _registers):
        def run(function, arguments):
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised again below
                with self.changed:
                    self.failed.append(error)
                    self.changed.notify_all()

        done = threading.Event()
        groups = [threading.Thread(target=run, args=pair) for pair in functions_and_arguments]
        engine = threading.Thread(target=self.carry_out_copies, args=(done,))
        for thread in (*groups, engine):
            thread.start()
        for thread in groups:
            thread.join()
        done.set()
        engine.join()
        if self.failed:
            raise self.failed[0]

    def names(self):
        """The names that a kernel's module gets instead of Gluon's."""

        def load(pointer, mask, other):
            flat = pointer.array.view(-1)
            return torch.where(mask, flat[torch.where(mask, pointer.at, 0)], other)

        def store(pointer, values, mask):
            pointer.array.view(-1)[pointer.at[mask]] = values[mask]

        def wait(barrier, parity):
            self.pause()
            barrier.wait(int(parity))

        def mma(a, b, z, *, use_acc, is_async):
            assert is_async
            self.pause()
            return Product(z.value, [*z.pending, (a, b, bool(use_acc))])

        layout = lambda *_, **__: None  # noqa: E731
        gl = types.SimpleNamespace(
            constexpr=None, float32=torch.float32, int64=torch.int64, minimum=min, cdiv=lambda a, b: -(-a // b),
            program_id=lambda _: self.program, num_programs=lambda _: self.programs,
            arange=lambda start, end, layout: torch.arange(start, end), sigmoid=torch.sigmoid,
            zeros=lambda shape, dtype, layout: Product(torch.full(shape, torch.nan), []),
            static_range=range, load=load, store=store, allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize, NVMMADistributedLayout=layout, NVMMASharedLayout=layout,
            BlockedLayout=layout, SliceLayout=layout,
        )  # fmt: skip
        barriers = types.SimpleNamespace(
            init=lambda barrier, count: barrier.__dict__.update(count=count, missing=count),
            expect=lambda barrier, size, pred=True: barrier.arrive(size=size) if pred else None,
            arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
            wait=wait,
            MBarrierLayout=lambda: None,
        )
        numbers = lambda *bounds: (torch.tensor(i) for i in range(*map(int, bounds)))  # noqa: E731 - they have .to
        return {
            "gl": gl,
            "tl": gl,
            "mbarrier": barriers,
            "tma": types.SimpleNamespace(async_copy_global_to_shared=self.copy),
            "warpgroup_mma": mma,
            "warpgroup_mma_wait": lambda outstanding, deps: deps[0].wait(outstanding),
            "range": numbers,
        }


def launch(kernel, programs, *arguments, seed=0, **options):
    """Run a kernel of some programs, on `Descriptor`s, tensors (as pointers), numbers and None."""
    for program in range(programs):
        names = dict(kernel.fn.__globals__) | World(1000 * seed + program, program, programs).names()
        for name, value in list(names.items()):
            if isinstance(value, constexpr):
                names[name] = value.value
            if hasattr(value, "fn"):
                names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        given = (Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments)
        names[kernel.fn.__name__](*given, **options)
