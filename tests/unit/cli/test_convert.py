"""`megallama convert` and `megallama checkpoint` as commands: what they leave, say and refuse."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megallama.checkpoint.store import Checkpoint
from megallama.cli.main import main
from megallama.data.tokenizer import Tokenizer
from megallama.files import Disk
from megallama.spec.grid import Grid
from tests.conftest import ConfigFile, TinyData
from tests.reference import Shape, huggingface, random_weights
from tests.unit.checkpoint.formats import GRIDS, bits_equal, read_all, save_checkpoint

Command = Callable[..., str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command that must end with `code`; returns what it printed, or its error."""

    def run(code: int, *words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        if code in (0, 1):
            return out
        assert err.startswith("megallama: error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def run_dir(config_file: ConfigFile, command: Command, tmp_path: Path) -> Path:
    """A run of six steps with checkpoints at 3 and 6, and its tokenizer."""
    command(0, "train", config_file())
    return tmp_path / "runs" / "tiny"


def test_a_trained_run_to_hugging_face_and_back(
    run_dir: Path, tiny_data: TinyData, command: Command, tmp_path: Path
) -> None:
    hf, back = tmp_path / "out" / "hf", tmp_path / "back"
    assert command(0, "convert", "to-hf", run_dir, hf).startswith(f"{hf}: ")
    assert not list(tmp_path.glob("**/*.partial"))
    trained = Checkpoint(run_dir / "checkpoints" / "step-00000006")
    masters = {n: t for n, t in read_all(trained).items() if not n.startswith("exp_avg")}
    expected = {huggingface.huggingface_name(name): tensor for name, tensor in masters.items()}
    assert bits_equal(load_file(hf / "model.safetensors"), expected)

    ours, theirs = Tokenizer(tiny_data.tokenizer), AutoTokenizer.from_pretrained(hf)
    for text in ("the fox and a dog", "def x(a): return 12", "caf\u00e9", "  and", ""):
        assert theirs(text)["input_ids"] == [ours.bos, *ours.encode(text)]
    model = AutoModelForCausalLM.from_pretrained(hf)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (ours.bos, ours.eos)

    command(0, "convert", "from-hf", hf, back)
    assert bits_equal(read_all(Checkpoint(back)), masters)
    prompt = ("--prompt", "the fox", "--tokens", "12")
    assert command(0, "generate", back, *prompt) == command(0, "generate", run_dir, *prompt)
    assert command(0, "checkpoint", "diff", run_dir, back, "--weights-only").endswith(
        "equal bit for bit\n"
    )
    assert "exp_avg/norm.weight: F32 [16] → absent" in command(
        1, "checkpoint", "diff", run_dir, back
    )


def test_a_trained_run_to_meta_and_back(run_dir: Path, command: Command, tmp_path: Path) -> None:
    meta, back = tmp_path / "meta", tmp_path / "back"
    command(0, "convert", "to-meta", run_dir, meta, "--shards", 2)
    names = {"params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"}
    assert {path.name for path in meta.iterdir()} == names
    command(0, "convert", "from-meta", meta, back)
    assert command(0, "checkpoint", "diff", run_dir, back, "--weights-only")
    prompt = ("--prompt", "the fox", "--tokens", "12")
    assert command(0, "generate", back, *prompt) == command(0, "generate", run_dir, *prompt)


def test_what_stands_beside_the_weights_goes_along(command: Command, tmp_path: Path) -> None:
    """Llama 3's tokenizer is none that megallama reads; it and the rest arrive byte for byte."""
    hf, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    huggingface.build(Shape(), random_weights(Shape()), torch.bfloat16).save_pretrained(hf)
    texts = {
        "tokenizer.model": "IQ== 0\n",
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "generation_config.json": '{"bos_token_id": 128000, "eos_token_id": [128001, 128008]}',
    }
    for name, text in texts.items():
        (blobs / name).write_text(text)
        (hf / name).unlink(missing_ok=True)
        (hf / name).symlink_to(blobs / name)  # as Hugging Face's cache has it
    command(0, "convert", "from-hf", hf, tmp_path / "us")
    command(0, "convert", "to-hf", tmp_path / "us", tmp_path / "back")
    for name, text in texts.items():
        assert (tmp_path / "back" / name).read_text() == text
        assert not (tmp_path / "us" / name).is_symlink()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (128000, [128001, 128008])
    message = command(78, "generate", tmp_path / "us", "--prompt", "x")
    assert "trained without data.tokenizer" in message
    (tmp_path / "us" / "tokenizer.json").unlink()
    (tmp_path / "us" / "tokenizer.json").symlink_to("/etc/hostname")
    message = command(78, "convert", "to-hf", tmp_path / "us", tmp_path / "again")
    assert "tokenizer.json: is a link" in message
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_a_disk_without_room_is_refused_before_anything_is_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A model of 2,000,000 weights in fp64 takes 16 MB, and 16 MiB are set aside for the rest."""
    shape = Shape(d_model=256, layers=3, ffn=600)
    source = tmp_path / "us"
    save_checkpoint(source, shape, random_weights(shape))
    free = 30_000_000
    monkeypatch.setattr(Disk, "free_bytes", lambda *_: free)
    out = tmp_path / "out"
    message = command(78, "convert", f"to-{kind}", source, out)
    assert f"cannot write {out}: it takes 0.0" in message
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(Disk, "free_bytes", lambda *_: 2 * free)
    command(0, "convert", f"to-{kind}", source, out)
    monkeypatch.setattr(Disk, "free_bytes", lambda *_: free)
    assert main(["convert", f"from-{kind}", str(out), str(tmp_path / "back")]) == 78
    assert not list(tmp_path.glob("back*"))


def test_wrong_sources_and_targets(run_dir: Path, command: Command, tmp_path: Path) -> None:
    hf, meta, out = tmp_path / "hf", tmp_path / "meta", tmp_path / "out"
    command(0, "convert", "to-hf", run_dir, hf)
    command(0, "convert", "to-meta", run_dir, meta)
    cases = [
        (
            ("from-hf", meta, out),
            f"{meta}: is in Meta's format, not for from-hf; use convert from-",
        ),
        (("to-meta", hf, out), f"{hf}: is in Hugging Face's format, not for to-meta"),
        (("from-meta", run_dir, out), f"{run_dir}: is a checkpoint, not for from-meta"),
        (("to-hf", tmp_path / "no", out), "no: no such directory"),
        (("from-hf", tmp_path, out), f"{tmp_path}: not in Hugging Face's format (no config.json)"),
        (("to-hf", run_dir, hf), f"{hf}: is there already"),
        (("to-meta", run_dir, out, "--shards", 3), "3 files do not divide 2 key/value heads"),
        (("to-meta", run_dir, out, "--shards", 0), "--shards 0"),
        (("to-hf", run_dir, out, "--dtype", "int8"), "invalid choice: 'int8'"),
        (("to-hf", run_dir, "/proc/out"), "cannot write /proc/out"),
    ]
    for words, message in cases:
        assert message in command(78, "convert", *words)
        assert not out.exists()
    (hf / "model.safetensors").write_bytes(b"")
    assert f"{hf / 'model.safetensors'}: its header" in command(65, "convert", "from-hf", hf, out)
    assert not list(tmp_path.glob("*.partial"))


def damage(directory: Path, name: str) -> Path:
    """Flip a bit of a tensor; returns its file."""
    piece = Checkpoint(directory).manifest.tensors[name].slices[0]
    path = directory / piece.file
    raw = bytearray(path.read_bytes())
    raw[piece.offset + 1] ^= 1
    path.write_bytes(raw)
    return path


def test_damage_met_on_the_way_leaves_nothing(
    run_dir: Path, command: Command, tmp_path: Path
) -> None:
    directory = run_dir / "checkpoints" / "step-00000006"
    path = damage(directory, "master/norm.weight")  # after layers that are written already
    for action in ("to-hf", "to-meta"):
        message = command(65, "convert", action, directory, tmp_path / "out")
        assert f"{path}: tensor 'master/norm.weight' is damaged" in message
        assert not list(tmp_path.glob("out*"))


def test_ls_verify_and_diff(run_dir: Path, command: Command, tmp_path: Path) -> None:
    first, last = (run_dir / "checkpoints" / f"step-0000000{step}" for step in (3, 6))
    listed = command(0, "checkpoint", "ls", run_dir, "--json", tmp_path / "ls.json").splitlines()
    assert [line.split("  ")[:2] for line in listed] == [
        [str(first), "step 3"],
        [str(last), "step 6"],
    ]
    rows = json.loads((tmp_path / "ls.json").read_text())
    # 2 layers of D = 16, F = 24, H = 4, K = 2, V = 300 tied; masters and two moments, in fp32.
    count = 300 * 16 + 2 * (2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24) + 16
    assert [(row["parameters"], row["bytes"]) for row in rows] == [(count, 12 * count)] * 2
    assert "intact" in command(0, "checkpoint", "verify", last)

    assert command(0, "checkpoint", "diff", last, last) == "equal bit for bit\n"
    report = tmp_path / "diff.json"
    lines = command(1, "checkpoint", "diff", first, last, "--json", report).splitlines()
    assert "state step: 3 → 6" in lines
    assert lines[-1] == "different"
    body = json.loads(report.read_text())
    a, b = read_all(Checkpoint(first)), read_all(Checkpoint(last))
    differing = {n for n in a if not torch.equal(a[n].view(torch.int32), b[n].view(torch.int32))}
    assert {n.removeprefix("master/") for n in body["tensors"]} == differing
    largest = (a["norm.weight"] - b["norm.weight"]).abs().max()
    assert body["tensors"]["master/norm.weight"].endswith(f"by {largest:.3g} at most")

    path = damage(last, "exp_avg/norm.weight")
    for words in (("verify", last), ("verify", run_dir), ("diff", first, last)):
        assert f"{path}: tensor 'exp_avg/norm.weight' is damaged" in command(
            65, "checkpoint", *words
        )
    command(0, "checkpoint", "verify", first)
    (last / "manifest.json").write_text("{}")
    assert f"{last / 'manifest.json'}: damaged" in command(0, "checkpoint", "ls", run_dir)
    for words in (("ls", tmp_path), ("verify", tmp_path), ("diff", first, tmp_path)):
        assert f"{tmp_path}: neither" in command(78, "checkpoint", *words)


def test_diff_sees_weights_and_not_layouts(command: Command, tmp_path: Path) -> None:
    weights = random_weights(Shape(), dtype=torch.float32)
    for name, grid in GRIDS.items():
        save_checkpoint(tmp_path / name, Shape(), weights, grid)
    assert command(0, "checkpoint", "diff", *(tmp_path / name for name in GRIDS))
    weights["layers.1.attention.wo.weight"][7, 9] += 0.25
    weights["norm.weight"][0] = torch.nan
    save_checkpoint(tmp_path / "other", Shape(), weights, GRIDS["one rank"], "fp32")
    out = command(1, "checkpoint", "diff", tmp_path / "4 x 3 ranks", tmp_path / "other")
    assert out.splitlines() == [
        "config train.precision: fp64 → fp32",
        "master/layers.1.attention.wo.weight: 1 elements differ, by 0.25 at most",
        "master/norm.weight: 1 elements differ, by inf at most",
        "different",
    ]


def test_a_disk_that_fills_up_leaves_nothing(
    run_dir: Path, command: Command, tmp_path: Path
) -> None:
    hf, meta = tmp_path / "hf", tmp_path / "meta"
    command(0, "convert", "to-hf", run_dir, hf)
    command(0, "convert", "to-meta", run_dir, meta)
    sources = {"to-hf": run_dir, "to-meta": run_dir, "from-hf": hf, "from-meta": meta}
    for action, source in sources.items():
        with largest_file(10_000):
            message = command(78, "convert", action, source, tmp_path / "out")
        assert f"cannot write {tmp_path / 'out'}" in message
        assert not list(tmp_path.glob("out*"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CHILD = """
import sys
from megallama.checkpoint import weights
from megallama.cli.main import main
weights.BLOCK_BYTES = 1 << 20
folder = sys.argv[1]
def convert(suffix, *ways):
    for way in ways:
        words = [f"{folder}/{name}{suffix}" for name in way[1:]]
        assert main([*way[0].split(), *words]) == 0
ways = [("convert to-hf", "us", "hf"), ("convert from-hf", "hf", "us2"),
        ("convert to-meta", "us2", "meta"), ("convert from-meta", "meta", "us3"),
        ("checkpoint diff --weights-only", "us", "us3")]
convert("-small", *ways)  # what is imported on the way is not counted
print("ready", flush=True)
sys.stdin.readline()
convert("", *ways)
"""
ROWS = 1 << 17  # of the vocabulary; with 64 numbers in fp32 each, 32 MiB


def anonymous_bytes(process: int) -> int:
    """What a process holds in memory but for pages of files."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def growth_while_converting(folder: Path) -> int:
    """By how many bytes the memory of a process grows at most, sampled every millisecond."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdin=PIPE, stdout=PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for line in child.stdout:
            if line == "ready\n":
                break
        before = most = anonymous_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            with suppress(OSError, IndexError):  # it has just ended
                most = max(most, anonymous_bytes(child.pid))
            time.sleep(0.001)
    assert child.returncode == 0
    return most - before


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """64 MiB of weights pass through blocks of 1 MiB, every way, within 24 MiB."""
    small = Shape(d_model=64, ffn=64, vocab=8)
    weights = random_weights(small, dtype=torch.float32)
    save_checkpoint(tmp_path / "us-small", small, weights, precision="fp32")
    large = Shape(d_model=64, ffn=64, vocab=ROWS)
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name] = torch.randn(ROWS, 64)
    save_checkpoint(tmp_path / "us", large, weights, Grid(tensor=2, data=32), "fp32")
    assert sum(path.stat().st_size for path in (tmp_path / "us").iterdir()) > 64 << 20
    assert growth_while_converting(tmp_path) < 24 << 20


def test_a_killed_conversion_leaves_no_target(run_dir: Path, tmp_path: Path) -> None:
    """SIGKILL at the last moment, before the rename; the next one succeeds all the same."""
    script = """
import os, signal, sys
from megallama.cli.main import main
os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
    words = ["convert", "to-hf", str(run_dir), str(tmp_path / "hf")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True)
    assert done.returncode == -9
    assert [path.name for path in tmp_path.glob("hf*")] == ["hf.partial"]
    assert main(words) == 0
    assert [path.name for path in tmp_path.glob("hf*")] == ["hf"]
