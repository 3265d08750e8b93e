"""Which device a rank computes on."""

import torch


def pick_device(device: str, local_rank: int = 0, ranks: int = 1) -> torch.device:
    """auto | cpu | cuda -> this rank's device. Raises ValueError if there is no such GPU.

    `ranks` on this host must all land on the same kind: auto takes GPUs only if there is one for each.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= max(ranks, local_rank + 1) else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device != "cuda":
        raise ValueError(f"device={device!r} is unknown; use auto, cpu or cuda")
    if torch.cuda.device_count() < max(ranks, local_rank + 1):
        raise ValueError(
            f"device=cuda but local rank {local_rank} finds {torch.cuda.device_count()} GPU(s) for {ranks} "
            f"rank(s); one process drives one GPU: start fewer ranks or use the CPU (--force-cpu, device=cpu)"
        )
    return torch.device("cuda", local_rank)
