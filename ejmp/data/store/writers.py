"""The processes that write one conversion: this one alone, or those that `mpirun` started."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
"""Environment variables by which MPI libraries and srun tell a process that it is one of many."""


class Writers:
    """The processes that convert one source together; mpi4py is needed only if a launcher started them.

    `rank` is the number of this process among the `size` that there are.
    """

    def __init__(self) -> None:
        self._world = None
        self.rank, self.size = 0, 1
        if any(name in os.environ for name in _LAUNCHERS):
            from mpi4py import MPI  # noqa: PLC0415

            self._world = MPI.COMM_WORLD
            self.rank, self.size = self._world.rank, self._world.size

    def share(self, value: Any) -> Any:
        """Return the value that rank 0 passes, on every rank."""
        return value if self._world is None else self._world.bcast(value)

    def wait(self) -> None:
        """Return when every process has called this."""
        if self._world is not None:
            self._world.barrier()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """End all processes if one meets an error, because the others would wait for it forever.

        The error of a process that is alone is raised as usual.
        """
        try:
            yield
        except BaseException as error:
            if self._world is None or self.size == 1:
                raise
            sys.stderr.write(f"rank {self.rank} of {self.size}: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
            self._world.Abort(2)
