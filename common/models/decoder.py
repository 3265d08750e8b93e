"""One tensor-parallel decoder for Qwen2, Qwen2.5, Qwen3 and Llama, and their mixtures of experts.

A pure function of its arguments: `model(input_ids [T], positions [T], attention) -> hidden [T, D]`. The T
tokens of a step belong to any mix of sequences; only `attention` knows which. Who talks, per step:

    embed_tokens   1 all-reduce  [T, D]
    each layer     2 all-reduces [T, D]    after o_proj and after down_proj
    logits         1 gather      [B, V/R]  (vocab.gather_logits, outside the model)

That is plain tensor parallelism. With a LayerCommunicator that spreads the rows, the two halves of each all-reduce stand apart,
and attention and MLP may be cut over different groups (common/layers/communicator.py).

A stage of a pipeline has some of the layers, with the numbers they have in the whole model (stages.py); the stages' links
(links.py) carry hidden states [T, D] from one to the next. Module names are Hugging Face's, with q/k/v and gate/up merged
(weights.py maps them).
"""

from itertools import islice

import torch
from torch import nn

from common.layers.communicator import LayerCommunicator, TokenRows
from common.layers.expert_placement import ExpertPlacement
from common.layers.linear import QKVParallelLinear, RowParallelLinear
from common.layers.mla import LatentAttention
from common.layers.mlp import MLP
from common.layers.moe import AUTO, MoE, MoEOptions
from common.layers.norm import RMSNorm
from common.layers.rotary import RotaryEmbedding, Turning
from common.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from common.models.config import ModelConfig
from common.parallel_state import TPGroup
from common.quantization.method import PLAIN, LayerMethods
from common.vision.tower import VisionTower


class SelfAttention(nn.Module):
    """x [T, D] -> [T, D]. Projects this rank's heads; `attention` stores k, v and attends over the pages.

    tp: the ranks that cut the heads. reduce_results=False: what comes out is this rank's part of the sum. input_size: of x, if it
    is not D.
    """

    def __init__(
        self, config: ModelConfig, tp: TPGroup, layer: int, first: int = 0, reduce_results: bool = True,
        input_size: int | None = None, methods: LayerMethods = PLAIN,
    ):  # fmt: skip
        super().__init__()
        name, d = f"layers.{layer}", config.head_dim
        self.layer, self.head_dim = layer - first, d  # its place in the pages: a stage has those of its own layers
        self.qkv_proj = QKVParallelLinear(
            input_size or config.hidden_size,
            d,
            config.num_heads,
            config.num_kv_heads,
            tp,
            config.qkv_bias,
            f"{name}.qkv_proj",
            methods("qkv_proj"),
        )
        self.heads = heads = self.qkv_proj.heads
        # o_proj's input columns are the query heads: whoever computed a head multiplies it
        self.o_proj = RowParallelLinear(
            config.num_heads * d, config.hidden_size, tp, config.o_bias, f"{name}.o_proj",
            pieces=(heads.num_q * d, heads.q_pieces(d)), reduce_results=reduce_results, method=methods("o_proj"),
        )  # fmt: skip
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.compiled = None  # the turning by torch.compile, if it is asked for (layers/compiled.py)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attention, adapters=None
    ) -> torch.Tensor:
        q, k, v = self.qkv_proj.split(self.qkv_proj(x, adapters))
        q = q.unflatten(-1, (-1, self.head_dim))  # [T, Hq/R, d]
        k = k.unflatten(-1, (-1, self.head_dim))  # [T, Hkv/R, d]
        v = v.unflatten(-1, (-1, self.head_dim))  # [T, Hkv/R, d]
        turning = Turning(rotary, self.q_norm, self.k_norm, self.compiled)
        if getattr(attention, "turns", False):  # it does so while it reads q and k
            o = attention(self.layer, q, k, v, turning)  # [T, Hq/R, d]
        else:
            o = attention(self.layer, *turning(q, k), v)  # [T, Hq/R, d]
        return self.o_proj(o.flatten(1), adapters)  # all-reduce inside


