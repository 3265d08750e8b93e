"""The executor: what every rank holds, and how it carries out one step.

A rank has its shard of the model, its heads' part of the pages, the pages and the last token of each running
sequence. It has no queue, no cache of prefixes and no sampler: whoever schedules says which rows run,
and gets this rank's logits. Both chapters put their brain on it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import psutil
import torch

from common.attention.backends import pick_attention
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.distributed.transfer import upload, upload_all
from common.layers.cpu_linear import choose_forms
from common.layers.vocab import gather_logits
from common.models.config import ModelConfig
from common.models.graph_runner import DecodeGraphs
from common.models.hub import resolve_model
from common.models.weights import load_model
from common.parallel_state import TPGroup, all_gather, get_tensor_parallel, pick_device
from common.sampling.batch import SamplingRow
from common.sampling.logprobs import Logprobs
from common.sampling.params import SamplingParams
from common.sampling.sampler import sample
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER_NAMES = {"float": "float32", "half": "float16"}  # of vLLM and SGLang
CPU_CACHE_BYTES = 1 << 30  # over all ranks: they share one machine's memory
GPU_CACHE_SHARE = 0.85  # of the memory that is free once the weights are there
MAX_POOL_TOKENS_ON_CPU = 65_536
WARM_UP_TOKENS = 8192
SCORED_ROWS = 256  # tokens of a prompt whose logits are there at a time
NO_TOKENS = np.zeros(0, dtype=np.int64)


class PoolWords(NamedTuple):
    """How a chapter calls them, so that an error says what its user can change."""

    page: str
    share: str  # of the memory


SGLANG_WORDS, VLLM_WORDS = PoolWords("page", "mem_fraction_static"), PoolWords("block", "gpu_memory_utilization")


class Executor:
    """This rank's model, pages and sequence table.

    model_name: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model.
    device: auto, cpu, cuda. dtype: float32, bfloat16, float16 (or float, half); auto: float32 on CPU and bfloat16 on GPU.
    attention_backend: auto, torch_native, triton, flashinfer (common/attention/backends.py).
    max_total_tokens: size of the pool in tokens; by default what memory allows, the same on every rank.
    mem_fraction_static: share of the device's memory for weights and pool together, as in SGLang; by default 0.85 of what
    the weights leave free on a GPU, and 1 GiB on a CPU. kv_cache_dtype: auto is the model's; a smaller one holds more.
    tokenizer_path: another folder or Hub id for the tokenizer; skip_tokenizer_init: none. context_length: tokens of a request at
    most, by default as many as the model has positions for. check_finite: refuse weights with NaN or infinity by name, for
    a pass over all of them on every rank.
    Raises ValueError or FileNotFoundError, on every rank alike, for what cannot be run.
    """

    def __init__(
        self, model_name: str | None = None, device: str = "auto", page_size: int = 16, *,
        dtype: str | None = "auto", max_total_tokens: int | None = None, max_running_requests: int = 256,
        attention_backend: str = "auto", disable_cuda_graph: bool = False, mem_fraction_static: float | None = None,
        kv_cache_dtype: str = "auto", tokenizer_path: str | None = None, skip_tokenizer_init: bool = False,
        context_length: int | None = None, check_finite: bool = False, tp: TPGroup | None = None,
        words: PoolWords = SGLANG_WORDS,
    ):  # fmt: skip
        self.tp = tp or get_tensor_parallel(device)
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be at least 1")
        if max_running_requests < 1:
            raise ValueError(f"max_running_requests={max_running_requests} must be at least 1")
        if device != "auto" and pick_device(device, self.tp.device.index or 0).type != self.tp.device.type:
            raise ValueError(
                f"device={device} but this group runs on {self.tp.device.type}; say so once, in initialize_tensor_parallel"
            )
        if mem_fraction_static is not None and not 0 < mem_fraction_static <= 1:
            raise ValueError(f"{words.share}={mem_fraction_static} must be in (0, 1]")
        kv_dtype = _dtype("kv_cache_dtype", kv_cache_dtype)
        self.attention = pick_attention(self.tp.device, attention_backend)
        self.folder = folder = resolve_model(model_name or TINY_QWEN_PATH)
        self.dtype = self._pick_dtype(dtype)
        self.model, self.load_report = load_model(folder, self.tp, self.dtype, check_finite=check_finite)
        self.linear_forms = choose_forms(self.model)
        self.config: ModelConfig = self.model.config
        self.tokenizer = None  # token ids work without one
        other = resolve_model(tokenizer_path) if tokenizer_path else folder
        if not skip_tokenizer_init and (tokenizer_path or Tokenizer.lies_in(other)):
            self.tokenizer = Tokenizer(other)
        self.context_length = self._context_length(context_length)
        self.page_size, self.max_running_requests = page_size, max_running_requests

        self.kv_dtype = kv_dtype or self.dtype
        num_pages = self._num_pages(max_total_tokens, mem_fraction_static, words)
        self.kv_cache = PagedKVCache(
            self.config.num_layers, num_pages, page_size, self.model.heads.num_kv, self.config.head_dim,
            self.kv_dtype, self.tp.device,
        )  # fmt: skip
        self.max_context = min(self.context_length, num_pages * page_size)
        pages, heads = -(-self.max_context // page_size), self.model.heads
        alike = self.attention.tile_members(heads.num_q, heads.num_kv)
        self.table = SequenceTable(max_running_requests, pages, page_size, self.tp.device, alike)
        self._emitting: torch.Tensor | None = None  # rows that wait for a token
        self._scored: torch.Tensor | None = None  # hidden states [S, D] that wait for `prompt_logprobs`
        self.graphs = None
        if self.attention.capturable and not disable_cuda_graph:
            batch = min(max_running_requests, num_pages)
            self.graphs = DecodeGraphs(self.model, self.attention, self.kv_cache, self.table, batch)
        if self.tp.device.type == "cuda":
            self._get_ready()

    # --- a step: new pages, forward, and what the tokens leave behind

    @torch.inference_mode()
    def ragged(
        self,
        token_ids: np.ndarray,
        rows: np.ndarray,
        cached: np.ndarray,
        new: np.ndarray,
        emits: np.ndarray,
        scored: np.ndarray = NO_TOKENS,
    ) -> torch.Tensor | None:
        """new[b] tokens of each sequence behind cached[b] known ones, end to end in token_ids [T]; any mix.

        Returns this rank's logits [n, V/R] of the n sequences that emit a token, None if none does. scored: the
        tokens, of these T, whose next ones `prompt_logprobs` is asked about afterwards.
        """
        step = self.table.prefill(token_ids, rows, cached, new)
        hidden = self.model(step.input_ids, step.positions, self.attention(self.kv_cache, step.meta))
        if len(scored):
            self._scored = hidden[upload(scored, self.tp.device)]  # [S, D]
        emitting = np.flatnonzero(emits)
        if len(emitting) == 0:
            return None
        last, self._emitting = upload_all(self.tp.device, np.cumsum(new)[emitting] - 1, rows[emitting])
        return self.model.compute_logits(hidden[last])

    @torch.inference_mode()
    def prompt_logprobs(
        self, tokens: Sequence[int] = (), top: Sequence[int] = (), ids: Sequence[Sequence[int]] = ()
    ) -> list[Logprobs]:
        """Log-probabilities of the tokens that follow the `scored` ones [S] of the last ragged step.

        All ranks call it; rank 0 says which tokens follow, how many of the best it wants beside each, and which ids,
        and gets them SCORED_ROWS positions at a time, on their way to the CPU. All logits of a long prompt at once
        would be [T, V]: 5 GB for 8,192 tokens of Qwen2.5.
        """
        hidden, self._scored, told = self._scored, None, []
        for first in range(0, len(hidden), SCORED_ROWS):
            some = slice(first, first + SCORED_ROWS)
            logits = gather_logits(self.model.compute_logits(hidden[some]), self.config.vocab_size, self.tp)
            if logits is not None:
                told.append(Logprobs(logits, upload(np.array(tokens[some]), self.tp.device), top[some], ids[some]))
                told[-1].download()
        return told

    @torch.inference_mode()
    def decode(
        self, rows: np.ndarray, positions: np.ndarray, alike: Sequence[tuple[int, int, int]] = ()
    ) -> torch.Tensor:
        """The last token of each sequence, at positions [B] -> this rank's logits [B, V/R]."""
        if self.graphs:
            logits, self._emitting = self.graphs.run(rows, positions, alike), self.graphs.rows(len(rows))
            return logits
        step = self.table.decode(rows, positions, alike)
        self._emitting = step.rows
        hidden = self.model(step.input_ids, step.positions, self.attention(self.kv_cache, step.meta))
        return self.model.compute_logits(hidden)

    def decode_rows(self, batch: int, alike: bool = False) -> int:
        """Rows that a decode step of `batch` sequences computes: CUDA graphs pad it to a captured size."""
        return self.graphs.padded(batch, alike) if self.graphs else batch

    @torch.inference_mode()
    def receive_tokens(self, tokens: torch.Tensor) -> None:
        """Remember the tokens [B] that rank 0 chose in this step: the next decode step starts from them."""
        self.table.set_tokens(self._emitting, tokens)

    # --- inside

    def _get_ready(self) -> None:
        """Compile all kernels, first of all and side by side; then capture, and run what is not captured once."""
        if self.attention.capturable:  # it is Triton's
            from common.kernels.launch import compile_ahead  # noqa: PLC0415, a CPU build of torch comes without Triton

            with compile_ahead():
                self._warm_up()
                if self.graphs:
                    self.graphs.rehearse()
        if self.graphs:
            self.graphs.capture()
        self._warm_up()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """One long prefill of nothing, and both kinds of sampling: what is compiled or loaded on first use, now."""
        n, one = min(WARM_UP_TOKENS, self.max_context), np.ones(1, dtype=np.int64)
        step = self.table.prefill(np.zeros(n, dtype=np.int64), 0 * one, 0 * one, n * one)
        logits = self.model.compute_logits(
            self.model(step.input_ids, step.positions, self.attention(self.kv_cache, step.meta))[-1:]
        )
        if self.tp.rank > 0:
            return
        for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)):
            sample(logits, [SamplingRow(params, 0, [], [])])

    def _pick_dtype(self, name: str | None) -> torch.dtype:
        dtype = _dtype("dtype", name) or (torch.float32 if self.tp.device.type == "cpu" else torch.bfloat16)
        if dtype not in self.attention.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.attention.dtypes)
            raise ValueError(f"dtype={name} is not for this attention_backend; use {known}, or another backend")
        return dtype

    def _context_length(self, wanted: int | None) -> int:
        """Tokens that a request may have, prompt and answer."""
        most = self.config.max_position_embeddings
        if wanted is not None and not 1 <= wanted <= most:
            raise ValueError(f"a context of {wanted} tokens is asked for, but the model has positions for {most}")
        return most if wanted is None else wanted

    def _num_pages(self, max_total_tokens: int | None, fraction: float | None, words: PoolWords) -> int:
        """Pages in the pool, the same number on every rank: the poorest decides."""
        per_page = PagedKVCache.bytes_per_page(
            self.config.num_layers, self.page_size, self.model.heads.num_kv, self.config.head_dim, self.kv_dtype
        )
        if max_total_tokens is not None:
            pages = max_total_tokens // self.page_size
            if pages < 1:
                raise ValueError(
                    f"max_total_tokens={max_total_tokens} holds no page of page_size={self.page_size} tokens"
                )
            return pages
        if self.tp.device.type == "cpu":
            room = CPU_CACHE_BYTES // self.tp.size
            if fraction is not None:  # of the machine's memory, which all ranks share
                weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
                room = int(fraction * _memory_of_the_machine() / self.tp.size) - weights
            most = MAX_POOL_TOKENS_ON_CPU
            if fraction is not None:
                most = self.max_running_requests * self.context_length
            pages = min(room // per_page, most // self.page_size)
        else:
            free, total = torch.cuda.mem_get_info(self.tp.device)
            room = int(free * GPU_CACHE_SHARE) if fraction is None else free - int((1 - fraction) * total)
            pages = room // per_page
            # more than all requests at full length: only a tiny model gets there
            pages = min(pages, self.max_running_requests * self.context_length // self.page_size)
        mine = torch.tensor([pages])
        offers = all_gather(mine, self.tp, "pool size")  # COMM all-gather [1]: pages each rank has room for
        pages = min(int(offer) for offer in offers)
        if pages < 1:
            raise ValueError(
                f"no memory left for a single {words.page} of {per_page} bytes; use a smaller model, more ranks, bfloat16 or "
                f"a larger {words.share}"
            )
        return pages


def _dtype(what: str, name: str | None) -> torch.dtype | None:
    """None for auto."""
    if name is None or name == "auto":
        return None
    found = DTYPES.get(OTHER_NAMES.get(name, name))
    if found is None:
        raise ValueError(f"{what}={name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return found


def _memory_of_the_machine() -> int:
    """Bytes."""
    return psutil.virtual_memory().total


def first_of_each(new: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where the first counts[b] of the new[b] tokens of each sequence lie in a ragged step: [sum(counts)]."""
    if not counts.any():
        return NO_TOKENS
    starts = np.cumsum(new) - new
    return np.concatenate([start + np.arange(n) for start, n in zip(starts, counts, strict=True)])
