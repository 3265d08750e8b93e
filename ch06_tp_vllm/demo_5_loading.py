"""Loading: read everything and throw most of it away, or read this rank's slices and nothing else.

    python ch06_tp_vllm/demo_5_loading.py                                 # the bundled model, seconds
    python ch06_tp_vllm/demo_5_loading.py --published Qwen2.5-0.5B        # random weights of that shape: a minute, 1 GB
                                                                          # of disk; writes figures/loading.csv

First, which tensors of the checkpoint a rank's parameters are made of, and checkpoints that keep q, k and v in one tensor.
Then each rank is a process of its own that loads its part of R, first in the old way, then in the new, and reports

    MB read     of tensors, from the files
    MB kept     as parameters of this rank (in float32 for the bundled model, twice as wide as the bfloat16 of its file)
    MB beside   the most that was held beside them: the whole checkpoint, or the largest piece
    MB peak     the most memory that the process took for itself beyond what it had before, watched every millisecond
                (on Linux; elsewhere it includes the pages of the file that the system has mapped)
"""

import argparse
import multiprocessing
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from common.distributed.launch import run_main
from common.layers.linear import QKVParallelLinear
from common.models.config import ModelConfig
from common.models.published_configs import CONFIGS, save_random_weights
from common.models.weights import TensorSource, load_model, load_then_shard
from common.parallel_state import TPGroup
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import check, heading, table
from common.tiny_qwen import TINY_QWEN_PATH

WAYS = {"load, then shard": load_then_shard, "read the shard": load_model}
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--published", choices=CONFIGS, help="a published shape with random weights, instead of the bundled model"
    )
    args = parser.parse_args()
    if args.published is None:
        what_is_made_of_what()
        fused_checkpoints()
        show(measure(TINY_QWEN_PATH, "the bundled model"))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(save_random_weights(args.published, Path(folder) / args.published), args.published)
    show(rows)
    write_csv(rows, FIGURES / "loading.csv")


def what_is_made_of_what() -> None:
    """Fused and tied weights: the parameters of a rank, and the tensors of the checkpoint that they take slices of."""
    heading("Parameters of rank 0 of 2, and the checkpoint's tensors behind them")
    model, report = load_model(TINY_QWEN_PATH, TPGroup(0, 2))
    rows = []
    for name, parameter in model.named_parameters():
        if not name.startswith("model.layers.") or ".layers.0." in name:
            made_of = ", ".join(f"{shard or ''}{list(shape)}" for shard, shape in _named_shards(parameter))
            rows.append((name.removeprefix("model."), list(parameter.shape), made_of))
    table(("parameter", "here", "made of"), rows)
    check(
        "the LM head is the embedding: one parameter, read once",
        model.lm_head.weight is model.model.embed_tokens.weight,
    )
    wanted = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"}
    check("q, k and v were read one by one, into one parameter", wanted <= set(report.tensors))


