"""A small dataset in a format of its own, for the tests of the store and of conversion."""

import dataclasses

import numpy as np

from ejmp.data import Format, Part, Structure

PER_PART = 40


def make_structure(number):
    """Return a random structure of 1 to 150 atoms: some records fit in LMDB's pages, some need pages of their own."""
    random = np.random.default_rng(number)
    n = int(random.integers(1, 150 if number % 5 == 0 else 25))
    wide = number % 2 == 0
    return Structure(
        numbers=random.choice([1, 6, 7, 8], n),
        positions=random.normal(size=(n, 3)) + 4 * np.arange(n)[:, None],  # none on top of another
        cell=random.normal(size=(3, 3)) + np.eye(3) * 8 * (n + 1) if wide else None,
        pbc=np.array([wide, wide, False]),
        fixed=random.random(n) < 0.3 if wide else None,
        energy=float(random.normal()) - 1000 * n,
        forces=random.normal(size=(n, 3)).astype(np.float32),
        targets={"gap": float(random.normal())} if number % 3 else {},
        id=f"structure {number}",
    )


def make_format(num_parts=6, seconds=0.0):
    """Return a format whose parts are for training, training, validation in turn; each structure takes `seconds`."""

    def parts(_):
        return [
            Part(name=f"part {k}", count=PER_PART, split="val" if k % 3 == 2 else "train") for k in range(num_parts)
        ]

    def read(_, part):
        import time

        first = PER_PART * int(part.name.removeprefix("part "))
        for number in range(first, first + PER_PART):
            if seconds:
                time.sleep(seconds)
            yield make_structure(number)

    return Format(parts=parts, read=read)


def numbers_of(split, num_parts=6):
    """Return the numbers in the source of the structures of a split."""
    wanted = [k for k in range(num_parts) if (k % 3 == 2) == (split == "val")]
    return [PER_PART * k + i for k in wanted for i in range(PER_PART)]


def same(one, other):
    """Return whether two structures are equal in every bit, and in every type that the store keeps."""
    for field in dataclasses.fields(Structure):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if a is None or b is None:
            if a is not b:
                return False
        elif field.name == "pbc":
            if np.broadcast_to(a, 3).tolist() != np.asarray(b).tolist():
                return False
        elif isinstance(b, np.ndarray):
            if np.asarray(a).astype(b.dtype).tobytes() != b.tobytes() or np.shape(a) != b.shape:
                return False
        elif a != b:
            return False
    return True
