"""What a checkpoint says about its quantization: `quantization_config` in config.json (compression_config, in older files)."""

from collections.abc import Mapping
from typing import Any

from common.quantization.scheme import Scheme


class QuantizationConfig:
    """Which scheme each module has. method: "fp8", "gptq", ..., a key of METHODS."""

    method: str

    @staticmethod
    def from_checkpoint(config: Mapping[str, Any], where: str) -> "QuantizationConfig | None":
        """config: all of config.json; None if its weights are not quantized. Raises ValueError for what is unknown, by name."""
        raise NotImplementedError

    @staticmethod
    def named(quantization: str) -> "QuantizationConfig":
        """Of --quantization: how a full-precision checkpoint is quantized while it is read. Raises ValueError for other names."""
        raise NotImplementedError

    def scheme_of(self, module: str) -> Scheme | None:
        """module: as the checkpoint names it, "model.layers.0.self_attn.q_proj"; None: its weight is plain."""
        raise NotImplementedError
