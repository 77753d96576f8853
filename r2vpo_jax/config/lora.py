"""Low-rank adapters: their size, which matrices have one, and how the weights beside them are held."""

import dataclasses
import math

from r2vpo_jax.config.fields import option, require, require_choice

# As Hugging Face and PEFT name them.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _is_on(lora) -> bool:
    return lora.rank > 0


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters that are trained in place of the weights (LoRA, arXiv 2106.09685). Without a rank there are none."""

    rank: int = option(
        0, "rank of the adapters that are trained in place of the weights (0 = none: weights are trained)"
    )
    alpha: float = option(32.0, "a matrix with an adapter is W + alpha / rank * A B", when=_is_on)
    target_modules: tuple[str, ...] = option(
        TARGET_MODULES, "matrices that have an adapter, in every layer", when=_is_on
    )
    use_rslora: bool = option(False, "alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732)", when=_is_on)
    base_dtype: str = option(
        "compute",
        "dtype of the frozen weights: float32, bfloat16, or compute: that of model.compute_dtype, to which products round them anyway",
        when=_is_on,
    )

    def __post_init__(self):
        require(self.rank >= 0, f"model.lora.rank must be at least 0 (0: no adapters), got {self.rank}")
        require(
            math.isfinite(self.alpha) and self.alpha > 0, f"model.lora.alpha must be a number > 0, got {self.alpha}"
        )
        names = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
        unknown = [name for name in names if name not in TARGET_MODULES]
        require(
            not unknown,
            f"model.lora.target_modules has {unknown[:1]}, for which there are no adapters; there are for "
            f"{', '.join(TARGET_MODULES)}",
        )
        require(
            names, "model.lora.target_modules is empty: nothing would be trained; model.lora.rank=0 trains the weights"
        )
        # In one order: the same adapters are the same configuration.
        object.__setattr__(self, "target_modules", tuple(name for name in TARGET_MODULES if name in names))
        require_choice("model.lora", self, {"base_dtype": ("compute", "float32", "bfloat16")})

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
