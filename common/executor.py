"""The executor: what every rank holds, and how it carries out one step.

A rank has its shard of the model, its heads' part of the pages, the pages and the last token of each running
sequence. It has no queue, no cache of prefixes and no sampler: whoever schedules says which rows run,
and gets this rank's logits. Both chapters put their brain on it.

In a pipeline a rank has the layers of its stage and pages for these. A step then begins with the hidden states of the stage
before, ends with those that the next one begins with, and only ranks of the last stage have logits (models/links.py).
With attention data parallelism a step has parts, of which a rank feeds in its own. What all layouts share is this one file.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from common.attention.backends import pick_attention
from common.attention.context_table import ContextTable, RingInputs, refuse_less_than_the_ranks
from common.attention.kv_cache import PagedKVCache
from common.attention.kv_format import kv_dtype as kv_dtype_of
from common.attention.kv_format import kv_format, kv_name
from common.attention.sequence_table import SequenceTable, StepInputs
from common.distributed.messages import share_all
from common.distributed.processes import Together
from common.distributed.transfer import upload, upload_all
from common.draft_tree import DraftTree
from common.kernels import linear_choice
from common.layers.batch_invariant import make_batch_invariant
from common.layers.communicator import LayerCommunicator, TokenRows
from common.layers.cpu_linear import choose_forms
from common.layers.expert_placement import ExpertPlacement
from common.layers.moe import MoEOptions
from common.models.config import ModelConfig
from common.models.draft_graphs import DraftGraphs
from common.models.drafters.contract import Drafter, DraftOptions, Target
from common.models.drafters.load import load_drafter
from common.models.graph_runner import DecodeGraphs, StepGraphs, nothing_collected
from common.models.hub import resolve_model
from common.models.links import StageLinks
from common.models.lora_manager import LoRAManager, LoRAOptions
from common.models.prefill_graphs import PREFILL_GRAPH_TOKENS, SEATS, PrefillGraphs
from common.models.quantized_tensors import weight_bytes
from common.models.stages import Stage, layer_partition
from common.models.two_batch_overlap import Half, Ragged, forward_in_halves, halves_of
from common.models.verify_graphs import VerifyGraphs
from common.models.vision import image_processor
from common.models.weights import load_model
from common.parallel_state import ParallelState, TPGroup, all_gather, all_reduce, get_parallel_state, pick_device
from common.pool_size import SGLANG_WORDS, PoolWords, num_pages
from common.quantization.packed_codes import CodedMatrices
from common.sampling.batch import SamplingRow
from common.sampling.draws import DrawnRows, Draws
from common.sampling.logprobs import Logprobs
from common.sampling.params import SamplingParams
from common.sampling.sampler import sample
from common.start_times import Laps
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import DRAFTER_PATHS, TINY_QWEN_PATH
from common.verify_step import Verifier, WaitingTree
from common.vision.store import ImageStore, refuse_beside_pictures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER_NAMES = {"float": "float32", "half": "float16"}  # of vLLM and SGLang
WARM_UP_TOKENS = 8192
SCORED_ROWS = 256  # tokens of a prompt whose logits are there at a time
SAID = 1024  # bytes of an error that travel
NO_TOKENS = np.zeros(0, dtype=np.int64)


class StepParts(NamedTuple):
    """A step whose rows are of several data ranks: of each, how many tokens it feeds in, and the numbers of those (within the
    part, ascending) after which a token is drawn, and of those that are scored."""

    tokens: Sequence[int]
    emitting: Sequence[np.ndarray]
    scored: Sequence[np.ndarray]


class Executor:
    """This rank's model, pages and sequence table.

    model_name: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model.
    device: auto, cpu, cuda. dtype: float32, bfloat16, float16 (or float, half); auto: float32 on CPU and bfloat16 on GPU.
    attention_backend: auto, torch_native, triton, flashinfer (common/attention/backends.py).
    max_total_tokens: size of the pool in tokens; by default what memory allows, the same on every rank.
    mem_fraction_static: share of the device's memory for weights and pool together, as in SGLang; by default 0.85 of what
    the weights leave free on a GPU, and 1 GiB on a CPU. kv_cache_dtype: auto is the model's; a smaller one holds more, those of 8
    and 4 bits as codes (common/attention/kv_format.py): fp8_e4m3 and fp8_e5m2 by the checkpoint's k_scale and v_scale, int8, int4.
    tokenizer_path: another folder or Hub id for the tokenizer; skip_tokenizer_init: none. context_length: tokens of a
    request at most, by default as many as the model has positions for. check_finite: refuse weights with NaN or infinity by
    name, for a pass over all of them on every rank. parallel: this rank's place and groups, by default those of the process;
    tp instead: tensor parallelism alone, over this group. pp_layer_partition: layers of each stage of a pipeline, such as
    "8,8,6". enable_layernorm_sp: the rows between attention and MLP are cut over ranks (common/layers/communicator.py).
    enable_all_reduce_fusion: a sum, the residual and the norm behind it in one kernel, where GPUs share memory.
    enable_two_batch_overlap: steps that no CUDA graph holds are computed in two halves (common/models/two_batch_overlap.py).
    moe_runner: the form in which experts are computed: auto, loop, grouped, triton (common/layers/moe_runner.py).
    ep_dispatch: replicated, or all_to_all where rows are spread: they travel to the ranks of their experts
    (common/layers/dispatch.py). ep_num_redundant_experts: experts that lie twice; ep_dispatch_algorithm, static or dynamic:
    which copy computes a row (common/layers/expert_placement.py). speculative: trees of guesses are verified, and what guesses, if
    it is not rank 0 (common/verify_step.py, common/models/drafters/). lora: room for LoRA adapters beside the weights; `self.lora`
    then loads them, and each step says which slot its sequences use (common/models/lora_manager.py). quantization,
    quantized_compute: those of load_model (common/models/weights.py). torch_compile_max_bs: in steps of so many tokens at most the
    small layers are those of torch.compile (common/layers/compiled.py); None: in none. enable_deterministic_inference: what a
    request gets does not depend on what else runs, on what is cached and on how its prompt is cut
    (common/layers/batch_invariant.py); `self.deterministic` says so to who gives out seeds and keeps pages. prefill_graph_tokens:
    prefills of so many tokens at most are CUDA graphs, too, where decode steps are (common/models/prefill_graphs.py); 0: none.
    `self.start_seconds`: where the time of this start went (common/start_times.py).
    On a GPU `self.linear_choices` are what was measured of who multiplies (common/kernels/linear_choice.py); not if deterministic.
    Raises ValueError or FileNotFoundError, on every rank alike, for what cannot be run.
    """

    def __init__(
        self, model_name: str | None = None, device: str = "auto", page_size: int = 16, *,
        dtype: str | None = "auto", max_total_tokens: int | None = None, max_running_requests: int = 256,
        attention_backend: str = "auto", disable_cuda_graph: bool = False, mem_fraction_static: float | None = None,
        kv_cache_dtype: str = "auto", tokenizer_path: str | None = None, skip_tokenizer_init: bool = False,
        context_length: int | None = None, check_finite: bool = False, tp: TPGroup | None = None,
        words: PoolWords = SGLANG_WORDS, parallel: ParallelState | None = None, pp_layer_partition: str | None = None,
        enable_layernorm_sp: bool = False, enable_all_reduce_fusion: bool = False, enable_two_batch_overlap: bool = False,
        moe_runner: str = "auto", ep_dispatch: str = "replicated", ep_num_redundant_experts: int = 0,
        ep_dispatch_algorithm: str = "static", speculative: DraftOptions | None = None, lora: LoRAOptions | None = None,
        quantization: str | None = None, quantized_compute: str = "auto", torch_compile_max_bs: int | None = None,
        enable_deterministic_inference: bool = False, prefill_graph_tokens: int = PREFILL_GRAPH_TOKENS,
    ):  # fmt: skip
        self.start_seconds = Laps()
        self.parallel = parallel or (ParallelState.of(tp) if tp else get_parallel_state(device))
        self.tp = self.parallel.tp  # inside the stage
        self.together = Together(self.parallel.replica.size)  # rank 0's: around each step
        self.two_batch_overlap = enable_two_batch_overlap and self.tp.size > 1
        self.communicator = LayerCommunicator(
            self.tp, self.parallel.attn_tp, enable_layernorm_sp, enable_all_reduce_fusion, enable_two_batch_overlap
        )
        self.ep_dispatch = ep_dispatch
        self.parallel.layout.refuse_what_is_not_combined(
            enable_layernorm_sp, enable_two_batch_overlap, ep_dispatch, ep_num_redundant_experts
        )
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
        kv_dtype = kv_dtype_of(kv_cache_dtype)
        self.folder = folder = resolve_model(model_name or TINY_QWEN_PATH)
        config = ModelConfig.from_folder(folder)
        config.refuse_experts_layout(self.parallel.ep.size, ep_dispatch, ep_num_redundant_experts)
        if config.vision:
            layout = self.parallel.layout
            refuse_beside_pictures(
                pp_size=layout.pp > 1, cp_size=layout.cp > 1, attn_dp_size=layout.attn_dp > 1, speculative_algorithm=speculative,
                enable_layernorm_sp=enable_layernorm_sp, enable_two_batch_overlap=self.two_batch_overlap, enable_lora=lora,
            )  # fmt: skip
        latent = config.latent is not None
        self.deterministic = enable_deterministic_inference
        if enable_deterministic_inference:
            self._refuse_other_orders(
                config,
                enable_all_reduce_fusion,
                speculative=speculative,
                enable_lora=lora,
                enable_torch_compile=torch_compile_max_bs,
            )
        self.attention = pick_attention(
            self.tp.device, attention_backend, self.parallel.cp.size, latent, enable_deterministic_inference
        )
        self.dtype = self._pick_dtype(dtype)
        self.kv_dtype = kv_dtype or self.dtype
        self._refuse_codes(attention_backend)
        if speculative:
            self._refuse_trees(attention_backend)
        self.moe = MoEOptions(
            moe_runner,
            self.parallel.ep,
            self.parallel.moe_tp,
            ep_dispatch,
            ep_num_redundant_experts,
            ep_dispatch_algorithm,
        )
        pp = self.parallel.pp
        self.stage = Stage(pp.rank, pp.size, layer_partition(pp_layer_partition) if pp.size > 1 else None)
        if self.tp.device.type == "cuda" and self.attention.capturable:
            from common.kernels.launch import ask_the_compiler  # noqa: PLC0415, a CPU build of torch comes without Triton

            ask_the_compiler(self.tp.device)
        error = compiled = None
        self.tokenizer = None  # token ids work without one
        other = resolve_model(tokenizer_path) if tokenizer_path else folder
        try:
            if torch_compile_max_bs:
                compiled = self._compiled_pieces(torch_compile_max_bs, config)
            self.model, self.load_report = load_model(
                folder, self.tp, self.dtype, check_finite=check_finite, stage=self.stage, communicator=self.communicator,
                moe=self.moe, quantization=quantization, quantized_compute=quantized_compute,
            )  # fmt: skip
            self.start_seconds.lap("weights")
            if not skip_tokenizer_init and (tokenizer_path or Tokenizer.lies_in(other)):
                self.tokenizer = Tokenizer(other)
        except (ValueError, FileNotFoundError) as one:
            error = one
        _refuse_together(error, self.parallel.replica)
        self.start_seconds.lap("tokenizer")
        # what is measured may be measured otherwise the next time, and then the bits are others
        self.linear_forms = choose_forms(self.model, "row-major" if enable_deterministic_inference else None)
        if enable_deterministic_inference:
            make_batch_invariant(self.model)
        if compiled:
            compiled.give_to(self.model.model)
            compiled.warm_up(self.model, self.dtype)
        self.start_seconds.lap("forms")
        self.config: ModelConfig = self.model.config
        if lora and enable_two_batch_overlap:
            raise ValueError("enable_lora with enable_two_batch_overlap is not supported; use one of the two")
        self.lora = LoRAManager(self.model, lora, folder) if lora else None
        self.links = StageLinks(self.parallel, self.config, self.dtype)
        self._refuse_layers_apart()
        self.context_length = self._context_length(context_length)
        self.page_size, self.max_running_requests = page_size, max_running_requests

        cp = self.parallel.cp
        layers, num_kv, row = len(self.model.stage), self.model.heads.num_kv, self.config.kv_row
        if speculative and not speculative.path:
            speculative = replace(speculative, path=DRAFTER_PATHS.get(speculative.algorithm))
        drafter = load_drafter(speculative, self._as_target()) if speculative else None
        page_bytes = PagedKVCache.bytes_per_page(layers, page_size, num_kv, dtype=self.kv_dtype, **row)
        self.num_pages = num_pages(
            page_bytes + (drafter.page_bytes if drafter else 0), page_size, self.parallel,
            max_total_tokens=max_total_tokens, share=mem_fraction_static, words=words,
            full_length_tokens=max_running_requests * self.context_length,
            weight_bytes=weight_bytes(self.model) + (self.lora.nbytes if self.lora else 0),
        )  # fmt: skip
        self.kv_cache = PagedKVCache(
            layers, -(-self.num_pages // cp.size), page_size, num_kv, dtype=self.kv_dtype, device=self.tp.device,
            scales=self.load_report.kv_scales, **row,
        )  # fmt: skip
        self.max_context = min(self.context_length, self.num_pages * page_size)
        nodes = speculative.nodes if speculative else 0  # guesses may reach beyond the end
        pages, heads = -(-(self.max_context + nodes) // page_size), self.model.heads
        if cp.size > 1:
            refuse_less_than_the_ranks(cp.size, self.max_context, self.num_pages, page_size)
            self.table = ContextTable(max_running_requests, pages, page_size, self.tp.device, cp)
        else:
            # else every data rank would have tiles of its own, and graphs for them
            alone = self.communicator.parts == 1
            alike = self.attention.tile_members(heads.num_q, heads.num_kv) if alone else 0
            last = self.config.max_position_embeddings - 1
            self.table = SequenceTable(max_running_requests, pages, page_size, self.tp.device, alike, last)
        self.verifier: Verifier | None = None
        if speculative:
            self.verifier = Verifier(speculative, drafter, self.table, self.kv_cache, self.config.vocab_size)
        if drafter:
            drafter.allocate(self.num_pages)
        self.images: ImageStore | None = None
        if self.config.vision:
            vision, processor = self.config.vision, image_processor(folder, self.config.vision.tower)
            self.images = ImageStore(self.model.visual, processor, vision.image_token_id)
            self.table.shift_positions()
        self.set_steps_in_flight(1)
        self.spans: list[tuple[float, float]] | None = None  # a list: note when each step was computed here (CPU)
        self._scored: torch.Tensor | None = None  # hidden states [S, D] that wait for `prompt_logprobs`
        self._scored_slots: np.ndarray | None = None  # and their adapters
        self.graphs = self.tree_graphs = self.prefill_graphs = None
        self.linear_choices: list[linear_choice.Choice] = []  # what was measured at this start
        capturable = (
            self.attention.capturable and self.model.capturable and (not self.lora or self.lora.form.capturable)
        )
        if capturable and not disable_cuda_graph:
            batch = min(max_running_requests, self.num_pages)
            parts, most = (self.model, self.attention, self.kv_cache, self.table, batch), lora.max_loras if lora else 0
            if not drafter:  # else plain decode steps are trees of one node: it is told of their hidden states
                self.graphs = DecodeGraphs(*parts, max_loras=most)
            if speculative:
                nodes = (1, speculative.nodes) if drafter else (speculative.nodes,)
                self.tree_graphs = VerifyGraphs(
                    *parts, nodes, self.verifier.listening() or (), most, bool(drafter and drafter.chains)
                )
            if drafter:
                self.verifier.graphs = DraftGraphs(drafter, speculative.nodes, *parts)
            if prefill_graph_tokens and self._plain_prefills(speculative):
                reachable = min(SEATS * self.max_context, self.num_pages * page_size)  # tokens of a step
                self.prefill_graphs = PrefillGraphs(*parts[:-1], min(prefill_graph_tokens, reachable), most)
        self.start_seconds.lap("pages")
        if self.tp.device.type == "cuda":
            self._get_ready()
            if self.config.mixture:
                self.placement.load.zero_()  # of the warm-up

    # --- a step: new pages, forward, and what the tokens leave behind

    @torch.inference_mode()
    def ragged(
        self, token_ids: np.ndarray, rows: np.ndarray, cached: np.ndarray, new: np.ndarray, emits: np.ndarray,
        scored: np.ndarray = NO_TOKENS, parts: StepParts | None = None, adapters: np.ndarray | None = None,
        shifts: Sequence[int] | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """new[b] tokens of each sequence behind cached[b] known ones, end to end in token_ids [T]; any mix.

        Returns this rank's logits [n, V/R] of the n sequences that emit a token, None if none does or a later stage has
        them. scored: the tokens, of these T, whose next ones `prompt_logprobs` is asked about afterwards. parts: with attention
        data parallelism, what all data ranks do, of which the rest is this one's; the logits are of all that emit, part by
        part. adapters [B]: the LoRA slot of each sequence, 0 for none; None: no adapter at all. shifts [B]: where there are
        pictures, by how much those before cached[b] shift positions (vision/mrope.py).
        """
        emitting = np.flatnonzero(emits)
        last = np.cumsum(new)[emitting] - 1
        if self.prefill_graphs and self.prefill_graphs.holds(len(token_ids), len(rows)):
            hidden = self.prefill_graphs.run(token_ids, rows, cached, new, adapters)
            parts, step, spread = StepParts([len(token_ids)], [last], [scored]), None, None
        else:
            hidden, parts, step, spread = self._prefill(
                token_ids, rows, cached, new, last, scored, parts, adapters, shifts
            )
        if any(map(len, parts.scored)) and hidden is not None:  # [S, D]
            if spread:
                self._scored = self._collect(hidden, spread, parts.scored, step, scored)
            else:
                self._scored = hidden[upload(scored, self.tp.device)]
                self._scored_slots = None if adapters is None else np.repeat(adapters, new)[scored]
        if not any(map(len, parts.emitting)):
            return None
        at, waiting = upload_all(self.tp.device, last, rows[emitting])
        self._emitting.append((waiting, self._slice_of(parts.emitting)))
        if hidden is None:
            return None
        hidden = self._collect(hidden, spread, parts.emitting, step, last) if spread else hidden[at]
        return self._logits(hidden, None if adapters is None else adapters[emitting])

    def _prefill(
        self, token_ids: np.ndarray, rows: np.ndarray, cached: np.ndarray, new: np.ndarray, last: np.ndarray,
        scored: np.ndarray, parts: StepParts | None, adapters: np.ndarray | None, shifts: Sequence[int] | None,
    ) -> tuple[torch.Tensor | None, StepParts, StepInputs, TokenRows | None]:  # fmt: skip
        """The forward of `ragged`, launch by launch -> (hidden [T, D], what all data ranks do, the step, how rows are spread)."""
        seen = self.images and self.images.chunk(token_ids, new, cached, shifts)
        if seen:
            token_ids = seen.token_ids
        step = self.table.prefill(token_ids, rows, cached, new) if len(rows) else self.table.nothing()
        if isinstance(step, RingInputs):  # the parts are shares of the same tokens
            parts = StepParts(step.meta.tokens, step.by_rank(last), step.by_rank(scored))
        hidden = None
        if self.images is not None and len(rows):
            self.table.set_shifts(step.rows, seen and seen.shifts)
            if seen:
                step, hidden = self.images.enter(seen, step, self.model.model.embed_tokens)
            self.images.let_go()
        parts = parts or StepParts([len(token_ids)], [last], [scored])
        # shares differ by a token a sequence: a few rows of padding are less than the copies of uneven messages
        spread = self.communicator.rows(parts.tokens, padded=isinstance(step, RingInputs))
        heard = self.verifier.listening() if self.verifier else None
        if self.two_batch_overlap and len(token_ids) > 1:
            hidden = self._forward_in_halves(Ragged(token_ids, rows, cached, new))
        else:
            hidden = self._forward(step, spread, heard, None if adapters is None else np.repeat(adapters, new), hidden)
        if self.verifier:
            self.verifier.prefilled(token_ids, rows, cached, new, hidden, heard)
        return hidden, parts, step, spread

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
        slots, self._scored_slots = self._scored_slots, None
        count = len(tokens) if hidden is None else len(hidden)  # a stage between the first and the last one has neither
        for first in range(0, count, SCORED_ROWS):
            some = slice(first, min(first + SCORED_ROWS, count))
            mine = None if hidden is None else self._logits(hidden[some], None if slots is None else slots[some])
            logits = self.links.bring_logits(mine, some.stop - first)
            if logits is not None:
                told.append(Logprobs(logits(), upload(np.array(tokens[some]), self.tp.device), top[some], ids[some]))
                told[-1].download()
            self.links.flush()  # rank 0 takes them now, and more than one such message at a time would be much memory
        return told

    @torch.inference_mode()
    def decode(
        self, rows: np.ndarray, positions: np.ndarray, alike: Sequence[tuple[int, int, int]] = (),
        parts: Sequence[int] | None = None, adapters: np.ndarray | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """The last token of each sequence, at positions [B] -> this rank's logits [B, V/R]; None if a later stage has them.

        parts: with attention data parallelism, the sequences of each data rank; the logits are of all of them. adapters [B]: as
        in `ragged`.
        """
        everybody = [range(n) for n in parts or [len(rows)]]
        own = self._slice_of(everybody)
        if self.drafter:  # it is told what was computed, and goes on from there
            return self._decode_for_drafter(rows, positions, alike, adapters)
        if self.graphs:
            out = self.graphs.run(rows, positions, alike, self.links.receive_hidden(len(rows)), parts, adapters)
            waiting = self.graphs.rows(len(rows))
            if self.parallel.pp.size > 1:  # the next replay may come before these have gone their way
                out, waiting = out.clone(), waiting.clone()
            self._emitting.append((waiting, own))
            if self.links.last:
                return out
            self.links.send_hidden(out)
            return None
        step = self.table.decode(rows, positions, alike) if len(rows) else self.table.nothing()
        self._emitting.append((step.rows, own))
        spread = self.communicator.rows([len(part) for part in everybody], padded=True)
        if self.two_batch_overlap and len(rows) > 1:
            half = len(rows) // 2
            steps = [self.table.decode(rows[some], positions[some]) for some in (slice(half), slice(half, None))]
            hidden = forward_in_halves(self.model.model, *map(self._half, steps))
        else:
            hidden = self._forward(step, spread, slots=adapters)
        if spread:
            hidden = self.communicator.collect(hidden, spread, [np.arange(len(part)) for part in everybody])
        return None if hidden is None else self._logits(hidden, adapters)

    def _decode_for_drafter(
        self, rows: np.ndarray, positions: np.ndarray, alike, adapters: np.ndarray | None
    ) -> torch.Tensor:
        if self.tree_graphs and self.tree_graphs.holds(len(rows), 1):
            roots = DraftTree.chain(self.table.last_token[upload(rows, self.tp.device)].unsqueeze(1))
            return self._replay_tree(rows, positions, roots, True, adapters)
        step, heard = self.table.decode(rows, positions, alike), self.verifier.listening()
        hidden = self._forward(step, None, heard, adapters)
        self._emitting.append(self.verifier.waits(rows, positions, step, hidden, heard))
        return self._logits(hidden, adapters)

    def _replay_tree(
        self, rows: np.ndarray, positions: np.ndarray, tree: DraftTree, chain: bool, adapters: np.ndarray | None
    ) -> torch.Tensor:
        done = self.tree_graphs.run(rows, positions, tree, adapters)
        self._emitting.append(
            self.verifier.waits(rows, positions, done.inputs, done.hidden, done.entering, tree, chain)
        )
        return done.logits

    @torch.inference_mode()
    def verify(
        self, rows: np.ndarray, positions: np.ndarray, nodes: int, guesses: Sequence[int] = (), parents: Sequence[int] = (),
        adapters: np.ndarray | None = None, drawn: DrawnRows | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The last token of each sequence, at positions [B], and guesses below it, N nodes each -> logits [B * N, V/R], one a node.

        guesses: the tokens of the nodes 1 .. N-1, sequence by sequence, with their parents' numbers; none: this rank's drafter
        makes them, and draws them if `drawn` says with what. The pages of a sequence must have room for positions[b] + N tokens.
        adapters [B]: as in `ragged`.
        """
        draws = None
        if drawn:
            draws = Draws(drawn, positions, self.config.vocab_size, self.tp.device, keeps=self.tp.rank == 0)
        tree, chain = self.verifier.tree(rows, positions, nodes, guesses, parents, draws)
        if self.tree_graphs and self.tree_graphs.holds(len(rows), nodes, chain):
            return self._replay_tree(rows, positions, tree, chain, adapters)
        slots = None if adapters is None else np.repeat(adapters, nodes)
        step, heard = self.table.tree(rows, positions, tree), self.verifier.listening()
        hidden = self._forward(step, None, heard, slots)
        self._emitting.append(self.verifier.waits(rows, positions, step, hidden, heard, tree, chain))
        return self._logits(hidden, slots)

    @property
    def drafter(self) -> Drafter | None:
        """Who guesses on this rank; None if nobody, or rank 0 does."""
        return self.verifier.drafter if self.verifier else None

    @property
    def caches(self) -> list[PagedKVCache]:
        """The model's pages, and a drafter's own."""
        own = self.drafter.cache if self.drafter else None
        return [self.kv_cache, own] if own else [self.kv_cache]

    @property
    def recorded(self) -> list[StepGraphs]:
        """The CUDA graphs of all kinds of steps; none on a CPU."""
        guesses = self.verifier.graphs if self.verifier else None
        return [graphs for graphs in (self.graphs, self.tree_graphs, guesses, self.prefill_graphs) if graphs]

    def decode_rows(self, batch: int, alike: bool = False) -> int:
        """Rows that a decode step of `batch` sequences computes: CUDA graphs pad it to a captured size."""
        return self.graphs.padded(batch, alike) if self.graphs else batch

    def receive_tokens(self, tokens: torch.Tensor) -> None:
        """Remember the tokens [B] of the oldest step that waits for some, as rank 0 chose them: decode goes on from there. Of a
        verify step they are those of all nodes [B * N]."""
        waiting = self._emitting.popleft()
        if isinstance(waiting, WaitingTree):
            self.verifier.receive(waiting, tokens)
            return
        rows, own = waiting
        self.table.set_tokens(rows, tokens if own is None else tokens[own])

    def set_steps_in_flight(self, most: int) -> None:
        """How many steps may be executed before the tokens of the first are received."""
        # the rows of each that wait for a token, and where theirs lie among all of the step; None: they are all
        self._emitting: deque[tuple[torch.Tensor, slice | None] | WaitingTree] = deque(maxlen=most)
        self.links.steps_in_flight = most

    # --- experts, between two steps

    @property
    def placement(self) -> ExpertPlacement:
        """Which expert lies where. Raises ValueError for a model without experts."""
        if self.model.model.placement is None:
            raise ValueError(f"{self.config.architecture} has no experts; ask this of a mixture of experts")
        return self.model.model.placement

    @torch.inference_mode()
    def expert_load(self) -> torch.Tensor:
        """[L, P] on the CPU: rows that each physical expert has computed since the last move. All ranks of the replica call it,
        and all get it; a layer without experts has 0."""
        placement = self.placement
        first, stop = placement.shares[placement.ep.rank]
        load = torch.zeros(placement.physical_to_logical.shape, dtype=torch.int64)
        if placement.moe_tp.rank == 0:  # the others have computed other columns of the same rows
            load[:, first:stop] = placement.load[:, : stop - first].cpu()
        return all_reduce(load, self.parallel.replica, "expert load")  # COMM all-reduce [L, P]: each rank's experts

    @torch.inference_mode()
    def move_experts(self, physical_to_logical: torch.Tensor) -> None:
        """physical_to_logical [L, P], the same on all ranks of the replica, which all call it between two steps: weights move, and
        from the next step on rows follow them. Raises ValueError on all of them for what is no placement, or codes."""
        self.refuse_experts_of_codes("experts that move")
        placement, new = self.placement, physical_to_logical.cpu()
        placement.refuse_a_misfit(new)
        for layer in self.model.model.layers:
            if getattr(layer, "sparse", False):
                layer.mlp.move_experts(new[layer.mlp.layer])
        placement.place(new)
        placement.load.zero_()

    def refuse_experts_of_codes(self, what: str) -> None:
        """All ranks of the replica call it: a stage without experts has no codes, and refuses what another one cannot do."""
        coded = any(isinstance(module, CodedMatrices) for module in self.model.modules())
        if any(share_all(coded, self.parallel.replica)):
            raise ValueError(
                f"{what}: this model's experts are kept as codes, which stay where they were read; start the engine with "
                "quantized_compute=auto"
            )

    # --- inside

    def _forward(
        self, step: StepInputs, spread: TokenRows | None, entering: dict[int, torch.Tensor] | None = None,
        slots: np.ndarray | None = None, hidden: torch.Tensor | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """hidden [T, D] of the last stage, or if rows are spread this rank's; the other stages send theirs on, and have none.
        entering: see CausalLM. slots [T]: of the adapters. hidden [T, D]: the embedded tokens, if pictures are among them."""
        if hidden is None:
            hidden = self.links.receive_hidden(len(step.input_ids))
        began = time.perf_counter()
        attention = self.attention(self.kv_cache, step.meta) if step.meta else None
        adapters = self.lora.rows(slots) if self.lora else None
        hidden = self.model(
            step.input_ids, step.positions, attention, hidden, spread, entering=entering, adapters=adapters
        )
        if self.spans is not None:
            self.spans.append((began, time.perf_counter()))
        if self.links.last:
            return hidden
        self.links.send_hidden(hidden)
        return None

    def _logits(self, hidden: torch.Tensor, slots: np.ndarray | None) -> torch.Tensor:
        """hidden [B, D], and the adapters' slots of these rows -> this rank's logits [B, V/R]."""
        return self.model.compute_logits(hidden, self.lora.rows(slots) if self.lora else None)

    def _forward_in_halves(self, step: Ragged) -> torch.Tensor:
        """hidden [T, D]."""
        return forward_in_halves(self.model.model, *(self._half(self.table.prefill(*half)) for half in halves_of(step)))

    def _half(self, step: StepInputs) -> Half:
        return Half(step.input_ids, step.positions, self.attention(self.kv_cache, step.meta))

    def _collect(
        self,
        hidden: torch.Tensor,
        spread: TokenRows,
        of_parts: Sequence[np.ndarray],
        step: StepInputs,
        wanted: np.ndarray,
    ) -> torch.Tensor:
        """The wanted rows, in their order: data rank by data rank, or as they stand in the step that was shared out."""
        hidden = self.communicator.collect(hidden, spread, of_parts)
        return hidden[upload(step.put_back(wanted), hidden.device)] if isinstance(step, RingInputs) else hidden

    def _slice_of(self, parts: Sequence[Sequence]) -> slice | None:
        """Where this rank's sequences lie when those of all stand one behind the other; None if it has all of them."""
        if len(parts) == 1 or self.parallel.cp.size > 1:
            return None
        first = sum(map(len, parts[: self.communicator.part]))
        return slice(first, first + len(parts[self.communicator.part]))

    def _refuse_trees(self, backend: str) -> None:
        """Of what a verify step cannot be combined with, what only an executor can know; Layout has sizes."""
        layout, spreads = self.parallel.layout, self.communicator.spreads or self.two_batch_overlap
        if spreads or layout.pp > 1 or layout.attn_dp > 1 or layout.cp > 1:
            raise ValueError(
                f"speculative decoding with ranks laid out as {layout}, or rows cut over them: a tree is verified by ranks that "
                f"all have all rows; use tp_size, ep_size and dp_size"
            )
        if not self.attention.windows:
            raise ValueError(
                f"attention_backend={backend}: it attends without a tree's mask, and cannot verify guesses; use another, or auto"
            )

    def _refuse_other_orders(self, config: ModelConfig, fusion: bool, **others: object) -> None:
        """Of what adds up in an order that depends on the step, what only an executor can know."""
        asked = [name for name, value in others.items() if value]
        if self.communicator.spreads or self.two_batch_overlap or fusion:
            asked.append("rows cut over ranks, halves of a step, or a sum fused with a norm")
        if config.mixture:
            asked.append(f"{config.architecture}, whose experts get as many rows as the batch sends them")
        if config.vision:
            asked.append("a model that sees")
        if asked:
            raise ValueError(
                f"enable_deterministic_inference with {asked[0]}: its sums depend on the batch; leave one of the two out"
            )
        if self.tp.size > 2 and (self.tp.device.type == "cuda" or self.tp.fast_all_reduce is None):
            raise ValueError(
                f"enable_deterministic_inference with tp_size={self.tp.size}: the order of a sum of more than two depends on the "
                f'size of the message; use tp_size=2, or all_reduce="shm" on a CPU'
            )

    def _as_target(self) -> Target:
        return Target(
            self.model, self.tp, self.attention, self.dtype, self.kv_dtype, self.page_size, self.max_running_requests,
            self.context_length,
        )  # fmt: skip

    def _refuse_layers_apart(self) -> None:
        """Every rank was told the split by itself: layers that two stages have, or none, would give wrong tokens quietly."""
        mine = torch.tensor([self.model.stage.start, self.model.stage.stop])
        ends = all_gather(mine, self.parallel.pp, "layers")  # COMM all-gather [2]: each stage's layers
        ends = torch.stack(ends).tolist()
        if any(stop != start for (_, stop), (start, _) in pairwise(ends)):
            said = ", ".join(f"{start}..{stop - 1}" for start, stop in ends)
            raise ValueError(f"the stages hold the layers {said}; give every rank the same pp_layer_partition")

    def _plain_prefills(self, speculative: DraftOptions | None) -> bool:
        """Does a prefill launch the same for the same number of tokens, whatever they are?

        Not where a drafter listens, where pictures are set in, where rows or layers are on several ranks, where experts get as many
        rows as come to them, and where what is read of latent pages is expanded.
        """
        config, here = self.config, self.parallel
        elsewhere = here.pp.size > 1 or here.cp.size > 1 or self.communicator.parts > 1 or self.communicator.spreads
        return not (
            speculative or elsewhere or self.two_batch_overlap or config.vision or config.mixture or config.latent
        )

    def _get_ready(self) -> None:
        """Compile all kernels, first of all and side by side; measure who multiplies; then capture, and run what is not captured
        once."""
        met: linear_choice.Met = {}
        if self.attention.capturable:  # it is Triton's
            from common.kernels.launch import compile_ahead  # noqa: PLC0415, a CPU build of torch comes without Triton

            with compile_ahead(self.parallel.world.size == 1), linear_choice.noting() as met:
                self._warm_up()
                for graphs in self.recorded:
                    graphs.rehearse()
                linear_choice.rehearse(met)
        self.start_seconds.lap("kernels")
        with nothing_collected():
            self.linear_choices = linear_choice.choose(met, self.tp)
            self.start_seconds.lap("products")
            for graphs in self.recorded:
                graphs.capture()
        self.start_seconds.lap("graphs")
        self._warm_up()
        torch.cuda.synchronize()
        self.start_seconds.lap("warm-up")

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """One long prefill of nothing, not recorded, and both kinds of sampling: what is compiled or loaded on first use, now."""
        n, one = min(WARM_UP_TOKENS, self.max_context), np.ones(1, dtype=np.int64)
        parts = None  # with context parallelism the step says so itself
        if self.parallel.cp.size == 1:
            parts = StepParts(*([each] * self.communicator.parts for each in (n, np.array([n - 1]), NO_TOKENS)))
        slots = one if self.lora else None  # of nobody: its kernels are compiled, and add nothing
        recorded, self.prefill_graphs = self.prefill_graphs, None
        mine = self.ragged(np.zeros(n, dtype=np.int64), 0 * one, 0 * one, n * one, one, parts=parts, adapters=slots)
        self.prefill_graphs = recorded
        if self.parallel.cp.size > 1:
            self._warm_up_short_prompts()
        logits = self.links.bring_logits(mine, len(parts.tokens) if parts else 1)
        if logits is None:
            return
        first = logits()[:1]
        for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)):
            for row in (first, first.float()):  # what is edited (penalties, a grammar) is in float32
                sample(row, [SamplingRow(params, 0, [], [])])

    def _warm_up_short_prompts(self) -> None:
        """Where tokens are spread over ranks: one of nothing, behind some tokens on each; short ones have kernels of their own."""
        cp, one = self.parallel.cp.size, np.ones(1, dtype=np.int64)
        cached, new = cp * self.page_size, 2 * cp
        if cached + new > self.max_context:
            return  # none ever comes that meets both
        pages = np.arange(-(-(cached + new) // self.page_size)) % self.num_pages
        self.table.set_pages([(0, 0, pages.tolist())])
        self.ragged(np.zeros(new, dtype=np.int64), 0 * one, cached * one, new * one, one)

    def _refuse_codes(self, backend: str) -> None:
        """Of pages that hold codes, what cannot read them."""
        if not kv_format(self.kv_dtype).coded:
            return
        if not self.attention.reads_codes:
            raise ValueError(
                f"kv_cache_dtype={kv_name(self.kv_dtype)} with attention_backend={backend}: it reads pages of numbers here, not of "
                f"codes; use triton, torch_native or auto"
            )
        too_old = self.tp.device.type == "cuda" and torch.cuda.get_device_capability(self.tp.device) < (8, 9)
        if self.kv_dtype == torch.float8_e4m3fn and too_old and self.attention.capturable:
            raise ValueError("kv_cache_dtype=fp8_e4m3 needs compute capability 8.9 or later; use fp8_e5m2 or int8")

    def _pick_dtype(self, name: str | None) -> torch.dtype:
        dtype = _dtype("dtype", name) or (torch.float32 if self.tp.device.type == "cpu" else torch.bfloat16)
        if dtype not in self.attention.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.attention.dtypes)
            raise ValueError(f"dtype={name} is not for this attention_backend; use {known}, or another backend")
        return dtype

    def _compiled_pieces(self, max_rows: int, config: ModelConfig):
        from common.layers.compiled import CompiledPieces  # noqa: PLC0415, for those who want it alone

        if config.latent or config.mixture:
            raise ValueError(
                f"enable_torch_compile is for models whose layers are attention with heads and an MLP, not {config.architecture}; "
                f"leave it out"
            )
        return CompiledPieces(self.tp.device, max_rows)

    def _context_length(self, wanted: int | None) -> int:
        """Tokens that a request may have, prompt and answer."""
        most = self.config.max_position_embeddings
        if wanted is not None and not 1 <= wanted <= most:
            raise ValueError(f"a context of {wanted} tokens is asked for, but the model has positions for {most}")
        return most if wanted is None else wanted


def _refuse_together(error: Exception | None, group: TPGroup) -> None:
    """Raises on every rank what one of them has found, and returns if none has: what is wrong in the part of a file that one rank
    reads, the others do not see, and would wait for it."""
    said = torch.frombuffer(bytearray(str(error or "").encode()[:SAID]) + bytes(1), dtype=torch.uint8)
    mine = torch.zeros(SAID + 1, dtype=torch.uint8)
    mine[: len(said)] = said
    parts = all_gather(mine, group, "errors")  # COMM all-gather [1025]: what a rank could not load, in words
    if error is not None:
        raise error
    for rank, part in enumerate(parts):
        if part[0]:
            raise ValueError(f"rank {rank}: {bytes(part.tolist()).rstrip(bytes(1)).decode(errors='replace')}")


def _dtype(what: str, name: str | None) -> torch.dtype | None:
    """None for auto."""
    if name is None or name == "auto":
        return None
    found = DTYPES.get(OTHER_NAMES.get(name, name))
    if found is None:
        raise ValueError(f"{what}={name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return found


def first_of_each(new: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where the first counts[b] of the new[b] tokens of each sequence lie in a ragged step: [sum(counts)]."""
    if not counts.any():
        return NO_TOKENS
    starts = np.cumsum(new) - new
    return np.concatenate([start + np.arange(n) for start, n in zip(starts, counts, strict=True)])
