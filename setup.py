"""Builds the native scan. It is optional: where no compiler is found, the package installs all the same and scans in PyTorch.

The kernels are compiled once for each instruction set, and the library chooses among them when it is loaded: what was built on
one machine runs on every other of its kind. The library contains no Python and no torch; neither is needed to build it.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("rankmamba/scan/native")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
]
GCC_FLAGS = ["-fno-predictive-commoning"]  # it spills registers around every inner loop; clang has none, and refuses the flag
# name: (lanes of float32, flags)
BUILDS = {"base": (4, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS["avx2"] = (8, ["-mavx2", "-mfma"])
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    BUILDS["avx512"] = (16, AVX512)
    BUILDS["avx512bf16"] = (16, [*AVX512, "-mavx512bf16"])
    if platform.system() == "Linux":  # which has to be asked for the tiles
        BUILDS["amx"] = (16, [*BUILDS["avx512bf16"][1], "-mamx-tile", "-mamx-bf16"])


class BuildKernels(build_ext):
    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"  # no Python version in it: the library is none of Python's modules

    def get_export_symbols(self, extension):
        return []

    def flags(self):
        """FLAGS, and GCC_FLAGS where the compiler knows them."""
        nothing = Path(self.build_temp, "nothing.cpp")
        nothing.parent.mkdir(parents=True, exist_ok=True)
        nothing.touch()
        try:
            self.compiler.compile([str(nothing)], self.build_temp, extra_postargs=GCC_FLAGS)
        except CompileError:
            return FLAGS
        return FLAGS + GCC_FLAGS

    def build_extension(self, extension):
        common = self.flags()

        def compile_kernels(build):
            lanes, flags = BUILDS[build]
            folder = os.path.join(self.build_temp, build)
            macros = [("ISA", build), ("WIDTH", str(lanes))]
            try:
                return self.compiler.compile([str(FOLDER / "kernels.cpp")], folder, macros, extra_postargs=common + flags)
            except CompileError:
                if build == "base":
                    raise
                return []  # an old compiler that does not know these instructions

        with ThreadPoolExecutor() as pool:
            built = dict(zip(BUILDS, pool.map(compile_kernels, BUILDS), strict=True))
        macros = [(f"HAVE_{build.upper()}", "1") for build, objects in built.items() if objects]
        objects = self.compiler.compile([str(FOLDER / "dispatch.cpp")], self.build_temp, macros, extra_postargs=common)
        target = self.get_ext_fullpath(extension.name)
        objects += sum(built.values(), [])
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")


setup(
    ext_modules=[
        Extension(
            "rankmamba.scan.native._kernels",
            sources=[str(FOLDER / "kernels.cpp"), str(FOLDER / "dispatch.cpp")],
            depends=[str(header) for header in FOLDER.glob("*.h")],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
