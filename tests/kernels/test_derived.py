"""What is held of parameters, and what malloc keeps."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from ejmp_kernels.allocator import keep_freed_memory
from ejmp_kernels.derived import columns, derived, held


def draw(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def lowered(weight, *options):
    return held(columns, (weight,), *options)


def test_a_copy_is_held_until_its_parameter_changes():
    weight = nn.Parameter(draw(4, 6))
    with torch.no_grad():
        first = lowered(weight, torch.bfloat16)
        assert lowered(weight, torch.bfloat16) is first
        assert lowered(weight, torch.float16).dtype == torch.float16
        torch.testing.assert_close(lowered(weight, torch.bfloat16, 2), first[:, 2:], rtol=0, atol=0)
        weight.mul_(2)
        torch.testing.assert_close(lowered(weight, torch.bfloat16), 2 * first, rtol=0, atol=0)
        weight.data = torch.ones(4, 6)
        torch.testing.assert_close(lowered(weight, torch.bfloat16), torch.ones(4, 6).bfloat16(), rtol=0, atol=0)


def test_gradients_go_to_a_weight_that_was_held_before():
    weight = nn.Parameter(draw(4, 6))
    with torch.no_grad():
        lowered(weight, torch.bfloat16, 1)
    lowered(weight, torch.bfloat16, 1).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.ones(4, 6).index_fill(1, torch.tensor([0]), 0.0))


def test_a_copy_made_in_inference_mode_serves_gradients_later():
    weight, x = nn.Parameter(draw(4, 6), requires_grad=False), draw(3, 6).bfloat16().requires_grad_()
    with torch.inference_mode():
        lowered(weight, torch.bfloat16)
    torch.nn.functional.linear(x, lowered(weight, torch.bfloat16)).sum().backward()
    torch.testing.assert_close(x.grad, weight.bfloat16().sum(dim=0).expand(3, 6))


def test_a_copy_is_dropped_when_its_parameter_is_trained():
    weight = nn.Parameter(draw(4, 6))
    flat = weight.detach()  # as an optimizer with buffers of its own writes to it
    with torch.no_grad():
        before = lowered(weight, torch.bfloat16)
    flat.data.mul_(2)
    lowered(weight, torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(lowered(weight, torch.bfloat16), 2 * before, rtol=0, atol=0)


def test_what_was_made_is_dropped_with_its_parameter():
    weight = draw(3, 3)
    made = weakref.ref(derived(weight, "double", lambda: torch.ones(3)))
    assert made() is not None
    del weight
    gc.collect()
    assert made() is None


def test_size_of_kept_memory_is_checked():
    for size in (-1, 1 << 31):
        with pytest.raises(ValueError, match="size must be from 0"):
            keep_freed_memory(size)


FAULTS = """
import resource, torch
from ejmp_kernels.allocator import keep_freed_memory
kept = {call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        made = [torch.ones(12_000_000) for _ in range(2)]
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def faults_of(call, **environment):
    """Whether memory is kept, and how many pages a process asks for that makes and drops tensors of 48 MB again."""
    given = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)],
        env=given | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kept, count = run.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc alone is told")
def test_kept_memory_is_not_asked_for_again():
    pages = 10 * 2 * 48_000_000 // os.sysconf("SC_PAGE_SIZE")
    _, without = faults_of("None")
    kept, count = faults_of("keep_freed_memory()")
    assert without > pages / 600  # huge pages would be a 512th as many
    assert kept
    assert count < without / 10
    assert not faults_of("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")[0]
