"""Trains the tiny model from nothing: tokenizer, weights, evaluation.

    python -m common.tiny_qwen.train

The checkpoint is written beside this script. A fixed seed and a fixed number of
threads give the same weights again.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is made here

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from common.distributed.launch import run_main
from common.tiny_qwen import TINY_QWEN_PATH, evaluate
from common.tiny_qwen.corpus import BARE_SEPARATOR, Conversation, ConversationSampler, Entry, load_glossary
from common.tiny_qwen.phrasings import SYSTEM_PROMPT
from common.tiny_qwen.tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer

SEED = 20
STEPS = 4500
TOKENS_PER_STEP = 800  # rows times the longest row, the system prompt not counted
PEAK_LR = 3e-3
WARMUP_STEPS = 60
LONG_PROMPT_SHARE = 0.5  # of the batches begin with SYSTEM_PROMPT
POOL = 256  # conversations sorted by length together, so that rows need little padding


def model_config(end_of_turn: int, padding: int) -> Qwen2Config:
    """Qwen2.5-0.5B's shape (14 query heads, 2 KV heads) with heads of 16 instead of 64."""
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=224,
        intermediate_size=608,
        num_hidden_layers=4,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.07,  # about 1 / sqrt(hidden_size): the usual 0.02 starts slowly here
        tie_word_embeddings=True,
        eos_token_id=end_of_turn,
        pad_token_id=padding,
    )


# ---- Batches -------------------------------------------------------------------------


def message(role: str, content: str) -> str:
    """One ChatML message, exactly as the tokenizer's chat template writes it."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def encode(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether the model must learn to write it.

    Text is tokenized piece by piece, cut where a prompt ends and an answer begins,
    because at inference the prompt is tokenized without knowing its answer.
    """
    pieces = []  # (text, is it the model's to write?)
    if conversation.system not in (None, SYSTEM_PROMPT):  # the long one is shared, see below
        pieces.append((message("system", conversation.system), False))
    for question, answer in conversation.turns:
        if conversation.bare:
            pieces += [(question, False), (BARE_SEPARATOR, True)]
        else:
            pieces.append((message("user", question) + "<|im_start|>assistant\n", False))
        pieces += [(answer + "<|im_end|>", True), ("\n", False)]
    ids, learned = [], []
    for text, is_answer in pieces:
        piece = tokenizer.encode(text).ids
        ids += piece
        learned += [is_answer] * len(piece)
    return ids, learned


def to_tensors(rows: list[tuple[list[int], list[bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows on the right. Causal attention never looks there, so no mask is needed."""
    ids = [torch.tensor(row_ids) for row_ids, _ in rows]
    learned = [torch.tensor(row_learned) for _, row_learned in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(learned, batch_first=True)  # [B, T], [B, T]


def batches(sampler: ConversationSampler, tokenizer: Tokenizer) -> Iterator[tuple[bool, torch.Tensor, torch.Tensor]]:
    """Endless batches (starts with the long prompt?, ids, learned) of similar row lengths."""
    while True:
        ready = []
        for long_prompt, share in ((True, LONG_PROMPT_SHARE), (False, 1 - LONG_PROMPT_SHARE)):
            pool = [sampler.draw(long_prompt) for _ in range(int(POOL * share))]
            rows = sorted((encode(c, tokenizer) for c in pool), key=lambda row: len(row[0]))
            batch = []
            for row in rows:
                if batch and (len(batch) + 1) * len(row[0]) > TOKENS_PER_STEP:
                    ready.append((long_prompt, batch))
                    batch = []
                batch.append(row)
            ready.append((long_prompt, batch))
        sampler.rng.shuffle(ready)
        for long_prompt, batch in ready:
            yield long_prompt, *to_tensors(batch)


# ---- Training ------------------------------------------------------------------------


def batch_loss(
    model: PreTrainedModel, prefix: torch.Tensor | None, ids: torch.Tensor, learned: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens.

    The long system prompt would be most of every row. So it is computed once, and all
    rows attend to its keys and values: prefix caching, with gradients flowing through.
    """
    past = None
    if prefix is not None:
        past = DynamicCache(config=model.config)
        model.model(prefix, past_key_values=past, use_cache=True)  # [1, S]
        past.batch_repeat_interleave(ids.shape[0])
    hidden = model.model(ids, past_key_values=past).last_hidden_state  # [B, T, D]
    targets = learned[:, 1:]  # position t writes token t + 1
    logits = model.lm_head(hidden[:, :-1][targets])  # [N, V], answer tokens only
    return F.cross_entropy(logits, ids[:, 1:][targets])


def make_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW; only matrices decay, since norms and biases have nothing to gain from it."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
        fused=True,
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a straight line down to zero."""
    return peak * min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))


def fit(
    model: PreTrainedModel, tokenizer: Tokenizer, steps: int, peak_lr: float, loss_of=batch_loss,
    glossary: dict[str, Entry] | None = None,
) -> None:  # fmt: skip
    """Train in place on conversations about the glossary, with any loss of the same arguments as `batch_loss`.

    float32, whatever the CPU offers, so that every machine does the same sums.
    """
    optimizer = make_optimizer(model)
    stream = batches(ConversationSampler(glossary or load_glossary(), random.Random(SEED)), tokenizer)
    system = torch.tensor([tokenizer.encode(message("system", SYSTEM_PROMPT)).ids])  # [1, S]

    progress = tqdm(range(steps), desc="training", mininterval=2)
    for step in progress:
        long_prompt, ids, learned = next(stream)
        loss = loss_of(model, system if long_prompt else None, ids, learned)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def train(tokenizer: Tokenizer, steps: int) -> Qwen2ForCausalLM:
    torch.manual_seed(SEED)
    config = model_config(tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>"))
    model = Qwen2ForCausalLM(config)
    fit(model, tokenizer, steps, PEAK_LR)
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Round the weights to bfloat16 and write them with their configuration."""
    ends = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    model.to(torch.bfloat16).save_pretrained(folder)
    # Loaders written for transformers 4 look for these two under their older names.
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"torch_dtype": "bfloat16", "rope_theta": config["rope_parameters"]["rope_theta"]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=TINY_QWEN_PATH, help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="1 is faster beside other work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(load_glossary())
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the text gives only {tokenizer.get_vocab_size()} tokens")
    model = train(tokenizer, args.steps)
    save_tokenizer(tokenizer, args.out)  # only now: an older checkpoint stays whole until here
    save_model(model, args.out)
    trained = time.perf_counter()
    evaluate.run(args.out, ["float32", "bfloat16"])
    done = time.perf_counter()
    print(f"tokenizer and training {trained - start:.0f} s, evaluation {done - trained:.0f} s")


if __name__ == "__main__":
    run_main(main)
