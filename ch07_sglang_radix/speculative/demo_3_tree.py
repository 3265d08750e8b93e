"""A tree of guesses in one step: its mask and its positions, and the path that is copied into place.

    python ch07_sglang_radix/speculative/demo_3_tree.py

The bundled model is asked a question, and answers one token at a time: so we know what is right. Then a tree is laid before it in
which the right path is hidden between wrong ones. All nodes go through the model in one step; each sees the prompt and its own
ancestors, and must give what the model gives for the text of its path alone. The path is walked, and what its nodes left in the
pages is copied to where it belongs. At the end three mistakes are made that no error message would tell of.
"""

from dataclasses import replace

import numpy as np
import torch

from common.attention.sequence_table import StepInputs
from common.distributed.launch import run_main
from common.draft_tree import Accepted, DraftTree, walk
from common.executor import Executor
from common.teaching.show import check, heading, mistake, table

PROMPT = "<|im_start|>user\nWhat is a radix cache?<|im_end|>\n<|im_start|>assistant\n"
PARENTS = [-1, 0, 0, 1, 2, 2, 4]
RIGHT, WRONG = (
    (2, 4, 6),
    {1: " page", 3: " tree", 5: " node"},
)  # nodes that carry the answer's tokens; and what others carry
TREE, PLAIN = 0, 1  # rows of the sequence table: whose pages a tree is laid in, and those of plain decoding
PAGES = 16  # of each
CLOSE = 1e-3  # of logits that reach 20: the same sums, in another order


def main() -> None:
    executor = Executor(device="cpu", page_size=4, max_total_tokens=8 * PAGES, max_running_requests=2)
    for row in (TREE, PLAIN):
        executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES))])
    with torch.inference_mode():
        prompt = executor.tokenizer.encode(PROMPT)
        answer = one_by_one(executor, prompt, len(RIGHT) + 2)
        prefill(executor, TREE, prompt[:-1])  # the last token is the root: known, and not computed yet
        tree, root = lay(executor, prompt, answer), np.array([len(prompt) - 1])
        step = executor.table.tree(np.array([TREE]), root, tree)
        show_tree(executor, tree, step)
        logits = forward(executor, step)
        accepted = walk(tree, logits.argmax(dim=-1)[None])
        show_nodes(executor, tree, logits, prompt)
        show_walk(executor, step, accepted, answer)
        mistakes(executor, step, accepted, answer)


def forward(executor: Executor, step: StepInputs) -> torch.Tensor:
    """The logits of every token of a step."""
    attention = executor.attention(executor.kv_cache, step.meta)
    return executor.model.compute_logits(executor.model(step.input_ids, step.positions, attention))


def prefill(executor: Executor, row: int, tokens: list[int]) -> torch.Tensor:
    """The logits behind the last of these tokens."""
    one = np.ones(1, dtype=np.int64)
    return forward(executor, executor.table.prefill(np.array(tokens), one * row, one * 0, one * len(tokens)))[-1]


def one_by_one(executor: Executor, prompt: list[int], count: int) -> list[int]:
    """The next `count` tokens, as plain decoding gives them; their K and V stay in the row PLAIN."""
    row, answer = np.array([PLAIN]), [int(prefill(executor, PLAIN, prompt).argmax())]
    while len(answer) < count:
        executor.table.set_tokens(torch.from_numpy(row), torch.tensor(answer[-1:]))
        step = executor.table.decode(row, np.array([len(prompt) + len(answer) - 1]))
        answer.append(int(forward(executor, step)[0].argmax()))
    return answer


def lay(executor: Executor, prompt: list[int], answer: list[int]) -> DraftTree:
    tokens = [prompt[-1]] + [
        executor.tokenizer.encode(WRONG[node])[0] if node in WRONG else answer[RIGHT.index(node)]
        for node in range(1, len(PARENTS))
    ]
    return DraftTree(torch.tensor([tokens]), torch.tensor([PARENTS]))


def show_tree(executor: Executor, tree: DraftTree, step: StepInputs) -> None:
    heading("A tree: where its nodes stand, where they lie, and who sees whom")
    words = [repr(executor.tokenizer.decode([token])) for token in tree.tokens[0].tolist()]
    numbers = zip(tree.depth[0].tolist(), step.positions.tolist(), step.meta.slot_mapping.tolist(), strict=True)
    rows = []
    for node, (depth, position, slot) in enumerate(numbers):
        sees = " ".join(str(j) if seen else "." for j, seen in enumerate(tree.ancestors[0, node].tolist()))
        rows.append((node, words[node], str(PARENTS[node]) if node else "-", depth, position, slot, sees))
    table(("node", "token", "parent", "depth", "position", "slot", "sees the prompt, and nodes"), rows)