def fused_checkpoints() -> None:
    """q, k and v of the bundled model's first layer, stacked as other checkpoints store them, and cut over two ranks."""
    heading("Checkpoints that keep q, k and v in one tensor")
    config, name = ModelConfig.from_folder(TINY_QWEN_PATH), "model.layers.0.self_attn.{}_proj.weight"
    hq, hkv, d = config.num_heads, config.num_kv_heads, config.head_dim
    with safe_open(TINY_QWEN_PATH / "model.safetensors", framework="pt") as file:
        heads = {key: file.get_tensor(name.format(key)).float().split(d) for key in "qkv"}  # head -> [d, D]
    group = hq // hkv
    orders = {  # which head lies where, from the top
        "one after the other (Phi-3: qkv_proj)": [(key, i) for key in "qkv" for i in range(len(heads[key]))],
        "by KV head (InternLM2: wqkv)": [
            one for i in range(hkv) for one in (*(("q", group * i + j) for j in range(group)), ("k", i), ("v", i))
        ],
    }
    rows, equal = [], True
    for stored, order in orders.items():
        fused = torch.cat([heads[key][i] for key, i in order])  # [(Hq + 2 Hkv) d, D]
        blocks = list(zip(order, fused.split(d), strict=True))
        for size in (2, 3):
            # the right way: take the three apart first, by what the config says, and let each be cut
            layer = QKVParallelLinear(config.hidden_size, d, hq, hkv, TPGroup(0, size))
            for key in "qkv":
                apart = torch.cat([block for (whose, _), block in blocks if whose == key])
                layer.weight.weight_loader(TensorSource(apart), key)
            needed = [("q", i) for i in layer.heads.q_heads] + [(key, i) for key in "kv" for i in layer.heads.kv_heads]
            equal &= torch.equal(layer.weight, torch.cat([heads[key][i] for key, i in needed]))
            rows.append((stored, size, _heads(order[: len(order) // size]), _heads(needed)))
    table(("heads are stored", "R", "the first 1/R of the rows holds", "rank 0 needs"), rows)
    check("taken apart first, and then cut: rank 0 holds what it needs", equal)


def _heads(order: list) -> str:
    """[("q", 0), ("q", 1), ("k", 0)] -> q 0 1, k 0"""
    runs = [(key, " ".join(str(i) for _, i in run)) for key, run in groupby(order, key=lambda one: one[0])]
    return ", ".join(f"{key} {heads}" for key, heads in runs)


def _named_shards(parameter: torch.nn.Parameter):
    names = {0: "gate ", 1: "up ", "q": "q ", "k": "k ", "v": "v ", None: ""}
    return [(names[shard], shape) for shard, shape in parameter.shard_shapes.items()]


def measure(folder: Path, name: str) -> list[dict]:
    rows = []
    for size in (1, 2, 4):
        for way in WAYS:
            # rank 0 stands for all: each reads and keeps as much
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append(
                    {"model": name, "R": size, "way": way} | pool.submit(_load, str(folder), size, way).result()
                )
    return rows


def _load(folder: str, size: int, way: str) -> dict:
    """In a fresh process: load rank 0 of `size`, and say what it took."""
    torch.set_num_threads(1)
    dtype = torch.float32 if Path(folder) == TINY_QWEN_PATH else torch.bfloat16
    with PeakMemory() as memory:
        model, report = WAYS[way](folder, TPGroup(0, size), dtype)
    kept = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    return {
        "MB read": round(report.bytes_read / MB, 3), "MB kept": round(kept / MB, 3),
        "MB beside": round(report.held_bytes / MB, 3), "MB peak": round(memory.peak / MB, 1),
    }  # fmt: skip


class PeakMemory:
    """`peak`: bytes, the most that this process had in the `with` beyond what it had before."""

    def __enter__(self) -> "PeakMemory":
        self._before, self.peak, self._done = self._now(), 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exc) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self._now() - self._before)

    def _now(self) -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - getattr(
            memory, "shared", 0
        )  # without the pages of files, where the system tells them apart


def show(rows: list[dict]) -> None:
    heading(f"What one rank of R reads and holds: {rows[0]['model']}")
    table(list(rows[0])[1:], [list(row.values())[1:] for row in rows])
    read = {(row["R"], row["way"]): row["MB read"] for row in rows}
    check(
        "the old way reads the whole checkpoint on every rank", read[4, "load, then shard"] == read[1, "read the shard"]
    )
    check("the new way reads about 1/R of it", read[4, "read the shard"] < 0.3 * read[1, "read the shard"])
    beside = {(row["R"], row["way"]): row["MB beside"] for row in rows}
    check("the old way holds all of it beside the weights", beside[4, "load, then shard"] == read[1, "read the shard"])
    check("the new way a piece", beside[4, "read the shard"] < 0.2 * beside[4, "load, then shard"])


if __name__ == "__main__":
    run_main(main)
