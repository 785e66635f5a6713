"""Structures of files with what was predicted of them: read lazily, written so that an interrupted run can go on."""

import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from ejmp.data.readers.ase_files import read_text
from ejmp.data.readers.files import SourceError
from ejmp.lock import locked
from ejmp.predict.predictor import Prediction, Predictor

Frame = tuple[str, Any]
"""A structure, an ase.Atoms, with its name."""
CHUNK = 256
"""Structures that are read ahead, of which batches are made."""
PICKLES = ("trj", "bundletrajectory")
"""Formats of ase.io whose contents may be pickles."""


def read_frames(paths: Sequence[Path]) -> Iterator[Frame]:
    """Yield the structures of files that ase.io reads as ase.Atoms, each with its name "FILE:FRAME".

    What `ejmp data convert` refuses of a CIF or a POSCAR is refused here: disordered crystals, and files without
    elements. So are formats that are pickles, which would run code, and LAMMPS dumps that do not say the elements.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one cannot be read, naming it.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        frames, number = _frames(path), 0
        while True:
            try:
                atoms = next(frames, None)
            except SourceError:
                raise
            except KeyError as error:
                problem = f"{error.args[0]!r} is no element (write D and T as H)"
                raise ValueError(f"{path}: frame {number}: {problem}") from error
            except Exception as error:
                raise ValueError(f"{path}: ase.io cannot read it ({type(error).__name__}: {error})") from error
            if atoms is None:
                break
            yield f"{path}:{number}", atoms
            number += 1


def _frames(path: Path) -> Iterator[Any]:
    """Yield the ase.Atoms of a file, after checking what kind of file it is."""
    import ase.io  # noqa: PLC0415
    from ase.io.formats import UnknownFileTypeError, filetype  # noqa: PLC0415

    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith((b"\x80", b"PickleTrajectory")):
        raise SourceError(path, "", "it is a pickle, which is not read because that runs code")
    try:
        kind = filetype(str(path))
    except UnknownFileTypeError:
        kind = ""
    if kind in PICKLES:
        raise SourceError(path, "", f"{kind} may hold pickles and is not read; write it as .traj with ase.io")
    if kind.startswith("lammps-dump"):
        _check_dump(path, kind)
    if kind in ("cif", "vasp"):
        return iter(read_text(path))
    return ase.io.iread(path, index=":")


def _check_dump(path: Path, kind: str) -> None:
    """Refuse a LAMMPS dump that has only types: ase.io would take type 1 for hydrogen."""
    with path.open("rb") as file:
        columns = next((line.split() for line in file if line.startswith(b"ITEM: ATOMS")), [])
    if kind == "lammps-dump-binary" or not {b"element", b"mass"} & set(columns):
        raise SourceError(
            path,
            "",
            "a LAMMPS dump without elements, whose types could be any: write it with the column element "
            "(dump custom ... element, dump_modify ... element Si O)",
        )


def predicted(predictor: Predictor, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Prediction]]:
    """Yield named structures with what is predicted of each, in order; they are taken as they are needed.

    Raises:
        ValueError: for a structure that `ejmp.build_graph` refuses, with its name.
    """
    left = iter(frames)
    while chunk := list(itertools.islice(left, CHUNK)):
        try:
            yield from zip(chunk, predictor.predict([atoms for _, atoms in chunk]), strict=True)
        except ValueError:
            for name, atoms in chunk:
                try:
                    predictor([atoms])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            raise


def with_prediction(atoms: Any, name: str, found: Prediction, target: str) -> Any:
    """Return a copy of atoms whose results are a prediction.

    Labels the atoms came with are kept as `label_energy` in info and `label_forces` among the arrays. Another target
    than the energy goes into info under its name, with its unit beside it.

    Args:
        atoms: an ase.Atoms.
        name: where they are from, which goes into info as `source`.
        found: what was predicted of them.
        target: the task's target.
    """
    from ase.calculators.singlepoint import SinglePointCalculator  # noqa: PLC0415

    new = atoms.copy()
    new.info["source"] = name
    labels = atoms.calc.results if atoms.calc is not None else {}
    if "energy" in labels:
        new.info["label_energy"] = float(labels["energy"])
    if "forces" in labels:
        new.arrays["label_forces"] = np.array(labels["forces"])
    results: dict[str, Any] = {}
    if target == "energy":
        results["energy"] = found.energy
    else:
        new.info[target], new.info[f"{target}_unit"] = found.energy, found.unit
    if found.forces is not None:
        results["forces"] = found.forces
    if found.stress is not None:
        results["stress"] = found.stress
    new.calc = SinglePointCalculator(new, **results)
    return new


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all.

    Args:
        path: the file.
        write: writes to a path of the same name.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        scratch = Path(folder, path.name)
        write(scratch)
        scratch.replace(path)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that is there already, or whose folder is not.

    Raises:
        ValueError: saying which.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"--output: {path} exists; --overwrite replaces it")
    if not path.parent.is_dir():
        raise ValueError(f"--output: {path.parent} is no folder")


class ResumableFrames:
    """An extxyz file that grows frame by frame in FILE.part, and becomes FILE when it is finished.

    Beside it, FILE.part.json says what the run was asked; only a run that was asked the same goes on with it. A frame
    that was cut off is dropped and computed again.

    Args:
        path: the finished file.
        asked: what the run is asked, ready for JSON.
        overwrite: begin anew after a run that was asked something else.

    Raises:
        ValueError: if a run that was asked something else was interrupted there, or one is running.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = path
        self.part, self._note = (path.with_name(path.name + ending) for ending in (".part", ".part.json"))
        text = json.dumps(asked, indent=1, sort_keys=True) + "\n"
        self._open = ExitStack()
        if not self._open.enter_context(locked(self.part, wait=False)):
            raise ValueError(f"--output: another run is writing {self.part}")
        self._file = self._open.enter_context(self.part.open("a+b"))
        same = self._note.exists() and self._note.read_text() == text
        if not same:
            if self._file.seek(0, os.SEEK_END) and not overwrite:
                self._open.close()
                raise ValueError(
                    f"--output: {self.part} is of an interrupted run that was asked something else; "
                    "--overwrite begins anew, or give another name"
                )
            self._file.truncate(0)
            self._note.write_text(text)
        self.done = self._keep_whole_frames()
        """Number of frames that are there."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def append(self, atoms: Any) -> None:
        """Add a frame, an ase.Atoms; it is in the file when this returns, whatever happens to this process."""
        from ase.io import write  # noqa: PLC0415

        text = io.StringIO()
        write(text, atoms, format="extxyz")
        self._file.write(text.getvalue().encode())
        self._file.flush()
        self.done += 1

    def finish(self) -> None:
        """Give the file its name."""
        os.fsync(self._file.fileno())
        self.part.replace(self.path)
        self._note.unlink()

    def _keep_whole_frames(self) -> int:
        """Cut off what is behind the last whole frame, and return the number of whole frames."""
        self._file.seek(0)
        count = end = 0
        while True:
            first = self._file.readline()
            try:
                lines = [first, *(self._file.readline() for _ in range(int(first) + 1))]
            except ValueError:
                break
            if not all(line.endswith(b"\n") for line in lines):
                break
            count, end = count + 1, self._file.tell()
        self._file.truncate(end)
        self._file.seek(end)
        return count
