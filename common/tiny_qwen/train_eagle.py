"""Trains the EAGLE heads of the bundled model: one decoder layer that guesses what the model is about to write.

    python -m common.tiny_qwen.train_eagle                # EAGLE-1/2 -> eagle/
    python -m common.tiny_qwen.train_eagle --version 3    # EAGLE-3 -> eagle3/

The model is frozen; only the head learns. What it learns from are the model's own hidden states ("features") over fresh
conversations about the glossary, and the tokens that the model itself would write next. The last line says how many tokens
a verify step yields on questions whose wording no training conversation had.

At index i a head reads feature f_i and token i+1, writes its guess of f_{i+1}, and from that its guess of token i+2. In a
chain it then reads its own guess where the feature was. A head that has met only true features stumbles over its own, so it
is trained as it is used: STEPS_AHEAD steps, each of them fed by the one before (Zhang et al. 2024, HASS; Li et al. 2025,
EAGLE-3, "training-time test"). With one layer this is cheap: a key and a value depend on their own inputs alone, so all tokens
of the prompt cost a row of `fc` and of k and v, and only answers cost queries, an MLP and logits (eagle_layer.py).

The files have the layout of published heads (common/models/drafters/eagle_head.py reads them).
"""

import argparse
import copy
import json
import os
import random
import time
from itertools import count
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is made here

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from common.distributed.launch import run_main
from common.tiny_qwen import DRAFTER_PATHS, TINY_QWEN_PATH
from common.tiny_qwen.acceptance import measure, show
from common.tiny_qwen.corpus import LANGUAGES, Conversation, ask, definition, load_glossary
from common.tiny_qwen.eagle_layer import MLP_WIDTH, Head, guesses, places_of
from common.tiny_qwen.phrasings import TRAINED
from common.tiny_qwen.train import encode, fit, to_tensors

SEED = 20
STEPS = {1: 1500, 3: 1100}
QUESTIONS = 60  # of each kind, to see what was learned; acceptance.py asks all
PEAK_LR = 3e-3
STEPS_AHEAD = {1: 5, 3: 6}  # guesses of a chain in training
FADING = 0.9  # weight of a step's loss beside the one before: a later guess counts only if all before it were right
FEATURE_WEIGHT = 0.5  # of the distance to the true feature beside the cross-entropy; EAGLE-3 leaves its features free
DRAFT_VOCAB = 2048  # EAGLE-3: the tokens that answers need most
# hidden states, by the number of layers before them; EAGLE-3's usual (2, L/2, L-3) are for a deeper model
CAPTURED = {1: (4,), 3: (1, 2, 3)}


# ---- What the target says ------------------------------------------------------------


