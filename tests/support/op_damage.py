"""Ways to damage the arguments of an op, by kind."""

import torch

from support.op_calls import EXTREMES, INDICES, NUMBERS, limit_of

TYPES = (
    torch.int32, torch.int64, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.complex64,
)  # fmt: skip
OBJECTS = (None, "text", [1, 2], (), {}, 3, 2.5, True, object(), b"bytes", 1 << 70, 1j, torch.float32)


class NotMadeError(Exception):
    """Raised where a kind of damage does not fit a call."""


def damage(kind, arguments, rng):
    """Return the arguments of a call with one damaged, and which one in words."""
    arguments = dict(arguments)
    if kind == "valid":
        return arguments, ""
    names = suits(kind, arguments)
    if not names:
        raise NotMadeError
    name = rng.choice(names)
    try:
        arguments[name] = DAMAGES[kind][1](rng, name, arguments[name])
    except (RuntimeError, ValueError) as error:  # torch does not make such a tensor
        raise NotMadeError from error
    return arguments, name


def suits(kind, arguments):
    """Return which arguments a kind of damage suits; a device has to differ from another argument's."""
    if kind == "valid":
        return list(arguments)
    if kind == "device" and sum(isinstance(x, torch.Tensor) for x in arguments.values()) < 2:
        return []
    return [name for name, x in arguments.items() if DAMAGES[kind][0](name, x)]


def _tensor(_name, x):
    return isinstance(x, torch.Tensor)


def _index(name, x):
    return _tensor(name, x) and name.endswith(INDICES)


def _rows(_name, x):
    return isinstance(x, torch.Tensor) and x.ndim > 0 and x.numel() > 1


def _type(rng, _name, x):
    return x.to(rng.choice([t for t in TYPES if t != x.dtype]))


def _index_type(rng, _name, x):
    return x.to(rng.choice([torch.int32, torch.float64, torch.uint8, torch.int16]))


def _shape(rng, _name, x):
    axis = rng.randrange(x.ndim)
    changes = (
        lambda: x.unsqueeze(axis),
        lambda: x.flatten()[0],
        lambda: x.narrow(axis, 1, x.shape[axis] - 1),
        lambda: torch.cat([x, x.narrow(axis, 0, 1)], axis),
        lambda: torch.cat([x, x], axis),
        lambda: x.flatten().unsqueeze(-1),
        lambda: x.transpose(0, -1).contiguous(),
        x.flatten,
    )
    changed = rng.choice(changes)()
    if changed.shape == x.shape:
        raise NotMadeError
    return changed


def _strides(rng, _name, x):
    """The same values, in rows that are apart, backwards in memory, or off by one number."""
    where = rng.randrange(3)
    if where == 0:
        return torch.stack([x, x], -1)[..., 0]
    if where == 1:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def _storage(_rng, _name, x):
    emptied = x.clone()
    emptied.untyped_storage().resize_(0)
    return emptied


def _layout(rng, _name, x):
    return x.to_sparse() if rng.random() < 0.5 else x.to_mkldnn()


def _huge(rng, _name, x):
    """More rows than there is memory for, of one row that is there."""
    return x[:1].expand(rng.choice([2**31, 2**40, 2**55]), *x.shape[1:])


def _wide(rng, _name, x):
    """No rows, of very many columns, whose products overflow."""
    sizes = [0] + [rng.choice([n, 2**32, 2**40, 2**62 + 1]) for n in x.shape[1:]]
    return torch.empty_strided(sizes, [1] * len(sizes), dtype=x.dtype)


def _numbers(rng, _name, x):
    changed = x.clone()
    places = slice(None) if rng.random() < 0.3 else rng.randrange(x.numel())
    changed.view(-1)[places] = rng.choice([*NUMBERS, 1e38, 5e-324, -1e38])
    return changed


def _pointers(rng, _name, x):
    bad = x.clone()
    last, at = len(x) - 1, rng.randrange(len(x))
    changes = (
        lambda: bad.flip(0),
        lambda: bad.index_fill(0, torch.tensor([at]), int(x[at]) + rng.choice([-(2**63) + 100, 10**12, -1, 99])),
        lambda: bad.index_fill(0, torch.tensor([last]), rng.choice([10**12, 0, int(x[last]) + 1, int(x[last]) - 1])),
        lambda: bad + 1,
        lambda: torch.tensor([0, 10**12]),
    )
    bad = rng.choice(changes)()
    if len(bad) == len(x) and bad[0] == 0 and bad[-1] == x[-1] and (bad.diff() >= 0).all():
        raise NotMadeError
    return torch.stack([bad, bad], 1)[:, 0] if rng.random() < 0.5 else bad


def _indices(rng, name, x):
    bad = x.clone()
    bad[rng.randrange(len(x))] = rng.choice([-1, limit_of(name), limit_of(name) + 1, *EXTREMES[3:]])
    return torch.stack([bad, bad], 1)[:, 0] if rng.random() < 0.5 else bad


def _twice(rng, _name, x):
    bad = x.clone()
    i, j = rng.sample(range(len(x)), 2)
    bad[i] = x[j]
    return bad


def _images(rng, _name, x):
    bad = x.clone()
    bad[rng.randrange(len(x))] = rng.choice([*EXTREMES[5:], -(2**62)])
    return bad


def _scalar(rng, _name, x):
    return rng.choice(EXTREMES if isinstance(x, int) else NUMBERS)


def _object(rng, _name, _x):
    return rng.choice(OBJECTS)


def _geometry(rng, name, x):
    """Cells, positions and cutoffs of any size."""
    changed = x.clone()
    changed.view(-1)[rng.randrange(x.numel())] = 10.0 ** rng.uniform(-320, 308) * rng.choice([1, -1])
    if name == "cell" and rng.random() < 0.5:
        return torch.eye(3, dtype=x.dtype).expand_as(x) * 10.0 ** rng.uniform(-320, 308)
    return changed


DAMAGES = {
    "type": (_tensor, _type),
    "index type": (lambda name, x: _tensor(name, x) and x.dtype == torch.int64, _index_type),
    "shape": (_rows, _shape),
    "strides": (_rows, _strides),
    "storage": (_rows, _storage),
    "device": (_tensor, lambda rng, name, x: x.to("meta")),
    "layout": (lambda name, x: _tensor(name, x) and x.is_floating_point(), _layout),
    "empty": (_rows, lambda rng, name, x: x[:0]),
    "huge": (_rows, _huge),
    "wide": (_rows, _wide),
    "numbers": (lambda name, x: _tensor(name, x) and x.is_floating_point(), _numbers),
    "pointers": (lambda name, x: _tensor(name, x) and name.endswith("ptr"), _pointers),
    "indices": (_index, _indices),
    "twice": (lambda name, x: name in ("swap", "order") and _tensor(name, x), _twice),
    "images": (lambda name, x: name.endswith("image"), _images),
    "scalar": (lambda name, x: isinstance(x, int | float) and not isinstance(x, bool), _scalar),
    "object": (lambda name, x: True, _object),
    "geometry": (lambda name, x: name in ("positions", "cell") or (name == "cutoff" and _tensor(name, x)), _geometry),
}
"""Which arguments a kind of damage suits, and what it does to one."""
KINDS = ("valid", *DAMAGES)
MUST_RUN = ("valid", "strides")
"""Kinds that must not change the result by a bit."""
MUST_REFUSE = ("index type", "storage", "device", "layout", "huge", "pointers", "indices", "twice", "images")
"""Kinds that an op must not run with."""
