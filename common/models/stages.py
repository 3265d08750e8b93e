"""Which layers a stage of the pipeline holds.

The first stage has the embedding, the last one the final norm and the LM head; with tied weights the embedding lies on both
ends. SGLang 0.5.23, srt/distributed/utils.py (get_pp_indices).

>>> [stage_layers(7, 3, rank) for rank in range(3)]
[range(0, 2), range(2, 4), range(4, 7)]
>>> [stage_layers(7, 3, rank, (3, 2, 2)) for rank in range(3)]
[range(0, 3), range(3, 5), range(5, 7)]
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PARTITION = "SGLANG_PP_LAYER_PARTITION"  # SGLang's name for a list in the environment


def stage_layers(num_layers: int, stages: int, rank: int, partition: Sequence[int] | None = None) -> range:
    """The layers of stage `rank`: num_layers // stages each, and one more for the last num_layers % stages; or as listed.

    The last ones get more, although they have the LM head as well: SGLang's rule. Raises ValueError for more stages than layers,
    and for a list that is not one number of at least 1 a stage, all the layers together.
    """
    if stages > num_layers:
        raise ValueError(
            f"pp_size={stages} stages for {num_layers} layers: every stage needs one; use pp_size={num_layers} or less"
        )
    if partition is not None:
        _refuse_another_sum(partition, num_layers, stages)
        start = sum(partition[:rank])
        return range(start, start + partition[rank])
    each, more = divmod(num_layers, stages)
    start = rank * each + max(rank - (stages - more), 0)
    return range(start, start + each + (rank >= stages - more))


def _refuse_another_sum(partition: Sequence[int], num_layers: int, stages: int) -> None:
    even = ",".join(str(len(stage_layers(num_layers, stages, rank))) for rank in range(stages))
    said = f"pp_layer_partition={','.join(map(str, partition))}"
    if len(partition) != stages:
        raise ValueError(f"{said} lists {len(partition)} stage(s), but pp_size={stages}; use {even}")
    if min(partition) < 1:
        raise ValueError(f"{said} leaves a stage without layers; use {even}, or fewer stages")
    if sum(partition) != num_layers:
        raise ValueError(f"{said} makes {sum(partition)} layers, but the model has {num_layers}; use {even}")


def layer_partition(written: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, ...] | None:
    """ "8,8,6" -> (8, 8, 6); without it what the environment says, and None if it says nothing."""
    name, written = ("pp_layer_partition", written) if written is not None else (PARTITION, environment.get(PARTITION))
    if written is None:
        return None
    parts = written.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{name}={written[:80]!r} must be the number of layers of each stage, such as 8,8,6")
    return tuple(map(int, parts))


@dataclass(frozen=True)
class Stage:
    """One stage among those of a pipeline, before it is known how many layers there are."""

    rank: int = 0
    size: int = 1
    partition: tuple[int, ...] | None = None

    def layers(self, num_layers: int) -> range:
        return stage_layers(num_layers, self.size, self.rank, self.partition if self.size > 1 else None)
