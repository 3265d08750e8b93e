"""Experts over ranks: the messages that the formula says, one by one; the bytes that a rank reads; weights that move.

pytest tests/common/test_experts_over_ranks.py
"""

import json
import random
from math import ceil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from common.executor import Executor, StepParts
from common.layers.vocab import gather_logits
from common.models.config import ModelConfig
from common.models.graph_runner import DecodeGraphs
from common.parallel_state import broadcast
from common.tiny_qwen import TINY_QWEN_PATH
from tests.mixtures import MIXTURES, save_mixture
from tests.oracle import greedy
from tests.ranks import layout_of_the_pool

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [20, 21, 22, 23]]
NEW, P, PAGES = 5, 4, 10
NOTHING = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    return lambda name: save_mixture(name, tmp_path_factory.getbasetemp() / f"mixture_{name.replace(' ', '_')}")


def make(folder, sizes: dict, options: dict) -> Executor:
    parallel = layout_of_the_pool(**sizes)
    return Executor(folder, "cpu", P, max_total_tokens=512, parallel=parallel, **options)


def serve(folder, sizes: dict, options: dict, where: list[int], moves: bool = False) -> dict:
    """Prompt i on data rank where[i]. moves: before every decode step the experts lie elsewhere."""
    executor = make(folder, sizes, options)
    tp, part, rng = executor.tp, executor.communicator.part, random.Random(5)
    part_of = [[i for i, rank in enumerate(where) if rank == one] for one in range(executor.communicator.parts)]
    order, mine, several = [i for one in part_of for i in one], part_of[part], len(part_of) > 1
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in range(len(mine))])
    out = [[] for _ in PROMPTS]

    def draw(logits):
        full = gather_logits(logits, executor.config.vocab_size, tp)
        tokens = torch.empty(len(order), dtype=torch.int64) if full is None else full.argmax(dim=-1)
        broadcast(tokens, tp, "tokens")
        executor.receive_tokens(tokens)
        for i, token in zip(order, tokens.tolist(), strict=True):
            out[i].append(token)

    lengths = [np.array([len(PROMPTS[i]) for i in one], dtype=np.int64) for one in part_of]
    own, rows = lengths[part], np.arange(len(mine))
    tokens = np.array([token for i in mine for token in PROMPTS[i]], dtype=np.int64)
    parts = StepParts([int(n.sum()) for n in lengths], [np.cumsum(n) - 1 for n in lengths], [NOTHING] * len(part_of))
    with tp.ledger.recording() as ledger:
        logits = executor.ragged(tokens, rows, 0 * own, own, 0 * own + 1, parts=parts if several else None)
        prefill = [(entry.op, entry.label, entry.shape, entry.bytes) for entry in ledger.entries]
    draw(logits)
    loads = []
    for step in range(NEW - 1):
        if moves:
            loads.append(executor.expert_load().sum(dim=1).tolist())
            experts, physical = executor.placement.num_experts, executor.placement.num_physical
            new = [rng.sample([*range(experts), *rng.choices(range(experts), k=physical - experts)], physical)
                   for _ in range(executor.config.num_layers)]  # fmt: skip
            executor.move_experts(torch.tensor(new))
        with tp.ledger.recording() as ledger:
            logits = executor.decode(rows, own + step, parts=[len(one) for one in part_of] if several else None)
            decode = [(entry.op, entry.label, entry.shape, entry.bytes) for entry in ledger.entries]
        draw(logits)
    loads.append(executor.expert_load().sum(dim=1).tolist())
    return {
        "out": out, "prefill": prefill, "decode": decode, "loads": loads, "slots": executor.placement.slots,
        "read": executor.load_report.bytes_read,
    }  # fmt: skip


def of_experts(said: list[tuple]) -> list[tuple]:
    """The messages of the layers behind attention, in order: (layer, op, what, shape)."""
    whats = ("gate_up_proj", "down_proj", "counts", "dispatch", "combine")
    split = [(op, *label.rsplit(".", 1), shape) for op, label, shape, _ in said if "." in label]
    return [(layer, op, what, shape) for op, layer, what, shape in split if what in whats]


def right(told: list[dict], folder) -> None:
    want = [greedy(folder, prompt, NEW) for prompt in PROMPTS]
    assert [one["out"] for one in told] == [want] * len(told)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("size", "ep"), [(2, 2), (3, 3), (4, 2), (4, 4)])
