"""Generation is the argmax of the plain reference on the checkpoint's weights, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megallama.cli.main import main
from megallama.config.schema import Config
from megallama.data.tokenizer import Tokenizer, train_tokenizer
from megallama.errors import EXIT_CONFIG, EXIT_LOST, ConfigError
from megallama.train.build import Trainer, build_dataset, build_trainer
from megallama.train.generate import generate
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE
from megallama.train.snapshot import Progress, save
from tests.conftest import MakeConfig, TinyData
from tests.harness import parts, put
from tests.reference import plain, random_weights


def greedy(config: Config, directory: Path, prompt: str, count: int) -> str:
    """The same by the reference, from safetensors' own reading of the file."""
    tensors = load_file(directory / "rank-00000.safetensors")
    weights = {n.removeprefix("master/"): t for n, t in tensors.items() if n.startswith("master/")}
    tokenizer = Tokenizer(config.data.tokenizer)
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    for _ in range(count):
        window = torch.tensor([ids[-config.train.sequence_length :]])
        ids.append(int(plain.forward(config.model, weights, window)[0, -1].argmax()))
        if ids[-1] == tokenizer.eos:
            return tokenizer.decode(ids[1:-1])
    return tokenizer.decode(ids[1:])


def test_it_is_the_references_argmax(make_config: MakeConfig, tiny_data: TinyData) -> None:
    """On random weights of size one, where every token before has a say in the next."""
    config = make_config({"model.tie_embeddings": False})
    trainer = build_trainer(config)
    weights = random_weights(config.model, seed=3, dtype=torch.float32)
    put(parts(trainer.model.state, trainer.model.state.masters), weights)
    trainer.model.state.masters["output"][:259].zero_()  # no </s>, and no bytes: few are text
    folder = config.run.directory / "checkpoints"
    directory = save(trainer, Progress(), folder, build_dataset(trainer.config), Meeting(ALONE))
    texts = set()
    for prompt in ("the fox", "def x", "", " "):
        for count in (1, 7, 40):  # 40 tokens and the prompt do not fit the sequence of 32
            text = generate(config.run.directory, prompt, count)
            assert text == greedy(config, directory, prompt, count)
            assert text == generate(directory, prompt, count)
            assert text.startswith(prompt)
            texts.add(text)
    assert len(texts) == 12


@pytest.fixture
def chain(make_config: MakeConfig, tiny_data: TinyData, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint whose likeliest successor of each token is given: one direction a token."""
    config = make_config({"model.tie_embeddings": False, "model.vocab": 320})

    def make(successors: dict[int, int]) -> Path:
        trainer: Trainer = build_trainer(config)
        masters = trainer.model.state.masters
        for name, weight in masters.items():
            if not name.endswith("norm"):
                weight.zero_()
        for direction, (token, successor) in enumerate(successors.items()):
            masters["tok_embeddings"][token, direction] = 1
            masters["output"][successor, direction] = 1
        return save(
            trainer, Progress(), tmp_path / "chain", build_dataset(trainer.config), Meeting(ALONE)
        )

    return make


def test_it_ends_with_the_document(chain: Callable[..., Path], tiny_data: TinyData) -> None:
    tokenizer = Tokenizer(tiny_data.tokenizer)
    last = tokenizer.encode("fox")[-1]
    follow = tokenizer.encode("dog")[-1]
    directory = chain({last: follow, follow: tokenizer.eos, tokenizer.eos: last})
    text = tokenizer.decode([*tokenizer.encode("fox"), follow])
    assert generate(directory, "fox", 1) == text
    assert generate(directory, "fox", 9) == text


def test_ids_beyond_the_tokenizers_are_never_chosen(
    chain: Callable[..., Path], tiny_data: TinyData
) -> None:
    tokenizer = Tokenizer(tiny_data.tokenizer)
    last = tokenizer.encode("fox")[-1]
    directory = chain({last: 310})
    text = generate(directory, "fox", 1)
    assert text == tokenizer.decode([*tokenizer.encode("fox"), 0])  # all others are equal


def test_it_needs_the_tokenizer_of_the_training(
    make_config: MakeConfig, tiny_data: TinyData, tmp_path: Path
) -> None:
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes(tiny_data.tokenizer.read_bytes())
    with_copy = build_trainer(make_config({"data.tokenizer": str(copy)}))
    directory = save(
        with_copy, Progress(), tmp_path, build_dataset(with_copy.config), Meeting(ALONE)
    )
    generate(directory, "fox", 1)
    train_tokenizer([tiny_data.tokenizer.with_name("prose.jsonl")], 290, copy)
    with pytest.raises(ConfigError, match=r"tokenizer\.model: not the tokenizer"):
        generate(directory, "fox", 1)
    copy.unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.model: No such file"):
        generate(directory, "fox", 1)
    without = build_trainer(make_config({"data.tokenizer": None}))
    directory = save(
        without, Progress(step=1), tmp_path, build_dataset(without.config), Meeting(ALONE)
    )
    with pytest.raises(ConfigError, match=r"without data\.tokenizer"):
        generate(directory, "fox", 1)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such checkpoint"):
        generate(tmp_path / "nowhere", "fox", 1)
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        generate(tmp_path, "fox", 1)


@pytest.mark.parametrize(
    "error, words, code",
    [
        ("CUDA error: uncorrectable ECC error encountered", "the GPU of rank 0 (host ", EXIT_LOST),
        ("CUDA out of memory. Tried to allocate 2 GiB", "cpu has no memory left", EXIT_CONFIG),
    ],
)
def test_a_device_that_fails_is_said_in_one_line(
    chain: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: str,
    words: str,
    code: int,
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(error)

    directory = chain({})
    monkeypatch.setattr("megallama.model.llama.Llama.logits", fail)
    assert main(["generate", str(directory), "--prompt", "fox"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
