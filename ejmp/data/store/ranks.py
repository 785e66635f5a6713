"""The processes of one conversion: alone, or those `mpirun` started."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
"""Environment variables by which MPI libraries and srun tell a process that it is one of many."""


class Ranks:
    """The processes that work together; mpi4py is needed only if a launcher started them."""

    def __init__(self) -> None:
        self._world = None
        self.rank, self.size = 0, 1
        if any(name in os.environ for name in _LAUNCHERS):
            from mpi4py import MPI  # noqa: PLC0415

            self._world = MPI.COMM_WORLD
            self.rank, self.size = self._world.rank, self._world.size

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        return value if self._world is None else self._world.bcast(value)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self._world is not None:
            self._world.barrier()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Let an error of one rank end all, which would wait for it forever; alone, it is raised as usual."""
        try:
            yield
        except BaseException as error:
            if self._world is None or self.size == 1:
                raise
            sys.stderr.write(f"rank {self.rank} of {self.size}: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
            self._world.Abort(2)
