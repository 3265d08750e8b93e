"""Two tensor-parallel ranks answer questions through a radix cache.

    torchrun --nproc_per_node=2 ch07_sglang_radix/demo_tp_radix.py
    torchrun --nproc_per_node=4 ch07_sglang_radix/demo_tp_radix.py --dp-size 2      # two replicas of two ranks, half of it each
    torchrun --nproc_per_node=4 ch07_sglang_radix/demo_tp_radix.py --pp-size 2      # two stages of two ranks
    torchrun --nproc_per_node=2 ch07_sglang_radix/demo_tp_radix.py --cp-size 2      # the tokens of each request on two ranks

Ten requests share a long system prompt and arrive over several steps; one is a follow-up turn, one repeats
another word for word. Watch the `cached` column: the first prompt is computed in full, the others start
where their words differ. The last lines count every message between the ranks against the formula, and
every page against conservation.

Every layout of the chapter goes through this one file.
"""

import argparse
import textwrap
from pathlib import Path

from ch07_sglang_radix.invariants import InvariantError, check_invariants
from ch07_sglang_radix.message_formulas import expected, why
from ch07_sglang_radix.parallelism.replica_ranks import ReplicaRanks
from ch07_sglang_radix.policy_names import LOAD_BALANCE_METHODS
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import MOE_RUNNERS
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.distributed.layout import EP_ALGORITHMS, EP_DISPATCHES
from common.distributed.messages import share_all
from common.parallel_state import ParallelState
from common.sampling.params import SamplingParams
from common.teaching.all_messages import Messages, messages_of_all
from common.teaching.report import write_json
from common.text.tokenizer import Tokenizer
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

QUESTIONS = [  # (arrives before step, question)
    (0, "What is a radix cache?"),
    (2, "What is tensor parallelism?"),
    (2, "Explain continuous batching."),
    (2, "什么是全归约？"),
    (6, "What does chunked prefill mean?"),
    (6, "什么是控制面？"),
    (6, "What is the KV cache?"),
    (12, "What is a radix cache?"),  # an exact repeat
    (12, "Define retraction."),
]
FOLLOW_UP = "Say that in Chinese."  # the second turn of request 0, sent once its answer is there
PROMPTS_EVERY_STEPS = 2  # of a --prompts-file, two arrive every two steps