class DecoderLayer(nn.Module):
    """x = x + self_attn(norm(x)); x = x + mlp(norm(x)).

    `residual` is x, and `x` what the last block has to add to it: the addition then sits next to the norm
    that reads it, where a GPU kernel does both in one pass. first: the first layer of this stage.
    """

    def __init__(
        self, config: ModelConfig, communicator: LayerCommunicator, layer: int, first: int = 0,
        moe: MoEOptions = AUTO, placement: ExpertPlacement | None = None, methods: LayerMethods = PLAIN,
    ):  # fmt: skip
        super().__init__()
        self.communicator, self.name, self.before = communicator, f"layers.{layer}", f"layers.{layer - 1}.down_proj"
        alone, attention, mlp = (
            not (communicator.spreads or communicator.defers),
            methods.under("self_attn"),
            methods.under("mlp"),
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.latent:
            self.self_attn = LatentAttention(
                config.hidden_size, config.num_heads, config.latent, communicator.attn_tp, layer, layer - first,
                bias=config.o_bias, reduce_results=alone, methods=attention,
            )  # fmt: skip
        else:
            self.self_attn = SelfAttention(config, communicator.attn_tp, layer, first, alone, methods=attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = bool(config.mixture and config.mixture.sparse[layer])
        self.travels = self.sparse and moe.dispatch == "all_to_all"
        if self.sparse:
            sizes = (config.hidden_size, config.mixture)
            self.mlp = MoE(*sizes, communicator.tp, self.name, alone, moe, placement, layer, mlp)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, communicator.tp, self.name, alone, mlp)
        # a product that rounds x has the kernel before it do so: a launch less. Not where messages carry x in between, nor
        # where several matrices read it
        if not (communicator.spreads or config.latent):
            self.input_layernorm.rounding = self.self_attn.qkv_proj.asks
        if not (communicator.spreads or self.sparse):
            self.post_attention_layernorm.rounding = self.mlp.gate_up_proj.asks
        if not self.sparse:
            self.mlp.act.rounding = self.mlp.down_proj.asks

    def forward(
        self, x, residual, rotary, attention, rows: TokenRows | None, live: torch.Tensor | None = None, adapters=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        between, name = self.communicator, self.name
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = between.add(self.input_layernorm, x, residual, self.before)
        x = between.gather_for_attention(x, rows, f"{name}.qkv_proj")
        if attention is not None:  # a data rank without work has none; a cp rank without rows takes part in the ring
            x = self.self_attn(x, rotary, attention, adapters)
        x = between.scatter_from_attention(x, rows, f"{name}.o_proj")
        x, residual = between.add(self.post_attention_layernorm, x, residual, f"{name}.o_proj")
        if self.travels:  # each row goes to the ranks of its experts alone
            return self.mlp(x, rows), residual
        x = between.gather_for_mlp(x, rows, f"{name}.gate_up_proj")
        x = self.mlp(x, rows, live) if self.sparse else self.mlp(x, adapters)
        return between.scatter_from_mlp(x, rows, f"{name}.down_proj"), residual


class Decoder(nn.Module):
    """Embedding, L layers, final norm; of a stage the layers in `stage`, and the embedding and the norm at the ends.

    What a stage has not is not there, and takes no memory: in `layers` an Identity stands in its place, as SGLang's
    PPMissingLayer does, so that every layer has the same name everywhere.
    """

    def __init__(
        self, config: ModelConfig, communicator: LayerCommunicator, stage: range, moe: MoEOptions = AUTO,
        methods: LayerMethods = PLAIN,
    ):  # fmt: skip
        super().__init__()
        self.communicator, self.stage = communicator, stage
        self.some: frozenset[int] | None = None  # the layers that run, in a rehearsal (rehearsal.py); None: all of them
        self.placement = None  # of the experts
        if config.mixture:
            self.placement = moe.placement(config.num_layers, config.mixture, communicator.tp)
        self.embed_tokens = self.norm = None
        if stage.start == 0:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, communicator.attn_tp, reduce_results=not communicator.spreads
            )
        self.rotary = RotaryEmbedding(**config.rotary)
        self.layers = nn.ModuleList(
            DecoderLayer(config, communicator, i, stage.start, moe, self.placement, methods.under(f"layers.{i}"))
            if i in stage
            else nn.Identity()
            for i in range(config.num_layers)
        )
        if stage.stop == config.num_layers:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attention, hidden: torch.Tensor | None = None,
        rows: TokenRows | None = None, live: torch.Tensor | None = None, entering: dict[int, torch.Tensor] | None = None,
        adapters=None,
    ) -> torch.Tensor:  # fmt: skip
        if rows is None and self.communicator.parts > 1:
            parts = self.communicator.parts
            raise ValueError(
                f"this model's rows lie on {parts} parts of its ranks; say how many each has (LayerCommunicator.rows)"
            )
        rows = rows or self.communicator.rows([len(input_ids)])
        x, residual = (self.embed_tokens(input_ids, adapters) if hidden is None else hidden), None  # [T, D]
        x = self.communicator.scatter_from_attention(x, rows, "embed_tokens")
        rotary = self.rotary(positions, x.dtype)
        layers = zip(self.stage, islice(self.layers, self.stage.start, self.stage.stop), strict=True)
        if self.some is not None and not entering:
            layers = [one for one in layers if one[0] in self.some]
        for number, layer in layers:
            if entering and number in entering:
                entering[number] = self._entering(x, residual, number)
            x, residual = layer(x, residual, rotary, attention, rows, live, adapters)
        return self.finish(x, residual)

    def _entering(self, x: torch.Tensor, residual: torch.Tensor | None, layer: int) -> torch.Tensor:
        return x if residual is None else self.communicator.whole(x, f"layers.{layer - 1}.down_proj") + residual

    def finish(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What the last layer left -> hidden."""
        last = f"layers.{self.stage.stop - 1}.down_proj"
        if self.norm is None:  # the next stage begins with a norm of the sum: one tensor travels, not two
            return self.communicator.whole(x, last) + residual
        return self.communicator.add(self.norm, x, residual, last)[0]


class CausalLM(nn.Module):
    """The decoder and its LM head. `hidden = model(...)`, then `model.compute_logits(hidden[last rows])`.

    stage: which layers, all by default. All but the first stage begin with `hidden` of the stage before; all but the last
    end with what the next one begins with, and have no head. communicator: whether the rows are spread, and over whom
    attention is cut; by default plain tensor parallelism over tp. moe: how experts are computed. methods: which linear layers hold
    codes in place of a weight, and how they multiply (common/quantization/method.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TPGroup,
        stage: range | None = None,
        communicator: LayerCommunicator | None = None,
        moe: MoEOptions = AUTO,
        methods: LayerMethods = PLAIN,
    ):
        super().__init__()
        self.config, self.tp, self.communicator = config, tp, communicator or LayerCommunicator(tp)
        self.stage = range(config.num_layers) if stage is None else stage
        self.model = Decoder(config, self.communicator, self.stage, moe, methods.under("model"))
        self.visual = VisionTower(config.vision.tower, tp) if config.vision else None
        self.lm_head = None
        if self.stage.stop == config.num_layers:
            # a copy of its own where the embedding is stages away, or cut over fewer ranks than the head
            tied = config.tie_word_embeddings and self.communicator.parts == 1
            embedding = self.model.embed_tokens if tied else None
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp, embedding, methods("lm_head"))

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attention, hidden: torch.Tensor | None = None,
        rows: TokenRows | None = None, live: torch.Tensor | None = None, entering: dict[int, torch.Tensor] | None = None,
        adapters=None,
    ) -> torch.Tensor:  # fmt: skip
        """input_ids, positions [T] or [3, T] -> hidden [T, D], or if rows are spread this rank's.

        hidden [T, D]: what a later stage begins with; or embedded tokens with rows of pictures among them.
        live [T]: which tokens are no padding, where some are that `rows` does not tell of (a CUDA graph). entering: layer numbers,
        whose values become the hidden states [T, D] that enter these layers, for who makes something of them (drafters/).
        adapters: which LoRA adapter each token uses, None if none uses one (layers/lora.py).
        """
        return self.model(input_ids, positions, attention, hidden, rows, live, entering, adapters)

    def compute_logits(self, hidden: torch.Tensor, adapters=None) -> torch.Tensor:
        """hidden [B, D], adapters of these B rows -> this rank's logits [B, V/R]."""
        return self.lm_head(hidden, adapters)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold it: not if experts are computed in a form that asks how many tokens each has."""
        return all(module.capturable for module in self.modules() if isinstance(module, MoE))

    @property
    def heads(self):
        """The heads of this rank (HeadLayout); the same in every layer."""
        return self.model.layers[self.stage.start].self_attn.heads