def show_nodes(executor: Executor, tree: DraftTree, logits: torch.Tensor, prompt: list[int]) -> None:
    heading("One step, seven rows: what comes next at each node")
    rows, apart = [], 0.0
    for node in range(len(PARENTS)):
        path = tree.tokens[0, tree.ancestors[0, node]].tolist()
        alone = prefill(executor, PLAIN, prompt[:-1] + path)
        apart = max(apart, float((logits[node] - alone).abs().max()))
        guessed, after = (executor.tokenizer.decode(tokens) for tokens in (path[1:], [int(logits[node].argmax())]))
        rows.append((node, repr(guessed), repr(after)))
    table(("node", "the answer so far", "comes next"), rows)
    check(f"the logits of every node are those of its own text alone, to {CLOSE}", apart < CLOSE)


def show_walk(executor: Executor, step: StepInputs, accepted: Accepted, answer: list[int]) -> None:
    heading("The walk, and the copy")
    count, cache = int(accepted.counts), executor.kv_cache
    path, tokens = accepted.nodes[0, :count].tolist(), accepted.tokens[0, :count].tolist()
    print(f"  path {path}, and out comes {executor.tokenizer.decode(tokens)!r}: {count} tokens for one step")
    check(f"{count} plain decode steps give the same", tokens == answer[:count])
    slots = step.meta.slot_mapping
    lies = list(range(len(PARENTS)))
    afterwards = path + lies[count:]
    cache.move(*accepted.moves(slots[None]))
    table(("slot", *map(str, slots.tolist())), [("before, of node", *map(str, lies)), ("after", *map(str, afterwards))])
    length = int(step.meta.context_lens) - len(PARENTS) + count
    print(f"  the sequence has {length} tokens now; what lies behind them counts for nothing")
    one_by_one(executor, executor.tokenizer.encode(PROMPT), count + 1)  # the row PLAIN again, as far as this
    own, plain = (cache.kv[:, :, row * PAGES : (row + 1) * PAGES].flatten(2, 3)[:, :, :length] for row in (TREE, PLAIN))
    check(f"its K and V are those of plain decoding, to {CLOSE}", bool((own - plain).abs().max() < CLOSE))


def mistakes(executor: Executor, step: StepInputs, accepted: Accepted, answer: list[int]) -> None:
    heading("Three mistakes that run without an error: how far a logit is then from plain decoding's")
    prompt, node, count = executor.tokenizer.encode(PROMPT), RIGHT[1], int(accepted.counts)
    alone = prefill(executor, PLAIN, prompt + answer[: RIGHT.index(node) + 1])
    right = off(forward(executor, step)[node], alone)
    causal = replace(step.meta, window=torch.ones_like(step.meta.window).tril())
    wrong = off(forward(executor, replace(step, meta=causal))[node], alone)
    mistake(f"node {node} sees all nodes before it, whosever text they are", wrong=wrong, right=right)
    as_they_lie = step.positions[0] + torch.arange(len(PARENTS))
    wrong = off(forward(executor, replace(step, positions=as_they_lie))[node], alone)
    mistake(f"node {node} stands where it lies: by its slot, not by its depth", wrong=wrong, right=right)
    root, row = step.positions[:1].numpy(), np.array([TREE])
    executor.table.set_tokens(torch.from_numpy(row), accepted.last_tokens)
    alone, said = prefill(executor, PLAIN, prompt + answer[:count]), []
    for copied in (False, True):
        forward(executor, step)  # every node in its own slot, once more
        if copied:
            executor.kv_cache.move(*accepted.moves(step.meta.slot_mapping[None]))
        said.append(off(forward(executor, executor.table.decode(row, root + count))[0], alone))
    mistake("the path is not copied: in the next step", wrong=said[0], right=said[1])


def off(logits: torch.Tensor, wanted: torch.Tensor) -> str:
    return f"{float((logits - wanted).abs().max()):.1f}"


if __name__ == "__main__":
    run_main(main)