def main() -> None:
    args = parse_args()
    questions, follow_up = QUESTIONS, FOLLOW_UP
    if args.prompts_file:
        lines = read_prompts(args.prompts_file)
        questions = [(i // 2 * PROMPTS_EVERY_STEPS, line) for i, line in enumerate(lines)]
        follow_up = None
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    if args.json:
        args.json.touch()  # find out now, not after the work

    device = "cpu" if args.force_cpu else "auto"
    parallel = ParallelState.initialize(
        None, args.pp_size, args.dp_size, context_parallel_size=args.cp_size,
        attention_data_parallel_size=args.attn_dp_size, expert_parallel_size=args.ep_size, device=device,
        all_reduce=args.all_reduce,
    )  # fmt: skip
    wrapper = TPRadixAttentionModelWrapper(
        args.model_name, page_size=args.page_size, dtype=args.dtype, parallel=parallel,
        enable_layernorm_sp=args.enable_layernorm_sp, moe_runner=args.moe_runner, ep_dispatch=args.ep_dispatch,
        ep_num_redundant_experts=args.ep_num_redundant_experts, ep_dispatch_algorithm=args.ep_dispatch_algorithm,
        enable_deterministic_inference=args.enable_deterministic_inference,
    )  # fmt: skip
    if wrapper.tokenizer is None:
        raise ValueError(f"{args.model_name} has no tokenizer files; the demo asks in words")
    scheduler = TPScheduler(wrapper)
    first = parallel.world.rank == 0
    if first:
        print_header(wrapper)
    if args.dp_size > 1:
        asked, results, told = as_replicas(scheduler, parallel, args.load_balance_method, questions, follow_up, params)
    else:
        with parallel.world.ledger.recording():
            visitor = Visitor(scheduler, questions, follow_up, params)
            results = scheduler.process_requests(arrivals=visitor.arrive)
        asked, told = visitor.asked, [what_happened(scheduler)] if first else []
    messages = messages_of_all(parallel.world)
    if first:
        print_answers(asked, results)
        print_summary(scheduler, messages, results, told)
        broken = next((part["broken"] for part in told if part["broken"]), None)
        if args.json:
            write_json(report(parallel, args, asked, results, told, messages), args.json)
        if broken:
            raise ValueError(broken)


def as_replicas(
    scheduler: TPScheduler, parallel: ParallelState, method: str, questions, follow_up: str | None, params: SamplingParams
) -> tuple[list[str], dict[int, RequestOutput], list[dict]]:  # fmt: skip
    """Each replica answers its share. On rank 0: all that was asked, all outputs in order, what happened in each replica."""
    replicas, tokenizer = ReplicaRanks(parallel, method), scheduler.wrapper.tokenizer
    where = replicas.place([prompt_ids(tokenizer, [text]) for _, text in questions])
    numbers = [i for i, rank in enumerate(where) if rank == replicas.dp_rank]
    if follow_up and where[0] == replicas.dp_rank:  # its beginning lies in this tree
        numbers.append(len(questions))
    with parallel.world.ledger.recording():
        visitor = Visitor(scheduler, questions, follow_up, params, numbers)
        results = scheduler.process_requests(arrivals=visitor.arrive)
        if parallel.replica.rank > 0:
            return [], {}, []
        results = replicas.share({visitor.numbers[rid]: output for rid, output in results.items()})
    told = share_all(what_happened(scheduler), parallel.dp)
    return [text for _, text in questions] + ([follow_up] if follow_up else []), results, told


class Visitor:
    """Sends the questions, each before its step; called by the scheduler on rank 0 only.

    mine: which of them this replica is asked, by number, the follow-up as the last; None: all, and numbered as they are asked.
    """

    def __init__(
        self,
        scheduler: TPScheduler,
        questions,
        follow_up: str | None,
        params: SamplingParams,
        mine: list[int] | None = None,
    ):
        self.scheduler, self.params, self.mine = scheduler, params, mine
        self.follow_up = follow_up if mine is None or len(questions) in mine else None
        self.coming = [(*one, i) for i, one in enumerate(questions) if mine is None or i in mine]
        self.last = len(questions)
        self.asked: list[str] = []  # by request id
        self.numbers: list[int] = []  # likewise
        self._prefills_shown = 0

    def arrive(self, step: int) -> bool:
        """What comes before this step; True while more is to come."""
        self._show_prefill()
        if not any(rank.running for rank in self.scheduler.data_ranks) and self.coming:
            step = max(step, self.coming[0][0])  # nobody is waiting for an answer: no reason to wait
        while self.coming and self.coming[0][0] <= step:
            self._ask(*self.coming.pop(0)[1:])
        first = self.scheduler.results.get(0)
        if self.follow_up and first:
            self._ask(self.follow_up, self.last, history=[self.asked[0], first.text])
            self.follow_up = None
        return bool(self.coming or self.follow_up)

    def _ask(self, question: str, number: int, history: list[str] | None = None) -> None:
        ids = prompt_ids(self.scheduler.wrapper.tokenizer, [*(history or []), question])
        self.scheduler.add_request(input_ids=ids, sampling_params=self.params)
        self.numbers.append(len(self.asked) if self.mine is None else number)
        self.asked.append(question)

    def _show_prefill(self) -> None:
        if self.scheduler.steps["prefill"] == self._prefills_shown:
            return
        self._prefills_shown = self.scheduler.steps["prefill"]
        ranks = self.scheduler.data_ranks
        batch, running = (
            [one for rank in ranks for one in rank.last_prefill],
            [r for rank in ranks for r in rank.running],
        )
        computed, total = sum(n for _, n in batch), sum(len(req.prompt_ids) for req, _ in batch)
        names = ", ".join(f"#{self.numbers[req.rid]}" for req, _ in batch)
        decoding = len(running) - sum(req in running for req, _ in batch)
        print(
            f"  step {self.scheduler.step_number - 1:3}  prefill {names:14} {computed:5} tokens computed, "
            f"{total - computed:5} from the tree; {decoding} others were decoding",
            flush=True,
        )


def prompt_ids(tokenizer: Tokenizer, turns: list[str]) -> list[int]:
    """What the user, and in between the model, has said so far, behind the system prompt."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat([{"role": "system", "content": SYSTEM_PROMPT}, *messages])
    return tokenizer.encode("\n".join([SYSTEM_PROMPT, *turns]))


def what_happened(scheduler: TPScheduler) -> dict:
    """In one replica, as its rank 0 knows."""
    formula, broken = expected(scheduler), conservation_broken(scheduler)
    return {"steps": scheduler.steps, "formula": formula, "broken": broken, "requests": scheduler.num_requests}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-name", help="folder in Hugging Face layout or Hub id; default: the bundled tiny model")
    parser.add_argument("--force-cpu", action="store_true", help="use the CPU even where there are GPUs")
    parser.add_argument("--all-reduce", choices=("auto", "shm"), default="auto", help="shm: CPU ranks share memory")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page (default 16)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer (default 96)")
    parser.add_argument("--prompts-file", type=Path, help="questions of your own, one a line")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default float32 on CPU, bfloat16 on GPU")
    parser.add_argument(
        "--dp-size", type=int, default=1, help="replicas; the ranks are shared out among them (default 1)"
    )
    parser.add_argument("--pp-size", type=int, default=1, help="stages that share out the layers (default 1)")
    parser.add_argument(
        "--cp-size", "--attn-cp-size", type=int, default=1, help="ranks over which each request's tokens are spread"
    )
    parser.add_argument(
        "--attn-dp-size", type=int, default=1, help="parts of the ranks with requests of their own (default 1)"
    )
    parser.add_argument("--enable-deterministic-inference", action="store_true", help="no bit depends on who else runs")
    parser.add_argument(
        "--enable-layernorm-sp", action="store_true", help="cut rows between attention and MLP over ranks"
    )
    parser.add_argument("--moe-runner", choices=MOE_RUNNERS, default="auto", help="form in which experts are computed")
    parser.add_argument("--ep-size", "--ep", type=int, default=1, help="parts of the ranks with experts of their own")
    parser.add_argument("--ep-dispatch", choices=EP_DISPATCHES, default="replicated", help="do rows travel to experts?")
    parser.add_argument("--ep-num-redundant-experts", type=int, default=0, help="experts that lie twice (default 0)")
    parser.add_argument("--ep-dispatch-algorithm", choices=EP_ALGORITHMS, default="static", help="which copy of them")
    parser.add_argument("--load-balance-method", choices=LOAD_BALANCE_METHODS, default="round_robin")
    parser.add_argument("--json", type=Path, help="also write what happened to this file")
    return parser.parse_args()


def read_prompts(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    empty = [i for i, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        where = f"line {empty[0]} of {path} is empty" if lines else f"{path} is empty"
        raise ValueError(f"{where}; write one prompt a line, {len(lines)} line(s) read")
    return lines


def conservation_broken(scheduler: TPScheduler) -> str | None:
    """None if every page has exactly one owner, else what is wrong."""
    try:
        for rank in scheduler.data_ranks:
            check_invariants(rank)
    except InvariantError as error:
        return str(error)
    return None


# --- what a person reads


def print_header(wrapper: TPRadixAttentionModelWrapper) -> None:
    c, heads, tp, stage = wrapper.config, wrapper.model.heads, wrapper.tp, wrapper.model.stage
    mine, ranks = sum(p.numel() for p in wrapper.model.parameters()), wrapper.parallel.replica.size
    print(
        f"{c.architecture}, {c.num_layers} layers, {c.num_heads} query and {c.num_kv_heads} KV heads, on {ranks} rank(s)"
    )
    if len(stage) < c.num_layers:
        print(f"{wrapper.parallel.layout}: the first stage has layers {stage.start}..{stage.stop - 1}")
    print(
        f"each rank: {heads.num_q} query and {heads.num_kv} KV heads, {mine:,} parameters; rank 0 read "
        f"{wrapper.load_report.bytes_read:,} bytes of weights"
    )
    attn_tp, cp = wrapper.parallel.attn_tp.size, wrapper.parallel.cp.size
    if (data_ranks := wrapper.parallel.layout.attn_dp) > 1:
        print(
            f"attention: {data_ranks} data ranks of {attn_tp} rank(s), each with requests, a tree and pages of its own"
        )
    if (zeros := heads.num_q * attn_tp - c.num_heads) > 0:
        print(
            f"{heads.num_q} x {attn_tp} = {c.num_heads} + {zeros}: {zeros} query heads are zeros, so that groups come out even"
        )
    what = f"the row of {c.latent.row} numbers, all heads' K and V," if c.latent else "each KV head"
    if (copies := heads.num_kv * attn_tp // c.num_kv_heads) > 1:
        print(f"{heads.num_kv} x {attn_tp} = {copies} x {c.num_kv_heads}: {what} is held {copies} times")
    print(
        f"pool: {wrapper.num_pages} pages of {wrapper.page_size} tokens on {tp.device.type}, "
        f"{str(wrapper.dtype).removeprefix('torch.')}{f', page g on cp rank g % {cp}' if cp > 1 else ''}\n"
    )


def print_answers(asked: list[str], results: dict[int, RequestOutput]) -> None:
    print()
    for rid, out in results.items():
        note = "" if out.finish_reason["type"] == "stop" else f"  [cut at {out.completion_tokens} tokens]"
        print(f"#{rid} {asked[rid]}   ({out.prompt_tokens} prompt tokens, {out.cached_tokens} cached)")
        print(textwrap.fill(" ".join(out.text.split()) + note, 116, initial_indent="   ", subsequent_indent="   "))


def print_summary(
    scheduler: TPScheduler, messages: dict[str, Messages], results: dict[int, RequestOutput], told: list[dict]
) -> None:
    cached, prompt = sum(r.cached_tokens for r in results.values()), sum(r.prompt_tokens for r in results.values())
    print(f"\nhit rate {cached / prompt:.3f}: {cached} of {prompt} prompt tokens came from the radix tree")
    layout, ranks = scheduler.wrapper.parallel.layout, scheduler.replica.size
    for i, part in enumerate(told):
        of = f"replica {i}: {part['requests']} requests, " if len(told) > 1 else ""
        print(f"{of}{part['steps']['prefill']} prefill and {part['steps']['decode']} decode steps, {ranks} rank(s)")
    width = max(11, *(len(kind) + 1 for kind in messages), 0)
    for kind, said in sorted(messages.items()):
        line = f"  {kind:<{width}}{said.calls:6} calls {said.bytes:12,} bytes {said.wire:12,} on the wire   "
        print(line + why(kind, said, [part["formula"] for part in told], scheduler.wrapper))
    if layout.world > 1:
        of = (
            "rank 0's tensors"
            if layout.tp == layout.world
            else "all tensors; those of a collective of its first rank's"
        )
        print(
            f"  bytes: of {of}; on the wire: between all {layout.world} ranks together (common/distributed/cost_model.py)"
        )
    data_ranks, page = scheduler.data_ranks, scheduler.page_size
    free = sum(rank.pool.num_free_pages for rank in data_ranks)
    cached_pages = sum(rank.tree.evictable_size // page for rank in data_ranks)
    pages = f"{sum(rank.pool.num_pages for rank in data_ranks)} pages = {free} free + {cached_pages} cached"
    broken = next((part["broken"] for part in told if part["broken"]), None)
    pages = f"{pages} (replica 0)" if layout.dp > 1 else pages
    print(f"conservation: {'BROKEN: ' + broken if broken else pages + ', no page lost, none with two owners'}")


def report(
    parallel: ParallelState, args, asked: list[str], results, told: list[dict], messages: dict[str, Messages]
) -> dict:  # fmt: skip
    """The --json file. steps and comm: of all replicas, and in comm of all their ranks (messages_of_all)."""
    comm: dict[str, Messages] = {}
    for kind, said in messages.items():
        op = kind.split()[0]
        comm[op] = comm.get(op, Messages()) + said
    cached, prompt = sum(r.cached_tokens for r in results.values()), sum(r.prompt_tokens for r in results.values())
    return {
        "world_size": parallel.world.size,
        "model": args.model_name or "common/tiny_qwen",
        "page_size": args.page_size,
        "requests": [
            {
                "prompt": asked[rid],
                "prompt_ids": out.prompt_ids,
                "text": out.text,
                "output_ids": out.output_ids,
                "prompt_tokens": out.prompt_tokens,
                "cached_tokens": out.cached_tokens,
            }
            for rid, out in results.items()
        ],
        "hit_rate": cached / prompt,
        "comm": {op: {"calls": said.calls, "bytes": said.bytes} for op, said in comm.items()},
        "steps": {kind: sum(part["steps"][kind] for part in told) for kind in told[0]["steps"]},
        "invariants_ok": not any(part["broken"] for part in told),
    }


if __name__ == "__main__":
    run_main(main)
