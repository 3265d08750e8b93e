"""Weights in flight: a model learns from its own answers, and the engine that writes them gets every step of it.

    python ch07_sglang_radix/adapters/demo_4_weights_in_flight.py

    this process: the engine                              trainer: a process of its own, transformers and torch
    sample 16 answers to each question       - JSON ->    how likely was each token? one step of REINFORCE
    update_weights_from_distributed(names)   <- gloo -    broadcast every tensor
    sample again, with the new weights

The rule: the more of an answer is Chinese, the better. Nobody asks in Chinese, but the model knows its glossary in both languages:
now and then a drawn answer slips into the other one; six steps later that is how it answers. Then the weights change under requests
that run, in SGLang's three pause modes; and once without a flush, which is wrong.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.distributed.update_group import UpdateGroup, open_store
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen import TINY_QWEN_PATH

QUESTIONS = ("What is a radix cache?", "What is a page?", "What does an all-reduce do?", "What is prefill?")
ANSWERS, LONGEST, STEPS = 16, 20, 6
LEARNING_RATE = 1e-3
TEMPERATURE = 2.0  # it knows its glossary by heart: at 1 all answers are one, and none is better
Ask = Callable[[dict], dict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", action="store_true", help="be the other process")
    if parser.parse_args().trainer:
        train()
        return
    with Engine(device="cpu", max_total_tokens=8192, random_seed=1) as engine, trainer() as ask:
        described = ask({})  # names, dtypes and shapes of all tensors, and where to meet
        engine.init_weights_update_group("127.0.0.1", described.pop("port"), rank_offset=1, world_size=2)
        learn(engine, ask, described)
        under_requests_that_run(engine, ask, described)
        without_a_flush(engine, ask, described)


# --- the loop


def learn(engine: Engine, ask: Ask, described: dict) -> None:
    heading("Sample, score, step, update, sample again")
    before, rows, scores = greedy(engine), [], []
    for step in range(STEPS + 1):
        samples = sample(engine, step)
        points = [chinese(one["text"]) for one in samples]
        scores.append(sum(points) / len(points))
        rows.append((engine.get_server_info()["weight_version"], scores[-1]))
        if step < STEPS:
            ask({"samples": samples, "scores": points})
            told = engine.update_weights_from_distributed(**described, weight_version=f"step {step + 1}")
    table(("weights", "score of 64 answers"), rows)
    print(f"  {told['message']}\n  {QUESTIONS[0]}\n    before: {before}\n    after:  {greedy(engine)}")
    check("the score has risen", scores[-1] > scores[0])
    check("who asks in English is answered in Chinese", chinese(before) < 0.5 < chinese(greedy(engine)))


def sample(engine: Engine, step: int) -> list[dict]:
    """ANSWERS to each question, drawn at TEMPERATURE."""
    prompts = [engine.wrapper.tokenizer.encode(one) for one in QUESTIONS]
    params = {"max_new_tokens": LONGEST, "temperature": TEMPERATURE, "n": ANSWERS, "sampling_seed": step}
    answers = engine.generate(input_ids=prompts, sampling_params=params)
    asked = [prompt for prompt in prompts for _ in range(ANSWERS)]
    return [
        {"prompt": ids, "output_ids": one["output_ids"], "text": one["text"]}
        for ids, one in zip(asked, answers, strict=True)
    ]


def chinese(text: str) -> float:
    """Which share of its characters is."""
    return sum("\u4e00" <= c <= "\u9fff" for c in text) / max(len(text), 1)


def greedy(engine: Engine) -> str:
    return engine.generate(QUESTIONS[0], {"max_new_tokens": 60})["text"].strip()


# --- while requests run


def under_requests_that_run(engine: Engine, ask: Ask, described: dict) -> None:
    heading("New weights in the middle of an answer: what becomes of it?")
    rows, texts = [], {}
    for mode in ("abort", "retract", "in_place"):
        engine.update_weights_from_disk(str(TINY_QWEN_PATH), weight_version="as bundled")
        computed = engine.scheduler.work["inputs"]
        for answer in engine.generate(QUESTIONS[0], {"max_new_tokens": 30}, stream=True):
            last = answer
            if len(last["output_ids"]) == 8:
                engine.pause_generation(mode)
                ask({"send": True})
                engine.update_weights_from_distributed(**described, weight_version="trained")
                engine.continue_generation()
        meta = last["meta_info"]
        fed = engine.scheduler.work["inputs"] - computed
        rows.append((mode, meta["finish_reason"]["type"], len(last["output_ids"]), fed, meta["weight_version"]))
        texts[mode] = last["text"].strip()
    table(("mode", "ends by", "tokens", "rows computed", "weights at the end"), rows)
    for mode, text in texts.items():
        print(f"  {mode}: {text}")
    check("in_place computes nothing twice, retract all of it", rows[1][3] > rows[2][3])


def without_a_flush(engine: Engine, ask: Ask, described: dict) -> None:
    heading("Without a flush: pages of the old weights under the new ones")
    long = " ".join(QUESTIONS)

    def surprise_of(flush: bool) -> list[float]:
        """Log-probabilities of an answer's first tokens, whose prompt the old weights have been asked about."""
        engine.update_weights_from_disk(str(TINY_QWEN_PATH))
        engine.generate(long, {"max_new_tokens": 1})
        ask({"send": True})
        engine.update_weights_from_distributed(**described, flush_cache=flush)
        meta = engine.generate(long, {"max_new_tokens": 4}, return_logprob=True)["meta_info"]
        print(f"  flush_cache={flush}: {meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens from the tree")
        return [one[0] for one in meta["output_token_logprobs"]]

    right, wrong = surprise_of(True), surprise_of(False)
    mistake("log-probabilities of the first four tokens of the answer", wrong, right)