def test_where_every_rank_has_all_rows_the_messages_are_those_of_a_dense_model(size, ep, name, mixture, ranks):
    """1 + 2L all-reduces [T, D] and nothing else, as without expert parallelism: no all-to-all."""
    folder = mixture(name)
    config = ModelConfig.from_folder(folder)
    told = ranks(size).run(serve, folder, {"expert_parallel_size": ep}, {}, [0, 0, 0])
    right(told, folder)
    labels = ["embed_tokens"]
    labels += [f"layers.{i}.{what}" for i in range(config.num_layers) for what in ("o_proj", "down_proj")]
    for one in told:
        for said, rows in ((one["prefill"], 12), (one["decode"], 3)):
            assert [entry[:3] for entry in said] == [("all_reduce", label, (rows, 48)) for label in labels]
        steps = [12 * config.mixture.router.top_k, *[3 * config.mixture.router.top_k] * (NEW - 1)]
        assert one["loads"] == [[sum(steps) * sparse for sparse in config.mixture.sparse]]


LAYOUTS = [  # ranks, sizes, options, data rank of each prompt
    (2, {"attention_data_parallel_size": 2, "expert_parallel_size": 2}, {}, [0, 1, 0]),
    (2, {"attention_data_parallel_size": 2, "expert_parallel_size": 2}, {"ep_num_redundant_experts": 1}, [1, 1, 1]),
    (2, {"attention_data_parallel_size": 2}, {}, [0, 1, 0]),  # columns of all experts are cut, and the rows travel to both
    (2, {"expert_parallel_size": 2}, {"enable_layernorm_sp": True}, [0, 0, 0]),
    (3, {"attention_data_parallel_size": 3, "expert_parallel_size": 3}, {}, [2, 0, 2]),
    (4, {"attention_data_parallel_size": 2, "expert_parallel_size": 2}, {}, [0, 1, 1]),
    (4, {"attention_data_parallel_size": 4, "expert_parallel_size": 4}, {"ep_dispatch_algorithm": "dynamic",
                                                                         "ep_num_redundant_experts": 2}, [3, 3, 1]),
]  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("size", "sizes", "options", "where"), LAYOUTS)
def test_rows_that_travel_are_the_chosen_ones_and_the_messages_are_three_a_layer(
    size, sizes, options, where, name, mixture, ranks
):
    """Counts [R, S]; then n rows, one for each choice of each real row and rank that has the expert's columns; and back.

    Prefill: n is as many as there are. Decode: room for as many rows as a rank holds, for every slot of every rank.
    """
    folder = mixture(name)
    config = ModelConfig.from_folder(folder)
    k, parts = config.mixture.router.top_k, sizes.get("attention_data_parallel_size", 1)
    copies, cut = size // sizes.get("expert_parallel_size", 1), size // parts
    told = ranks(size).run(serve, folder, sizes, options | {"ep_dispatch": "all_to_all"}, where)
    right(told, folder)
    tokens = [sum(len(PROMPTS[i]) for i in range(3) if where[i] == part) for part in range(parts)]
    most = ceil(max(where.count(part) for part in range(parts)) / cut)
    sparse = [i for i in range(config.num_layers) if config.mixture.sparse[i]]
    for layer in sparse:
        came = 0
        for rank, one in enumerate(told):
            held = ceil(tokens[rank // cut] / cut)
            real = min(max(tokens[rank // cut] - rank % cut * held, 0), held)
            counts, there, back = [said for said in of_experts(one["prefill"]) if said[0] == f"layers.{layer}"]
            assert counts == (f"layers.{layer}", "all_to_all", "counts", (size, one["slots"]))
            assert there[1:] == ("all_to_all", "dispatch", (real * k * copies, 48))
            assert back[1:3] == ("all_to_all", "combine")
            came += back[3][0]
            room = (size, one["slots"], most, 48)
            assert [said[1:] for said in of_experts(one["decode"]) if said[0] == f"layers.{layer}"] == [
                ("all_to_all", "counts", (size, one["slots"])),
                ("all_to_all", "dispatch", room),
                ("all_to_all", "combine", room),
            ]
        assert came == sum(tokens) * k * copies  # every row comes home
    for one in told:
        steps = (12 + 3 * (NEW - 1)) * k
        assert one["loads"] == [[steps * (i in sparse) for i in range(config.num_layers)]]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("size", "ep", "dispatch"), [(2, 2, "replicated"), (2, 2, "all_to_all"), (4, 2, "all_to_all"),
                                                      (3, 3, "replicated")])  # fmt: skip
def test_experts_that_move_before_every_step_change_no_token(size, ep, dispatch, name, mixture, ranks):
    sizes, options = {"expert_parallel_size": ep}, {"ep_num_redundant_experts": 2, "ep_dispatch": dispatch}
    if dispatch == "all_to_all":
        sizes["attention_data_parallel_size"] = 2
    told = ranks(size).run(serve, mixture(name), sizes, options, [0, 0, dispatch == "all_to_all"], True)
    right(told, mixture(name))
    config = ModelConfig.from_folder(mixture(name))
    for one in told:  # the load since the last move
        per_step = [3 * config.mixture.router.top_k * sparse for sparse in config.mixture.sparse]
        assert one["loads"][1:] == [per_step] * (NEW - 1)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("size", "ep", "redundant"), [(2, 2, 0), (2, 2, 1), (3, 3, 0), (4, 2, 1)])
def test_a_rank_reads_the_bytes_of_its_own_experts(size, ep, redundant, name, mixture, ranks):
    """Once each, also if one lies twice here; where columns are cut, its own columns."""
    folder = mixture(name)
    config = ModelConfig.from_folder(folder)
    plain = ranks(size).run(read_by, folder, 1, 0)
    told = ranks(size).run(read_by, folder, ep, redundant)
    layers, width = sum(config.mixture.sparse), config.mixture.intermediate_size
    for rank, (bytes_read, held) in enumerate(told):
        cut = lambda ranks, rank: min(ceil(width / ranks), max(width - rank * ceil(width / ranks), 0))  # noqa: E731
        before = config.mixture.num_experts * cut(size, rank)
        after = held * cut(size // ep, rank % (size // ep))
        assert bytes_read - plain[rank][0] == layers * 3 * 48 * 4 * (after - before)


def read_by(folder, ep: int, redundant: int) -> tuple[int, int]:
    executor = make(folder, {"expert_parallel_size": ep}, {"ep_num_redundant_experts": redundant})
    first = executor.config.mixture.sparse.index(True)
    return executor.load_report.bytes_read, len({e for e in executor.placement.held(first) if e is not None})


def events_of(folder) -> list[str]:
    executor = make(
        folder, {"attention_data_parallel_size": 2, "expert_parallel_size": 2}, {"ep_dispatch": "all_to_all"}
    )
    said: list[str] = []
    layer = executor.model.model.layers[0].mlp
    ledger = executor.tp.ledger
    record, run = ledger.record, layer.runner.run
    ledger.record = lambda op, label, *more: said.append(label) or record(op, label, *more)
    layer.shared_expert.register_forward_hook(lambda *_: said.append("shared expert"))
    layer.runner = layer.runner._replace(run=lambda *given: said.append("experts") or run(*given))
    tokens, parts = np.array([5, 6, 7]), StepParts([3, 3], [np.array([2])] * 2, [NOTHING] * 2)
    executor.table.set_pages([(0, 0, range(4))])
    one = np.ones(1, dtype=np.int64)
    executor.ragged(tokens, 0 * one, 0 * one, 3 * one, one, parts=parts)
    ledger.record = record
    return said


def test_the_shared_expert_is_computed_while_the_rows_are_on_their_way(mixture, ranks):
    for said in ranks(2).run(events_of, mixture("shared")):
        begin = said.index("layers.0.counts")
        assert said[begin : begin + 5] == [
            "layers.0.counts", "layers.0.dispatch", "shared expert", "experts", "layers.0.combine",
        ]  # fmt: skip


def refused(folder, sizes: dict, options: dict) -> str:
    try:
        make(folder, sizes, options)
    except ValueError as error:
        return str(error)
    return "made"


@pytest.mark.parametrize(
    ("name", "sizes", "options", "words"),
    [
        (None, {"expert_parallel_size": 2}, {}, "Qwen2ForCausalLM has no experts to deal out over ep_size=2"),
        ("wide", {"expert_parallel_size": 2}, {"ep_dispatch": "deepep"}, "ep_dispatch='deepep' is unknown; use replicated or"),
        ("wide", {"expert_parallel_size": 2}, {"ep_dispatch": "all_to_all"}, "use attn_dp_size= or enable_layernorm_sp"),
        ("wide", {}, {"ep_num_redundant_experts": 2}, "ep_num_redundant_experts=2 with ep_size=1"),
        ("wide", {"expert_parallel_size": 2}, {"ep_dispatch_algorithm": "fake"}, "ep_dispatch_algorithm='fake' is unknown"),
        ("wide", {"context_parallel_size": 2, "expert_parallel_size": 2}, {"ep_dispatch": "all_to_all"}, "every rank has all"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_on_every_rank(name, sizes, options, words, mixture, ranks):
    folder = mixture(name) if name else TINY_QWEN_PATH
    for said in ranks(2).run(refused, folder, sizes, options):
        assert words in said
        assert "\n" not in said


def test_an_expert_may_lie_in_no_place_that_is_asked_of_a_dense_model():
    with pytest.raises(ValueError, match="has no experts; ask this of a mixture"):
        _ = Executor(None, "cpu", P, max_total_tokens=64).placement


def test_the_checkpoints_are_what_these_tests_are_for(mixture):
    """E that no number of ranks here divides, k = 1, a layer without experts, and names per expert in the file."""
    facts = [ModelConfig.from_folder(mixture(name)).mixture for name in MIXTURES]
    assert [(one.num_experts, one.router.top_k) for one in facts] == [(5, 2), (7, 1), (4, 3)]
    assert facts[0].sparse == (True, False, True)
    index = mixture("one each") / "model.safetensors"
    with safe_open(index, framework="pt") as file:
        assert "model.layers.0.mlp.experts.6.down_proj.weight" in file.keys()  # noqa: SIM118, not a dict
    assert json.loads((mixture("wide") / "config.json").read_text())["num_local_experts"] == 4


def captured_step(folder, sizes: dict, options: dict, where: list[int]) -> tuple[bool, list[int]]:
    """What a CUDA graph would hold, run by hand: eight rows a part, of which the device alone knows how many are real.

    Are the logits those of a step that knows it, and how many rows did the experts of each layer compute?
    """
    executor = make(folder, sizes, options)
    part, parts = executor.communicator.part, executor.communicator.parts
    part_of = [[i for i, rank in enumerate(where) if rank == one] for one in range(parts)]
    counts, mine = [len(one) for one in part_of], part_of[part]
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in range(len(mine))])
    executor.table.set_tokens(torch.arange(len(mine)), torch.tensor([5 + i for i in mine], dtype=torch.int64))
    rows, size = np.arange(len(mine)), 8
    want = executor.decode(rows, 0 * rows, parts=counts if parts > 1 else None)
    plain = executor.expert_load().sum(dim=1).tolist()
    graphs = DecodeGraphs(executor.model, executor.attention, executor.kv_cache, executor.table, size)
    numbers = torch.full((2, size), -1)
    numbers[:, : len(mine)] = torch.stack((torch.arange(len(mine)), torch.zeros(len(mine), dtype=torch.int64)))
    graphs.inputs[: 2 * size] = numbers.flatten()
    if graphs.real is not None:
        graphs.real.copy_(torch.tensor(counts))
    with torch.inference_mode():
        out = graphs._step((size, False))
    got = torch.cat([x[:n] for x, n in zip(out.split(size), counts, strict=True)])
    after = executor.expert_load().sum(dim=1).tolist()
    return torch.allclose(got, want, atol=1e-4), plain == [b - a for a, b in zip(plain, after, strict=True)]


@pytest.mark.parametrize("name", ["shared", "one each"])
@pytest.mark.parametrize(
    ("size", "sizes", "options", "where"),
    [
        (2, {"expert_parallel_size": 2}, {"ep_num_redundant_experts": 1}, [0, 0, 0]),
        (2, {"expert_parallel_size": 2, "attention_data_parallel_size": 2}, {}, [0, 1, 0]),
        (2, {"expert_parallel_size": 2, "attention_data_parallel_size": 2}, {"ep_dispatch": "all_to_all"}, [1, 1, 1]),
        (2, {"expert_parallel_size": 2}, {"ep_dispatch": "all_to_all", "enable_layernorm_sp": True}, [0, 0, 0]),
        (4, {"expert_parallel_size": 2, "attention_data_parallel_size": 2}, {"ep_dispatch": "all_to_all"}, [0, 1, 0]),
    ],
)
def test_in_a_captured_step_rows_of_padding_reach_no_expert(size, sizes, options, where, name, mixture, ranks):
    for alike, as_many in ranks(size).run(captured_step, mixture(name), sizes, options, where):
        assert alike
        assert as_many
