"""Packaging: `pip install -e .` gives the `megallama` command."""

from setuptools import find_packages, setup

setup(
    name="megallama",
    version="0.1.0",
    description="Pretrains LLaMA models with a hand-written backward pass.",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megallama", "megallama.*"]),
    package_data={"megallama": ["py.typed"]},
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
            "pytest",
            "ruff",
            "transformers>=5,<6",
            "types-PyYAML",
            "wandb",
        ],
    },
    entry_points={"console_scripts": ["megallama = megallama.cli.main:main"]},
)