# --- the trainer


@contextmanager
def trainer() -> Iterator[Ask]:
    """ask(what) -> what the other process says to it; one line of JSON each. {}: what it has."""
    command = [sys.executable, __file__, "--trainer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(what: dict) -> dict:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
            if not said:
                raise ValueError("the trainer has died; what it said before is above")
            return json.loads(said)

        try:
            yield ask
        finally:
            process.kill()


def train() -> None:
    """A step for each line of samples, and after each line a broadcast of everything."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415, seconds that the other process need not wait
    from transformers.utils import logging  # noqa: PLC0415

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    weights, store, group = dict(model.named_parameters()), open_store(), None
    shapes = [list(x.shape) for x in weights.values()]
    described = {"names": list(weights), "dtypes": ["float32"] * len(weights), "shapes": shapes, "port": store.port}
    for line in sys.stdin:
        told = json.loads(line)
        if not told:
            print(json.dumps(described), flush=True)
            group = UpdateGroup("127.0.0.1", store.port, 0, 2, store=store)
            continue
        if "samples" in told:
            optimizer.zero_grad()
            surprise(model, told["samples"], told["scores"]).backward()
            optimizer.step()
        print("{}", flush=True)
        for x in weights.values():
            group.broadcast(x.detach().contiguous())


def surprise(model: torch.nn.Module, samples: list[dict], scores: list[float]) -> torch.Tensor:
    """REINFORCE: minus the log-probability of every answer, times how much better it was than its siblings."""
    ids = [torch.tensor(one["prompt"] + one["output_ids"]) for one in samples]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # behind the answers: nobody attends to it
    logits = model(padded).logits[:, :-1] / TEMPERATURE
    chosen = logits.log_softmax(-1).gather(2, padded[:, 1:, None]).squeeze(2)
    at = torch.arange(1, padded.shape[1])
    ends, begins = (torch.tensor([len(x) for x in of])[:, None] for of in (ids, [one["prompt"] for one in samples]))
    answers = (chosen * ((at >= begins) & (at < ends))).sum(1)
    points = torch.tensor(scores).view(-1, ANSWERS)
    better = (points - points.mean(1, keepdim=True)) / (points.std(1, keepdim=True) + 1e-4)
    return -(better.flatten() * answers).mean() / LONGEST


if __name__ == "__main__":
    run_main(main)
