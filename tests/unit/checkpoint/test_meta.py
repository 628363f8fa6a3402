"""Meta's format against a model that rotates neighbouring pairs, from RoPE's paper."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megallama.checkpoint import weights as streams
from megallama.checkpoint.manifest import Manifest
from megallama.checkpoint.meta import MetaWeights, write_meta
from megallama.checkpoint.meta_params import model_from_params, params_of
from megallama.checkpoint.pth_reader import PthFile
from megallama.checkpoint.store import Checkpoint
from megallama.checkpoint.weights import CheckpointWeights, write_checkpoint
from megallama.config.presets import PRESETS
from megallama.errors import ConfigError, CorruptError
from tests.reference import Shape, plain, random_batch, random_weights
from tests.unit.checkpoint.formats import (
    GRIDS,
    SHAPES,
    bits_equal,
    config_for,
    our_logits,
    read_all,
    save_checkpoint,
)

Tensors = dict[str, Tensor]

COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # of a row-parallel linear
#: `params.json` of SHAPES but for the feed-forward width and the vocabulary.
PARAMS: dict[str, dict[str, Any]] = {
    "MHA": {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5},
    "GQA": {"dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "norm_eps": 1e-5},
    "tied": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "rope_theta": 500000.0,
        "norm_eps": 1e-5,
    },
    "scaled": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows: every tensor crosses several."""
    monkeypatch.setattr(streams, "BLOCK_BYTES", 4000)