class Teacher:
    """The frozen model: features and next tokens of a batch, the long system prompt computed once for all."""

    def __init__(self, version: int, model: PreTrainedModel):
        self.model, self.captured = model.eval().requires_grad_(False), CAPTURED[version]
        self._prefix: tuple[DynamicCache, torch.Tensor] | None = None

    def _states(self, ids: torch.Tensor, past: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model.model(ids, past_key_values=past, use_cache=True, output_hidden_states=True)
        return torch.cat([output.hidden_states[n] for n in self.captured], dim=-1), output.last_hidden_state

    @torch.no_grad()
    def __call__(self, prefix: torch.Tensor | None, ids: torch.Tensor):
        """prefix [1, S] or None, ids [B, T] -> embeds, features, last hidden states, all [B, S + T, .]."""
        whole, before = ids, None
        past = DynamicCache(config=self.model.config)
        if prefix is not None:
            if self._prefix is None:
                states = self._states(prefix, past)
                self._prefix = past, states
            past, before = copy.deepcopy(self._prefix[0]), self._prefix[1]
            past.batch_repeat_interleave(len(ids))
            whole = torch.cat((prefix.expand(len(ids), -1), ids), dim=1)
        states = self._states(ids, past)
        if before is not None:
            states = [torch.cat((b.expand(len(ids), -1, -1), s), dim=1) for b, s in zip(before, states, strict=True)]
        return self.model.model.embed_tokens(whole), *states


def with_prefix(prefix: torch.Tensor | None, learned: torch.Tensor) -> torch.Tensor:
    if prefix is None:
        return learned
    return torch.cat((learned.new_zeros(len(learned), prefix.shape[1]), learned), dim=1)


def loss_of(head: Head, teacher: Teacher, steps: int):
    """A loss with the arguments of train.batch_loss, for `steps` calls; chains grow until half of them are done."""
    calls = count()

    def loss(_, prefix: torch.Tensor | None, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        embeds, features, last = teacher(prefix, ids)
        places = places_of(with_prefix(prefix, learned))
        true = last[torch.arange(len(ids)).unsqueeze(1), places.index + 1]  # [B, M, D] f_{i+1}
        with torch.no_grad():
            written = torch.full(places.real.shape, -100)
            written[places.real] = teacher.model.lm_head(true[places.real]).argmax(
                -1
            )  # token i+2, as the target writes it
            if head.version == 3:
                draft_id = torch.full((len(head.t2d),), -100)  # what the head cannot say, it does not learn
                draft_id[head.t2d] = torch.arange(int(head.t2d.sum()))
                written = torch.where(written >= 0, draft_id[written.clamp(min=0)], written)
        total, weight = 0.0, 1.0
        most = STEPS_AHEAD[head.version]
        ahead = min(most, 1 + 2 * most * next(calls) // steps)
        for guess in guesses(head, embeds, features, places, ahead):
            total = total + weight * F.cross_entropy(guess.logits, written[guess.at])
            if head.version == 1:
                total = total + weight * FEATURE_WEIGHT * F.smooth_l1_loss(guess.hidden, true[guess.at])
            weight *= FADING
        return total

    return loss


# ---- Files -----------------------------------------------------------------------------


def asked() -> list[Conversation]:
    """Every entry in both languages, in a wording of the training."""
    rng = random.Random(SEED)
    return [
        Conversation(((ask(rng.choice(TRAINED[lang]), entry), definition(entry, lang)),))
        for entry in load_glossary().values()
        for lang in LANGUAGES
    ]


def vocabulary_of(tokenizer: Tokenizer, size: int) -> torch.Tensor:
    """The `size` tokens that answers use most, ascending."""
    counts = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.long)
    for entry in load_glossary().values():
        for text in (entry.en_def, entry.zh_def, f"See also: {entry.term}, ", f"另见：{entry.zh}、"):
            for token in tokenizer.encode(text + "<|im_end|>").ids:
                counts[token] += 1
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def save_head(head: Head, folder: Path) -> None:
    """model.safetensors in float16 and config.json."""
    target = json.loads((TINY_QWEN_PATH / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings",
             "rms_norm_eps", "rope_theta", "hidden_act", "eos_token_id", "pad_token_id")  # fmt: skip
    config = {name: target[name] for name in names} | {
        "architectures": ["LlamaForCausalLMEagle" if head.version == 1 else "LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "intermediate_size": MLP_WIDTH[head.version],
        "bias": head.version == 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    if head.version == 3:
        layers = [n - 1 for n in CAPTURED[3]]  # the published configs number a layer by its output
        config |= {"draft_vocab_size": len(head.d2t), "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers}}
    folder.mkdir(parents=True, exist_ok=True)
    half = {n: t.half() if t.is_floating_point() else t for n, t in head.folded().items()}
    save_file({n: t.contiguous() for n, t in half.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--version", type=int, choices=[1, 3], default=1, help="1: EAGLE-1 and 2, which share their heads"
    )
    parser.add_argument("--steps", type=int, help=f"by default {STEPS[1]}, or {STEPS[3]} for EAGLE-3")
    parser.add_argument("--out", type=Path, help="folder of the head, by default eagle/ or eagle3/ beside this script")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    algorithm = "EAGLE" if args.version == 1 else "EAGLE3"
    folder, steps = args.out or DRAFTER_PATHS[algorithm], args.steps or STEPS[args.version]
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32)
    teacher = Teacher(args.version, model)
    torch.manual_seed(SEED)
    head = Head(args.version, model, vocabulary_of(tokenizer, DRAFT_VOCAB) if args.version == 3 else None)
    some, _ = to_tensors([encode(conversation, tokenizer) for conversation in asked()[::6]])
    head.measure(*teacher(None, some)[:2])
    fit(head, tokenizer, steps, PEAK_LR, loss_of(head, teacher, steps))
    save_head(head, folder)
    print(f"trained {sum(p.numel() for p in head.parameters()):,} parameters in {time.perf_counter() - start:.0f} s")
    for row in measure(algorithm, folder, QUESTIONS):
        print(show(row))


if __name__ == "__main__":
    run_main(main)
