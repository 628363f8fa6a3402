"""Compiles csrc/ into one extension module: CPU code always, CUDA code where nvcc is found.

A variant is the set of all ops compiled for one instruction set or for CUDA. `setup.py` calls
`build`; `python csrc/build.py TARGET [FLAG …]` builds by hand, with more compiler flags.

    MEGALLAMA_CUDA_ARCHS   GPU architectures, such as "80 90"; empty builds no CUDA code
    CXX                    the C++ compiler (c++)
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
#: Kernels call no library function, and vectors are passed in whatever registers there are.
KERNELS = ["-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
AVX512 = [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "bf16")]
INSTRUCTION_SETS = {
    "x86_64": {
        "portable": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx2", "-mfma", *AVX512, "-mprefer-vector-width=512"],
    },
}


class BuildError(Exception):
    """A compiler is missing or failed; the text has its output."""


def instruction_sets() -> dict[str, list[str]]:
    """The CPU variants of this machine's architecture and their flags, best last."""
    return INSTRUCTION_SETS.get(platform.machine(), {"portable": []})


def nvcc() -> str | None:
    """The CUDA compiler, if CUDA code is wanted and can be compiled."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    return found if architectures() else None


def architectures() -> list[str]:
    return os.environ.get("MEGALLAMA_CUDA_ARCHS", "80 90").replace(",", " ").split()


def nvcc_flags(archs: Sequence[str], variants: Sequence[str] = ("cuda",)) -> list[str]:
    """Machine code for each architecture, and PTX of the last for those to come."""
    targets = [f"arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = [part for target in targets for part in ("-gencode", target)]
    flags += ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
    flags += ["-Xptxas", "-v"]  # registers and spills of each kernel, for the report
    return [*flags, *definitions(variants, "cuda")]


def definitions(variants: Sequence[str], variant: str | None = None) -> list[str]:
    """The lists of variants that ops.h declares, and the one that this file is compiled for."""

    def listed(names: Sequence[str]) -> str:
        return " ".join(f"V({name})" for name in names)

    cpu = [name for name in variants if name != "cuda"]
    lists = [
        f"-DMEGALLAMA_VARIANTS(V)={listed(variants)}",
        f"-DMEGALLAMA_CPU_VARIANTS(V)={listed(cpu)}",
    ]
    return [*lists, f"-DMEGALLAMA_VARIANT={variant}"] if variant else lists


def commands(work: Path, flags: Sequence[str]) -> dict[Path, tuple[Path, list[str]]]:
    """Object file → its source and the command that compiles it."""
    import pybind11

    cxx, cuda, sets = compiler(), nvcc(), instruction_sets()
    variants = [*sets, *(["cuda"] if cuda else [])]
    found: dict[Path, tuple[Path, list[str]]] = {}

    def add(source: Path, name: str, command: list[str]) -> None:
        digest = hashlib.sha256(" ".join(command).encode()).hexdigest()[:12]
        target = work / f"{source.stem}.{name}.{digest}.o"
        found[target] = (source, [*command, "-c", str(source), "-o", str(target)])

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    add(CSRC / "module.cpp", "module", [cxx, *COMMON, *flags, *includes, *definitions(variants)])
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        for name, extra in sets.items():
            command = [cxx, *COMMON, *KERNELS, *extra, *flags, *definitions(variants, name)]
            add(source, name, command)
    for source in sorted((CSRC / "cuda").glob("*.cu")) if cuda else ():
        add(source, "cuda", [cuda or "", *nvcc_flags(architectures(), variants)])
    return found


def compiler() -> str:
    """Raises BuildError where there is none."""
    name = os.environ.get("CXX", "c++")
    if shutil.which(name.split()[0]) is None:
        raise BuildError(f"no C++ compiler: {name} not found; apt install g++, or set CXX")
    return name


def build(target: Path, work: Path, flags: Sequence[str] = ()) -> None:
    """Compile what `work` has no newer object of by the same command, then link `target`.

    Raises BuildError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    files = commands(work, flags)
    compile_stale(files)
    objects = [str(item) for item in files]
    cuda = nvcc()
    if cuda:
        # CUDA's runtime goes in statically: torch brings one of any version.
        link = [cuda, "-shared", "-cudart", "static", "-Xcompiler", "-fopenmp"]
        link += [part for flag in flags for part in ("-Xcompiler", flag)]
    else:
        link = [compiler(), "-shared", "-fopenmp", *flags]
    _run([*link, *objects, "-o", str(target)])


def report(item: Path) -> Path:
    """What the compiler said while it made an object; written last, when the object is whole."""
    return item.with_suffix(".txt")


def compile_stale(files: Mapping[Path, tuple[Path, list[str]]]) -> None:
    """Compile what is not of its source as that is now: some of `commands`. Raises BuildError."""
    headers = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
    rules = max(headers, Path(__file__).stat().st_mtime)

    def made(item: Path) -> float:
        return report(item).stat().st_mtime if item.exists() and report(item).exists() else 0.0

    def compile_one(item: Path) -> None:
        item.parent.mkdir(parents=True, exist_ok=True)
        report(item).write_text(_run(files[item][1]))

    stale = [item for item in files if made(item) < max(files[item][0].stat().st_mtime, rules)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, stale))


def _run(command: Sequence[str]) -> str:
    """What it says. Raises BuildError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[1]).parent / "objects", sys.argv[2:])
