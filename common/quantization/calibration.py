"""What the layers of a model are asked for by some text, and its matrices rounded by GPTQ for that.

Layer by layer: the texts go through the model, the inputs of the layer's matrices are counted into H (gptq_algorithm.py), the
matrices are rounded, and the next layer gets what the rounded ones put out. So each pass sees the errors made so far. transformers
runs the model, whose modules are named as the checkpoint's tensors.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common.quantization.codes import Codes
from common.quantization.gptq_algorithm import Inputs, gptq
from common.quantization.methods import METHODS
from common.quantization.scheme import Scheme

TEXTS, TOKENS, SEED = 128, 128, 11  # how many, how long at most; the bundled model's conversations are drawn by chance


@torch.no_grad()
def calibrated(folder: Path, schemes: dict[str, Scheme], text: Path | None = None) -> dict[str, Codes]:
    """{module: codes} of those modules in `schemes` that are linear layers of their own (experts packed into one are not).

    text: a file to take token rows from; None: conversations about the glossary, in the model's own chat template.
    Raises ValueError for schemes that are not integers in groups or rows, and for a text shorter than one row.
    """
    for module, scheme in schemes.items():
        if scheme.kind != "int" or scheme.strategy not in ("group", "channel"):
            raise ValueError(f"{module}: GPTQ rounds to integers with scales of groups or rows, not to {scheme}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is a local folder
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415, the rest does not wait for it

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = list(_rows(AutoTokenizer.from_pretrained(folder), text))
    layers = {
        name: module
        for name, module in model.named_modules()
        if name in schemes and isinstance(module, torch.nn.Linear)
    }
    order = list(dict.fromkeys(name.rpartition(".layers.")[2].partition(".")[0] for name in layers))
    codes = {}
    for number in tqdm(order, desc="GPTQ", unit="layer", leave=False, disable=None):
        mine = {name: module for name, module in layers.items() if f".layers.{number}." in name}
        with _watched(mine) as inputs:
            for row in rows:
                model(input_ids=row, use_cache=False)
        for name, module in mine.items():
            scheme = schemes[name]
            codes[name] = gptq(module.weight, inputs[name].hessian, scheme, METHODS[scheme.method].stored)
            module.weight.copy_(codes[name].dequantise())
    return codes


@contextmanager
def _watched(modules: dict[str, torch.nn.Linear]) -> Iterator[dict[str, Inputs]]:
    inputs = {name: Inputs(module.in_features) for name, module in modules.items()}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].add(args[0]))
        for name, module in modules.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _rows(tokenizer, text: Path | None) -> Iterator[torch.Tensor]:
    """[1, up to TOKENS] each."""
    if text is None:
        for conversation in _conversations(tokenizer):
            yield tokenizer(conversation, return_tensors="pt", add_special_tokens=False).input_ids[:, :TOKENS]
        return
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    count = ids.shape[1] // TOKENS
    if count == 0:
        raise ValueError(f"{text} has {ids.shape[1]} tokens; calibration needs {TOKENS} at least")
    yield from islice(ids[:, : count * TOKENS].view(count, 1, TOKENS), TEXTS)


def _conversations(tokenizer) -> Iterator[str]:
    from common.tiny_qwen.corpus import BARE_SEPARATOR, ConversationSampler, load_glossary  # noqa: PLC0415, this text alone

    sampler = ConversationSampler(load_glossary(), random.Random(SEED))
    for i in range(TEXTS):
        conversation = sampler.draw(long_prompt=i % 2 == 0)
        if conversation.bare:
            yield BARE_SEPARATOR.join(conversation.turns[0])
            continue
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for question, answer in conversation.turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield tokenizer.apply_chat_template(messages, tokenize=False)
