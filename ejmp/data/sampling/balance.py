"""Distribute the structures of one step over ranks so that all take about as long.

JMP's multiply-adds are proportional to main edges to within 2% (`ejmp.measure.flops`, molecules to frameworks), so
the edges of a structure are its cost. Every rank gets the same number of structures: data-parallel training averages
the ranks' gradients, and only with equal numbers is that the gradient of the mean over all structures of the step.
"""

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray


def assign_ranks(costs: Any, world_size: int) -> NDArray[np.int64]:
    """Assign each structure to a rank, [n]: the largest first, each to the least loaded rank that has room.

    The rule is Graham's "longest processing time first" (SIAM J. Appl. Math. 17, 1969) with room for
    n / world_size structures on a rank. All sums are exact, so every rank comes to the same result.

    Args:
        costs: time that each structure takes, in any unit, [n] integers from 0 on.
        world_size: number of ranks.

    Raises:
        ValueError: if costs are not integers from 0 on, or their number is not a multiple of the ranks.
    """
    array = np.asarray(costs)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (len(array) and array.min() < 0):
        raise ValueError(f"costs: expected integers [n] from 0 on, got {array.dtype} {list(array.shape)}")
    if world_size < 1 or len(array) % world_size:
        raise ValueError(f"world_size: expected a divisor of the {len(array)} structures, got {world_size}")
    room = [len(array) // world_size] * world_size
    loads = [(0, rank) for rank in range(world_size)]
    values = array.tolist()
    ranks = np.empty(len(array), dtype=np.int64)
    for i in np.argsort(-array.astype(np.int64), kind="stable").tolist():
        load, rank = loads[0]
        ranks[i] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heapreplace(loads, (load + values[i], rank))
        else:
            heapq.heappop(loads)
    return ranks
