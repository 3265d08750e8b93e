from math import isclose
from types import ModuleType

from common.teaching.expect import ask, expect

PLAIN = {"r": 4, "lora_alpha": 8}
PATTERNS = {
    "rank_pattern": {"q_proj": 16, r"1\.up_proj": 2, "up_proj": 1},
    "alpha_pattern": {"o_proj": 2, "q_proj": 24},
}


def check(m: ModuleType) -> None:
    for config, module, want in (
        (PLAIN, "layers.0.q_proj", 2.0),
        (PLAIN | {"use_rslora": True}, "layers.0.q_proj", 4.0),
        (PLAIN | {"use_rslora": False}, "layers.0.q_proj", 2.0),
        (PLAIN | {"rank_pattern": {"q_proj": 16}}, "layers.0.q_proj", 0.5),
        (PLAIN | {"rank_pattern": {"q_proj": 16}}, "q_proj", 0.5),
        (PLAIN | {"rank_pattern": {"q_proj": 16}}, "layers.0.aq_proj", 2.0),
        (PLAIN | {"rank_pattern": {"q_proj": 16}}, "layers.0.q_proj.extra", 2.0),
        (PLAIN | PATTERNS, "layers.0.q_proj", 1.5),
        (PLAIN | PATTERNS, "layers.1.up_proj", 4.0),
        (PLAIN | PATTERNS, "layers.2.up_proj", 8.0),
        (PLAIN | PATTERNS, "layers.11.up_proj", 8.0),
        (PLAIN | PATTERNS, "layers.0.o_proj", 0.5),
        (PLAIN | PATTERNS, "layers.0.v_proj", 2.0),
        (PLAIN | PATTERNS | {"use_rslora": True}, "layers.0.q_proj", 6.0),
        (PLAIN | {"alpha_pattern": {"q_proj|v_proj": 4}}, "layers.3.v_proj", 1.0),
    ):
        got = ask(m.scale, dict(config), module, why="a number")
        if not (isinstance(got, int | float) and isclose(got, want, rel_tol=1e-9)):
            expect(f"scale({config}, {module!r})", got, want)