def interleaved_logits(shape: Shape, weights: Tensors, tokens_BS: Tensor) -> Tensor:
    """LLaMA in fp64 with Meta's RoPE: elements 2e and 2e + 1 of a head are a complex number."""
    width = shape.d_model // shape.heads
    angles_SE = torch.arange(tokens_BS.shape[1])[:, None] * plain.frequencies(shape)
    turn_SE = torch.polar(torch.ones_like(angles_SE), angles_SE)

    def heads(n_BSD: Tensor, weight: Tensor, turned: bool) -> Tensor:
        x = (n_BSD @ weight.T).unflatten(-1, (-1, width)).transpose(1, 2)
        if turned:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * turn_SE).flatten(-2)
        return x.repeat_interleave(shape.heads // x.shape[1], 1)

    x = weights["tok_embeddings.weight"][tokens_BS]
    causal_SS = torch.full((tokens_BS.shape[1],) * 2, -math.inf, dtype=x.dtype).triu(1)
    for layer in range(shape.layers):
        w = {n.split(".", 2)[2]: t for n, t in weights.items() if n.startswith(f"layers.{layer}.")}
        n = plain.rms_norm(x, w["attention_norm.weight"], shape.norm_eps)
        q, k = (heads(n, w[f"attention.{name}.weight"], True) for name in ("wq", "wk"))
        v = heads(n, w["attention.wv.weight"], False)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(width) + causal_SS).softmax(-1)
        x = x + (scores @ v).transpose(1, 2).flatten(2) @ w["attention.wo.weight"].T
        n = plain.rms_norm(x, w["ffn_norm.weight"], shape.norm_eps)
        gate, up = (n @ w[f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (gate * gate.sigmoid() * up) @ w["feed_forward.w2.weight"].T
    return plain.rms_norm(x, weights["norm.weight"], shape.norm_eps) @ weights["output.weight"].T


def meta_weights(shape: Shape, dtype: torch.dtype = torch.float64) -> Tensors:
    """Random weights as Meta names and stores them: both ends are always there."""
    weights = random_weights(shape, dtype=dtype)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return weights


def publish(
    directory: Path,
    params: dict[str, Any],
    weights: Tensors,
    shards: int = 1,
    embedding_dim: Literal[0, 1] = 1,
    **more: Tensor,
) -> Path:
    """A release in Meta's layout, by torch.save."""
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(params))
    for n in range(shards):
        shard = {}
        for name, weight in {**weights, **more}.items():
            dim = 1 if name.endswith(COLUMNS) else 0
            dim = embedding_dim if name == "tok_embeddings.weight" else dim
            whole = weight.dim() == 1
            shard[name] = weight if whole else weight.chunk(shards, dim)[n].clone()
        torch.save(shard, directory / f"consolidated.{n:02d}.pth")
    return directory


def joined(directory: Path, embedding_dim: Literal[0, 1] = 1) -> Tensors:
    """The whole tensors of a release, by torch.load."""
    paths = sorted(directory.glob("*.pth"))
    shards = [torch.load(path, weights_only=True) for path in paths]
    weights = {}
    for name, first in shards[0].items():
        dim = 1 if name.endswith(COLUMNS) else 0
        dim = embedding_dim if name == "tok_embeddings.weight" else dim
        whole = first.dim() == 1
        weights[name] = first if whole else torch.cat([shard[name] for shard in shards], dim)
    return weights


def to_checkpoint(source: Path, target: Path) -> Checkpoint:
    weights = MetaWeights(source)
    facts = Manifest({"step": 0}, weights.config.model_dump(mode="json"), None, {})
    write_checkpoint(target, weights, facts)
    return Checkpoint(target)


def to_release(
    source: Checkpoint, target: Path, precision: str, shards: int = 1, dim: Literal[0, 1] = 1
) -> Path:
    target.mkdir()
    write_meta(target, CheckpointWeights(source), precision, shards, dim)
    return target


@pytest.mark.parametrize("kind", SHAPES)
def test_our_logits_are_those_of_a_model_that_rotates_pairs(tmp_path: Path, kind: str) -> None:
    shape, tokens = SHAPES[kind], random_batch(SHAPES[kind], samples=2, length=24).tokens
    weights = meta_weights(shape)
    checkpoint = to_checkpoint(
        publish(tmp_path / "meta", params_for(kind), weights), tmp_path / "us"
    )
    assert checkpoint.manifest.config["model"] == config_for(shape).model.model_dump(mode="json")
    ours, theirs = our_logits(checkpoint, tokens), interleaved_logits(shape, weights, tokens)
    assert (ours - theirs).abs().max() < 1e-12
    assert theirs.abs().mean() > 0.3
    # The same rows without the permutation are another model: the comparison can fail.
    unpermuted = save_checkpoint(tmp_path / "raw", shape, random_weights(shape))
    assert (our_logits(unpermuted, tokens) - theirs).abs().max() > 0.1


def params_for(kind: str) -> dict[str, Any]:
    """PARAMS with a feed-forward width of 44: half of 8/3 x 32 is 42, up to a multiple of 44."""
    return {**PARAMS[kind], "multiple_of": 44, "ffn_dim_multiplier": 0.5, "vocab_size": -1}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_exported_rotates_pairs(tmp_path: Path, kind: str, grid: str) -> None:
    """From a checkpoint of any layout: a release that computes our logits."""
    shape, tokens = SHAPES[kind], random_batch(SHAPES[kind], samples=2, length=24).tokens
    checkpoint = save_checkpoint(tmp_path / "us", shape, random_weights(shape), GRIDS[grid])
    weights = joined(to_release(checkpoint, tmp_path / "meta", "fp64"))
    theirs = interleaved_logits(shape, weights, tokens)
    assert (our_logits(checkpoint, tokens) - theirs).abs().max() < 1e-12


LAYOUTS: dict[str, tuple[str, int, Literal[0, 1], torch.dtype, str]] = {
    "LLaMA 1": ("MHA", 1, 1, torch.float16, "fp16"),
    "LLaMA 1 on 4": ("MHA", 4, 1, torch.float16, "fp16"),
    "Llama 2 on 2": ("GQA", 2, 1, torch.bfloat16, "bf16"),
    "Llama 3 on 2": ("scaled", 2, 0, torch.bfloat16, "bf16"),
    "tied on 2": ("tied", 2, 1, torch.float32, "fp32"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_bitwise(tmp_path: Path, layout: str) -> None:
    kind, shards, dim, dtype, precision = LAYOUTS[layout]
    shape = Shape(**{**SHAPES[kind].__dict__, "vocab": 60})
    weights = meta_weights(shape, dtype)
    frequencies = {"rope.freqs": torch.ones(4)} if dtype == torch.float16 else {}
    source = publish(tmp_path / "meta", params_for(kind), weights, shards, dim, **frequencies)
    checkpoint = to_checkpoint(source, tmp_path / "us")
    assert checkpoint.manifest.config["model"] == config_for(shape).model.model_dump(mode="json")
    back = to_release(checkpoint, tmp_path / "back", precision, shards, dim)
    assert [p.name for p in sorted(back.glob("*.pth"))] == [
        f"consolidated.{n:02d}.pth" for n in range(shards)
    ]
    for path in sorted(back.glob("*.pth")):
        theirs = torch.load(source / path.name, weights_only=True)
        theirs.pop("rope.freqs", None)
        assert bits_equal(torch.load(path, mmap=True, weights_only=True), theirs)
    again = to_checkpoint(back, tmp_path / "again")
    assert bits_equal(read_all(again), read_all(checkpoint))


def test_any_number_of_files_from_any_number(tmp_path: Path) -> None:
    shape = Shape(**{**SHAPES["GQA"].__dict__, "kv_heads": 4, "vocab": 60})
    params = {**params_for("GQA"), "n_kv_heads": 4}
    weights = meta_weights(shape)
    checkpoint = to_checkpoint(publish(tmp_path / "meta", params, weights, 2), tmp_path / "us")
    for shards, dim in ((1, 1), (4, 1), (4, 0)):
        release = to_release(checkpoint, tmp_path / f"{shards}.{dim}", "fp64", shards, dim)
        assert bits_equal(joined(release, dim), weights)
    with pytest.raises(ConfigError, match="3 files do not divide 4 key/value heads"):
        to_release(checkpoint, tmp_path / "three", "fp64", 3)


RELEASES = {
    # Published params.json: dim, n_heads, n_layers, multiple_of, and what newer ones add.
    "llama-7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6},
    "llama-13b": {"dim": 5120, "n_layers": 40, "n_heads": 40, "norm_eps": 1e-6},
    "llama-33b": {"dim": 6656, "n_layers": 60, "n_heads": 52, "norm_eps": 1e-6},
    "llama-65b": {"dim": 8192, "n_layers": 80, "n_heads": 64, "norm_eps": 1e-6},
    "llama2-70b": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5,
    },
    "llama3-8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
}


@pytest.mark.parametrize("release", RELEASES)
def test_published_params_are_the_presets(release: str) -> None:
    params = {"multiple_of": 256, "vocab_size": -1, **RELEASES[release]}
    vocab = PRESETS[release]["vocab"]  # type: ignore[index]
    model = model_from_params(params, int(vocab), Path("params.json"))
    kv_heads = {"kv_heads": params["n_heads"], "rope_theta": 10000.0}
    assert model == {**kv_heads, **PRESETS[release]}  # type: ignore[dict-item]


def test_every_feed_forward_width_has_params() -> None:
    for width in (16, 32, 4096):
        for ffn in (1, 2, 24, 43, 44, 256, 4099, 11008, 14336):
            model = config_for(Shape(d_model=width, ffn=ffn)).model
            params = json.loads(json.dumps(params_of(model)))
            assert model_from_params(params, model.vocab, Path("p"))["ffn"] == ffn


def test_llama_3_1_s_scaling_and_no_other() -> None:
    scaling = SHAPES["scaled"].rope_scaling
    model = config_for(SHAPES["scaled"]).model
    assert params_of(model)["use_scaled_rope"] is True
    assert "rope_scaling_factor" not in params_of(model)
    longer = config_for(Shape(rope_scaling=scaling._replace(factor=32.0))).model
    assert params_of(longer)["rope_scaling_factor"] == 32.0
    read = model_from_params(params_of(longer), longer.vocab, Path("p"))
    assert read["rope_scaling"]["factor"] == 32.0
    other = config_for(Shape(rope_scaling=scaling._replace(original_context=4096))).model
    with pytest.raises(ConfigError, match=r"original_context=4096: Meta's format has 8192"):
        params_of(other)


def test_llama_3_2_does_not_say_its_factor() -> None:
    """params.json of 1B and 3B cannot be told from one with Llama 3.1's factor, so it is asked."""
    small = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
    small |= {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-5}
    small |= {"rope_theta": 500000.0, "use_scaled_rope": True}
    with pytest.raises(
        ConfigError, match=r"p: rope_scaling_factor is missing.* 3\.2, which has 32"
    ):
        model_from_params(small, 128256, Path("p"))
    for factor in (8, 32.0):
        named = {**small, "rope_scaling_factor": factor}
        model = model_from_params(named, 128256, Path("p"))
        assert model["rope_scaling"]["factor"] == factor
        assert model["ffn"] == 8192
    larger = {**small, "dim": 4096, "n_layers": 32}
    assert model_from_params(larger, 128256, Path("p"))["rope_scaling"]["factor"] == 8


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shape = Shape(**{**SHAPES["GQA"].__dict__, "vocab": 60})
    return publish(tmp_path / "meta", params_for("GQA"), meta_weights(shape, torch.bfloat16), 2)


class Caught:
    """A class whose unpickling would call something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_a_file_with_code_is_refused_and_nothing_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = source / "consolidated.01.pth"
    tensors = torch.load(path, weights_only=True)
    for content in ({**tensors, "x": Caught()}, Caught(), list(tensors), {**tensors, "x": 5}):
        torch.save(content, path)
        with pytest.raises(CorruptError, match=r"consolidated\.01\.pth: not a"):
            MetaWeights(source)
    path.write_bytes(pickle.dumps(Caught()))
    with pytest.raises(CorruptError, match=r"consolidated\.01\.pth: not a"):
        MetaWeights(source)
    assert not (tmp_path / "executed").exists()
    pickle.loads(path.read_bytes())  # what would have happened
    assert (tmp_path / "executed").exists()


def test_damaged_files_are_named(source: Path) -> None:
    path = source / "consolidated.01.pth"
    whole = path.read_bytes()
    weight = torch.load(path, weights_only=True)["layers.1.feed_forward.w2.weight"]
    inside = whole.index(weight.view(torch.uint8).numpy().tobytes()) + 7
    flipped = bytearray(whole)
    flipped[inside] ^= 16
    for mutant in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(mutant)
        with pytest.raises(CorruptError, match=r"consolidated\.01\.pth: .*damaged"):
            MetaWeights(source)
    path.unlink()
    with pytest.raises(CorruptError, match=r"shape \(60, 16\), params\.json and 1 files make it"):
        MetaWeights(source)
    (source / "consolidated.00.pth").rename(path)
    with pytest.raises(CorruptError, match=r"consolidated\.01\.pth, but no consolidated\.00\.pth"):
        MetaWeights(source)
    path.unlink()
    with pytest.raises(ConfigError, match=r"no consolidated\.00\.pth"):
        MetaWeights(source)
    (source / "params.json").write_text("{")
    with pytest.raises(CorruptError, match=r"params\.json: not a JSON object"):
        MetaWeights(source)


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.ffn_norm.weight"])
def test_files_of_two_releases_are_told_by_their_norms(source: Path, name: str) -> None:
    """The norms stand in every file; one bit of one of them is enough."""
    path = source / "consolidated.01.pth"
    tensors = torch.load(path, weights_only=True)
    tensors[name].view(torch.int16)[-1] ^= 1
    torch.save(tensors, path)
    words = rf"consolidated\.01\.pth: tensor '{name}' is not the one of consolidated\.00\.pth"
    with pytest.raises(CorruptError, match=words):
        MetaWeights(source)


def test_views_transposes_and_gaps_are_read_as_they_look(tmp_path: Path) -> None:
    """torch.save writes a view's whole storage, and stores a transpose as it lies."""
    base = torch.arange(60.0).view(6, 10)
    views = {
        "a": base,
        "b": base[1:, 2:7],
        "c": base.T,
        "d": base[:, 3],
        "e": base[:1].expand(4, -1),
    }
    views["f"] = torch.randn(0, 4)
    torch.save(views, tmp_path / "x.pth")
    file = PthFile(tmp_path / "x.pth")
    for name, view in views.items():
        for first in range(len(view)):
            for rows in range(len(view) - first + 1):
                assert file.read(name, first, rows).equal(view[first : first + rows])


READ_CUT = """
import sys
from pathlib import Path
import megallama.checkpoint.weights as weights
from megallama.checkpoint.meta import MetaWeights
from megallama.errors import CorruptError
weights.BLOCK_BYTES = 100_000
source = MetaWeights(Path(sys.argv[1]))
blocks = source.blocks("output.weight")
next(blocks)
with open(Path(sys.argv[1]) / "consolidated.01.pth", "r+b") as cut:
    cut.truncate(5000)
try:
    list(blocks)
except CorruptError as error:
    print(error)
"""


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    shape = Shape(**{**SHAPES["MHA"].__dict__, "vocab": 30_000})
    source = publish(tmp_path / "meta", params_for("MHA"), meta_weights(shape), 2)
    command = [sys.executable, "-c", READ_CUT, str(source)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "consolidated.01.pth: ends within tensor 'output.weight'" in done.stdout


def test_tensors_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    wq = "layers.0.attention.wq.weight"
    cases: list[tuple[Callable[[Tensors], Any], type[Exception], str]] = [
        (lambda t: t.pop(wq), CorruptError, f"tensor '{wq}' has shape none"),
        (lambda t: t.pop("output.weight"), CorruptError, "'output.weight' has shape none"),
        (lambda t: t.update({wq: torch.ones(4, 4)}), CorruptError, f"'{wq}' has shape (4, 4)"),
        (lambda t: t.update({"layers.0.x": torch.ones(1)}), ConfigError, "'layers.0.x' is no"),
        (lambda t: t.update({wq: t[wq].to(torch.int8)}), ConfigError, "of type torch.int8"),
    ]
    for change, kind, words in cases:
        copy = shutil.copytree(source, tmp_path / "copy")
        tensors = torch.load(copy / "consolidated.01.pth", weights_only=True)
        change(tensors)
        torch.save(tensors, copy / "consolidated.01.pth")
        with pytest.raises(kind) as caught:
            MetaWeights(copy)
        assert words in str(caught.value)
        assert str(copy) in str(caught.value)
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dim": None}, "dim is missing"),
        ({"vocab_size": 61}, "vocab_size=61, but the embedding has 60 rows"),
        ({"n_heads": 5}, "model.heads=5: does not divide"),
        ({"multiple_of": 0}, "multiple_of=0 is no positive whole number"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier=1.3 is no number that can be"),
    ],
)
def test_params_that_do_not_fit(source: Path, changes: dict[str, Any], words: str) -> None:
    params = {**json.loads((source / "params.json").read_text()), **changes}
    (source / "params.json").write_text(json.dumps(params))
    with pytest.raises(ConfigError) as caught:
        MetaWeights(source)
    assert str(caught.value).startswith(f"{source / 'params.json'}: ")
    assert words in str(caught.value)
