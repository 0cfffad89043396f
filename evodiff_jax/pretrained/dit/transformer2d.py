"""diffusers' DiTTransformer2DModel: DiT with embeddings of time and class in every block.

Beside that its frequencies are 10000^(-i / 127) in place of 10000^(-i / 128), so that weights converted from DiT see
other embeddings of the time, and the second norm of a block has an epsilon of its own. Modules are named as in the
files, "transformer_blocks_3.attn1_to_q" for "transformer_blocks.3.attn1.to_q".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained import blocks
from evodiff_jax.pretrained.diffusers import _settings
from evodiff_jax.pretrained.dit import network
from evodiff_jax.pretrained.states import Network, Origin, apply, check_arguments, floats, integers

ORIGIN = Origin("facebookresearch/DiT, in the form of huggingface/diffusers", "CC BY-NC 4.0, for non-commercial use")
RENAMED = (
    (r"(transformer_blocks|pos_embed|norm1|emb|timestep_embedder|class_embedder|attn1|ff)_", r"\1."),
    (r"(to_out|net)_(\d)[._]", r"\1.\2."),
)

_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    # Of Transformer2DModel, which the class was before it had its own name:
    "use_linear_projection": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "attention_type": ("default",),
    "use_additional_conditions": (False,),
    "interpolation_scale": (1, 1.0),
    "cross_attention_dim": (),
    "num_vector_embeds": (),
    "caption_channels": (),
}
_WITHOUT_EFFECT = ("norm_num_groups", "upcast_attention")


class DiTTransformer2DModel(nn.Module):
    """The network; attributes are the settings of `config.json`, an `out_channels` of 0 is in_channels."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 0
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, timesteps: jax.Array, class_labels: jax.Array) -> jax.Array:
        """Evaluates the network.

        Args:
          x: (B, H, W, in_channels) with H = W = sample_size.
          timesteps: (B,), from 0 to 999, which may be fractions.
          class_labels: (B,), integers; num_embeds_ada_norm for none.

        Returns:
          (B, H, W, out_channels) in float32 at least.
        """
        network.check_image(x, self.sample_size, self.in_channels)
        heads, width = self.num_attention_heads, self.num_attention_heads * self.attention_head_dim
        out = self.out_channels or self.in_channels
        h = network.patches(x, width, self.patch_size, self.dtype, "pos_embed_proj")
        h = h + jnp.asarray(positions(self.sample_size // self.patch_size, width), h.dtype)
        features = network.time_features(timesteps, at_least_float32(x.dtype), network.TIME_FEATURES // 2 - 1)
        conditions = []
        for i in range(self.num_layers):
            settings = (heads, self.num_embeds_ada_norm, self.attention_bias, self.norm_eps, self.dtype)
            h, condition = _Block(*settings, name=f"transformer_blocks_{i}")(h, features, class_labels)
            conditions.append(condition)
        shift, scale = network.modulation(2, conditions[0], width, self.dtype, "proj_out_1")
        h = network.normed(h) * (1 + scale) + shift
        return network.image(nn.Dense(self.patch_size**2 * out, name="proj_out_2")(h), self.patch_size, out)


class _Block(nn.Module):
    heads: int
    classes: int
    bias: bool
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tokens after the block, and its condition, activated."""
        width = h.shape[-1]
        dense = lambda features, name, bias=True: nn.Dense(features, bias, self.dtype, name=name)
        time = dense(width, "norm1_emb_timestep_embedder_linear_1")(features)
        time = dense(width, "norm1_emb_timestep_embedder_linear_2")(nn.silu(time))
        table = nn.Embed(self.classes + 1, width, name="norm1_emb_class_embedder_embedding_table")
        c = nn.silu(network.widened(time) + network.widened(table(labels)))
        six = network.modulation(6, c, width, self.dtype, "norm1_linear")
        first, second = network.branches(six, self.epsilon)

        def attention(h: jax.Array) -> jax.Array:
            apart = lambda name: dense(width, name, self.bias)(h).reshape(*h.shape[:2], self.heads, -1)
            attended = blocks.attend(apart("attn1_to_q"), apart("attn1_to_k"), apart("attn1_to_v"))
            return dense(width, "attn1_to_out_0")(attended.reshape(h.shape))

        mlp = lambda h: dense(width, "ff_net_2")(nn.gelu(dense(4 * width, "ff_net_0_proj")(h)))
        return second(first(h, attention), mlp), c


def positions(side: int, width: int) -> np.ndarray:
    """Embeddings (1, side * side, width) of the positions, float32: of the column in the first half, then of the row.

    Sines and cosines of p 10000^(-i / (width / 4)) for p = 0 .. side - 1.
    """
    angles = np.arange(side)[:, None] * blocks.frequencies(width // 4, width // 4)
    each = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    both = np.concatenate([np.tile(each, (side, 1)), np.repeat(each, side, axis=0)], axis=1)
    return both.astype(np.float32)[None]


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of DiTTransformer2DModel.

    Args:
      cls: "DiTTransformer2DModel".
      arguments: of the constructor, or the contents of `config.json`.
      dtype: of the computation and of the kernels, or None for that of inputs and parameters.

    Returns:
      The module and what is known of it, without a schedule, which a folder's scheduler tells. The prediction has the
      first `in_channels` of the network's outputs.

    Raises:
      ValueError: a setting is unknown, or a value is impossible or unsupported.
    """
    settings = _settings.given(arguments, _WITHOUT_EFFECT)
    _settings.only(settings, cls, _ONLY)
    module = check_arguments(DiTTransformer2DModel, settings, cls)(dtype=dtype)
    for name in settings:
        if getattr(module, name) <= 0 and name not in ("attention_bias", "out_channels"):
            raise ValueError(f"{cls} needs a positive setting {name}, got {getattr(module, name)!r}")
    out, width = module.out_channels or module.in_channels, module.num_attention_heads * module.attention_head_dim
    if out not in (module.in_channels, 2 * module.in_channels):
        raise ValueError(f"{cls} needs out_channels of in_channels {module.in_channels} or twice that, got {out}")
    if module.sample_size % module.patch_size:
        raise ValueError(f"{cls} can't cut sample_size {module.sample_size} into patches of {module.patch_size}")
    if width % 4:
        raise ValueError(f"{cls} needs heads that have a multiple of 4 channels together, got {width}")
    shape = (module.sample_size, module.sample_size, module.in_channels)
    classes = module.num_embeds_ada_norm
    return Network(
        module=module,
        inputs={"x": floats(1, *shape), "timesteps": floats(1), "class_labels": integers(1)},
        image_shape=shape,
        num_classes=classes,
        origin=ORIGIN,
        renamed=RENAMED,
        stored=dtype,
        prediction="epsilon",
        predict=_predict,
        null_class=classes,
    )


def _predict(module: nn.Module, params: Any, x: jax.Array, t: jax.Array, label: Any) -> jax.Array:
    """The prediction, without the variance that some networks predict beside it."""
    return apply(module, params, x=x, timesteps=t, class_labels=label)[..., : x.shape[-1]]
