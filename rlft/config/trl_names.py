"""What TRL calls a setting, what version 0.1 of rlft called it, and what it is here, value included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

OTHERS = {"r": "PEFT", "gpu_memory_utilization": "vLLM", "fast_inference": "Unsloth"}
"""Names that are not TRL's -> whose they are."""


class Ours(NamedTuple):
    """A setting of ours that does what one of TRL's does."""

    ours: str
    """Its dotted name."""
    values: Mapping[Any, Any] = {}
    """TRL's value -> ours, where they differ: a text is written as it stands."""
    note: str = ""
    """How the value translates where a table cannot say it."""

    def sentence(self, name: str, value: Any) -> str:
        """What the error for TRL's `name` = `value` says after "unknown setting."."""
        key, theirs = value.lower() if isinstance(value, str) else value, f"{OTHERS.get(name, 'TRL')}'s {name}"
        if isinstance(key, str | bool) and key in self.values:
            return f"{theirs} = {json.dumps(value)} is {self.values[key]} here"
        return f"{theirs} is {self.ours} here{': ' if self.note else ''}{self.note}"


_ADVANTAGE = {
    True: 'algo.advantage = "group_norm"', "group": 'algo.advantage = "group_norm"',
    "batch": 'algo.advantage = "batch_std"', False: 'algo.advantage = "group_mean"',
    "none": 'algo.advantage = "group_mean"',
}  # fmt: skip
_LOSS_TYPE = {
    "grpo": 'algo.aggregation = "sequence_mean"',
    "dapo": 'algo.aggregation = "token_mean"',
    "bnpo": 'algo.aggregation = "token_mean"',
    "dr_grpo": 'algo.name = "dr_grpo"',
    "luspo": 'algo.name = "luspo"',
    "cispo": 'algo.name = "cispo"',
    "sapo": 'algo.name = "sapo"',
    "vespo": 'algo.name = "vespo"',
    "sigmoid": 'algo.name = "dpo"',
    "hinge": 'algo.name = "hinge"',
    "ipo": 'algo.name = "ipo"',
    "exo_pair": 'algo.name = "exo"',
    "nca_pair": 'algo.name = "nca"',
    "robust": 'algo.name = "robust_dpo"',
    "sppo_hard": 'algo.name = "sppo"',
    "apo_zero": 'algo.name = "apo"',
    "apo_down": 'algo.name = "apo"',
    "nll": 'algo.name = "sft"',
    "dft": 'algo.name = "dft"',
    "kto": 'algo.name = "kto"',
}
_STEPS = "a number of steps here"
_CACHE = "GiB of vLLM's cache, not a share of the card"

