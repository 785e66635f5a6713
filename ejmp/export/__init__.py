"""Models for programs without ejmp: AOTInductor packages. Names are imported when they are first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ejmp.export.package import Package, inputs_of, load, write_package

__all__ = ["Package", "inputs_of", "load", "write_package"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ejmp.export' has no attribute {name!r}")
    from ejmp.export import package  # noqa: PLC0415 - the command line's help does not wait for torch

    return getattr(package, name)
