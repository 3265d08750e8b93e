"""SGLang's ServerArgs: what an engine is made with, under SGLang's names, and one line for a name that does not exist here.

It imports nothing that brings torch: a wrong argument is told at once, and not seconds later.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ch07_sglang_radix.eviction import pick_strategy
from ch07_sglang_radix.policy_names import check_policy
from common.arguments import says_names
from common.values import choice, flag, new_file, path, real, text, whole

LEVELS = ("critical", "error", "warning", "info", "debug")
MAX_RUNNING = 256
DEFAULT_PAGE = {
    "cpu": 1,
    "cuda": 16,
}  # 1 finds every token alike, and costs a real model nothing on a CPU (page_size.csv)

# what SGLang has and this engine has not: the way out
ELSEWHERE = {
    "enable_priority_scheduling": "use schedule_policy='priority', which preempts nobody",
    "prefill_decode_interval": "a decode step follows every prefill step while somebody runs; leave it out",
    "host": "an engine listens to nobody; start a server with python -m ch07_sglang_radix.launch_server",
    "port": "an engine listens to nobody; start a server with python -m ch07_sglang_radix.launch_server",
    "api_key": "an engine listens to nobody; start a server with python -m ch07_sglang_radix.launch_server",
    "chat_template": "put it into the tokenizer's folder, and name that with tokenizer_path=",
    "enable_metrics": "get_server_info() tells them; of the server, GET /metrics",
    "log_requests": "use trace=, a line for each step, or log_level=",
    "quantization": "weights are read as float32, bfloat16 or float16; use dtype=",
    "pp_size": "layers are not spread over ranks here; use tp_size=",
    "dp_size": "one engine is one replica; start several",
    "ep_size": "mixtures of experts are not here",
    "speculative_algorithm": "one token a step here; leave it out",
    "enable_lora": "adapters are not here; merge them into the weights",
    "lora_paths": "adapters are not here; merge them into the weights",
    "grammar_backend": "llguidance is the only one here; leave it out",
    "disaggregation_mode": "prefill and decode run in one engine here",
    "max_queued_requests": "the queue has no end here; leave it out",
    "trust_remote_code": "a folder's Python is never run here; leave it out",
    "stream_interval": "a stream tells of every token; leave it out",
    "watchdog_timeout": "a rank that does not answer ends the others after 60 s (300 s on GPUs); leave it out",
    "load_format": "safetensors files are read; leave it out",
    "revision": "give the Hub id alone, or a local folder",
    "download_dir": "the Hub's own cache is used (HF_HOME)",
    "json_model_override_args": "edit the folder's config.json",
    "tokenizer_mode": "the folder's own tokenizer is used; leave it out",
    "is_embedding": "this engine generates; leave it out",
    "nnodes": "several hosts: start it under torchrun on each",
    "node_rank": "several hosts: start it under torchrun on each",
    "dist_init_addr": "several hosts: start it under torchrun on each",
    "base_gpu_id": "choose the GPUs with CUDA_VISIBLE_DEVICES",
    "enable_dp_attention": "attention is split by heads; leave it out",
    "enable_torch_compile": "nothing is compiled but kernels; leave it out",
    "enable_hierarchical_cache": "pages stay on the device; use a larger max_total_tokens or kv_cache_dtype=",
    "cpu_offload_gb": "weights stay on the device; use more ranks or a smaller dtype",
    "sampling_backend": "one sampler here; leave it out",
}
# values that ask for nothing of it, besides None: SGLang's own defaults (0.5.23, srt/arg_groups/fields/)
IDLE = dict.fromkeys(ELSEWHERE) | {
    "enable_priority_scheduling": False, "enable_metrics": False, "log_requests": False,
    "pp_size": 1, "dp_size": 1, "ep_size": 1, "nnodes": 1, "node_rank": 0, "base_gpu_id": 0, "stream_interval": 1,
    "enable_lora": False, "trust_remote_code": False, "disaggregation_mode": "null", "load_format": "auto",
    "json_model_override_args": "{}", "tokenizer_mode": "auto", "is_embedding": False, "enable_dp_attention": False,
    "enable_torch_compile": False, "enable_hierarchical_cache": False, "cpu_offload_gb": 0, "watchdog_timeout": 300,
}  # fmt: skip


@says_names("engine argument", ELSEWHERE, IDLE)
@dataclass(frozen=True)
class ServerArgs:
    """The arguments of Engine.

    model_path: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model; tokenizer_path: another one for the
    tokenizer; skip_tokenizer_init: none, token ids only. tp_size: ranks; by default as many as torchrun started, else 1.
    context_length: tokens of a request at most. random_seed: None draws one. log_level: of this project's loggers, and
    whether a bar shows that weights are read (info and debug). schedule_conservativeness: more than 1 admits fewer requests
    at a time, and retracts fewer. max_prefill_tokens: of a step, if chunked_prefill_size allows more. check_finite: look for NaN
    and infinity in the weights before they are used, and name them. The others are those of TPRadixAttentionModelWrapper and
    TPScheduler.
    Raises ValueError for a value of a wrong kind or outside its range.
    """

    model_path: str | None = None
    tokenizer_path: str | None = None
    skip_tokenizer_init: bool = False
    tp_size: int | None = None
    device: str = "auto"
    dtype: str | None = "auto"
    kv_cache_dtype: str = "auto"
    context_length: int | None = None
    page_size: int | None = None
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    max_running_requests: int | None = MAX_RUNNING
    chunked_prefill_size: int | None = None
    max_prefill_tokens: int | None = None
    enable_mixed_chunk: bool = False
    small_request_share: float = 0.0
    schedule_policy: str = "fcfs"
    schedule_conservativeness: float = 1.0
    disable_radix_cache: bool = False
    radix_eviction_policy: str = "lru"
    disable_overlap_schedule: bool | None = None
    gather_best: bool = False
    disable_cuda_graph: bool = False
    disable_custom_all_reduce: bool = False
    attention_backend: str = "auto"
    random_seed: int | None = 0
    log_level: str = "error"
    check_finite: bool = False
    check: bool = False
    trace: str | Path | None = None

    @classmethod
    def of(cls, given: Mapping[Any, Any]) -> "ServerArgs":
        """The same from a dictionary, whose keys may be anything."""
        return cls(**{str(name): value for name, value in given.items()})

    def __post_init__(self):
        for name in ("tp_size", "context_length", "page_size", "max_total_tokens", "max_prefill_tokens"):
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), 1))
        most = MAX_RUNNING if self.max_running_requests is None else self.max_running_requests
        self._set("max_running_requests", whole("max_running_requests", most, 1))
        switches = (
            "skip_tokenizer_init", "enable_mixed_chunk", "disable_radix_cache", "gather_best", "disable_cuda_graph",
            "disable_custom_all_reduce", "check_finite", "check",
        )  # fmt: skip
        for name in switches:
            self._set(name, flag(name, getattr(self, name)))
        if self.disable_overlap_schedule is not None:
            self._set("disable_overlap_schedule", flag("disable_overlap_schedule", self.disable_overlap_schedule))
        if self.chunked_prefill_size is not None:
            self._set("chunked_prefill_size", whole("chunked_prefill_size", self.chunked_prefill_size, -1))
        for name in ("model_path", "tokenizer_path"):
            self._set(name, path(name, getattr(self, name)))
        new_file("trace", self.trace)
        if self.random_seed is not None:
            self._set("random_seed", whole("random_seed", self.random_seed, -(1 << 63), (1 << 63) - 1))
        for name, least, most in (
            ("mem_fraction_static", 0, 1), ("schedule_conservativeness", 0, 10), ("small_request_share", 0, 1),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                value = real(name, getattr(self, name), least, most, open_below=name != "small_request_share")
                self._set(name, value)
        for name in ("device", "kv_cache_dtype", "schedule_policy", "radix_eviction_policy", "attention_backend"):
            self._set(name, text(name, getattr(self, name)))
        check_policy(self.schedule_policy, self.disable_radix_cache)  # now, and not when the model is there
        pick_strategy(self.radix_eviction_policy)
        self._set("dtype", text("dtype", self.dtype, none=True))
        choice("log_level", self.log_level, LEVELS)
        for name in ("common", "ch07_sglang_radix"):
            logging.getLogger(name).setLevel(self.log_level.upper())

    def for_a_follower(self) -> dict[str, Any]:
        """The same as JSON; a trace is rank 0's alone."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        return values | {"trace": None}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
