"""One sampler or many: what becomes of the text if every rank draws its own tokens.

    torchrun --nproc_per_node=2 ch07_sglang_radix/demo_6_one_sampler.py

The same question four times, at temperature 3: with that the ranks part within a few tokens, and the text is wild in any
case; above it stands what the model says at temperature 0. Either every rank gathers all the logits and samples by
itself, with its own seed or with a common one, or rank 0 alone samples and broadcasts the tokens. A rank that goes on
with another token than its peers does not write another text of its own: their partial sums are still added up, so all
of them compute on a mixture of both.
"""

from collections.abc import Callable

import numpy as np
import torch

from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.layers.vocab import gather_logits
from common.parallel_state import all_gather, broadcast, initialize_tensor_parallel
from common.sampling.batch import SamplingRow
from common.sampling.params import SamplingParams
from common.sampling.sampler import sample
from common.teaching.show import check, heading, table
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

PARAMS, STEPS, SEED = SamplingParams(temperature=3.0, top_k=8, ignore_eos=True), 24, 6
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def main() -> None:
    tp = initialize_tensor_parallel(device="cpu")
    wrapper = TPRadixAttentionModelWrapper(max_total_tokens=512, tp=tp)
    prompt = wrapper.tokenizer.encode_chat(
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is a radix cache?"}]
    )
    writer = Writer(wrapper, prompt)
    runs = {
        "everyone, own seeds": (writer.everyone_samples, SEED + tp.rank),
        "everyone, one seed": (writer.everyone_samples, SEED),
        "everyone, one seed, rank 1 a draw ahead": (writer.everyone_samples_late, SEED),
        "rank 0 alone, own seeds": (writer.rank_0_samples, SEED + tp.rank),
    }
    greedy = writer.write(writer.greedy, SEED)
    texts, rows = {}, []
    for name, (choose, seed) in runs.items():
        with tp.ledger.recording() as ledger:
            mine = writer.write(choose, seed)
            sent = [e for e in ledger.entries if e.label in ("logits", "tokens")]
        everyones = all_gather(torch.tensor(mine), tp, "to compare")  # COMM all-gather [STEPS]: to compare
        texts[name] = [tokens.tolist() for tokens in everyones]
        handed_in = [sum(e.bytes for e in sent if e.op == op) // STEPS for op in ("all_gather", "gather", "broadcast")]
        rows.append((name, differ_at(texts[name]), *handed_in))
    if tp.rank > 0:
        return
    heading("Temperature 0: the best token each time, on any rank")
    print(f"  {' '.join(wrapper.tokenizer.decode(greedy).split())}")
    for name, everyones in texts.items():
        heading(f"Temperature {PARAMS.temperature:g}: {name}")
        for rank, tokens in enumerate(everyones):
            print(f"  rank {rank}: {' '.join(wrapper.tokenizer.decode(tokens).split())}")
    heading("Where the ranks part, and the bytes a rank hands in each step")
    table(("who samples", "they part at token", "all-gather", "gather", "broadcast"), rows)
    if tp.size == 1:
        print("  one rank has nobody to differ from; start two")
        return
    print("  (an all-gather sends each part to every other rank, a gather to rank 0 only)")
    agree = {name: all(tokens == everyones[0] for tokens in everyones) for name, everyones in texts.items()}
    check("with seeds of their own the ranks diverge", not agree["everyone, own seeds"])
    check("with one seed, and as many draws on each rank, they agree", agree["everyone, one seed"])
    check("one draw too many on one rank, and they diverge", not agree["everyone, one seed, rank 1 a draw ahead"])
    check("if rank 0 alone samples they agree, whatever the seeds", agree["rank 0 alone, own seeds"])
    check("and the text is the one of rank 0's seed", texts["rank 0 alone, own seeds"] == texts["everyone, one seed"])


class Writer:
    """The prompt, then STEPS tokens; `choose(logits of this rank, seed, tokens so far)` gives this rank's next one."""

    def __init__(self, wrapper: TPRadixAttentionModelWrapper, prompt: list[int]):
        self.wrapper, self.tp, self.prompt = wrapper, wrapper.tp, prompt
        self.vocab_size = wrapper.config.vocab_size

    def write(self, choose: Callable, seed: int) -> list[int]:
        wrapper, one = self.wrapper, np.ones(1, dtype=np.int64)
        pages = -(-(len(self.prompt) + STEPS) // wrapper.page_size)
        wrapper.table.set_pages([(0, 0, range(pages))])
        logits = wrapper.ragged(np.array(self.prompt), 0 * one, 0 * one, len(self.prompt) * one, one)
        tokens: list[int] = []
        while True:
            token = choose(logits, seed, tokens)  # [1]
            wrapper.receive_tokens(token)  # this rank goes on with it
            tokens.append(int(token))
            if len(tokens) == STEPS:
                return tokens
            logits = wrapper.decode(0 * one, (len(self.prompt) + len(tokens) - 1) * one)

    def everyone_samples(self, logits: torch.Tensor, seed: int, tokens: list[int]) -> torch.Tensor:
        parts = all_gather(logits, self.tp, "logits")  # COMM all-gather [B, V/R]: every rank samples
        return self._draw(torch.cat(parts, dim=-1)[:, : self.vocab_size], seed, tokens)

    def everyone_samples_late(self, logits: torch.Tensor, seed: int, tokens: list[int]) -> torch.Tensor:
        """As if one rank had drawn a number that the others have not: a retry, a request that it alone dropped."""
        return self.everyone_samples(logits, seed, tokens + [0] * self.tp.rank)

    def rank_0_samples(
        self, logits: torch.Tensor, seed: int, tokens: list[int], params: SamplingParams = PARAMS
    ) -> torch.Tensor:
        full = gather_logits(logits, self.vocab_size, self.tp)
        token = torch.empty(1, dtype=torch.int64) if full is None else self._draw(full, seed, tokens, params)
        return broadcast(token, self.tp, "tokens")  # COMM broadcast [B]: the tokens rank 0 chose

    def greedy(self, logits: torch.Tensor, seed: int, tokens: list[int]) -> torch.Tensor:
        return self.rank_0_samples(logits, seed, tokens, GREEDY)

    def _draw(
        self, logits: torch.Tensor, seed: int, tokens: list[int], params: SamplingParams = PARAMS
    ) -> torch.Tensor:
        """The n-th token takes the n-th random number of the seed."""
        return sample(logits, [SamplingRow(params, seed, self.prompt, tokens)]).tokens


def differ_at(everyones: list[list[int]]) -> str:
    at = next((i for i, tokens in enumerate(zip(*everyones, strict=True)) if len(set(tokens)) > 1), None)
    return "never" if at is None else str(at)


if __name__ == "__main__":
    run_main(main)
