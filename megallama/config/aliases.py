"""What other systems call our keys.

An unknown key that is known elsewhere gets its name here in the error, whichever section it stood
in, and docs/from-megatron.md is this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """A key here, or none where `note` says what became of it."""

    here: str
    megatron: str
    """Megatron-LM's names, separated by spaces."""
    elsewhere: str
    """Names in Hugging Face, torchtitan and the LLaMA releases, separated by spaces."""
    note: str = ""


_ALWAYS = "always on, remove it"

ALIASES: tuple[Alias, ...] = (
    Alias("model.d_model", "hidden_size", "dim n_embd"),
    Alias("model.layers", "num_layers", "num_hidden_layers n_layers n_layer"),
    Alias("model.heads", "num_attention_heads", "n_heads n_head num_heads"),
    Alias("model.kv_heads", "num_query_groups", "num_key_value_heads n_kv_heads"),
    Alias("model.ffn", "ffn_hidden_size", "intermediate_size hidden_dim"),
    Alias("model.vocab", "vocab_size padded_vocab_size", ""),
    Alias("model.rope_theta", "rotary_base", "rope_base"),
    Alias("model.rope_scaling", "use_rope_scaling rope_scaling_factor", "scaled_rope"),
    Alias("model.rope_scaling.original_context", "", "original_max_position_embeddings"),
    Alias("model.norm_eps", "norm_epsilon layernorm_epsilon", "rms_norm_eps"),
    Alias("model.tie_embeddings", "", "tie_word_embeddings enable_weight_tying"),
    Alias(
        "model.tie_embeddings",
        "untie_embeddings_and_output_weights",
        "",
        "the opposite: untied is the default",
    ),
    Alias("", "kv_channels", "head_dim", "remove it: the head width is d_model / heads"),
    Alias(
        "",
        "group_query_attention",
        "",
        "remove it: model.kv_heads below model.heads says it",
    ),
    Alias(
        "train.sequence_length",
        "seq_length max_position_embeddings",
        "seq_len max_seq_len block_size model_max_length",
    ),
    Alias("train.global_batch", "global_batch_size", ""),
    Alias(
        "train.micro_batch",
        "micro_batch_size",
        "local_batch_size per_device_train_batch_size",
    ),
    Alias(
        "train.global_batch",
        "",
        "gradient_accumulation_steps",
        "the number of micro-batches follows from it",
    ),
    Alias("train.steps", "train_iters", "max_steps"),
    Alias("train.tokens", "train_samples", "train_tokens", "in tokens, not samples"),
    Alias("train.max_minutes", "exit_duration_in_mins", ""),
    Alias(
        "train.profile",
        "profile_step_start profile_step_end",
        "enable_profiling profile_freq",
        "as {start: STEP, steps: COUNT}",
    ),
    Alias(
        "train.precision",
        "bf16 fp16 params_dtype",
        "dtype torch_dtype mixed_precision_param",
        "bf16, fp32 or fp64",
    ),
    Alias("train.deterministic", "deterministic_mode", "use_deterministic_algorithms"),
    Alias(
        "train.saved_activations",
        "recompute_granularity recompute_activations recompute_method recompute_num_layers",
        "gradient_checkpointing activation_checkpoint",
        "full recomputation is layer_input",
    ),
    Alias(
        "parallel.tensor",
        "tensor_model_parallel_size",
        "tensor_parallel_degree tensor_parallel_size tp_size",
    ),
    Alias(
        "parallel.pipeline",
        "pipeline_model_parallel_size",
        "pipeline_parallel_degree pipeline_parallel_size pp_size",
    ),
    Alias(
        "parallel.data",
        "data_parallel_size",
        "data_parallel_replicate_degree data_parallel_shard_degree dp_size",
    ),
    Alias(
        "parallel.virtual_stages",
        "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank",
        "",
        "the number of chunks on a pipeline rank",
    ),
    Alias("parallel.schedule", "", "pipeline_parallel_schedule"),
    Alias(
        "parallel.stage_layers",
        "pipeline_model_parallel_layout decoder_first_pipeline_num_layers "
        "decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split",
        "pipeline_parallel_layers_per_stage module_fqns_per_model_part",
        "cost, even, or the layers of each chunk",
    ),
    Alias(
        "parallel.timeout_seconds",
        "distributed_timeout_minutes",
        "train_timeout_seconds ddp_timeout",
        "in seconds",
    ),
    Alias("parallel.overlap", "tp_comm_overlap", "enable_async_tensor_parallel"),
    Alias(
        "",
        "context_parallel_size expert_model_parallel_size",
        "context_parallel_degree expert_parallel_degree",
        "remove it: there is no context or expert parallelism here",
    ),
    Alias(
        "",
        "use_distributed_optimizer",
        "",
        "remove it: how optimizer state is held follows from the layout",
    ),
    Alias(
        "", "overlap_grad_reduce overlap_param_gather", "", "remove it: parallel.overlap says it"
    ),
    Alias("optimizer.lr", "", "learning_rate max_lr"),
    Alias("optimizer.min_lr", "", "min_learning_rate"),
    Alias("optimizer.min_lr", "", "min_lr_ratio min_lr_factor", "a rate, not a ratio"),
    Alias("optimizer.warmup_steps", "lr_warmup_iters", "num_warmup_steps warmup_iters"),
    Alias(
        "optimizer.warmup_steps",
        "lr_warmup_fraction lr_warmup_samples",
        "warmup_ratio",
        "in steps",
    ),
    Alias("optimizer.schedule", "lr_decay_style", "lr_scheduler_type decay_type"),
    Alias("optimizer.decay_steps", "lr_wsd_decay_iters", "", "with optimizer.schedule: wsd"),
    Alias(
        "",
        "lr_decay_iters lr_decay_samples",
        "lr_decay_steps",
        "remove it: the rate decays to the last step of the run",
    ),
    Alias("optimizer.betas", "adam_beta1 adam_beta2", "beta1 beta2", "both, as [0.9, 0.95]"),
    Alias("optimizer.eps", "adam_eps", "adam_epsilon"),
    Alias("optimizer.weight_decay", "", "wd"),
    Alias("optimizer.grad_clip", "clip_grad", "max_grad_norm max_norm gradient_clip_val"),
    Alias("data.tokenizer", "tokenizer_model", "tokenizer_path tokenizer_name_or_path"),
    Alias(
        "data.mixture",
        "data_path train_data_path",
        "dataset dataset_path",
        "a list of {name, path, weight}",
    ),
    Alias("data.mask_documents", "reset_attention_mask reset_position_ids", ""),
    Alias("validation.every", "eval_interval", "eval_steps"),
    Alias("validation.sequences", "eval_iters split", "", "sequences held out of each source"),
    Alias("checkpoint.every", "save_interval", "save_steps"),
    Alias("checkpoint.keep", "", "save_total_limit keep_latest_k"),
    Alias("run.root", "save", "output_dir dump_folder"),
    Alias("", "load", "resume_from_checkpoint", "remove it: give --resume on the command line"),
    Alias("log.every", "log_interval", "logging_steps log_freq"),
    Alias("log.wandb", "wandb_project", "enable_wandb report_to"),
    Alias(
        "", "swiglu normalization use_flash_attn disable_bias_linear", "", f"{_ALWAYS}: LLaMA is so"
    ),
)


