"""What pyproject.toml cannot say: the C++ extension, which is optional.

Without torch in the build environment (pip's build isolation) or without a C++ compiler the package installs without
the extension and runs in plain torch; `ejmp_kernels.availability.why_unavailable()` says why.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    print("ejmp: torch is not in the build environment; use pip install --no-build-isolation", file=sys.stderr)  # noqa: T201
    setup()
    sys.exit(0)


class OptionalBuild(BuildExtension):
    """Build the extension with CUDA if torch and nvcc have it, or else without, or else not at all."""

    def build_extensions(self):
        for choice in choices:
            for field in ("sources", "include_dirs", "library_dirs", "libraries", "extra_compile_args"):
                setattr(self.extensions[0], field, getattr(choice, field))
            try:
                return super().build_extensions()
            except Exception as error:  # noqa: BLE001 - whatever a compiler can do wrong
                print(f"ejmp: the {choice.what} not built ({error})", file=sys.stderr)  # noqa: T201
        print("ejmp: everything works in plain torch, slower", file=sys.stderr)  # noqa: T201
        self.extensions = []
        return None

    def copy_extensions_to_source(self):
        if self.extensions:
            super().copy_extensions_to_source()


openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
# fp-contract=off: distances must have the same bits as the plain-torch twin
host_flags = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-ffp-contract=off", *openmp]
options = {
    "depends": sorted(map(str, Path("csrc").rglob("*.h"))) + sorted(map(str, Path("csrc/cuda").glob("*.cu*"))),
    "extra_link_args": openmp,
    # the library registers torch ops and does not touch Python: one file for every Python version
    "py_limited_api": True,
}
bindings = [f"csrc/bindings/{name}.cpp" for name in ("cpu", "dense", "products", "quantized")]
sources = [*bindings, *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
choices = [CppExtension("ejmp_kernels._C", sources, extra_compile_args=host_flags, **options)]
choices[0].what = "C++ extension was"
if torch.version.cuda and CUDA_HOME:
    sources = [*sources, "csrc/bindings/cuda.cpp", *sorted(map(str, Path("csrc/cuda").glob("*.cu")))]
    targets = ["70", "80", "90"] if torch.version.cuda.startswith("12.") else ["80", "90"]
    device_flags = ["-O3", "-std=c++20", *(f"-gencode=arch=compute_{x},code=sm_{x}" for x in targets)]
    device_flags += ["-gencode=arch=compute_90,code=compute_90"]  # for cards that came later
    flags = {"cxx": host_flags, "nvcc": device_flags}
    choices.insert(0, CUDAExtension("ejmp_kernels._C", sources, extra_compile_args=flags, **options))
    choices[0].what = "CUDA kernels were"
# one file after another, unless MAX_JOBS asks for ninja (which must then be there, or torch goes back to this)
use_ninja = "MAX_JOBS" in os.environ
setup(
    ext_modules=choices[:1],
    cmdclass={"build_ext": OptionalBuild.with_options(use_ninja=use_ninja, no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
