"""All ways side by side, the one to take, and why: from the numbers of bounds.py alone."""

from collections.abc import Sequence
from itertools import count

from common.distributed.machines import Machine
from common.models.config import ModelConfig
from common.planner.bounds import Bound, bound
from common.planner.holdings import holdings
from common.planner.plan import Load, Way, has_its_hosts, ways

MOST_GPUS = 1024  # that are tried when those given are too few
ALIKE = 1e-3  # two times that differ by less are one
WORDS = {
    "weights": "reading the weights",
    "kv": "reading keys and values",
    "compute": "arithmetic",
    "messages": "messages",
    "waiting": "waiting for other stages",
}
GB = 1e9


def room_of(machine: Machine, gpus: int, gpu_memory: int | None, fraction: float) -> int:
    """Bytes that a rank may hold."""
    memory = gpu_memory or machine.memory // (min(gpus, machine.ranks_a_host) if machine.shared else 1)
    return int(fraction * memory)


def all_bounds(config: ModelConfig, gpus: int, load: Load, machine: Machine, room: int) -> list[Bound]:
    """Of every legal way: those that fit first, the quickest first; of equally quick ones what holds least."""
    found = [bound(config, way, load, machine, room) for way in ways(gpus, config, load, machine.ranks_a_host)]
    return sorted(found, key=lambda b: (not b.fits, _rounded(b.seconds), b.held.total, sum(m.times for m in b.said)))


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def refuse_if_none_fits(
    bounds: Sequence[Bound], config: ModelConfig, name: str, gpus: int, load: Load, machine: Machine, fraction: float,
    gpu_memory: int | None,
) -> None:  # fmt: skip
    """Raises ValueError that says how many GPUs would do."""
    if bounds[0].fits:
        return
    leanest = min(bounds, key=lambda b: b.held.total)
    found = fewest(config, gpus + 1, load, machine, fraction, gpu_memory)
    would = (
        f"{found[0]} would do ({found[1]})"
        if found
        else f"nor do {MOST_GPUS} GPUs; use less context or a smaller batch"
    )
    raise ValueError(
        f"{name} in {str(load.dtype).removeprefix('torch.')} with {load.batch} x {load.context} tokens does not fit into {gpus} x "
        f"{leanest.room / GB:.1f} GB: {leanest.way} comes nearest with {leanest.held.total / GB:.1f} GB a rank; {would}"
    )


def fewest(
    config: ModelConfig, at_least: int, load: Load, machine: Machine, fraction: float, gpu_memory: int | None
) -> tuple[int, Way] | None:
    """The smallest number of GPUs, and the way that holds least on each of them."""
    for gpus in count(at_least):
        if gpus > MOST_GPUS:
            return None
        room = room_of(machine, gpus, gpu_memory, fraction)
        held = {way: holdings(config, way, load).total for way in ways(gpus, config, load)}
        # where ranks run is asked last: it takes longest, and few layouts of too few GPUs come so far
        fits = [way for way in held if held[way] <= room and has_its_hosts(way.layout, machine.ranks_a_host)]
        if fits:
            return gpus, min(fits, key=held.__getitem__)


def why(bounds: Sequence[Bound], load: Load, gpus: int) -> str:
    """One paragraph: what to take, what bounds it, what the runner-up loses."""
    best, fitting = bounds[0], [b for b in bounds if b.fits]
    most, *others = [part for part in sorted(best.parts, key=best.parts.__getitem__, reverse=True) if best.parts[part]]
    text = [
        f"Take {best.way}: at best {_ms(best.seconds)} a token for {load.batch} requests of {load.context:,} tokens, "
        f"{best.tokens_per_s:,.0f} tokens/s.",
        f"{_share(best, most)} of that is {WORDS[most]}{''.join(f', {_share(best, part)} {WORDS[part]}' for part in others)};"
        f" a rank holds {best.held.total / GB:.1f} of {best.room / GB:.1f} GB.",
    ]
    alike = [b for b in fitting[1:] if b.seconds <= best.seconds * (1 + ALIKE)]
    if alike:
        more = (alike[0].held.total - best.held.total) / GB
        text.append(f"{alike[0].way} would be as quick and hold {more:.2f} GB more.")
    if others := [b for b in fitting if b.seconds > best.seconds * (1 + ALIKE)]:
        text.append(_against(best, others[0]))
        if others[-1] is not others[0]:
            text.append(_against(best, others[-1], "The slowest that fits"))
    if len(fitting) < len(bounds):
        text.append(f"{len(bounds) - len(fitting)} of {len(bounds)} layouts do not fit.")
    prompt = min(fitting, key=lambda b: b.first_token_s)
    if prompt.first_token_s < best.first_token_s * (1 - ALIKE):
        text.append(
            f"One prompt of {load.context:,} tokens alone has its first token after {_ms(best.first_token_s)} at best, with "
            f"{prompt.way} after {_ms(prompt.first_token_s)}."
        )
    if gpus == 1:
        text = text[:2]
    return " ".join(text)


def _against(best: Bound, other: Bound, name: str = "The next") -> str:
    more = {part: other.parts[part] - best.parts[part] for part in best.parts}
    lost, won = max(more, key=more.__getitem__), min(more, key=more.__getitem__)
    said = f"{name}, {other.way}, takes {_ms(other.seconds - best.seconds)} more: {_ms(more[lost])} more {WORDS[lost]}"
    if more[won] < -ALIKE * best.seconds:
        said += f", against {_ms(-more[won])} less {WORDS[won]}"
    return said + "."


def _share(bound: Bound, part: str) -> str:
    return f"{100 * bound.parts[part] / bound.seconds:.0f} %"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"
