"""Hugging Face directories against transformers itself: bits, configs, logits, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from megallama.checkpoint import weights as streams
from megallama.checkpoint.huggingface import HuggingFaceWeights, write_huggingface
from megallama.checkpoint.manifest import Manifest
from megallama.checkpoint.store import Checkpoint
from megallama.checkpoint.weights import CheckpointWeights, part_shapes, write_checkpoint
from megallama.errors import ConfigError, CorruptError
from tests.reference import Shape, huggingface, random_batch, random_weights
from tests.unit.checkpoint.formats import (
    GRIDS,
    SCALING,
    SHAPES,
    bits_equal,
    config_for,
    our_logits,
    read_all,
    save_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Precision = str


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows: every tensor crosses several."""
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1000)


def published(directory: Path, shape: Shape, dtype: torch.dtype, shard: str = "1GB") -> Path:
    """A directory as transformers saves it."""
    weights = random_weights(shape, dtype=dtype)
    huggingface.build(shape, weights, dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def to_checkpoint(source: Path, target: Path) -> Checkpoint:
    weights = HuggingFaceWeights(source)
    facts = Manifest({"step": 0}, weights.config.model_dump(mode="json"), None, {})
    write_checkpoint(target, weights, facts)
    return Checkpoint(target)


def to_directory(source: Checkpoint, target: Path, precision: str, shard: int = 10**9) -> Path:
    target.mkdir()
    write_huggingface(target, CheckpointWeights(source), precision, {"bos": 1, "eos": 2}, shard)
    return target


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", SHAPES)
def test_there_and_back_is_bitwise(tmp_path: Path, kind: str, precision: str) -> None:
    """From one file or several of transformers', to one or several of ours."""
    shape, several = SHAPES[kind], precision == "bf16"
    source = published(tmp_path / "hf", shape, DTYPES[precision], "5KB" if several else "1GB")
    assert (len(list(source.glob("*.safetensors"))) > 3) == several
    checkpoint = to_checkpoint(source, tmp_path / "ours")
    expected = random_weights(shape, dtype=DTYPES[precision])
    stored = read_all(checkpoint)
    assert bits_equal({n: t.to(DTYPES[precision]) for n, t in stored.items()}, expected)
    back = to_directory(checkpoint, tmp_path / "back", precision, 5000 if several else 10**9)
    assert (len(list(back.glob("*.safetensors"))) > 3) == several
    assert bits_equal(tensors_of(back), tensors_of(source))


@pytest.mark.parametrize("kind", SHAPES)
def test_the_config_there_and_back(tmp_path: Path, kind: str) -> None:
    """transformers reads the same values from ours as from its own, but for tokens and trivia."""
    source = published(tmp_path / "hf", SHAPES[kind], torch.bfloat16)
    checkpoint = to_checkpoint(source, tmp_path / "ours")
    assert HuggingFaceWeights(source).config.model == config_for(SHAPES[kind]).model
    assert HuggingFaceWeights(source).config.train.precision == "bf16"
    back = to_directory(checkpoint, tmp_path / "back", "bf16")
    ours, theirs = (LlamaConfig.from_pretrained(path).to_dict() for path in (back, source))
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing <= {"_name_or_path", "transformers_version", "use_cache"}
    assert ours["rope_parameters"]["rope_theta"] == SHAPES[kind].rope_theta


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_transformers_computes_our_logits(tmp_path: Path, kind: str, grid: str) -> None:
    """From a checkpoint of any layout, in fp64 with transformers' fp32 islands lifted."""
    shape = SHAPES[kind]
    weights = random_weights(shape)
    checkpoint = save_checkpoint(tmp_path / "ours", shape, weights, GRIDS[grid])
    exported = to_directory(checkpoint, tmp_path / "hf", "fp64", 20_000)
    tokens = random_batch(shape, samples=2, length=24).tokens
    with huggingface.lift_fp32_islands(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            exported, dtype=torch.float64, attn_implementation="eager"
        )
        theirs = model(input_ids=tokens).logits
    ours = our_logits(checkpoint, tokens)
    assert ours.abs().mean() > 0.3, "logits of size one, so that 1e-12 means something"
    assert (ours - theirs).abs().max() < 1e-12
    mapped = {huggingface.huggingface_name(name): tensor for name, tensor in weights.items()}
    assert bits_equal(tensors_of(exported), mapped)


def test_a_narrower_type_is_the_rounding_and_one_too_narrow_is_refused(tmp_path: Path) -> None:
    weights = random_weights(Shape())
    checkpoint = save_checkpoint(tmp_path / "ours", Shape(), weights)
    exported = tensors_of(to_directory(checkpoint, tmp_path / "hf", "bf16"))
    for name, weight in weights.items():
        assert torch.equal(exported[huggingface.huggingface_name(name)], weight.bfloat16())
    weights["layers.1.attention.wo.weight"][3, 5] = -1e5
    large = save_checkpoint(tmp_path / "large", Shape(), weights)
    with pytest.raises(ConfigError, match=r"layers\.1\.attention\.wo\.weight: holds 100000.*fp16"):
        to_directory(large, tmp_path / "narrow", "fp16")
    weights["layers.1.attention.wo.weight"][3, 5] = torch.inf  # a diverged run's stays what it is
    diverged = save_checkpoint(tmp_path / "diverged", Shape(), weights)
    exported = tensors_of(to_directory(diverged, tmp_path / "infinite", "fp16"))
    assert exported["model.layers.1.self_attn.o_proj.weight"][3, 5] == torch.inf


def test_tensors_of_several_types_keep_them(tmp_path: Path) -> None:
    source = published(tmp_path / "hf", Shape(), torch.bfloat16)
    tensors = tensors_of(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = to_checkpoint(source, tmp_path / "ours")
    assert checkpoint.manifest.config["train"]["precision"] == "fp32"
    stored = read_all(checkpoint)
    assert torch.equal(stored["norm.weight"], tensors["model.norm.weight"])
    assert stored["output.weight"].dtype == torch.bfloat16


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published(tmp_path / "hf", SHAPES["scaled"], torch.float32)


def edit(directory: Path, file: str = "config.json", **changes: Any) -> None:
    """Set keys of a JSON file; None takes one out, "null" makes it null."""
    path = directory / file
    body = json.loads(path.read_text())
    for key, value in changes.items():
        body[key] = None if value == "null" else value
        if value is None:
            del body[key]
    path.write_text(json.dumps(body))


OLD_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_config_of_transformers_4(source: Path) -> None:
    now = HuggingFaceWeights(source).config
    assert now.model.rope_scaling is not None
    assert now.model.rope_scaling.model_dump() == SCALING._asdict()
    edit(source, rope_parameters=None, dtype=None, rope_theta=500_000.0, rope_scaling=OLD_SCALING)
    edit(source, torch_dtype="float32")
    assert HuggingFaceWeights(source).config == now
    edit(source, rope_scaling="null", rope_theta=1e6)
    plain = HuggingFaceWeights(source).config.model
    assert (plain.rope_scaling, plain.rope_theta) == (None, 1e6)


def test_absent_keys_have_transformers_defaults(tmp_path: Path) -> None:
    """As the first LLaMA conversions were published, with RoPE's frequencies beside the weights."""
    source = published(tmp_path / "hf", SHAPES["MHA"], torch.float32)
    absent = ("rope_parameters", "head_dim", "num_key_value_heads")
    absent += ("tie_word_embeddings", "max_position_embeddings", "attention_bias", "mlp_bias")
    edit(source, **dict.fromkeys(absent))
    tensors = tensors_of(source)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    defaults = LlamaConfig()
    config = HuggingFaceWeights(source).config
    assert config.model.kv_heads == config.model.heads
    assert config.model.tie_embeddings == defaults.tie_word_embeddings
    assert config.model.rope_theta == defaults.rope_parameters["rope_theta"]
    assert config.train.sequence_length == defaults.max_position_embeddings


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "mistral"}, "model_type=mistral"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    "attention bias": ({"attention_bias": True}, "attention_bias=True"),
    "bias of the MLP": ({"mlp_bias": True}, "mlp_bias=True"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window=4096"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "head width": ({"head_dim": 16}, "head_dim=16; heads of hidden_size / num_attention_heads"),
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    "no width": ({"hidden_size": None}, "hidden_size is missing"),
    "words for a number": ({"num_hidden_layers": "two"}, "num_hidden_layers=two"),
    "rope of another kind": ({"rope_scaling": [8.0]}, "rope_scaling=[8.0]; make it an object"),
    "heads": ({"num_key_value_heads": 3, "head_dim": 8}, "model.kv_heads=3: does not divide"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type=yarn"),
    "old rope": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type=linear; megallama has default and llama3",
    ),
    "half a rope": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        "rope_scaling.low_freq_factor is missing",
    ),
    "part of a head": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_that_megallama_does_not_have(source: Path, fault: str) -> None:
    changes, words = REFUSED[fault]
    edit(source, **changes)
    with pytest.raises(ConfigError) as caught:
        HuggingFaceWeights(source)
    assert str(caught.value).startswith(f"{source / 'config.json'}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


Q0 = "model.layers.0.self_attn.q_proj"


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[dict[str, Tensor]], Any], type[Exception], str]] = [
        (lambda t: t.pop(f"{Q0}.weight"), CorruptError, f"tensor '{Q0}.weight' is missing"),
        (
            lambda t: t.update({f"{Q0}.weight": torch.ones(32, 16)}),
            CorruptError,
            f"tensor '{Q0}.weight' has shape (32, 16), config.json makes it (32, 32)",
        ),
        (lambda t: t.update({f"{Q0}.bias": torch.ones(32)}), ConfigError, f"'{Q0}.bias' is no"),
        (
            lambda t: t.update({f"{Q0}.weight": torch.ones(32, 32, dtype=torch.int8)}),
            ConfigError,
            "holds tensors of type I8; convert a model that is not quantised",
        ),
    ]
    for change, kind, words in cases:
        copy = shutil.copytree(source, tmp_path / "copy")
        rewrite(copy, change)
        with pytest.raises(kind) as caught:
            HuggingFaceWeights(copy)
        assert words in str(caught.value)
        assert str(copy) in str(caught.value)
        shutil.rmtree(copy)


