"""What comparisons of a commit with itself have shown: how much each benchmark's samples spread, by machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ejmp.track.verdict import spread_of


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Log ratios of A/A pairs by machine key and name of the benchmark."""

    samples: Mapping[str, Mapping[str, Sequence[float]]]

    @classmethod
    def read(cls, path: Path | None) -> Self:
        """Read a file, or return none at all if there is no file.

        Raises:
            ValueError: if it is no such file.
        """
        if path is None or not path.exists():
            return cls(samples={})
        try:
            found = json.loads(path.read_text())["a_a_log_ratios"]
            return cls(
                samples={
                    str(key): {str(name): [float(x) for x in values] for name, values in rows.items()}
                    for key, rows in found.items()
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected log ratios of A/A runs, written by --calibrate ({error!r})") from error

    def spread(self, key: str, name: str) -> float | None:
        """Return the standard deviation of a benchmark's samples, or None if there are fewer than four."""
        values = self.samples.get(key, {}).get(name, ())
        return spread_of(values) if len(values) >= 4 else None

    def joined(self, result: Mapping[str, Any]) -> "Tolerances":
        """Return these with the samples of a comparison of a commit with itself.

        Raises:
            ValueError: if it compared two different codes.
        """
        other = [row["name"] for row in result["rows"] if not row["control"]]
        if other:
            raise ValueError(f"--calibrate: expected the same code on both sides, got another of {', '.join(other)}")
        key = result["key"]
        rows = {name: list(values) for name, values in self.samples.get(key, {}).items()}
        for row in result["rows"]:
            rows.setdefault(row["name"], []).extend(row["log_ratios"] + row["repeated_log_ratios"])
        return Tolerances(samples={**self.samples, key: rows})

    def write(self, path: Path) -> None:
        """Write the file; a reader never meets half of one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f"{path.suffix}.part")
        rounded = {
            key: {name: [round(x, 5) for x in values] for name, values in rows.items()}
            for key, rows in self.samples.items()
        }
        part.write_text(json.dumps({"a_a_log_ratios": rounded}, indent=1) + "\n")
        part.replace(path)
