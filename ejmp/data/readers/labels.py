"""Which of the arrays of ASE atoms are labels, and the structure they make.

- The energy is the calculator's "energy", or else the first of ENERGY_KEYS in `info` (for databases: in the keys and
  data of the row). The forces are the calculator's "forces", without constraints applied, or else the first of
  FORCES_KEYS among the arrays, or in a row's data. `ReadOptions` chooses others.
- Every other single number in `info` becomes a target of that name, in the unit it has there, unless targets are named.
- A structure with an array that looks like forces, none of which is read, is refused; so is one with forces whose
  energy is under a name that is not read.
- Energy, forces, positions and cell are in eV and A unless the file or an option says otherwise.

What the arrays of a structure become is decided once for all structures that have the same ones.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ejmp.data.readers.options import LEFT_OUT, NOT_READ, ReadOptions, Rows, Survey, listed
from ejmp.data.readers.tags import held_atoms, infer_tags
from ejmp.data.readers.units import TOO_MUCH, binding_energy, factor_of
from ejmp.graph.structure import TAGS, Structure

ENERGY_KEYS = ("energy", "Energy", "REF_energy")
FORCES_KEYS = ("forces", "REF_forces")
ENERGY_UNIT_KEYS = ("e_unit", "energy_unit", "energy_units", "unit_energy", "units_energy")
LENGTH_UNIT_KEYS = (
    *("r_unit", "length_unit", "length_units", "unit_length", "distance_unit", "_distance_unit", "position_unit"),
    "units_length",
)
_LIKE_FORCES = re.compile(r"force|frc|grad|(^|_)f($|_)", re.IGNORECASE)
_ONE_COMPONENT = re.compile(r"((?:.*_)?(?:f|forces?|frc|grad))(_?)x$", re.IGNORECASE)
_LIKE_ENERGY = re.compile(r"energ|toten|etot|(^|_)e($|_)", re.IGNORECASE)
_NOT_TOTAL = re.compile(r"kin|unit|per_?atom|std|var|weight", re.IGNORECASE)
_OWN = ("numbers", "positions", "tags")
_IN_PYTHON = "(`ejmp data convert`; in Python options=ReadOptions({name}=...))"
Groups = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Recipe:
    """What the arrays of structures of one kind become."""

    energy: Callable[[Groups], Any] | None
    forces: Callable[[Groups], Any] | None
    targets: Mapping[str, tuple[str, str]]
    move_mask: tuple[str, str] | None
    length: float
    energy_unit: float
    force_unit: float
    rows: Rows = ()


class LabelReader:
    """Makes structures of ASE atoms, as options say."""

    def __init__(
        self,
        options: ReadOptions,
        survey: Survey,
        *,
        stated: Mapping[str, str] | None = None,
        tags: str | None = None,
        name: str = "",
    ) -> None:
        """Begin a file.

        Args:
            options: which arrays are labels.
            survey: where it is reported what became of each array.
            stated: units that the file states, by the name of a quantity or one of the names of units.
            tags: what tags are if the options do not say; missing ones are allowed then.
            name: what to call the file in messages.
        """
        self.options, self.survey, self.name = options, survey, name
        self.stated = dict(stated or {})
        self.tags = options.tags or tags or "none"
        self._recipes: dict[Hashable, _Recipe] = {}

    def structure(self, atoms: Any, place: str, more: Mapping[str, Any] = {}) -> Structure:
        """Return ASE atoms with their labels as a structure.

        Args:
            atoms: an ase.Atoms.
            place: the structure's id.
            more: labels in addition to those of the atoms themselves.

        Raises:
            ValueError: if a label that was asked for is missing, one that is there would be lost, or units contradict.
        """
        n = len(atoms)
        results = atoms.calc.results if atoms.calc is not None else {}
        groups = {"results": results, "arrays": atoms.arrays, "info": {**more, **atoms.info} if more else atoms.info}
        kind = (
            *((name, _shape(name, value, n)) for group in groups.values() for name, value in group.items()),
            len(results),
            len(atoms.arrays),
            frozenset(type(constraint).__name__ for constraint in atoms.constraints),
        )
        recipe = self._recipes.get(kind)
        if recipe is None:
            recipe = self._decide(groups, atoms)
            recipe = self._recipes[kind] = replace(recipe, rows=tuple(self._rows(groups, atoms, recipe)))
        self.survey.saw(recipe.rows)
        fixed = held_atoms(atoms.constraints, n, None if recipe.move_mask is None else _get(groups, recipe.move_mask))
        energy = None if recipe.energy is None else _number(recipe.energy(groups)) * recipe.energy_unit
        forces = None if recipe.forces is None else recipe.forces(groups)
        scale = recipe.length
        return Structure(
            numbers=atoms.numbers,
            positions=atoms.positions if scale == 1 else atoms.positions * scale,
            cell=(atoms.cell.array if scale == 1 else atoms.cell.array * scale) if atoms.pbc.any() else None,
            pbc=atoms.pbc,
            tags=self._tags(atoms, fixed),
            fixed=fixed,
            energy=energy,
            forces=forces if recipe.force_unit == 1 or forces is None else np.asarray(forces) * recipe.force_unit,
            targets={name: _number(_get(groups, source)) for name, source in recipe.targets.items()},
            id=place,
        )

    def _decide(self, groups: Groups, atoms: Any) -> _Recipe:
        n = len(atoms)
        stated = self.stated | {
            name.lower(): value for name, value in groups["info"].items() if _is_unit(name) and isinstance(value, str)
        }
        energy, forces = self._energy(groups), self._forces(groups, n)
        _check_family(self.options, energy, forces, groups)
        self._check_none_lost(groups, n, energy, forces)
        length = self._unit("length", stated, LENGTH_UNIT_KEYS, None)
        energy_unit = self._unit("energy", stated, ENERGY_UNIT_KEYS, energy[0][1] if energy else None)
        force_unit = energy_unit / length
        given = stated.get(forces[0][1]) if forces else None
        if given is not None:
            per_energy, _, per_length = given.rpartition("/")
            force_unit = factor_of("energy", per_energy, self.options.unit_energy, "eV")
            force_unit /= factor_of("length", per_length, self.options.unit_length, "A")
        if (
            energy
            and energy_unit == 1
            and -_number(_get(groups, energy[0])) > TOO_MUCH * binding_energy(atoms.numbers.tolist())
        ):
            self.survey.say(
                f"{self.name}: energy {_number(_get(groups, energy[0])):.8g} is too low for eV, as which it is read: "
                "say --unit-energy, such as kcal/mol",
                once="unit",
            )
        mask = next(((group, "move_mask") for group in ("arrays", "info") if "move_mask" in groups[group]), None)
        return _Recipe(
            energy=_getter(energy),
            forces=_getter(forces),
            targets=self._targets(groups, energy),
            move_mask=mask,
            length=length,
            energy_unit=energy_unit,
            force_unit=force_unit,
        )

    def _unit(self, kind: str, stated: Mapping[str, str], keys: tuple[str, ...], key: str | None) -> float:
        found = [stated[name] for name in (key, *keys) if name is not None and name in stated]
        asked = getattr(self.options, f"unit_{kind}")
        factors = {factor_of(kind, text, asked, "eV" if kind == "energy" else "A") for text in found or [None]}
        if len(factors) > 1:
            raise ValueError(f"the file states two units of {kind}: {listed(found)}")
        return factors.pop()

    def _energy(self, groups: Groups) -> list[tuple[str, str]]:
        asked = self.options.energy_key
        if asked == LEFT_OUT:
            return []
        if asked is not None:
            return [_find(groups, asked, ("info", "results"), "energy_key")]
        places = (("results", "energy"), *(("info", key) for key in ENERGY_KEYS))
        return [place for place in places if groups[place[0]].get(place[1]) is not None][:1]

    def _forces(self, groups: Groups, n: int) -> list[tuple[str, str]]:
        asked = self.options.forces_key
        if asked == LEFT_OUT:
            return []
        if asked is not None:
            names = asked.split(",")
            return [_find(groups, name.strip(), ("arrays", "results", "info"), "forces_key") for name in names]
        places = [("results", "forces")]
        places += [(group, key) for key in FORCES_KEYS for group in ("arrays", "info")]
        there = [place for place in places if groups[place[0]].get(place[1]) is not None]
        return [place for place in there if place[0] != "info" or np.shape(_get(groups, place)) == (n, 3)][:1]

    def _check_none_lost(
        self, groups: Groups, n: int, energy: list[tuple[str, str]], forces: list[tuple[str, str]]
    ) -> None:
        """Raise ValueError if there are forces or a total energy under a name that is not read."""
        if not forces and self.options.forces_key is None:
            found = list(_forces_like(groups, n))
            if found:
                advice = f"say --forces-key {found[0][0]}, or --forces-key none {_IN_PYTHON.format(name='forces_key')}"
                shown = ", ".join(f"{name} {shape}" for name, shape in found)
                raise ValueError(f"no forces are read, but there is {shown}: {advice}")
        if forces and not energy and self.options.energy_key is None:
            found = [name for name in _energy_like(groups) if name not in self.options.targets]
            if found:
                advice = f"say --energy-key {found[0]}, or --energy-key none {_IN_PYTHON.format(name='energy_key')}"
                raise ValueError(f"forces are read, but no energy; there is {listed(found)}: {advice}")

    def _targets(self, groups: Groups, energy: list[tuple[str, str]]) -> dict[str, tuple[str, str]]:
        if self.options.targets:
            found = {}
            for key, name in self.options.targets.items():
                found[name] = _find(groups, key, ("info", "results"), "target")
                if not _is_single(_get(groups, found[name])):
                    raise ValueError(
                        f"--target {key}: expected a single number, got {_get(groups, found[name])!r:.100}"
                    )
            return found
        used = {key for _, key in energy} | set(ENERGY_KEYS)
        info = groups["info"].items()
        return {str(name): ("info", name) for name, value in info if name not in used and _is_single(value)}

    def _rows(self, groups: Groups, atoms: Any, recipe: _Recipe) -> Iterator[tuple[str, str, str]]:
        """Yield a row of the table for each array."""
        n = len(atoms)
        labels: dict[tuple[str, str], str] = {}
        for label, source, unit in (
            ("energy", self._energy(groups), recipe.energy_unit),
            ("forces", self._forces(groups, n), recipe.force_unit),
        ):
            labels |= dict.fromkeys(source, label + (f", times {unit:.6g}" if unit != 1 else ""))
        for name, place in recipe.targets.items():
            unit = self.stated.get(place[1])
            labels[place] = labels.get(place, "") + (" and " if place in labels else "") + f"target {name}"
            labels[place] += f" ({unit})" if unit else ""
        if recipe.move_mask:
            labels[recipe.move_mask] = "fixed"
        for group, values in groups.items():
            for name, value in values.items():
                if value is not None and not (group == "arrays" and name in _OWN) and not _is_unit(name):
                    per = "atom" if group == "arrays" or (np.ndim(value) and len(value) == n > 1) else "structure"
                    yield f"{name}{_describe(value, n)}", per, labels.get((group, name), NOT_READ)
        for kind in {type(constraint).__name__ for constraint in atoms.constraints}:
            part = {
                "FixAtoms": "fixed",
                "FixCartesian": "fixed where held in all three",
                "FixScaled": "fixed where held",
            }
            yield f"constraints {kind}", "atom", part.get(kind, NOT_READ)
        if atoms.has("tags"):
            read = {"oc20": "tags", "none": f"{NOT_READ} (--tags)", "infer": f"{NOT_READ}: tags are inferred"}
            yield "tags", "atom", read[self.tags]

    def _tags(self, atoms: Any, fixed: np.ndarray | None) -> np.ndarray | None:
        if self.tags == "infer":
            return infer_tags(atoms.numbers, fixed)
        if not atoms.has("tags"):
            if self.options.tags == "oc20":
                raise ValueError("no tags, which --tags oc20 asks for: say --tags none or --tags infer")
            return None
        if self.tags == "oc20":
            return atoms.get_tags()
        if self.options.tags is None and not self.survey.has_said("tags"):
            found = np.unique(atoms.get_tags())
            known = "say --tags oc20 if they are 0 bulk, 1 surface, 2 adsorbate; " * bool(np.isin(found, TAGS).all())
            self.survey.say(
                f"{self.name}: tags are left out, as ASE gives them no meaning ({listed(map(str, found))}): "
                f"{known}--tags infer makes them from constraints, --tags none is quiet",
                once="tags",
            )
        return None


def _shape(name: str, value: Any, n: int) -> Hashable:
    if isinstance(value, np.ndarray):
        return (
            value.dtype.kind,
            value.size == 1,
            value.size == 3 * n,
            len(value) == n if value.ndim else None,
            value.shape[1:],
        )
    if isinstance(value, str):
        return value if _is_unit(name) else str
    return (list, np.shape(value)) if isinstance(value, list | tuple) and len(value) == n else type(value)


def _is_unit(name: str) -> bool:
    return "unit" in name.lower() and name.lower() in (*ENERGY_UNIT_KEYS, *LENGTH_UNIT_KEYS)


def _is_single(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.ndarray | np.generic):
        return False
    array = np.asarray(value)
    return array.size == 1 and array.dtype.kind in "iuf"


def _number(value: Any) -> float:
    if isinstance(value, bool | np.bool_ | str):
        raise ValueError(f"expected a number, got {str(value)[:50]!r}")  # noqa: TRY004, a damaged source
    return float(np.reshape(value, ()))


def _get(groups: Groups, place: tuple[str, str]) -> Any:
    return groups[place[0]][place[1]]


def _getter(places: list[tuple[str, str]]) -> Callable[[Groups], Any] | None:
    """Return a function that takes an array from the places it has: one, or one for each of three components."""
    if not places:
        return None
    if len(places) == 1:
        group, key = places[0]
        return lambda groups: groups[group][key]
    return lambda groups: np.stack([np.asarray(_get(groups, place), float) for place in places], axis=1)


def _find(groups: Groups, key: str, places: tuple[str, ...], option: str) -> tuple[str, str]:
    """Return where an array is that was asked for."""
    for place in places:
        if groups[place].get(key) is not None:
            return place, key
    there = [str(name) for place in places for name in groups[place] if name not in _OWN]
    raise ValueError(f"--{option.replace('_', '-')}: no {key!r}; there is {listed(there)}")


def _describe(value: Any, n: int) -> str:
    shape = np.shape(value) if isinstance(value, np.ndarray) else ()
    return f" {_with_n(shape, n)}" if shape else ""


def _with_n(shape: tuple[int, ...], n: int) -> str:
    return f"[{', '.join('n' if k == 0 and size == n else str(size) for k, size in enumerate(shape))}]"


def _forces_like(groups: Groups, n: int) -> Iterator[tuple[str, str]]:
    """Yield name and shape of arrays that look like forces: as one array, or as three columns."""
    for values in groups.values():
        for name, value in values.items():
            if isinstance(value, np.ndarray | list | tuple) and _LIKE_FORCES.search(str(name)):
                array = np.asarray(value)
                if array.dtype.kind in "fiu" and array.size == 3 * n and array.ndim in (1, 2):
                    yield str(name), _with_n(array.shape, n)
            found = _ONE_COMPONENT.search(str(name))
            columns = [f"{found[1]}{found[2]}{axis}" for axis in ("xyz" if name[-1] == "x" else "XYZ")] if found else []
            if columns and all(column in values for column in columns):
                yield ",".join(columns), "[n] each"


def _energy_like(groups: Groups) -> Iterator[str]:
    for values in (groups["results"], groups["info"]):
        for name, value in values.items():
            if _LIKE_ENERGY.search(str(name)) and not _NOT_TOTAL.search(str(name)) and _is_single(value):
                yield str(name)


def _check_family(
    options: ReadOptions, energy: list[tuple[str, str]], forces: list[tuple[str, str]], groups: Groups
) -> None:
    """Raise ValueError if energy and forces would come from two calculations, REF_ and another."""
    if options.energy_key is None and options.forces_key is None and energy and forces:
        names = energy[0][1], forces[0][1]
        if names[0].startswith("REF_") != names[1].startswith("REF_"):
            other = {"REF_forces": ("info", "REF_energy"), "forces": ("info", "energy")}[names[1]]
            if groups[other[0]].get(other[1]) is not None:
                raise ValueError(f"both {names[0]} and {other[1]} are there, with {names[1]}: say --energy-key")
