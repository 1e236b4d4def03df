"""Packages, and the native libraries, which `vqvit/_build.py` compiles without torch.

A missing compiler is a warning: its library is then built on first use, or another backend runs. The CUDA library takes
minutes for all parts: it is built here if VQVIT_BUILD_CUDA=1 (for wheels), else on first use for the part at hand.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_builder():
    """vqvit/_build.py by path: importing vqvit would import torch."""
    spec = importlib.util.spec_from_file_location("_vqvit_build", ROOT / "vqvit" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()
WANTED = (builder.CPU, builder.CUDA) if os.environ.get("VQVIT_BUILD_CUDA") == "1" else (builder.CPU,)
LIBRARIES = {f"vqvit._lib.{Path(library.file).stem}": library for library in WANTED}


class BuildLibrary(build_ext):
    """Each extension is a plain shared library: no Python symbols, no ABI tag."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        try:
            builder.build(ROOT / "csrc", LIBRARIES[ext.name], Path(self.get_ext_fullpath(ext.name)))
        except builder.BuildError as error:
            self.warn(f"vqvit without its native {LIBRARIES[ext.name].device} library: {error}")

    def copy_extensions_to_source(self):  # editable installs
        (ROOT / "vqvit" / "_lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, not on the Python version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


# kernels/ and csrc/ have no __init__.py and live beside the package: a top-level package named `kernels` would hide the
# one that transformers imports.
mapped = {"vqvit.kernels": "kernels", "vqvit._csrc": "csrc"}
mapped |= {f"vqvit._csrc.{path.name}": f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_dir()}

setup(
    packages=[*find_packages(include=["vqvit", "vqvit.*"]), *mapped],
    package_dir=mapped,
    package_data={
        "vqvit._csrc": ["*.h", "**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"],
        "vqvit.kernels": ["tables/*.json"],
    },
    exclude_package_data={"": ["__pycache__"]},
    ext_modules=[Extension(name, sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
