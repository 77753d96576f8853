"""A matrix of the decoder, and its low-rank adapter if it has one."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from r2vpo_jax.models.config import DecoderConfig
from r2vpo_jax.models.products import project


class Projection(nn.Module):
    """`einsum(spec, x, kernel) (+ bias)` with logical axis names on every parameter."""

    config: DecoderConfig
    spec: str
    kernel_shape: tuple[int, ...]
    kernel_axes: tuple[str | None, ...]
    num_inputs: int = 1  # leading axes of the kernel that are contracted
    dtype: Any = None  # of the product; None: the compute dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        config = self.config
        axes = tuple(range(len(self.kernel_shape)))
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=axes[: self.num_inputs], out_axis=axes[self.num_inputs :]
        )
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.kernel_axes),
            self.kernel_shape,
            config.weights_dtype,
        )
        kernel = kernel.astype(config.compute_dtype)
        y = project(self.spec, x, kernel, self.num_inputs, config, preferred_element_type=self.dtype)
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros, self.kernel_axes[self.num_inputs :]),
                self.kernel_shape[self.num_inputs :],
                config.weights_dtype,
            )
            y = y + bias.astype(config.compute_dtype)
        return y + self._adapter(x) if self._has_adapter() else y

    def _has_adapter(self) -> bool:
        lora = self.config.lora
        if lora is None or self.name not in lora.target_modules:
            return False
        return self.is_initializing() or self.has_variable("params", "lora_a")  # without: the model under the adapters

    def _adapter(self, x):
        """scale * (x A) B, which is 0 at first: B is."""
        config, lora, n = self.config, self.config.lora, self.num_inputs
        inputs, outputs = self.kernel_shape[:n], self.kernel_shape[n:]
        names = self.spec.split(",")[1].partition("->")[0]
        bound = math.prod(inputs) ** -0.5  # as PEFT's

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def factor(name, init, shape, axes):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape, config.param_dtype)
            return value.astype(config.compute_dtype)

        a = factor("lora_a", uniform, (*inputs, lora.rank), (*self.kernel_axes[:n], None))
        b = factor("lora_b", nn.initializers.zeros, (lora.rank, *outputs), (None, *self.kernel_axes[n:]))
        low = project(f"...{names[:n]},{names[:n]}r->...r", x, a, n, config, preferred_element_type=jnp.float32)
        low = (lora.scale * low).astype(config.compute_dtype)
        return project(f"...r,r{names[n:]}->...{names[n:]}", low, b, 1, config, preferred_element_type=self.dtype)
