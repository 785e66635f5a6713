"""What pyproject.toml cannot say: the C++ extension, which is optional.

Without torch in the build environment (pip's build isolation) or without a C++ compiler the package installs without
the extension and runs in plain torch; `ejmp_kernels.extension.unavailable()` says why.
"""

import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("ejmp: torch is not in the build environment; use pip install --no-build-isolation", file=sys.stderr)  # noqa: T201
    setup()
    sys.exit(0)


class OptionalBuild(BuildExtension):
    """Build the extension if there is a working compiler; go on without it otherwise."""

    def build_extensions(self):
        try:
            super().build_extensions()
        except Exception as error:  # noqa: BLE001 - whatever a compiler can do wrong
            message = f"ejmp: the C++ extension was not built ({error}); everything works in plain torch, slower"
            print(message, file=sys.stderr)  # noqa: T201
            self.extensions = []

    def copy_extensions_to_source(self):
        if self.extensions:
            super().copy_extensions_to_source()


openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
extension = CppExtension(
    "ejmp_kernels._C",
    ["csrc/bindings.cpp", "csrc/bindings_dense.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
    depends=sorted(map(str, Path("csrc").rglob("*.h"))),
    # fp-contract=off: distances must have the same bits as the plain-torch twin
    extra_compile_args=["-O3", "-g0", "-Wall", "-Wno-psabi", "-ffp-contract=off", *openmp],
    extra_link_args=openmp,
    # the library registers torch ops and does not touch Python: one file for every Python version
    py_limited_api=True,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": OptionalBuild.with_options(use_ninja=False, no_python_abi_suffix=True)},
)