def canonical(name: str) -> str:
    """One spelling for `--hidden-size`, `hidden_size` and `HiddenSize`."""
    return name.replace("-", "").replace("_", "").lower()


_BY_NAME = {
    canonical(name): alias
    for alias in ALIASES
    for name in f"{alias.megatron} {alias.elsewhere}".split()
}


def find_alias(name: str) -> Alias | None:
    """The row for a key of another system, in any spelling."""
    return _BY_NAME.get(canonical(name))


def _code(names: str, dashes: bool = False) -> str:
    spelled = (f"--{name.replace('_', '-')}" if dashes else name for name in names.split())
    return ", ".join(f"`{name}`" for name in spelled)


def from_megatron_markdown() -> str:
    """The text of docs/from-megatron.md."""
    lines = [
        "# From Megatron-LM and others",
        "",
        "What the keys of Megatron-LM, Hugging Face, torchtitan and the LLaMA releases are called",
        "here; `lr`, `min_lr`, `weight_decay`, `seed` and `sequence_parallel` keep their names. A",
        "config that uses another system's name is refused, with the name to use. This page is the",
        "table in `megallama/config/aliases.py`, printed by",
        "",
        "```",
        "python -c 'from megallama.config import aliases; print(aliases.from_megatron_markdown())'",
        "```",
        "",
        "| Megatron-LM | elsewhere | here | note |",
        "|---|---|---|---|",
    ]
    for alias in ALIASES:
        cells = (
            _code(alias.megatron, dashes=True),
            _code(alias.elsewhere),
            _code(alias.here),
            alias.note,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
