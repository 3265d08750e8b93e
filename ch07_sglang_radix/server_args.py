"""SGLang's ServerArgs: what an engine is made with, under SGLang's names, and one line for a name that does not exist here.

It imports nothing that brings torch: a wrong argument is told at once, and not seconds later. It is one file although it is long:
a reader looks a flag up here, with what it means, its default and what it may be.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from ch07_sglang_radix import hicache_args, speculative_args
from ch07_sglang_radix.arguments_not_here import ELSEWHERE, IDLE
from ch07_sglang_radix.eviction import pick_strategy
from ch07_sglang_radix.handoff import MODES
from ch07_sglang_radix.lora import checked_lora
from ch07_sglang_radix.policy_names import (
    LOAD_BALANCE_METHODS,
    check_continuous_decode,
    check_dynamic_chunking,
    check_policy,
)
from common.arguments import says_names
from common.distributed.layout import EP_ALGORITHMS, EP_DISPATCHES, Layout
from common.distributed.nodes import START_S, parse_address
from common.models.stages import layer_partition
from common.quantization.scheme import QUANTIZED_COMPUTE
from common.values import choice, flag, new_file, path, real, shown, text, whole

ONE_BY_DEFAULT = ("pp_size", "dp_size", "attn_dp_size", "cp_size", "ep_size")  # None asks for nothing, too
REPORT_MODES = ("off", "server_log", "prometheus", "both")
MOE_RUNNERS = ("auto", "loop", "grouped", "triton")
TRANSFER_BACKENDS = ("tcp", "shm", "cuda_ipc")  # what pages travel by, from one half to the other
LEVELS = ("critical", "error", "warning", "info", "debug")
MAX_RUNNING = 256
DEFAULT_PAGE = {
    "cpu": 1,
    "cuda": 16,
}  # 1 finds every token alike, and costs a real model nothing on a CPU (page_size.csv)


@says_names("engine argument", ELSEWHERE, IDLE)
@dataclass(frozen=True)
class ServerArgs:
    """The arguments of Engine.

    model_path: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model; tokenizer_path: another one for the
    tokenizer; skip_tokenizer_init: none, token ids only. tp_size: ranks of a stage; by default as many as torchrun started for it,
    else as few as the cuts inside them need. pp_size: stages, each with some of the layers; pp_layer_partition: how many each,
    "8,8,6"; pp_async_batch_depth: micro-batches on their way beyond one a stage; pp_max_micro_batch_size: requests in one at most;
    enable_dynamic_chunking: chunks of a long prompt that take equally long, instead of being equally long.
    attn_dp_size: so many parts of the ranks have requests of their own, and attend for these alone (DP
    attention); each gets its share of max_running_requests and chunked_prefill_size. cp_size: over so many of them the tokens of
    each request are spread (context parallelism). enable_layernorm_sp: between attention and MLP the rows are cut over ranks
    (sequence parallelism). enable_all_reduce_fusion: GPUs do a sum, the residual and the norm behind it in one kernel (SGLang:
    enable_flashinfer_allreduce_fusion). enable_two_batch_overlap: one half of a step is computed while the sums of the other
    travel, where no CUDA graph holds the step. moe_runner: the form in which experts are computed (common/layers/moe_runner.py;
    SGLang: moe_runner_backend).
    ep_size: over so many parts of a stage's ranks the experts of a mixture are dealt out. ep_dispatch: where rows are spread
    (attn_dp_size, enable_layernorm_sp), "all_to_all" sends each to the ranks of its experts; "replicated" gathers all for all.
    ep_num_redundant_experts: so many experts lie twice; ep_dispatch_algorithm: static or dynamic, which copy computes a row.
    nnodes, node_rank: this is one of several hosts, with the same arguments on each; tp_size is the total, dist_init_addr HOST:PORT
    of node 0, dist_timeout the seconds that they wait for each other (common/distributed/nodes.py).
    enable_torch_compile: in steps of at most torch_compile_max_bs tokens the small layers are compiled (common/layers/compiled.py).
    cuda_graph_max_bs_prefill: prefills of so many tokens at most, of a few sequences, are CUDA graphs as decode steps are; None:
    2048; 0: none (common/models/prefill_graphs.py; SGLang: with cuda_graph_backend_prefill="full").
    context_length: tokens of a request at most. random_seed: None draws one. log_level: of this project's loggers, and
    whether a bar shows that weights are read (info and debug). dp_size: replicas, each of tp_size ranks and with a tree
    and a pool of its own; load_balance_method says which of them a request goes to. schedule_conservativeness: more than 1 admits
    fewer requests at a time, and retracts fewer. max_prefill_tokens: of a step, if chunked_prefill_size allows more.
    num_continuous_decode_steps: the tokens of so many decode steps are looked at together (step_loop.py): fewer calls a token on
    rank 0, a stream that tells of so many tokens at a time, and up to as many less one computed in vain behind a stop.
    enable_eplb: every eplb_rebalance_num_iterations steps experts go to the ranks where they make all alike busy (experts/eplb.py).
    expert_balancedness_report_mode: read after each step how busy they are, for the log (server_log), GET /metrics (prometheus) or
    both; that costs two small messages a step.
    check_finite: look for NaN and infinity in the weights before they are used, and name them. all_reduce: "shm" lets CPU ranks
    of one host add up in shared memory (common/distributed/shared_memory.py) instead of gloo. disaggregation_mode: prefill or
    decode, if another engine does the other half (disaggregation/); the bootstrap port is the prefill side's, 0 any free one;
    disaggregation_transfer_backend: tcp, shm between processes of one host, cuda_ipc between its GPUs;
    disaggregation_timeout: seconds that a request waits for the other side; num_reserved_decode_tokens: free for each answer before
    another prompt may come; disaggregation_deflect_tokens: the decode engine computes a prompt itself of which its tree lacks at
    most so many tokens, 0: none (disaggregation/decode.py). speculative_algorithm: NGRAM, STANDALONE, MEDUSA, EAGLE or EAGLE3
    guesses several tokens, which a step verifies: the same text, sooner (speculative_args.py has all that goes with it).
    enable_deterministic_inference: what a request gets does not depend on what runs beside it, on the tree and on chunks
    (common/layers/batch_invariant.py); all requests without a seed then draw by one, which random_seed gives and which all replicas
    share. allow_image_urls: pictures may come from the net (images/fetch.py). enable_lora, lora_paths and the others about LoRA:
    checked_lora in lora.py. enable_hierarchical_cache and the others about lower tiers: check_hicache in hicache_args.py. The
    others are those of TPRadixAttentionModelWrapper and TPScheduler. Raises ValueError for a value of a wrong kind or outside its
    range.
    """

    model_path: str | None = None
    tokenizer_path: str | None = None
    skip_tokenizer_init: bool = False
    tp_size: int | None = None
    pp_size: int = 1
    pp_layer_partition: str | None = None
    pp_async_batch_depth: int = 0
    pp_max_micro_batch_size: int | None = None
    enable_dynamic_chunking: bool = False
    dp_size: int = 1
    load_balance_method: str = "round_robin"
    attn_dp_size: int = 1
    cp_size: int = 1
    ep_size: int = 1
    ep_dispatch: str = "replicated"
    ep_num_redundant_experts: int = 0
    ep_dispatch_algorithm: str | None = None
    enable_layernorm_sp: bool = False
    enable_all_reduce_fusion: bool = False
    enable_two_batch_overlap: bool = False
    moe_runner: str = "auto"
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    dist_timeout: float | None = None
    device: str = "auto"
    dtype: str | None = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    quantized_compute: str = "auto"
    context_length: int | None = None
    page_size: int | None = None
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    max_running_requests: int | None = MAX_RUNNING
    chunked_prefill_size: int | None = None
    max_prefill_tokens: int | None = None
    num_continuous_decode_steps: int = 1
    enable_mixed_chunk: bool = False
    enable_deterministic_inference: bool = False
    small_request_share: float = 0.0
    schedule_policy: str = "fcfs"
    schedule_conservativeness: float = 1.0
    disable_radix_cache: bool = False
    radix_eviction_policy: str = "lru"
    disable_overlap_schedule: bool | None = None
    gather_best: bool = False
    disable_cuda_graph: bool = False
    cuda_graph_max_bs_prefill: int | None = None
    enable_torch_compile: bool = False
    torch_compile_max_bs: int = 32
    disable_custom_all_reduce: bool = False
    all_reduce: str = "auto"
    attention_backend: str = "auto"
    random_seed: int | None = 0
    log_level: str = "error"
    enable_eplb: bool = False
    eplb_rebalance_num_iterations: int = 1000
    expert_balancedness_report_mode: str = "off"
    check_finite: bool = False
    check: bool = False
    trace: str | Path | None = None
    disaggregation_mode: str = "null"
    disaggregation_bootstrap_port: int = 0
    disaggregation_transfer_backend: str = "tcp"
    disaggregation_timeout: float = 300.0
    num_reserved_decode_tokens: int = 512
    disaggregation_deflect_tokens: int = 0
    speculative_algorithm: str | None = None
    speculative_draft_model_path: str | None = None
    speculative_num_steps: int | None = None
    speculative_eagle_topk: int | None = None
    speculative_num_draft_tokens: int | None = None
    speculative_accept_threshold_single: float = 1.0
    speculative_accept_threshold_acc: float = 1.0
    speculative_use_rejection_sampling: bool = False
    speculative_typical_acceptance: bool = False
    speculative_stand_down: bool = True
    speculative_ngram_min_bfs_breadth: int = 1
    speculative_ngram_max_bfs_breadth: int = 10
    speculative_ngram_match_type: str = "BFS"
    speculative_ngram_max_trie_depth: int = 18
    speculative_ngram_capacity: int = 1_000_000
    allow_image_urls: bool = False
    enable_lora: bool = False
    lora_paths: tuple[Any, ...] | None = None
    max_loras_per_batch: int = 8
    max_lora_rank: int | None = None
    max_loaded_loras: int | None = None
    lora_eviction_policy: str = "lru"
    lora_target_modules: tuple[str, ...] | None = None
    lora_backend: str = "auto"
    enable_hierarchical_cache: bool = False
    hicache_ratio: float = 2.0
    hicache_size: float = 0
    hicache_write_policy: str = "write_through"
    hicache_io_backend: str = "direct"
    hicache_storage_backend: str | None = None
    hicache_storage_dir: str | None = None
    hicache_storage_quota: float = 10.0
    hicache_storage_prefetch_policy: str = "timeout"
    hicache_prefetch_threshold: int = 256

    @classmethod
    def of(cls, given: Mapping[Any, Any]) -> "ServerArgs":
        """The same from a dictionary, whose keys may be anything."""
        return cls(**{str(name): value for name, value in given.items()})

    def __post_init__(self):
        for name in (
            "tp_size", "pp_size", "dp_size", "attn_dp_size", "cp_size", "ep_size", "context_length", "page_size",
            "max_total_tokens", "max_prefill_tokens", "pp_max_micro_batch_size",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), 1))
            elif name in ONE_BY_DEFAULT:
                self._set(name, 1)
        self._about_stages()
        choice("load_balance_method", self.load_balance_method, LOAD_BALANCE_METHODS)
        if self.dp_size == 1 and self.load_balance_method != "round_robin":
            raise ValueError(
                f"load_balance_method={shown(self.load_balance_method)} chooses among replicas, and dp_size=1; use dp_size=2, or "
                f"leave it out"
            )
        most = MAX_RUNNING if self.max_running_requests is None else self.max_running_requests
        self._set("max_running_requests", whole("max_running_requests", most, 1))
        self._set("torch_compile_max_bs", whole("torch_compile_max_bs", self.torch_compile_max_bs, 1))
        if self.cuda_graph_max_bs_prefill is not None:
            self._set(
                "cuda_graph_max_bs_prefill", whole("cuda_graph_max_bs_prefill", self.cuda_graph_max_bs_prefill, 0)
            )
        switches = (
            "skip_tokenizer_init", "enable_mixed_chunk", "disable_radix_cache", "gather_best", "disable_cuda_graph",
            "enable_torch_compile",
            "disable_custom_all_reduce", "check_finite", "check", "enable_layernorm_sp",
            "enable_all_reduce_fusion", "enable_two_batch_overlap", "enable_dynamic_chunking", "enable_eplb", "allow_image_urls",
            "enable_deterministic_inference",
        )  # fmt: skip
        for name in switches:
            self._set(name, flag(name, getattr(self, name)))
        if self.disable_overlap_schedule is not None:
            self._set("disable_overlap_schedule", flag("disable_overlap_schedule", self.disable_overlap_schedule))
        together = whole("num_continuous_decode_steps", self.num_continuous_decode_steps, 1)
        self._set("num_continuous_decode_steps", together)
        check_continuous_decode(together, self.pp_size, self.attn_dp_size, self.speculative_algorithm is not None)
        if self.chunked_prefill_size is not None:
            self._set("chunked_prefill_size", whole("chunked_prefill_size", self.chunked_prefill_size, -1))
        for name in ("model_path", "tokenizer_path"):
            self._set(name, path(name, getattr(self, name)))
        self._about_nodes()
        self._about_disaggregation()
        for name, value in checked_lora(self).items():
            self._set(name, value)
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
        self._about_experts()
        vars(self).update(speculative_args.check_speculative(self))
        vars(self).update(hicache_args.check_hicache(self))
        self._about_deterministic_inference()
        check_policy(self.schedule_policy, self.disable_radix_cache)  # now, and not when the model is there
        pick_strategy(self.radix_eviction_policy)
        self._set("dtype", text("dtype", self.dtype, none=True))
        self._set("quantization", text("quantization", self.quantization, none=True))
        choice("quantized_compute", self.quantized_compute, QUANTIZED_COMPUTE)
        choice("log_level", self.log_level, LEVELS)
        choice("all_reduce", self.all_reduce, ("auto", "shm"))
        choice("moe_runner", self.moe_runner, MOE_RUNNERS)
        for name in ("common", "ch07_sglang_radix"):
            logging.getLogger(name).setLevel(self.log_level.upper())

    def _about_stages(self) -> None:
        self._set("pp_async_batch_depth", whole("pp_async_batch_depth", self.pp_async_batch_depth, 0))
        self._set("pp_layer_partition", text("pp_layer_partition", self.pp_layer_partition, empty=False, none=True))
        idle = {"pp_layer_partition": None, "pp_async_batch_depth": 0, "pp_max_micro_batch_size": None}
        for name, nothing in idle.items():
            if self.pp_size == 1 and getattr(self, name) != nothing:
                raise ValueError(
                    f"{name}={shown(getattr(self, name))} is about stages, and pp_size=1; use pp_size=2 or leave it out"
                )
        if self.enable_dynamic_chunking is True:
            limit = self.chunked_prefill_size if self.max_prefill_tokens is None else self.max_prefill_tokens
            check_dynamic_chunking(self.pp_size, limit)
        partition = layer_partition(self.pp_layer_partition, {})
        if partition and len(partition) != self.pp_size:
            raise ValueError(
                f"pp_layer_partition={shown(self.pp_layer_partition)} lists {len(partition)} stage(s), but pp_size={self.pp_size}; "
                "give each its number of layers"
            )

    def _about_experts(self) -> None:
        choice("ep_dispatch", self.ep_dispatch, EP_DISPATCHES)
        algorithm = EP_ALGORITHMS[0] if self.ep_dispatch_algorithm is None else self.ep_dispatch_algorithm
        self._set("ep_dispatch_algorithm", choice("ep_dispatch_algorithm", algorithm, EP_ALGORITHMS))
        redundant = whole("ep_num_redundant_experts", self.ep_num_redundant_experts, 0)
        self._set("ep_num_redundant_experts", redundant)
        asked = Layout(pp=self.pp_size, attn_dp=self.attn_dp_size, cp=self.cp_size, ep=self.ep_size)
        # before any rank is started
        asked.refuse_what_is_not_combined(
            self.enable_layernorm_sp, self.enable_two_batch_overlap, self.ep_dispatch, redundant
        )
        every = whole("eplb_rebalance_num_iterations", self.eplb_rebalance_num_iterations, 1)
        self._set("eplb_rebalance_num_iterations", every)
        choice("expert_balancedness_report_mode", self.expert_balancedness_report_mode, REPORT_MODES)
        if self.watches_experts and self.ep_size == 1:
            name = "enable_eplb" if self.enable_eplb else "expert_balancedness_report_mode"
            raise ValueError(
                f"{name} with ep_size=1: one rank has every expert, and nothing can be uneven; use ep_size=2 or more"
            )

    def _about_nodes(self) -> None:
        self._set("nnodes", whole("nnodes", self.nnodes, 1))
        self._set("node_rank", whole("node_rank", self.node_rank, 0, self.nnodes - 1, f"; nnodes={self.nnodes}"))
        seconds = START_S if self.dist_timeout is None else self.dist_timeout
        self._set("dist_timeout", real("dist_timeout", seconds, 0, 86400, open_below=True))
        if self.nnodes > 1 and self.dp_size > 1:
            raise ValueError(
                f"nnodes={self.nnodes} hosts are one replica, dp_size={self.dp_size} would be several; start each by itself, and "
                "python -m ch07_sglang_radix.parallelism.router in front"
            )
        if self.nnodes > 1:
            parse_address("dist_init_addr", self.dist_init_addr)
        elif self.dist_init_addr is not None:
            raise ValueError(
                "dist_init_addr is where several nodes meet; give nnodes and node_rank, too, or leave it out"
            )

    def _about_disaggregation(self) -> None:
        mode = choice("disaggregation_mode", self.disaggregation_mode, MODES)
        backend = choice("disaggregation_transfer_backend", self.disaggregation_transfer_backend, TRANSFER_BACKENDS)
        if backend == "cuda_ipc" and self.device == "cpu":
            raise ValueError(
                "disaggregation_transfer_backend=cuda_ipc moves pages from GPU to GPU, and device=cpu; use tcp or shm"
            )
        port = whole("disaggregation_bootstrap_port", self.disaggregation_bootstrap_port, 0, 65535)
        self._set("disaggregation_bootstrap_port", port)
        seconds = real("disaggregation_timeout", self.disaggregation_timeout, 0, 86400, open_below=True)
        self._set("disaggregation_timeout", seconds)
        self._set("num_reserved_decode_tokens", whole("num_reserved_decode_tokens", self.num_reserved_decode_tokens, 0))
        deflect = whole("disaggregation_deflect_tokens", self.disaggregation_deflect_tokens, 0)
        self._set("disaggregation_deflect_tokens", deflect)
        if deflect and mode != "decode":
            raise ValueError(
                f"disaggregation_deflect_tokens={deflect} with disaggregation_mode={mode}: it is the decode engine that takes "
                "prompts over; give it to that one, or leave it out"
            )
        for name in ("pp_size", "dp_size", "attn_dp_size", "cp_size", "nnodes"):
            if mode != "null" and getattr(self, name) > 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} with disaggregation_mode={mode}: a half has tp_size ranks of one host "
                    "and nothing else; leave one of the two out"
                )

    def _about_deterministic_inference(self) -> None:
        """What adds up in an order that depends on the batch; an executor knows the rest."""
        for name in (
            "speculative_algorithm", "enable_lora", "enable_layernorm_sp", "enable_two_batch_overlap",
            "enable_all_reduce_fusion", "enable_torch_compile",
        ):  # fmt: skip
            if self.enable_deterministic_inference and getattr(self, name):
                raise ValueError(
                    f"enable_deterministic_inference with {name}: its sums depend on the batch; leave one of the two out"
                )
        for name in ("attn_dp_size", "cp_size", "ep_size"):
            if self.enable_deterministic_inference and getattr(self, name) > 1:
                raise ValueError(
                    f"enable_deterministic_inference with {name}={getattr(self, name)}: its sums depend on the batch; "
                    f"use tp_size=2, pp_size or dp_size"
                )
        if self.enable_deterministic_inference and self.random_seed is None:
            self._set("random_seed", secrets.randbits(32))  # here, and not each replica its own

    @property
    def one_seed(self) -> int | None:
        """What the seed of all requests that bring none is made of; None if each of them gets another."""
        return self.random_seed if self.enable_deterministic_inference else None

    @property
    def watches_experts(self) -> bool:
        """Is anybody to read what experts have to do?"""
        return self.enable_eplb or self.expert_balancedness_report_mode != "off"

    @property
    def ranks(self) -> int:
        """Of a replica, where nobody else has started them."""
        return self.pp_size * (self.tp_size or lcm(self.attn_dp_size * self.cp_size, self.ep_size))

    def for_a_follower(self) -> dict[str, Any]:
        """The same as JSON, for a rank that joins those there are; a trace is rank 0's alone."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        return values | {"trace": None, "nnodes": 1, "node_rank": 0, "dist_init_addr": None}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
