"""Two tensor-parallel ranks answer questions through a radix cache.

    torchrun --nproc_per_node=2 ch07_sglang_radix/demo_tp_radix.py

Ten requests share a long system prompt and arrive over several steps; one is a follow-up turn, one repeats
another word for word. Watch the `cached` column: the first prompt is computed in full, the others start
where their words differ. The last lines count every message between the ranks against the formula, and
every page against conservation.
"""

import argparse
import textwrap
from pathlib import Path

from ch07_sglang_radix.invariants import InvariantError, check_invariants
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.parallel_state import TPGroup, initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import write_json
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

    tp = initialize_tensor_parallel(device="cpu" if args.force_cpu else "auto")
    wrapper = TPRadixAttentionModelWrapper(args.model_name, page_size=args.page_size, dtype=args.dtype, tp=tp)
    if wrapper.tokenizer is None:
        raise ValueError(f"{args.model_name} has no tokenizer files; the demo asks in words")
    scheduler = TPScheduler(wrapper)
    if tp.rank == 0:
        print_header(wrapper, tp)
    with tp.ledger.recording():
        visitor = Visitor(scheduler, questions, follow_up, params)
        results = scheduler.process_requests(arrivals=visitor.arrive)
    if tp.rank == 0:
        print_answers(visitor.asked, results)
        broken = conservation_broken(scheduler)
        print_summary(scheduler, tp, results, broken)
        if args.json:
            write_json(report(scheduler, tp, args, visitor.asked, results, broken), args.json)
        if broken:
            raise ValueError(broken)


