"""Makes mixtures of experts of the bundled model: in each layer, a router and experts take the place of the MLP.

    python -m common.tiny_qwen.upcycle        # trains the mixture in `mixture/` and evaluates it

An MLP is a sum over its F columns (row j of gate_proj and up_proj, column j of down_proj), so it can be cut anywhere.
The first 64 columns go to a shared expert, which sees each token; the other 544 are what the routed experts are made of:

    one part    each expert is a copy of all 544. Whichever two the router chooses, their weights sum to one, so this
                mixture answers as the dense model does, whatever its router; `tiny_mixture()` makes it in a second.
    four parts  each expert is a quarter of them, and two experts begin with the same quarter. A token now meets only
                some of the columns, so the experts have to learn what their tokens need: this one is trained.

The layout is Qwen2-MoE's, which has Qwen2's attention with its biases. Cutting a dense model into a mixture and training
on is called upcycling: Komatsuzaki et al. 2022; Qwen1.5-MoE-A2.7B was made so, with fine-grained experts and a shared one.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is made here

import torch
from safetensors.torch import load_file, save_file

from common.distributed.launch import run_main
from common.tiny_qwen import TINY_QWEN_PATH

SEED = 20
EXPERTS = 8
CHOSEN = 2  # experts a token
SHARED = 64  # columns of the shared expert; with half of all, the trained model hardly needed the routed ones
PARTS = (
    4  # of the other columns, in the mixture that is trained: 136, a width that grouped products in bfloat16 take (8 n)
)
MIXTURE_PATH = TINY_QWEN_PATH / "mixture"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
STEPS = 700
PEAK_LR = 2e-3  # less than the dense model began with: much of this one is already right
BALANCE = 0.01  # weight of the balance loss beside the cross-entropy; Switch Transformer's


# ---- Cutting -------------------------------------------------------------------------


def cut(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, columns: torch.Tensor, scale: float) -> dict:
    """Some columns of an MLP (gate, up [F, D], down [D, F]) as an MLP of its own, whose output is `scale` times theirs."""
    return {
        "gate_proj.weight": gate[columns].contiguous(),
        "up_proj.weight": up[columns].contiguous(),
        "down_proj.weight": (down[:, columns] * scale).contiguous(),
    }


def upcycle(dense: dict[str, torch.Tensor], num_layers: int, parts: int) -> dict[str, torch.Tensor]:
    """The tensors of a dense checkpoint -> those of the mixture, under Qwen2-MoE's names and in the same dtype.

    Both scales are powers of two, which bfloat16 multiplies exactly. The shared expert's gate is sigmoid(0 @ x) = 1/2, so
    it counts twice. A part is what a token gets with weight 1/parts if all experts are as likely, so it counts `parts` times.
    """
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    generator = torch.Generator().manual_seed(SEED)
    for layer in range(num_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (dense[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        width, hidden = gate.shape
        pieces = {"shared_expert": cut(gate, up, down, torch.arange(SHARED), 2.0)}
        for e in range(EXPERTS):
            pieces[f"experts.{e}"] = cut(gate, up, down, torch.arange(SHARED + e % parts, width, parts), float(parts))
        tensors |= {f"{mlp}.{piece}.{name}": t for piece, of in pieces.items() for name, t in of.items()}
        tensors[f"{mlp}.shared_expert_gate.weight"] = gate.new_zeros(1, hidden)
        router = torch.randn(EXPERTS, hidden, generator=generator) * hidden**-0.5  # logits of about 1: it prefers some
        tensors[f"{mlp}.gate.weight"] = router.to(gate.dtype)
    return tensors


def save_upcycled(folder: Path, parts: int) -> None:
    """A checkpoint of the bundled model, upcycled: weights, config, tokenizer."""
    config = json.loads((TINY_QWEN_PATH / "config.json").read_text(encoding="utf-8"))
    routed = config["intermediate_size"] - SHARED
    if routed % parts or EXPERTS % parts:
        raise ValueError(f"{parts} parts do not divide {routed} columns and {EXPERTS} experts evenly; use 1, 2, 4 or 8")
    config |= {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "norm_topk_prob": True,
        "moe_intermediate_size": routed // parts,
        "shared_expert_intermediate_size": SHARED,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
    }
    dense = load_file(TINY_QWEN_PATH / "model.safetensors")
    save_checkpoint(folder, upcycle(dense, config["num_hidden_layers"], parts), config)


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Another model over the bundled model's tokenizer: weights, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copy(TINY_QWEN_PATH / name, folder)


def tiny_mixture() -> Path:
    """The untrained mixture of equal experts, which answers as the dense model: made once, in the temporary folder.

    Its name says of what it was made, so a change of the model or of this file makes another one. Several processes may
    call this at once: each writes a folder of its own, and the first one to finish gives it the name.
    """
    made_of = hashlib.sha256((TINY_QWEN_PATH / "model.safetensors").read_bytes() + Path(__file__).read_bytes())
    folder = Path(tempfile.gettempdir()) / f"tiny_mixture_{made_of.hexdigest()[:12]}"
    if not folder.exists():
        unfinished = Path(tempfile.mkdtemp(prefix="tiny_mixture_"))
        save_upcycled(unfinished, parts=1)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return folder


# ---- Training ------------------------------------------------------------------------


def balance_loss(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """E * sum over experts of (share of the choices) * (mean probability), 1 if all are alike; logits [T, E], chosen [T, k].

    The share is a count and has no gradient; the probability pulls it along. Fedus et al. 2021, equation 4.
    """
    experts = logits.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()  # [E]
    return experts * (share * logits.softmax(-1).mean(0)).sum()


def balanced(loss_of: Callable[..., torch.Tensor], routers: list[torch.nn.Module]) -> Callable[..., torch.Tensor]:
    """The same loss, and beside it the mean balance loss of what transformers' routers say while it is computed."""
    said: list[tuple[torch.Tensor, torch.Tensor]] = []  # logits, chosen
    for router in routers:
        router.register_forward_hook(lambda _, __, output: said.append((output[0], output[2])))

    def loss_and_balance(*batch) -> torch.Tensor:
        said.clear()
        return loss_of(*batch) + BALANCE * sum(balance_loss(*one) for one in said) / len(said)

    return loss_and_balance


def train(folder: Path, steps: int) -> None:
    """Train the checkpoint in a folder, all of its weights, and round them to bfloat16 again."""
    from tokenizers import Tokenizer  # noqa: PLC0415, the rest of this file does not wait for transformers
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from common.tiny_qwen.train import batch_loss, fit, save_model  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    routers = [layer.mlp.gate for layer in model.model.layers]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fit(model, tokenizer, steps, PEAK_LR, balanced(batch_loss, routers))
    save_model(model, folder)


def main() -> None:
    from common.tiny_qwen import evaluate  # noqa: PLC0415, as above

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=MIXTURE_PATH, help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    save_upcycled(args.out, PARTS)
    train(args.out, args.steps)
    trained = time.perf_counter()
    evaluate.run(args.out, ["float32", "bfloat16"])
    done = time.perf_counter()
    print(f"training {trained - start:.0f} s, evaluation {done - trained:.0f} s")


if __name__ == "__main__":
    run_main(main)
