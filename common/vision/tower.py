"""The vision towers of Qwen2-VL and Qwen2.5-VL: patches of a picture -> rows that stand among those of the tokens.

    patches [N, C*frames*p*p] -> patch_embed [N, E] -> blocks -> merger [N/m^2, D], m * m neighbouring patches one row

A vision transformer in which each patch knows its place by a rotary embedding: half of a head's frequencies turn with the
patch's line, half with its column. No causal mask: a patch sees all others. The two differ in what one class can say:

                    Qwen2-VL                      Qwen2.5-VL
    norms           LayerNorm                     RMSNorm
    MLP             quick GELU, 4 E               SwiGLU with biases
    attention       over the whole picture        in windows of 112 x 112 pixels; over all of it in a few blocks

Every rank holds all of it and computes every picture: a tower is small beside its decoder (0.67 of 7.6 billion numbers), and
replicated it sends nothing. (SGLang cuts it over tensor-parallel ranks, unless mm_enable_dp_encoder spreads pictures.)
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.layers.linear import ReplicatedLinear, loadable
from common.layers.norm import RMSNorm
from common.parallel_state import TPGroup

EPS = 1e-6  # of all norms here


@dataclass(frozen=True)
class VisionShape:
    """What the config says of the tower."""

    depth: int  # blocks
    width: int  # E
    heads: int
    mlp_width: int
    out: int  # D of the decoder
    patch: int
    merge: int
    frames: int
    gated: bool  # RMSNorm and SwiGLU, as Qwen2.5-VL; else LayerNorm and quick GELU
    theta: float = 10_000.0
    window: int = 0  # blocks along a window's side; 0: no windows
    whole: frozenset[int] = frozenset()  # with windows: which blocks see all of the picture

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def unit(self) -> int:
        """Patches of a row of the decoder."""
        return self.merge**2


class LayerNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = loadable(torch.zeros(size), self.load_weight, {None: (size,)})
        self.bias = loadable(torch.zeros(size), self.load_bias, {None: (size,)})

    def load_weight(self, source, shard_id=None) -> None:
        self.weight.copy_(source.read(0, 0, source.shape[0]))

    def load_bias(self, source, shard_id=None) -> None:
        self.bias.copy_(source.read(0, 0, source.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)


class PatchEmbed(nn.Module):
    """A convolution whose steps are as long as its window is one product a patch."""

    def __init__(self, shape: VisionShape):
        super().__init__()
        self.proj = PatchProjection((shape.width, 3, shape.frames, shape.patch, shape.patch))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.flatten(1)  # [E, C*frames*p*p]
        return F.linear(patches.to(weight.dtype), weight)


class PatchProjection(nn.Module):
    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = loadable(torch.zeros(shape), self.load_weight, {None: shape})

    def load_weight(self, source, shard_id=None) -> None:
        self.weight.copy_(source.read(0, 0, source.shape[0]))


class Mlp(nn.Module):
    def __init__(self, shape: VisionShape, tp: TPGroup):
        super().__init__()
        self.fc1 = ReplicatedLinear(shape.width, shape.mlp_width, tp, bias=True)
        self.fc2 = ReplicatedLinear(shape.mlp_width, shape.width, tp, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick GELU


class GatedMlp(nn.Module):
    def __init__(self, shape: VisionShape, tp: TPGroup):
        super().__init__()
        self.gate_proj = ReplicatedLinear(shape.width, shape.mlp_width, tp, bias=True)
        self.up_proj = ReplicatedLinear(shape.width, shape.mlp_width, tp, bias=True)
        self.down_proj = ReplicatedLinear(shape.mlp_width, shape.width, tp, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionAttention(nn.Module):
    def __init__(self, shape: VisionShape, tp: TPGroup):
        super().__init__()
        self.heads = shape.heads
        self.qkv = ReplicatedLinear(shape.width, 3 * shape.width, tp, bias=True)
        self.proj = ReplicatedLinear(shape.width, shape.width, tp, bias=True)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], lengths: list[int]) -> torch.Tensor:
        """x [N, E]; lengths: of the windows, end to end in x, each of which sees itself alone."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # [N, H, d]
        q, k = turned(q, turn), turned(k, turn)
        cut = [part.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for part in (q, k, v)]  # [1, H, n, d] each
        o = torch.cat([F.scaled_dot_product_attention(*window) for window in zip(*cut, strict=True)], dim=2)
        return self.proj(o.squeeze(0).transpose(0, 1).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, shape: VisionShape, tp: TPGroup):
        super().__init__()
        self.norm1, self.norm2 = norm_of(shape), norm_of(shape)
        self.attn = VisionAttention(shape, tp)
        self.mlp = (GatedMlp if shape.gated else Mlp)(shape, tp)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], lengths: list[int]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), turn, lengths)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """The projector: m * m neighbouring patches, side by side, become one row of the decoder."""

    def __init__(self, shape: VisionShape, tp: TPGroup):
        super().__init__()
        self.wide = shape.width * shape.unit
        self.ln_q = norm_of(shape)
        self.mlp = nn.Sequential(
            ReplicatedLinear(self.wide, self.wide, tp, bias=True),
            nn.GELU(),
            ReplicatedLinear(self.wide, shape.out, tp, bias=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.wide))


class VisionTower(nn.Module):
    """One picture at a time: patches [N, C*frames*p*p] of a grid of (h, w) rows, N = h * w * m * m -> [h * w, D]."""

    def __init__(self, shape: VisionShape, tp: TPGroup):
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(VisionBlock(shape, tp) for _ in range(shape.depth))
        self.merger = PatchMerger(shape, tp)

    def forward(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        shape, (h, w) = self.shape, grid
        x = self.patch_embed(patches)  # [N, E]
        angles, order, windows = places(h, w, shape), None, [len(x)]
        if shape.window:
            order, sizes = in_windows(h, w, shape.window)
            windows = [size * shape.unit for size in sizes]
            x, angles = (one.view(h * w, shape.unit, -1)[order].flatten(0, 1) for one in (x, angles))
        angles = angles.to(x.device)
        turn = angles.cos(), angles.sin()
        for number, block in enumerate(self.blocks):
            x = block(x, turn, [len(x)] if number in shape.whole else windows)
        rows = self.merger(x)
        return rows if order is None else rows[order.argsort()]


def norm_of(shape: VisionShape) -> nn.Module:
    return RMSNorm(shape.width, EPS) if shape.gated else LayerNorm(shape.width)


def places(h: int, w: int, shape: VisionShape) -> torch.Tensor:
    """Angles [N, d/2], float32, of the patches in the order in which they come: block by block, in a block line by line."""
    m = shape.merge
    line = torch.arange(h * m).view(h, 1, m, 1).expand(h, w, m, m).flatten()
    column = torch.arange(w * m).view(1, w, 1, m).expand(h, w, m, m).flatten()
    half = shape.head_dim // 2
    frequencies = shape.theta ** -(torch.arange(0, half, 2).float() / half)  # [d/4]
    return torch.cat([torch.outer(line.float(), frequencies), torch.outer(column.float(), frequencies)], dim=-1)


def turned(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [N, H, d] by its patch's angles, in float32: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = (one.unsqueeze(1) for one in turn)  # [N, 1, d/2]
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def in_windows(h: int, w: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """Which block comes where once those of a window lie together [h * w], and how many blocks each window has.

    Windows go line by line, and so do the blocks of one; those at the right and lower edge may be smaller.
    """
    line, column = np.divmod(np.arange(h * w), w)
    window = line // side * -(-w // side) + column // side
    order = np.argsort(window, kind="stable")
    return torch.from_numpy(order), np.bincount(window).tolist()