class Visitor:
    """Sends the questions, each before its step; called by the scheduler on rank 0 only."""

    def __init__(self, scheduler: TPScheduler, questions, follow_up: str | None, params: SamplingParams):
        self.scheduler, self.params, self.follow_up = scheduler, params, follow_up
        self.coming = list(questions)
        self.asked: list[str] = []  # by request id
        self._prefills_shown = 0

    def arrive(self, step: int) -> bool:
        """What comes before this step; True while more is to come."""
        self._show_prefill()
        if not self.scheduler.running and self.coming:
            step = max(step, self.coming[0][0])  # nobody is waiting for an answer: no reason to wait
        while self.coming and self.coming[0][0] <= step:
            self._ask(self.coming.pop(0)[1])
        first = self.scheduler.results.get(0)
        if self.follow_up and first:
            self._ask(self.follow_up, history=[self.asked[0], first.text])
            self.follow_up = None
        return bool(self.coming or self.follow_up)

    def _ask(self, question: str, history: list[str] | None = None) -> None:
        turns = [*(history or []), question]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        tokenizer = self.scheduler.wrapper.tokenizer
        if tokenizer.has_chat_template:
            ids = tokenizer.encode_chat([{"role": "system", "content": SYSTEM_PROMPT}, *messages])
        else:
            ids = tokenizer.encode("\n".join([SYSTEM_PROMPT, *turns]))
        self.scheduler.add_request(input_ids=ids, sampling_params=self.params)
        self.asked.append(question)

    def _show_prefill(self) -> None:
        if self.scheduler.steps["prefill"] == self._prefills_shown:
            return
        self._prefills_shown = self.scheduler.steps["prefill"]
        batch = self.scheduler.last_prefill
        computed, total = sum(n for _, n in batch), sum(len(req.prompt_ids) for req, _ in batch)
        names = ", ".join(f"#{req.rid}" for req, _ in batch)
        decoding = len(self.scheduler.running) - sum(req in self.scheduler.running for req, _ in batch)
        print(
            f"  step {self.scheduler.step_number - 1:3}  prefill {names:14} {computed:5} tokens computed, "
            f"{total - computed:5} from the tree; {decoding} others were decoding",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-name", help="folder in Hugging Face layout or Hub id; default: the bundled tiny model")
    parser.add_argument("--force-cpu", action="store_true", help="use the CPU even where there are GPUs")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page (default 16)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer (default 96)")
    parser.add_argument("--prompts-file", type=Path, help="questions of your own, one a line")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default float32 on CPU, bfloat16 on GPU")
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
        check_invariants(scheduler)
    except InvariantError as error:
        return str(error)
    return None


# --- what a person reads


def print_header(wrapper: TPRadixAttentionModelWrapper, tp: TPGroup) -> None:
    c, heads = wrapper.config, wrapper.model.heads
    mine = sum(p.numel() for p in wrapper.model.parameters())
    print(
        f"{c.architecture}, {c.num_layers} layers, {c.num_heads} query and {c.num_kv_heads} KV heads, on {tp.size} rank(s)"
    )
    print(
        f"each rank: {heads.num_q} query and {heads.num_kv} KV heads, {mine:,} parameters; rank 0 read "
        f"{wrapper.load_report.bytes_read:,} bytes of weights"
    )
    if (zeros := heads.num_q * tp.size - c.num_heads) > 0:
        print(
            f"{heads.num_q} x {tp.size} = {c.num_heads} + {zeros}: {zeros} query heads are zeros, so that groups come out even"
        )
    if (copies := heads.num_kv * tp.size // c.num_kv_heads) > 1:
        print(f"{heads.num_kv} x {tp.size} = {copies} x {c.num_kv_heads}: each KV head is held {copies} times")
    print(
        f"pool: {wrapper.kv_cache.num_pages} pages of {wrapper.page_size} tokens on {tp.device.type}, "
        f"{str(wrapper.dtype).removeprefix('torch.')}\n"
    )


def print_answers(asked: list[str], results: dict[int, RequestOutput]) -> None:
    print()
    for rid, out in results.items():
        note = "" if out.finish_reason["type"] == "stop" else f"  [cut at {out.completion_tokens} tokens]"
        print(f"#{rid} {asked[rid]}   ({out.prompt_tokens} prompt tokens, {out.cached_tokens} cached)")
        print(textwrap.fill(" ".join(out.text.split()) + note, 116, initial_indent="   ", subsequent_indent="   "))


def expected_comm(scheduler: TPScheduler, tp: TPGroup) -> dict[str, dict[str, int]]:
    """What the formula says: 1 + 2L all-reduces [T, D] a step, and one gather [B, V/R] a step that samples."""
    if tp.size == 1:
        return {}
    wrapper, steps, work = scheduler.wrapper, sum(scheduler.steps.values()), scheduler.work
    per_step, item = 1 + 2 * wrapper.config.num_layers, wrapper.dtype.itemsize
    vocab_local = -(-wrapper.config.vocab_size // tp.size)
    return {
        "all_reduce": {
            "calls": per_step * steps,
            "bytes": per_step * work["tokens"] * wrapper.config.hidden_size * item,
        },
        "gather": {"calls": work["samplings"], "bytes": work["sampled"] * vocab_local * item},
    }


def print_summary(scheduler: TPScheduler, tp: TPGroup, results: dict[int, RequestOutput], broken: str | None) -> None:
    cached, prompt = sum(r.cached_tokens for r in results.values()), sum(r.prompt_tokens for r in results.values())
    print(f"\nhit rate {cached / prompt:.3f}: {cached} of {prompt} prompt tokens came from the radix tree")
    print(f"{scheduler.steps['prefill']} prefill and {scheduler.steps['decode']} decode steps, {tp.size} rank(s)")
    formula = expected_comm(scheduler, tp)
    for op, said in sorted(tp.ledger.summary().items()):
        wire = wire_bytes(op, said["bytes"], tp.size)
        line = f"  {op:<11}{said['calls']:6} calls {said['bytes']:12,} bytes {wire:12,} on the wire"
        if op in formula:
            right = "as the formula says" if said == formula[op] else f"NOT the formula's {formula[op]}"
            line += (
                f"   {right}: {'1 + 2L a step, [T, D]' if op == 'all_reduce' else '1 a step that samples, [B, V/R]'}"
            )
        else:
            line += "   tasks and tokens, rank 0 -> all; the answers, once"
        print(line)
    if tp.size > 1:
        print(
            f"  bytes: of rank 0's tensors; on the wire: between all {tp.size} ranks together (common/distributed/cost_model.py)"
        )
    free, cached_pages = scheduler.pool.num_free_pages, scheduler.tree.evictable_size // scheduler.page_size
    pages = f"{scheduler.pool.num_pages} pages = {free} free + {cached_pages} cached"
    print(f"conservation: {'BROKEN: ' + broken if broken else pages + ', no page lost, none with two owners'}")


def report(scheduler: TPScheduler, tp: TPGroup, args, asked: list[str], results, broken: str | None) -> dict:
    """The --json file."""
    cached, prompt = sum(r.cached_tokens for r in results.values()), sum(r.prompt_tokens for r in results.values())
    return {
        "world_size": tp.size,
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
        "comm": tp.ledger.summary(),
        "steps": scheduler.steps,
        "invariants_ok": broken is None,
    }


if __name__ == "__main__":
    run_main(main)
