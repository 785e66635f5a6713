"""The numbers that Ghunaim et al. (arXiv 2504.19538) publish, for JMP-L."""

from collections.abc import Mapping

_SETS = ("oc20", "oc22", "ani1x", "transition1x")
_TABLE1 = {
    ("teacher", 6): (17.0, 22.9, 22.5, 12.7),
    ("br", 5): (39.1, 45.7, 220.0, 48.5),
    ("br", 4): (65.3, 68.9, 443.4, 99.8),
    ("br", 3): (94.1, 99.3, 615.1, 149.6),
    ("br", 2): (106.6, 111.9, 711.8, 188.3),
    ("br_kd", 5): (19.8, 25.8, 30.1, 16.0),
    ("br_kd", 4): (26.7, 34.5, 58.1, 24.2),
    ("br_kd", 3): (42.1, 45.6, 97.6, 39.1),
    ("br_kd", 2): (52.1, 56.3, 144.4, 53.3),
}
TABLE1: Mapping[tuple[str, int], Mapping[str, float]] = {
    key: dict(zip(_SETS, values, strict=True)) for key, values in _TABLE1.items()
}
"""Mean absolute errors of forces on validation data by strategy and number of blocks, then by dataset, meV/A."""
TABLE2: Mapping[int, Mapping[str, float]] = {
    blocks: {"throughput": throughput, "gflops": gflops, "parameters": parameters}
    for blocks, throughput, gflops, parameters in (
        (6, 19.1, 1.74, 160.9e6),
        (5, 21.8, 1.45, 134.5e6),
        (4, 25.6, 1.16, 108.2e6),
        (3, 30.8, 0.87, 81.9e6),
        (2, 38.0, 0.59, 55.5e6),
    )
}
"""Structures per second on one V100, the column "GFlops (Billion)" and the parameters, by number of blocks."""
