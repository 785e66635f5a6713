"""Damaged sources for every reader: a short run of `make fuzz`."""

import pytest
from support.fuzz_readers import WRITERS, fuzz, fuzz_unpickle

from ejmp.data import FORMATS

EXAMPLES = 100


def test_every_format_is_fuzzed():
    assert WRITERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_sources_are_read_or_refused(name, tmp_path):
    counts = fuzz(name, EXAMPLES, tmp_path)
    assert counts["refused"] > EXAMPLES // 10


def test_damaged_pickles_are_read_or_refused():
    counts = fuzz_unpickle(10 * EXAMPLES)
    assert counts["refused"] > EXAMPLES
