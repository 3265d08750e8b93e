"""Gives the bundled model latent attention: K and V of its two KV heads become one row of 32 + 16 numbers.

    python -m common.tiny_qwen.to_latent        # converts, trains on, evaluates: the checkpoint in `latent/`

Of a token the dense model caches two keys and two values of 16 numbers in each layer, the converted one a latent of c = 32 and
a turned part of r = 16 (layers/mla.py). Three steps, each a factoring of matrices over what a few thousand tokens bring there:

    turn apart  A rotary embedding turns the pair of numbers (i, i + 8) of each key by an angle that is i's alone. As a complex
                number per KV head it is multiplied by exp(i angle), and so is any combination of the heads' numbers: they can be
                mixed. Of each i, the combination that does most for the scores becomes the shared part, which is turned. The other
                stays as it is, unturned: this is what the conversion loses.
    factor      The 16 numbers that are left of the keys, and the 32 of the values, are nearly 31 numbers: down with
                kv_a_proj_with_mqa, up again with kv_b_proj. Queries likewise, over 79 numbers.
    anchor      Between down and up stands a norm, and the dense model has none; it has biases, and `up` has none. One more
                number of the latent is the same for all tokens and so large that the norm divides by it alone: then the norm
                changes nothing, and what `up` makes of this number is the bias. It needs a bias in `down`: attention_bias.

Then all weights are trained on. The layout is DeepSeek-V2's, with MLPs in place of experts. The way is that of TransMLA
(Meng et al. 2025, arXiv 2502.07864: mix heads before the turn, factor over activations) and MHA2MLA (Ji et al. 2025, arXiv
2502.14837: leave some numbers unturned, train on); mixing by complex numbers and the anchor are ours.
"""

import argparse
import json
import os
import random
import time
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is made here

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from common.distributed.launch import run_main
from common.tiny_qwen import LATENT_PATH, TINY_QWEN_PATH, evaluate
from common.tiny_qwen.corpus import ConversationSampler, load_glossary
from common.tiny_qwen.train import batch_loss, batches, fit, save_model
from common.tiny_qwen.upcycle import save_checkpoint

SEED = 20
KV_RANK = 32  # c, the anchor among them
Q_RANK = 80  # as many weights as the dense model's queries have, nearly
ANCHOR = 64.0  # the other numbers are about 1 each, so the norm's divisor changes by half a percent
BATCHES = 24  # of about 800 tokens, over which matrices are factored
STEPS = 600
PEAK_LR = 1e-3
QWEN_ALONE = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")


# ---- Converting ----------------------------------------------------------------------
# A linear map with its bias is one matrix [out, D + 1]; its inputs [N, D + 1] end with a 1.