def test_damaged_files_are_named(source: Path) -> None:
    """A header that is damaged anywhere, a file cut anywhere, longer, or another."""
    path = source / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cut = [b"", whole[:5], whole[: header // 2], whole[:header], whole[:-1], whole + b"\0"]
    deep = b"[" * 100_000
    mutants = [
        *cut,
        (2**60).to_bytes(8, "little") + whole[8:],
        len(deep).to_bytes(8, "little") + deep,
    ]
    at = whole.index(b'"data_offsets"', header // 2)
    mutants.append(whole[:at] + b'"data_offsetz"' + whole[at + 14 :])
    mutants.append(whole.replace(b'"F32"', b'"F64"', 1))
    mutants.append(whole.replace(b'"data_offsets":[0', b'"data_offsets":[4', 1))
    for mutant in mutants:
        assert mutant != whole
        path.write_bytes(mutant)
        with pytest.raises(CorruptError) as caught:
            HuggingFaceWeights(source)
        assert str(caught.value).startswith(f"{path}: ")
    path.write_bytes(whole)
    weights = HuggingFaceWeights(source)
    path.write_bytes(whole[:header])  # after it was opened
    with pytest.raises(CorruptError, match=r"ends within tensor 'lm_head\.weight'"):
        list(weights.blocks("output.weight"))


def test_no_flipped_bit_of_a_header_changes_the_weights(source: Path) -> None:
    """It is refused, or it is in what means nothing here, such as the metadata."""
    path = source / "model.safetensors"
    whole, names = path.read_bytes(), list(part_shapes(HuggingFaceWeights(source).config.model))
    expected = weights_of(source, names)
    messages = []
    for at in range(0, 8 + int.from_bytes(whole[:8], "little"), 5):
        mutant = bytearray(whole)
        mutant[at] ^= 1 << at % 8
        path.write_bytes(mutant)
        try:
            assert bits_equal(weights_of(source, names), expected)
        except (CorruptError, ConfigError) as error:
            messages.append(str(error))
    assert len(messages) > 300
    assert all(str(source) in message for message in messages)


def weights_of(directory: Path, names: list[str]) -> dict[str, Tensor]:
    weights = HuggingFaceWeights(directory)
    return {name: torch.cat(list(weights.blocks(name))) for name in names}


def test_directories_that_are_not_whole(tmp_path: Path) -> None:
    source = published(tmp_path / "hf", Shape(), torch.bfloat16, "5KB")
    index = "model.safetensors.index.json"
    places = json.loads((source / index).read_text())["weight_map"]
    second = source / places[f"{Q0}.weight"]

    def refused(kind: type[Exception], words: str) -> None:
        with pytest.raises(kind) as caught:
            HuggingFaceWeights(source)
        assert words in str(caught.value)

    hidden = second.rename(source / "hidden")
    refused(ConfigError, f"cannot read {second}: No such file")
    other = next(name for name in sorted(set(places.values())) if source / name != second)
    shutil.copy(source / other, second)
    refused(CorruptError, f"{second}: holds no tensor")
    hidden.rename(second)
    for lead in ("../hf/x.safetensors", "/etc/passwd", 5):
        edit(source, index, weight_map={**places, f"{Q0}.weight": lead})
        refused(CorruptError, f"{source / index}: weight_map names no files")
    edit(source, index, weight_map=places)
    HuggingFaceWeights(source)
    (source / index).write_text("[1]")
    refused(CorruptError, f"{source / index}: not a JSON object")
    (source / index).unlink()
    refused(ConfigError, "neither model.safetensors nor model.safetensors.index.json")
    (source / "config.json").write_text('{"model_type": ')
    refused(CorruptError, "config.json: not a JSON object, or damaged")


def test_a_checkpoint_that_lacks_a_tensor_of_its_config(tmp_path: Path) -> None:
    weights = random_weights(SHAPES["tied"])
    checkpoint = save_checkpoint(tmp_path / "ours", SHAPES["tied"], weights)
    checkpoint.manifest.config["model"]["tie_embeddings"] = False
    with pytest.raises(CorruptError, match=r"'master/output\.weight' is missing"):
        CheckpointWeights(checkpoint)
    checkpoint.manifest.config["model"].update(tie_embeddings=True, vocab=60)
    with pytest.raises(CorruptError, match=r"has shape \(61, 32\), its config says \(60, 32\)"):
        CheckpointWeights(checkpoint)
