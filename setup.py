"""Packaging: `pip install -e .` gives the `megallama` command and builds csrc/ where it can."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build as csrc


class BuildKernels(build_ext):
    """Compiles with csrc/build.py; where that fails, the package runs without its kernels."""

    def build_extension(self, ext: Extension) -> None:
        try:
            # Not in pip's temporary folder: installing an extra would compile all of it again.
            objects = Path(__file__).parent / "build" / "objects"
            csrc.build(Path(self.get_ext_fullpath(ext.name)), objects)
        except (csrc.BuildError, ImportError) as error:
            raise CompileError(f"installed without kernels: {error}") from error


setup(
    name="megallama",
    version="0.1.0",
    description="Pretrains LLaMA models with a hand-written backward pass.",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megallama", "megallama.*"]),
    package_data={"megallama": ["py.typed", "plan/hardware/*.yaml", "train/slurm/job.sh"]},
    # Optional: the PyTorch references stand in for what was not built.
    ext_modules=[Extension("megallama.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy",
        "sentencepiece",
        "safetensors",
        "pydantic>=2.12",
        "pyyaml",
        "rich",
        "matplotlib",
        "xxhash",
        "zstandard",
    ],
    extras_require={
        "parquet": ["pyarrow"],
        "wandb": ["wandb"],
        "test": [
            "hypothesis",
            "mypy",
            "pyarrow",
            "pybind11",
            "pytest",
            "pytest-xdist",
            "ruff",
            "transformers>=5,<6",
            "types-PyYAML",
            "wandb",
        ],
    },
    entry_points={"console_scripts": ["megallama = megallama.cli.main:main"]},
)