def affine(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.cat((tensors[f"{name}.weight"], tensors[f"{name}.bias"].unsqueeze(1)), dim=1)


def pairs(w: torch.Tensor) -> torch.Tensor:
    """[H, d, D + 1] -> complex [H, d/2, D + 1]: numbers i and i + d/2 of a head, which are turned together."""
    return torch.complex(*w.chunk(2, dim=1))


def features(z: torch.Tensor) -> torch.Tensor:
    """complex [..., d/2, D + 1] -> [..., d, D + 1], real and imaginary part side by side, as DeepSeek's layout turns them."""
    return torch.stack((z.real, z.imag), dim=-2).flatten(-3, -2)


def turn_apart(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q [Hq, d, D + 1], k [Hkv, d, D + 1], inputs x [N, D + 1] -> turned and plain part of queries and of keys.

    turned: queries [Hq, d, D + 1], key [d, D + 1], one for all heads; plain: [Hq, (Hkv - 1) d, D + 1], [(Hkv - 1) d, D + 1].
    With all parts turned the scores would be those of q and k.
    """
    group = torch.arange(len(q)) // (len(q) // len(k))  # of each query head, its KV head
    q, k = pairs(q), pairs(k)
    x = x.to(q.dtype)
    asked = torch.einsum("ni,hfi->nhf", x, q).abs().square().mean(0)  # [Hq, d/2]
    weight = torch.zeros(k.shape[:2]).index_add_(0, group, asked).sqrt()  # [Hkv, d/2]: how much scores grow with a key
    keys = torch.einsum("ni,hfi->nhf", x, k) * weight
    _, mix = torch.linalg.eigh(torch.einsum("nhf,ngf->fhg", keys, keys.conj()))  # ascending
    mix = mix.flip(-1)  # [d/2, Hkv, Hkv]: k_h weight_h = sum_j mix_hj k'_j, the largest first
    k = torch.einsum("fhj,hf,hfi->jfi", mix.conj(), weight.to(mix.dtype), k)
    q = torch.einsum("fhj,hf,hfi->hjfi", mix.conj()[:, group], (1 / weight[group]).to(mix.dtype), q)
    q, k = features(q), features(k)  # [Hq, Hkv, d, D + 1], [Hkv, d, D + 1]
    return q[:, 0], k[0], q[:, 1:].flatten(1, 2), k[1:].flatten(0, 1)


def factor(w: torch.Tensor, x: torch.Tensor, rank: int, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """w [out, D + 1], inputs x [N, D + 1] -> down [rank, D + 1], norm [rank] and up [out, rank], nearly the same map.

    The best for these inputs if an error of output i counts weight[i] (principal components). The last number is the anchor.
    """
    y = (x @ w.T) * weight
    mean = y.mean(0)
    _, basis = torch.linalg.eigh((y - mean).T.double() @ (y - mean).double())  # ascending
    basis = basis.flip(1)[:, : rank - 1].float()  # [out, rank - 1]
    size = ((y - mean) @ basis).std(0)
    down = (basis / size).T @ (w * weight.unsqueeze(1))
    down[:, -1] -= (basis / size).T @ mean
    anchor = torch.zeros(1, w.shape[1])
    anchor[0, -1] = ANCHOR
    norm = torch.full((rank,), ANCHOR * rank**-0.5)  # what the norm divides by, but for the others
    norm[-1] = rank**-0.5  # the anchor becomes 1
    up = torch.cat((basis * size, mean.unsqueeze(1)), dim=1) / weight.unsqueeze(1)
    return {"down": torch.cat((down, anchor)), "norm": norm, "up": up}


def latent_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, kv_rank: int, q_rank: int
) -> dict[str, torch.Tensor]:
    """Of a layer q [Hq, d, D + 1], k and v [Hkv, d, D + 1], inputs x [N, D + 1] -> tensors under DeepSeek-V2's names."""
    heads, groups, d = len(q), len(k), q.shape[1]
    q_turned, k_turned, q_plain, k_plain = turn_apart(q, k, x)

    size = lambda w: (x @ w.T).square().mean(0).sqrt()  # noqa: E731, of each output
    q = torch.cat((q_plain, q_turned), dim=1) * groups**0.5  # scores are divided by (Hkv d)^0.5 now, not by d^0.5
    seen = size(torch.cat((k_plain, k_turned))).repeat(heads)  # what an error of a query meets
    queries = factor(q.flatten(0, 1), x, q_rank, seen)

    # an error of a key counts as much as its queries are large; and keys as much as values, on the whole
    asked = torch.stack([size(one) for one in q_plain]).square().mean(0).sqrt()
    v = v.flatten(0, 1)
    spread = lambda w: (x @ w.T).std(0).square().sum().sqrt()  # noqa: E731
    weight = torch.cat((asked / spread(k_plain * asked.unsqueeze(1)), torch.ones(len(v)) / spread(v)))
    rows = factor(torch.cat((k_plain, v)), x, kv_rank, weight)
    keys, values = rows["up"].split((len(k_plain), len(v)))
    of_head = values.unflatten(0, (groups, d)).repeat_interleave(heads // groups, dim=0)  # [Hq, d, c]
    kv_a = torch.cat((rows["down"], k_turned))
    return {
        "q_a_proj.weight": queries["down"][:, :-1],
        "q_a_proj.bias": queries["down"][:, -1],
        "q_a_layernorm.weight": queries["norm"],
        "q_b_proj.weight": queries["up"],
        "kv_a_proj_with_mqa.weight": kv_a[:, :-1],
        "kv_a_proj_with_mqa.bias": kv_a[:, -1],
        "kv_a_layernorm.weight": rows["norm"],
        "kv_b_proj.weight": torch.cat((keys.expand(heads, -1, -1), of_head), dim=1).flatten(0, 1),
    }


@torch.inference_mode()
def inputs_of_attention(tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Of each layer of the dense model, what its projections read over some conversations: [N, D + 1]."""
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32)
    seen = [[] for _ in model.model.layers]
    for layer, rows in zip(model.model.layers, seen, strict=True):
        layer.input_layernorm.register_forward_hook(lambda _, __, y, rows=rows: rows.append(y.flatten(0, 1)))
    stream = batches(ConversationSampler(load_glossary(), random.Random(SEED)), tokenizer)
    for _, ids, _ in islice(stream, BATCHES):
        model.model(ids)
    return [torch.nn.functional.pad(torch.cat(rows), (0, 1), value=1.0) for rows in seen]


def convert(folder: Path, kv_rank: int, q_rank: int) -> None:
    """Writes the converted checkpoint, not yet trained: weights, config, tokenizer."""
    config = json.loads((TINY_QWEN_PATH / "config.json").read_text(encoding="utf-8"))
    heads, groups, hidden = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    dense = load_file(TINY_QWEN_PATH / "model.safetensors")
    tensors = {name: tensor for name, tensor in dense.items() if ".self_attn." not in name}
    d = hidden // heads
    for i, x in enumerate(inputs_of_attention(Tokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json")))):
        prefix = f"model.layers.{i}.self_attn"
        layer = {name: tensor.float() for name, tensor in dense.items() if name.startswith(prefix)}
        q, k, v = (affine(layer, f"{prefix}.{name}_proj").unflatten(0, (-1, d)) for name in "qkv")
        made = latent_attention(q, k, v, x, kv_rank, q_rank)
        made |= {"o_proj.weight": layer[f"{prefix}.o_proj.weight"], "o_proj.bias": torch.zeros(hidden)}
        tensors |= {f"{prefix}.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in made.items()}
    for key in QWEN_ALONE:
        config.pop(key)
    config |= {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": True,
        "num_key_value_heads": heads,  # of a latent all heads make their own
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_rope_head_dim": d,
        "qk_nope_head_dim": (groups - 1) * d,
        "v_head_dim": d,
        "head_dim": d,  # what is turned of a head
        "first_k_dense_replace": config["num_hidden_layers"],  # MLPs, no experts
    }
    save_checkpoint(folder, tensors, config)


# ---- Training ------------------------------------------------------------------------


def train(folder: Path, steps: int) -> None:
    """Train the checkpoint in a folder, all of its weights, and round them to bfloat16 again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fit(model, Tokenizer.from_file(str(folder / "tokenizer.json")), steps, PEAK_LR)
    save_model(model, folder)


@torch.inference_mode()
def loss(folder: Path) -> float:
    """Mean cross-entropy of a token of an answer, in conversations that are not those of the training."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream = batches(ConversationSampler(load_glossary(), random.Random(SEED + 1)), tokenizer)
    some = [batch_loss(model, None, ids, learned) for _, ids, learned in islice(stream, BATCHES)]
    return sum(map(float, some)) / len(some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="0: converted only")
    parser.add_argument("--kv-rank", type=int, default=KV_RANK, help="c; 49 lose nothing of keys and values")
    parser.add_argument("--q-rank", type=int, default=Q_RANK, help="225 lose nothing of the queries")
    parser.add_argument("--out", type=Path, default=LATENT_PATH, help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    convert(args.out, args.kv_rank, args.q_rank)
    converted = time.perf_counter()
    print(f"conversion {converted - start:.0f} s; loss {loss(TINY_QWEN_PATH):.4f} before, {loss(args.out):.4f} after")
    if args.steps:
        start = time.perf_counter()
        train(args.out, args.steps)
        print(f"training {time.perf_counter() - start:.0f} s; loss {loss(args.out):.4f}")
    evaluate.run(args.out, ["float32", "bfloat16"])


if __name__ == "__main__":
    run_main(main)
