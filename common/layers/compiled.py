"""The small layers by torch.compile, as an option: what lies between two matrix products in one loop instead of a dozen.

In eager PyTorch a norm with the addition before it, the MLP's gate and the turning of q and k are some 20 operators a layer, and
each reads and writes all its rows. TorchDynamo follows the Python code once and hands on a graph; its backend, inductor, writes a
loop for it, in C++ for a CPU and in Triton for a GPU, and a C++ compiler or Triton makes it a kernel. Before each call Dynamo looks
whether the arguments are what the kernel was made for (guards): that costs Python time, four times a layer in every step.

What is compiled are four functions of tensors alone, and not the modules that call them: Dynamo's guards would hold for one
layer, its number and its weights, and 24 layers would be compiled 24 times. Matrix products stay out: on a CPU they are oneDNN's,
on matrices in a form of their own (cpu_linear.py), and collectives and attention keep books of which Dynamo knows nothing.

SGLang 0.5.23 has the same switch, `--enable-torch-compile` with `--torch-compile-max-bs 32`, around the whole forward pass
(model_executor/); there it pays with a slow start. What it costs and brings here: ch07_sglang_radix/README.md.
"""

import os
import shutil
import sys
from functools import partial

import torch

from common.layers.activation import SiluAndMul, silu_and_mul
from common.layers.norm import RMSNorm, rms_norm
from common.layers.rotary import turn

MAX_ROWS = 32  # as SGLang's torch_compile_max_bs
SEVERAL = 4  # rows that stand for every number of them but 1
# what inductor looks for (torch/_inductor/config.py)
CXX = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, root_weight: torch.Tensor, root_floor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), both [T, D]."""
    residual = x + residual
    return rms_norm(residual, root_weight, root_floor), residual


class CompiledPieces:
    """The four functions, for steps of at most max_rows tokens; larger ones run as without.

    One row is compiled apart from several: Dynamo takes a length of 1 for a constant. backend: inductor, or another that torch
    knows; "eager" runs the graph as it was recorded, and needs no compiler.
    Raises ValueError if there is none of which inductor could make use.
    """

    def __init__(self, device: torch.device, max_rows: int = MAX_ROWS, backend: str = "inductor"):
        compiler = os.environ.get("CXX", CXX)
        if backend == "inductor" and device.type == "cpu" and shutil.which(compiler) is None:
            raise ValueError(
                f"enable_torch_compile writes C++ for a CPU, and there is no compiler {compiler}; install it, name another one in "
                f"the variable CXX, or leave it out"
            )
        self.max_rows = max_rows
        self.norm, self.add_norm, self.gate, self.turn = (
            torch.compile(function, backend=backend) for function in (rms_norm, add_rms_norm, silu_and_mul, turn)
        )

    def give_to(self, model: torch.nn.Module) -> None:
        """From now on the norms of all layers, their gates and the turning of q and k are these. Not the norms of single heads."""
        for name, module in model.named_modules():
            of_a_layer = isinstance(module, RMSNorm) and not name.endswith(("q_norm", "k_norm"))
            if of_a_layer or isinstance(module, SiluAndMul) or name.endswith("self_attn"):
                module.compiled = self

    @torch.inference_mode()
    def warm_up(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Compile all of them for a model now (CausalLM, its layers alike), and not while the first request waits."""
        layer, rotary = model.model.layers[model.stage.start], model.model.rotary
        norm, attention = layer.input_layernorm, layer.self_attn
        qkv_width, gate_up_width = sum(attention.qkv_proj.sizes), sum(layer.mlp.gate_up_proj.sizes)
        for rows in sorted({1, min(SEVERAL, self.max_rows)}):
            zeros = partial(torch.zeros, dtype=dtype, device=norm.weight.device)
            x, residual = zeros(rows, len(norm.weight)), zeros(rows, len(norm.weight))
            gate_up, qkv = zeros(rows, gate_up_width), zeros(rows, qkv_width)
            q, k, _ = (part.unflatten(-1, (-1, attention.head_dim)) for part in attention.qkv_proj.split(qkv))
            cos, sin = rotary(torch.zeros(rows, dtype=torch.int64, device=x.device), dtype)
            for tensor in (x, residual, gate_up, q, k, cos, sin) if rows > 1 else ():
                torch._dynamo.mark_dynamic(tensor, 0)  # else the first number of rows would be taken for the only one
            norm(x)
            norm.add(x, residual)
            self.gate(gate_up)
            self.turn(q, k, cos, sin)