TRL_NAMES = {
    "adam_beta1": Ours("optim.betas", note="the first of the two"),
    "adam_beta2": Ours("optim.betas", note="the second of the two"),
    "adam_epsilon": Ours("optim.eps"),
    "beta": Ours("algo.kl_coef"),
    "bf16": Ours("dtype", {True: 'dtype = "bfloat16"', False: 'dtype = "float32"'}),
    "chat_template_kwargs": Ours("data.chat_template_kwargs"),
    "cpo_alpha": Ours("algo.nll_coef"),
    "data_seed": Ours("seed"),
    "dataset_config": Ours("data.subset"),
    "dataset_name": Ours("data.path"),
    "dataset_text_field": Ours("data.columns", note='{text = "its name"}'),
    "dataset_train_split": Ours("data.split"),
    "delta": Ours("algo.delta"),
    "entropy_coef": Ours("algo.entropy_coef"),
    "entropy_coef_delta": Ours("algo.entropy_coef_delta"),
    "entropy_coef_max": Ours("algo.entropy_coef_max"),
    "entropy_target": Ours("algo.entropy_target"),
    "epsilon": Ours("algo.clip_low", note="clip_high does not follow it, set both"),
    "epsilon_high": Ours("algo.clip_high"),
    "eval_dataset": Ours("eval.data"),
    "eval_steps": Ours("eval.every", note=_STEPS),
    "eval_strategy": Ours("eval.every", {"no": "eval.every = 0"}, _STEPS),
    "fast_inference": Ours("engine.name", {True: 'engine.name = "vllm"', False: 'engine.name = "eager"'}),
    "fp16": Ours("dtype", {True: 'dtype = "float16"', False: 'dtype = "float32"'}),
    "gpu_memory_utilization": Ours("engine.kv_gib", note=_CACHE),
    "label_smoothing": Ours("algo.label_smoothing"),
    "learning_rate": Ours("optim.lr"),
    "load_in_4bit": Ours("quantization", {True: 'quantization = "nf4"', False: 'quantization = "none"'}),
    "load_in_8bit": Ours("quantization", {True: 'quantization = "int8"', False: 'quantization = "none"'}),
    "lora_alpha": Ours("lora.alpha"),
    "lora_dropout": Ours("lora.dropout"),
    "lora_r": Ours("lora.rank"),
    "lora_target_modules": Ours("lora.targets"),
    "loss_type": Ours("algo.aggregation", _LOSS_TYPE),
    "lr_scheduler_type": Ours("optim.schedule", {"constant_with_warmup": 'optim.schedule = "constant" with warmup'}),
    "mask_truncated_completions": Ours("overlong.mask"),
    "max_completion_length": Ours("sampling.max_tokens"),
    "max_grad_norm": Ours("optim.max_grad_norm"),
    "max_prompt_length": Ours("data.max_prompt_tokens"),
    "max_steps": Ours("steps"),
    "model_name_or_path": Ours("model"),
    "multi_objective_aggregation": Ours(
        "algo.advantage",
        {"sum_then_normalize": 'algo.advantage = "group_norm"', "normalize_then_sum": 'algo.advantage = "gdpo"'},
    ),
    "num_generations": Ours("sampling.group_size"),
    "num_generations_eval": Ours("eval.samples"),
    "num_iterations": Ours("optim.passes"),
    "num_train_epochs": Ours("data.epochs"),
    "off_policy_mask_threshold": Ours("algo.off_policy_limit"),
    "output_dir": Ours("out"),
    "overwrite_output_dir": Ours("if_exists", {True: 'if_exists = "overwrite"'}),
    "per_device_train_batch_size": Ours(
        "prompts_per_step",
        note="TRL's counts completions, ours prompts: theirs x devices x gradient_accumulation_steps / num_generations",
    ),
    "r": Ours("lora.rank"),
    "report_to": Ours("track.use", {"none": "track.use = []"}, "a list of trackers"),
    "reward_funcs": Ours("rewards"),
    "reward_weights": Ours("rewards.weight", note="one weight in each table of rewards"),
    "rpo_alpha": Ours("algo.nll_coef"),
    "run_name": Ours("track.name"),
    "sapo_temperature_neg": Ours("algo.temperature_neg"),
    "sapo_temperature_pos": Ours("algo.temperature_pos"),
    "save_strategy": Ours("checkpoint.every", note=_STEPS),
    "save_steps": Ours("checkpoint.every", note=_STEPS),
    "save_total_limit": Ours("checkpoint.keep"),
    "scale_rewards": Ours("algo.advantage", _ADVANTAGE),
    "shuffle_dataset": Ours("data.shuffle"),
    "simpo_gamma": Ours("algo.gamma"),
    "target_modules": Ours("lora.targets"),
    "temperature": Ours("sampling.temperature"),
    "top_entropy_quantile": Ours("algo.entropy_share", note="the same share"),
    "top_k": Ours("sampling.top_k"),
    "top_p": Ours("sampling.top_p"),
    "torch_dtype": Ours("dtype"),
    "use_adaptive_entropy": Ours("algo.entropy_target", note="the entropy that is aimed at, in nats"),
    "use_bias_correction_kl": Ours("algo.kl", {True: 'algo.kl = "k3_ratio"', False: 'algo.kl = "forward"'}),
    "use_rslora": Ours("lora.rslora"),
    "use_cpu": Ours("device", {True: 'device = "cpu"'}),
    "use_vllm": Ours("engine.name", {True: 'engine.name = "vllm"', False: 'engine.name = "eager"'}),
    "vespo_k_neg": Ours("algo.k_neg"),
    "vespo_k_pos": Ours("algo.k_pos"),
    "vespo_lambda_neg": Ours("algo.lambda_neg"),
    "vespo_lambda_pos": Ours("algo.lambda_pos"),
    "vllm_gpu_memory_utilization": Ours("engine.kv_gib", note=_CACHE),
    "vllm_importance_sampling_correction": Ours("algo.correction"),
    "vllm_max_model_length": Ours("engine.max_model_len"),
    "vllm_importance_sampling_cap": Ours("algo.correction_cap"),
    "vllm_importance_sampling_clip_max": Ours("algo.correction_cap"),
    "vllm_importance_sampling_clip_min": Ours("algo.correction_floor"),
    "vllm_importance_sampling_mode": Ours("algo.correction_weight"),
    "warmup_ratio": Ours("optim.warmup", note="a share of all updates there, a number of updates here"),
    "warmup_steps": Ours("optim.warmup", note="a number of updates"),
    "weight_decay": Ours("optim.weight_decay"),
}
"""TRL's setting -> ours."""

TRL_NOTES = {
    "do_eval": "use the command: rlft train, rlft eval",
    "do_train": "use the command: rlft train, rlft eval",
    "gradient_accumulation_steps": "nothing to set: packing.tokens_per_micro_batch cuts a step into parts",
    "gradient_checkpointing": "nothing to set: lower packing.tokens_per_micro_batch to save memory",
    "importance_sampling_level": 'for ratios of sequences set algo.name = "gspo"',
    "load_best_model_at_end": "nothing to set: the checkpoint that did best on the held-out rows is kept and named",
    "logging_steps": "nothing to set: every step is logged",
    "metric_for_best_model": "nothing to set: the best has the highest eval/reward, or without rewards the lowest loss",
    "resume": "use the flag --resume, which goes on from the newest checkpoint in `out`",
    "resume_from_checkpoint": "use the flag --resume, which goes on from the newest checkpoint in `out`",
}
"""TRL's settings that have no counterpart, and what to do instead."""

