"""vLLM's EngineArgs: what an engine is made with, under vLLM's names, and one line for a name that does not exist here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ch06_tp_vllm.ngram_proposer import SpeculativeConfig
from ch06_tp_vllm.scheduler import POLICIES
from common.arguments import says_names
from common.quantization.scheme import QUANTIZED_COMPUTE
from common.values import choice, flag, new_file, path, real, text, whole

# what vLLM has and this engine has not: the way out
ELSEWHERE = {
    "pipeline_parallel_size": "layers are not spread over ranks here; use tensor_parallel_size=",
    "data_parallel_size": "one engine is one replica; start several",
    "all2all_backend": "every rank has all rows, and nothing travels to experts; leave it out",
    "enable_eplb": "experts stay where they are in this chapter; leave it out",
    "swap_space": "preempted requests are computed again, as in vLLM V1; leave it out",
    "cpu_offload_gb": "weights stay on the device; use more ranks or a smaller dtype",
    "max_logprobs": "any number up to the vocabulary is given; leave it out",
    "disable_log_stats": "nothing is logged; see LLM.get_metrics() and trace=",
    "hf_overrides": "edit the folder's config.json",
    "revision": "give the Hub id alone, or a local folder",
    "download_dir": "the Hub's own cache is used (HF_HOME)",
    "distributed_executor_backend": "processes of torchrun, or started by the engine itself; leave it out",
    "max_seq_len_to_capture": "CUDA graphs hold any length; leave it out, or enforce_eager=True",
    "tokenizer_mode": "the folder's own tokenizer is used; leave it out",
    "served_model_name": "nothing is served here; leave it out",
    "compilation_config": "nothing is compiled but kernels; leave it out, or enforce_eager=True for no CUDA graphs",
    "task": "this engine generates; leave it out",
    "runner": "this engine generates; leave it out",
    "convert": "this engine generates; leave it out",
    "kv_cache_memory_bytes": "use num_gpu_blocks_override= or gpu_memory_utilization=",
    "tokenizer_revision": "give a local folder",
    "code_revision": "a folder's Python is never run here; leave it out",
    "hf_token": "the Hub's own login is used (HF_TOKEN)",
    "config_format": "config.json in Hugging Face layout is read; leave it out",
    "limit_mm_per_prompt": "this engine reads text only",
    "logits_processors": "use logit_bias, bad_words or allowed_token_ids of SamplingParams",
    "long_prefill_token_threshold": "a long prompt gets what is left of max_num_batched_tokens; leave it out",
    "disable_sliding_window": "windows are not here; leave it out",
    "profiler_config": "see demo_10_profile.py",
    "kv_transfer_config": "prefill and decode run in one engine here",
    "nnodes": "several hosts: start it under torchrun on each",
    "max_cpu_loras": "an adapter stays in memory once it was asked for; leave it out",
    "fully_sharded_loras": "A and B are cut as the base is; leave it out",
    "lora_dtype": "adapters have the model's dtype; leave it out",
    "moe_backend": "it is moe_runner= here: auto, loop, grouped or triton",
}  # fmt: skip
# values that ask for nothing of it, besides None: vLLM's own defaults (0.33, engine/arg_utils.py, config/, entrypoints/llm.py)
IDLE = dict.fromkeys(ELSEWHERE) | {
    "pipeline_parallel_size": 1, "data_parallel_size": 1, "nnodes": 1,
    "all2all_backend": "allgather_reducescatter", "enable_eplb": False,
    "cpu_offload_gb": 0, "swap_space": 4, "max_logprobs": 20, "disable_log_stats": True, "hf_overrides": {},
    "tokenizer_mode": "auto", "task": "generate", "runner": "auto", "convert": "auto",
    "config_format": "auto", "limit_mm_per_prompt": {}, "long_prefill_token_threshold": 0, "disable_sliding_window": False,
    "fully_sharded_loras": False, "lora_dtype": "auto", "moe_backend": "auto",
}  # fmt: skip


@says_names("engine argument", ELSEWHERE, IDLE)
@dataclass(frozen=True)
class EngineArgs:
    """The arguments of LLM and LLMEngine.

    model: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model. tokenizer: another folder for the
    tokenizer; skip_tokenizer_init: none, token ids only. max_model_len: tokens of a request at most (prompt and answer).
    enable_expert_parallel: the ranks hold some experts each, and not some columns of all of them.
    max_num_batched_tokens: the budget of a step. num_gpu_blocks_override: blocks in the pool; by default what memory
    allows, gpu_memory_utilization of the device's memory for weights and pool together. scheduler_reserve_full_isl: a
    request enters only if its whole prompt fits, and a share `watermark` of the blocks stays free. enforce_eager: no CUDA graphs.
    disable_custom_all_reduce: NCCL for small sums too (common/distributed/symmetric_memory.py). all_reduce: "shm" lets CPU
    ranks of one host add up in shared memory (common/distributed/shared_memory.py) instead of gloo.
    moe_runner: the form in which experts are computed (common/layers/moe_runner.py). quantization: fp8, w8a8_fp8 or w8a8_int8
    rounds a full-precision checkpoint as it is read; quantized_compute: "dequantise", "weight_only", "activations" or auto, what
    becomes of quantized weights (common/quantization/linear_methods.py).
    speculative_config: guesses that are verified, several tokens a step (ngram_proposer.py). enable_lora: requests may bring an
    adapter (lora_request.py), max_loras of them run together, none of a rank above max_lora_rank.
    async_scheduling: queue a step before the last one's tokens are seen; None: on a GPU. generation_config: "auto" takes
    sampling defaults from the model's generation_config.json, "vllm" takes vLLM's own. check_finite: look for NaN and
    infinity in the weights before they are used, and name them. check: test the conservation of blocks after every step.
    trace: a file to which every step writes a line (trace.py).
    Raises ValueError for a value of a wrong kind or outside its range.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    load_format: str = "auto"
    tensor_parallel_size: int | None = None
    enable_expert_parallel: bool = False
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    quantized_compute: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    scheduling_policy: str = "fcfs"
    seed: int = 0
    enforce_eager: bool = False
    disable_custom_all_reduce: bool = False
    all_reduce: str = "auto"
    moe_runner: str = "auto"
    async_scheduling: bool | None = None
    speculative_config: Mapping[str, Any] | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    attention_backend: str = "auto"
    generation_config: str = "auto"
    check_finite: bool = False
    check: bool = False
    trace: str | Path | None = None

    @classmethod
    def of(cls, given: Mapping[Any, Any]) -> "EngineArgs":
        """The same from a dictionary, whose keys may be anything."""
        return cls(**{str(name): value for name, value in given.items()})

    def __post_init__(self):
        for name in ("max_num_batched_tokens", "num_gpu_blocks_override", "tensor_parallel_size", "max_model_len"):
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), 1))
        for name in ("block_size", "max_num_seqs", "enable_prefix_caching", "enable_chunked_prefill"):
            if getattr(self, name) is None:  # vLLM's own default
                self._set(name, type(self).__dataclass_fields__[name].default)
        for name in ("block_size", "max_num_seqs", "max_loras", "max_lora_rank"):
            self._set(name, whole(name, getattr(self, name), 1))
        self._set("seed", whole("seed", self.seed, -(1 << 63), (1 << 63) - 1))
        switches = (
            "skip_tokenizer_init", "trust_remote_code", "enable_prefix_caching", "enable_chunked_prefill",
            "scheduler_reserve_full_isl", "enforce_eager", "disable_custom_all_reduce", "check_finite", "check",
            "enable_expert_parallel", "enable_lora",
        )  # fmt: skip
        for name in switches:
            self._set(name, flag(name, getattr(self, name)))
        if self.async_scheduling is not None:
            self._set("async_scheduling", flag("async_scheduling", self.async_scheduling))
        if self.speculative_config is not None:
            SpeculativeConfig.of(self.speculative_config)
            if self.enable_lora:
                raise ValueError(
                    "enable_lora with speculative_config: a verify step knows no adapters here; leave one of the two out"
                )
            if self.async_scheduling:
                raise ValueError(
                    "async_scheduling with speculative_config: guesses need the last step's tokens; leave one of the two out"
                )
        for name in ("model", "tokenizer"):
            self._set(name, path(name, getattr(self, name)))
        if self.gpu_memory_utilization is not None:
            share = real("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, "; a share", open_below=True)
            self._set("gpu_memory_utilization", share)
        self._set("watermark", real("watermark", self.watermark, 0, 1, "; a share of the blocks"))
        for name in ("dtype", "kv_cache_dtype", "device", "attention_backend"):
            self._set(name, text(name, getattr(self, name)))
        for name, allowed in (
            ("load_format", ("auto", "safetensors")), ("generation_config", ("auto", "vllm")), ("scheduling_policy", POLICIES),
            ("all_reduce", ("auto", "shm")), ("moe_runner", ("auto", "loop", "grouped", "triton")),
            ("quantized_compute", QUANTIZED_COMPUTE),
        ):  # fmt: skip
            choice(name, getattr(self, name), allowed)
        self._set("quantization", text("quantization", self.quantization, none=True))
        if self.trust_remote_code:
            raise ValueError("trust_remote_code=True: a folder's Python is never run here; leave it out")
        new_file("trace", self.trace)

    def for_a_follower(self) -> dict[str, Any]:
        """The same as JSON; a trace is rank 0's alone."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        return values | {"trace": None}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
