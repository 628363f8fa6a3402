"""What the benchmarks of a training step compare: megallama and transformers' LLaMA.

All train the same shape on random tokens with AdamW and clipping. megallama in bf16 has fp32
masters; Hugging Face is taken as pure bf16, and as fp32 parameters under bf16 autocast, which is
the like-for-like of masters, each eager and under torch.compile. AdamW is PyTorch's fused kernel
there, attention PyTorch's flash kernel (flash-attn's on a GPU where it is installed).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

RATE = 1e-4
POLICY = "linear_outputs"


@dataclass(frozen=True)
class Case:
    """A shape and how it is trained. A step is `micro_batches` of `micro_batch` samples."""

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    length: int
    micro_batch: int
    micro_batches: int = 1
    precision: str = "bf16"
    device: str = "cpu"

    @property
    def model(self) -> dict[str, int]:
        names = ("d_model", "layers", "heads", "kv_heads", "ffn", "vocab")
        return {name: getattr(self, name) for name in names}

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.length * self.micro_batch * self.micro_batches

    def config(self, policy: str = POLICY) -> Any:
        """As megallama trains it."""
        from megallama.config import parse_config

        train = dict(
            steps=1,
            sequence_length=self.length,
            global_batch=self.micro_batch * self.micro_batches,
            micro_batch=self.micro_batch,
            precision=self.precision,
            saved_activations=policy,
        )
        return parse_config({"model": self.model, "train": train, "optimizer": {"lr": RATE}})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Contender(Protocol):
    """A model that is being trained."""

    def step(self) -> float:
        """One optimizer step; the mean loss."""
        ...

    def kept(self) -> Mapping[str, list[Tensor]]:
        """After a step: what is there besides activations, logits and workspaces."""
        ...


class Megallama:
    def __init__(self, case: Case, policy: str = POLICY) -> None:
        from megallama.spec.grid import ALONE
        from megallama.train import build
        from megallama.train.bench import batches

        config = case.config(policy)
        # A run's own initial weights are made on the host, in minutes for 7e9: no figure of a
        # benchmark depends on them.
        with patch.object(build, "initialize", _initialize):
            self.trainer = build.build_trainer(config)
        assert self.trainer.device.type == case.device, "a GPU trains in bf16, and a CPU where none"
        self.batch = batches(config, None, ALONE)(0)

    def step(self) -> float:
        return self.trainer.step.run(self.batch, RATE).loss

    def kept(self) -> Mapping[str, list[Tensor]]:
        state, optimizer = self.trainer.model.state, self.trainer.optimizer
        return {
            "parameters": list(state.padded_weights.values()),
            "gradients": list(state.padded_gradients.values()),
            "masters": list(state.masters.values()),
            "moments": [*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()],
        }


def _initialize(state: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for piece, master in state.pieces(state.masters):
        if piece.part.init_std is None:
            master.fill_(1.0)
        else:
            master.normal_(std=piece.part.init_std)


class HuggingFace:
    """`kind`: of the parameters' dtype, or autocast."""

    def __init__(self, case: Case, kind: str, compiled: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=case.d_model,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            intermediate_size=case.ffn,
            vocab_size=case.vocab,
            max_position_embeddings=case.length,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation=attention_of(case.device),
        )
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        self.case, self.autocast = case, kind == "autocast"
        with torch.device(case.device):  # 7e9 weights on the host would take minutes
            self.model: Any = LlamaForCausalLM._from_config(config, dtype=dtype)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.1, fused=True)
        if compiled:
            self.model = torch.compile(self.model)
        shape = case.micro_batches, case.micro_batch, case.length
        self.batch = torch.randint(case.vocab, shape, device=case.device)

    def step(self) -> float:
        self.optimizer.zero_grad()
        losses = []
        for tokens in self.batch:
            with torch.autocast(self.case.device, torch.bfloat16, enabled=self.autocast):
                loss = self.model(input_ids=tokens, labels=tokens).loss / len(self.batch)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(sum(losses))

    def kept(self) -> Mapping[str, list[Tensor]]:
        states = self.optimizer.state.values()
        return {
            "parameters": list(self.parameters),
            "gradients": [p.grad for p in self.parameters if p.grad is not None],
            "moments": [t for state in states for t in state.values() if isinstance(t, Tensor)],
        }


def attention_of(device: str) -> str:
    """The fastest attention that transformers has here."""
    flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


#: Of each precision, the contenders by name; the first is ours.
CONTENDERS: dict[str, dict[str, Callable[[Case], Contender]]] = {
    "bf16": {
        "megallama": Megallama,
        "hf-bf16": lambda case: HuggingFace(case, "bf16", compiled=False),
        "hf-bf16-compiled": lambda case: HuggingFace(case, "bf16", compiled=True),
        "hf-autocast": lambda case: HuggingFace(case, "autocast", compiled=False),
        "hf-autocast-compiled": lambda case: HuggingFace(case, "autocast", compiled=True),
    },
    "fp32": {
        "megallama": Megallama,
        "hf-fp32": lambda case: HuggingFace(case, "fp32", compiled=False),
        "hf-fp32-compiled": lambda case: HuggingFace(case, "fp32", compiled=True),
    },
}