_SAME_NOTE = {
    "nothing to set: sequences are packed, without padding": (
        "padding_free pad_to_multiple_of packing_strategy eval_packing pad_token group_by_length "
        "train_sampling_strategy length_column_name"
    ),
    "nothing to set: no row is cut; data.max_prompt_tokens drops long prompts": (
        "max_length max_seq_length truncation_mode"
    ),
    "nothing to set: vLLM samples in this process, on the trainer's own weights; [engine] has its settings": (
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port "
        "vllm_server_timeout vllm_group_port vllm_tensor_parallel_size cache_implementation use_transformers_paged "
        "use_transformers_continuous_batching transformers_continuous_batching_config"
    ),
    "there is none: in training it would sample from another distribution than the one that is trained": (
        "min_p repetition_penalty presence_penalty frequency_penalty generation_kwargs vllm_structured_outputs_regex"
    ),
    "there is none: no code that comes with a model or a dataset is run": "trust_remote_code",
    "use the command: rlft push RUN YOU/MODEL": (
        "push_to_hub push_to_hub_model_id hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision "
        "hub_token log_completions_hub_repo"
    ),
    "nothing to set: every completion is in the run folder, and track.completions of each step go to the trackers": (
        "log_completions num_completions_to_print log_unique_prompts log_multimodal"
    ),
    "nothing to set: the reference is the model without its adapter, or with that of lora.resume_from": (
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps precompute_ref_log_probs precompute_ref_batch_size "
        "ref_model force_use_ref_model"
    ),
    "nothing to set: completions are trained, or the assistant's messages": (
        "completion_only_loss assistant_only_loss train_on_responses_only"
    ),
    "nothing to set: rows are read once, in this process": (
        "dataset_num_proc dataset_kwargs remove_unused_columns dataloader_num_workers dataloader_pin_memory "
        "dataloader_prefetch_factor dataloader_persistent_workers dataloader_drop_last"
    ),
    "nothing to set: memory is planned, and activations go to the host where the card has no room": (
        "activation_offloading auto_find_batch_size torch_empty_cache_steps use_liger_kernel liger_kernel_config"
    ),
    "nothing to set: the tokenizer's own is used; change it in the folder of the model": "chat_template_path eos_token",
    "nothing to set: every step is logged": "logging_strategy logging_first_step",
    "nothing to set: held-out rows are evaluated before the first step and after the last": "eval_on_start",
    "set prompts_per_step, the prompts of one step, and optim.minibatches, the updates it is split into": (
        "steps_per_generation generation_batch_size"
    ),
    "nothing to set: start the run with torchrun; for a base that does not fit a card set base.place": (
        "deepspeed fsdp fsdp_config"
    ),
    "there is none: rlft has nothing like it": (
        "model_init_kwargs router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 ds3_gather_for_generation "
        "max_tool_calling_iterations loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting "
        "discopop_tau neftune_noise_alpha torch_compile label_smoothing_factor "
        "entropy_coef_min"
    ),
}
TRL_NOTES |= {name: note for note, names in _SAME_NOTE.items() for name in names.split()}

RENAMED = {
    "refill": "dynamic_sampling",
    "packing.budget": "packing.tokens_per_micro_batch",
    "overlong.drop": "overlong.mask",
    "algo.gate_low": "algo.sequence_mask_low",
    "algo.gate_high": "algo.sequence_mask_high",
}
"""Settings of version 0.1 that have another name now."""

RENAMED_VALUES = {("engine.mode", "lent"): "shared", ("engine.mode", "expanded"): "dequantized"}
"""(setting, value) of version 0.1 -> the value's name now."""

TRL_REWARDS = {
    "accuracy_reward": 'TRL\'s accuracy_reward is "math" here; "number" and "exact" compare numbers and texts',
    "reasoning_accuracy_reward": 'TRL\'s reasoning_accuracy_reward is "math" here, which reads what follows </think>',
    "think_format_reward": 'TRL\'s think_format_reward is "format" here, with args = {pattern = "<think>.*</think>.*"}',
    "get_soft_overlong_punishment": 'TRL\'s get_soft_overlong_punishment is overlong.penalty_share, or "length"',
    "get_repetition_penalty_reward": 'TRL\'s get_repetition_penalty_reward is "repetition" here',
    "get_cosine_scaled_reward": "rlft has no cosine-scaled reward; TRL's is an object that a script can give to "
    "rlft.train(cfg, rewards=[...])",
}
"""TRL's name of a reward function -> what does it here."""
