"""The same request, alone and in company: other bits, and now and then another text. Then with enable_deterministic_inference.

    python ch07_sglang_radix/demo_14_same_text.py

Eight prompts that the bundled model has no good answer to, so that its best two tokens often lie close together; bfloat16,
greedy, 14 tokens each. They are asked one by one, all at once, and all at once in chunks of 16 tokens. What is counted are
log-probabilities of the tokens put out, bit for bit.
"""

import torch
import torch.nn.functional as F

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.layers.batch_invariant import agreeing_rows, in_blocks
from common.teaching.show import check, heading, table

PROMPTS = [
    "The rank cannot", "The batch and then", "A rank does", "A rank and then", "A block and then", "What is a rank?",
    "A rank cannot", "The page is",
]  # fmt: skip
PARAMS = {"max_new_tokens": 14, "temperature": 0.0, "ignore_eos": True}
OUT, IN = 576, 1536  # a down_proj of SmolLM2-135M
WAYS = {"all at once": {}, "all at once, chunks of 16": {"chunked_prefill_size": 16, "enable_mixed_chunk": True}}


def main() -> None:
    heading(f"One row of a float32 product with W [{OUT}, {IN}], in company of so many")
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(1))
    rows = agreeing_rows(weight)
    alone, fixed = F.linear(x[:1], weight), in_blocks(lambda block: F.linear(block, weight), x[:1], rows)
    told, blocked = [], []
    for n in (2, 8, 40):
        y, z = F.linear(x[:n], weight)[:1], in_blocks(lambda block: F.linear(block, weight), x[:n], rows)[:1]
        told.append((n, int((y != alone).sum()), f"{(y - alone).abs().max():.1e}", int((z != fixed).sum())))
        blocked.append(torch.equal(z, fixed))
    table(("rows", "numbers that differ", "furthest", f"in blocks of {rows}"), told)
    check("in blocks of one shape the row is always the same", all(blocked))

    heading("Eight requests, asked one by one and together")
    counted, parted = [], None
    for deterministic in (False, True):
        one_by_one = ask({}, deterministic, together=False)
        for way, options in WAYS.items():
            answers = ask(options, deterministic, together=True)
            pairs = list(zip(PROMPTS, one_by_one, answers, strict=True))
            others = [p for p, a, b in pairs if logprobs(a) != logprobs(b)]
            texts = [(p, a, b) for p, a, b in pairs if a["output_ids"] != b["output_ids"]]
            counted.append(("on" if deterministic else "off", way, len(others), len(texts)))
            parted = parted or (texts[0] if texts and not deterministic else None)
    table(("deterministic", "against one by one", "requests with other bits", "with another text"), counted)
    if parted:
        tell(*parted)
    check(
        "with it nothing differs: no bit, no text",
        not any(bits + texts for on, _, bits, texts in counted if on == "on"),
    )


def ask(options: dict, deterministic: bool, together: bool) -> list[dict]:
    engine = Engine(
        device="cpu", dtype="bfloat16", max_total_tokens=2048, enable_deterministic_inference=deterministic, **options
    )
    asked = {"return_logprob": True, "top_logprobs_num": 2}
    answers = (
        engine.generate(PROMPTS, PARAMS, **asked)
        if together
        else [engine.generate(p, PARAMS, **asked) for p in PROMPTS]
    )
    engine.shutdown()
    return answers


def logprobs(answer: dict) -> list[float]:
    return [one[0] for one in answer["meta_info"]["output_token_logprobs"]]


def tell(prompt: str, alone: dict, company: dict) -> None:
    """Where two texts part, and by how little."""
    n = next(i for i, (a, b) in enumerate(zip(alone["output_ids"], company["output_ids"], strict=True)) if a != b)
    print(f"  {prompt!r} parts at token {n + 1}; its two best tokens there, as log-probabilities:")
    for name, answer in (("alone", alone), ("together", company)):
        best = answer["meta_info"]["output_top_logprobs"][n]
        print(f"    {name}: {best[0][0]:.4f} (token {best[0][1]}) and {best[1][0]:.4f} (token {best[1][1]})")


if __name__ == "__main__":
    run_main(main)
