"""Is the engine right? Two sequences of different length, a prefill and three decode steps, and four questions to it.

    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_9b_four_checks.py
    python ch06_tp_vllm/demo_9b_four_checks.py                      # one rank

    prefill    the logits behind each prompt are those of transformers
    decode     so are the logits of three more steps, and the tokens
    ranks      every rank has the same block tables and the same last tokens
    KV         what lies in this rank's pages, read through the block table, are the K and V of its heads, all that were
               written and no others

transformers computes each sequence alone, whole, in one forward: no batch, no pages, no ranks.
"""

import torch
from transformers import AutoModelForCausalLM

from ch06_tp_vllm import LLMEngine, SamplingParams
from common.distributed.launch import run_main
from common.layers.heads import HeadLayout
from common.parallel_state import TPGroup, all_gather
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen import TINY_QWEN_PATH

PROMPTS = {"short": [220 + i % 3 for i in range(20)], "long": [250 + i % 7 for i in range(50)]}
DECODE_STEPS = 3
WHY = "to compare"


def main() -> None:
    engine = LLMEngine(num_gpu_blocks_override=32, device="cpu")
    tp, logits = engine.tp, []
    run = engine.runner.run
    engine.runner.run = lambda step: logits.append(run(step)) or logits[-1]  # rank 0: the gathered logits of each step
    for name, prompt in PROMPTS.items():
        engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=DECODE_STEPS + 2, ignore_eos=True))
    for _ in range(1 + DECODE_STEPS):
        outputs = {output.request_id: output.outputs[0].token_ids for output in engine.step()}

    theirs = {name: alone(prompt + outputs[name][:-1]) for name, prompt in PROMPTS.items()}  # the last was not fed in
    tables = what_all_ranks_have(engine.runner.table.page_table[:, :4], tp)
    last_tokens = what_all_ranks_have(engine.runner.table.last_token[:2], tp)
    pages = [[int(page) for page in row if page >= 0] for row in tables[0][:2]]
    layout = HeadLayout.of(engine.runner.config.num_heads, engine.runner.config.num_kv_heads, tp.rank, tp.size)
    off = [kv_difference(engine, pages[i], theirs[name], layout.kv_heads) for i, name in enumerate(PROMPTS)]
    offs = what_all_ranks_have(torch.tensor(off), tp)  # [ranks] of [sequences]
    block = engine.runner.kv_cache.k[0, pages[1][0], 0, 0, :4]  # of the first token of the long one, in the first layer
    blocks = what_all_ranks_have(block, tp)
    written = int(engine.runner.kv_cache.k[0].flatten(0, 1).any(dim=-1).any(dim=-1).sum())  # slots, of all in the pool
    while engine.has_unfinished_requests():
        engine.step()
    if tp.rank > 0:
        return

    heading(f"Prefill and {DECODE_STEPS} decode steps on {tp.size} rank(s): the largest difference of a logit")
    rows, worst, best = [], 0.0, True
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        behind = theirs[name].logits[0, len(prompt) - 1 :]  # [1 + DECODE_STEPS, V]
        step_by_step = [(logits[step][i] - behind[step]).abs().max().item() for step in range(1 + DECODE_STEPS)]
        worst, best = max(worst, *step_by_step), best and behind.argmax(dim=-1).tolist() == outputs[name]
        rows.append((name, len(prompt), *(f"{x:.0e}" for x in step_by_step), outputs[name]))
    table(("sequence", "prompt", "prefill", *(f"decode {n}" for n in range(1, DECODE_STEPS + 1)), "tokens"), rows)
    check("no logit of prefill or decode is off by 0.001", worst < 1e-3)
    check("every token is transformers' best", best)

    heading("Are the ranks of one mind?")
    for rank in range(tp.size):
        print(f"  rank {rank}: block tables {pages_of(tables[rank])}, last tokens {last_tokens[rank].tolist()}")
    check("block tables and tokens are the same on all ranks", all(map(torch.equal, tables, [tables[0]] * tp.size))
          and all(map(torch.equal, last_tokens, [last_tokens[0]] * tp.size)))  # fmt: skip

    heading("Is what was written what is read?")
    heads = [HeadLayout.of(14, 2, rank, tp.size).kv_heads for rank in range(tp.size)]
    rows = [(rank, list(heads[rank]), *(f"{x:.0e}" for x in offs[rank].tolist())) for rank in range(tp.size)]
    table(("rank", "KV heads", *(f"{name}: K, V of all layers off by" for name in PROMPTS)), rows)
    check("every rank's pages hold its heads' K and V of all tokens", all(bool((x < 1e-3).all()) for x in offs))
    tokens = sum(len(prompt) + DECODE_STEPS for prompt in PROMPTS.values())
    check(f"{tokens} tokens were computed, {written} slots of the pool hold something", written == tokens)
    if tp.size > 1 and heads[0][0] != heads[-1][0]:
        print(
            "  The same block, the same slot, the first layer; what rank 0 would take for its own if pages were mixed up:"
        )
        mistake(f"K of the first head there, on rank {tp.size - 1} and on rank 0", blocks[-1], blocks[0])


def alone(tokens: list[int]):
    """transformers on one sequence: logits [1, S, V], past_key_values."""
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval()
        return model(torch.tensor([tokens]), use_cache=True)


def kv_difference(engine: LLMEngine, pages: list[int], theirs, kv_heads: tuple[int, ...]) -> float:
    """Of one sequence, read through its block table: the largest difference of K or V in any layer."""
    cache, worst = engine.runner.kv_cache, 0.0
    tokens = theirs.logits.shape[1]
    slots = torch.tensor([pages[i // cache.page_size] * cache.page_size + i % cache.page_size for i in range(tokens)])
    for layer, whole in enumerate(theirs.past_key_values.layers):
        for ours, all_heads in zip(cache.read(layer, slots), (whole.keys, whole.values), strict=True):
            mine = all_heads[0, list(kv_heads)].transpose(0, 1)  # [S, Hkv/R, d]
            worst = max(worst, (ours - mine).abs().max().item())
    return worst


def what_all_ranks_have(x: torch.Tensor, tp: TPGroup) -> list[torch.Tensor]:
    return all_gather(x.clone(), tp, WHY)  # COMM all-gather [...]: to compare, no engine does


def pages_of(table: torch.Tensor) -> list[list[int]]:
    """The block tables of the two sequences, without what stands behind their ends."""
    sizes = [-(-(len(prompt) + DECODE_STEPS) // 16) for prompt in PROMPTS.values()]
    return [row[:n].tolist() for row, n in zip(table, sizes, strict=False)]


if __name__ == "__main__":
    run_main(main)
