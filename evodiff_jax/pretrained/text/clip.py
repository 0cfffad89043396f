"""CLIP's text encoders (Radford et al. 2021, arXiv 2103.00020), with the names and settings of transformers.

A causal transformer over at most 77 tokens. The diffusion pipelines give it no padding mask: padding attends and is
attended to, by the positions after it. Norms, softmax and the sum of the residual branches are in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from evodiff_jax.numerics import at_least_float32
from evodiff_jax.pretrained import blocks
from evodiff_jax.pretrained.states import Network, Origin, check_arguments, integers

ORIGIN = Origin("huggingface/transformers", "Apache-2.0 (code); the weights are under that of their model card")
RENAMED = (
    (r"^layers_(\d+)\.", r"text_model.encoder.layers.\1."),
    (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
    (r"^final_layer_norm\.", r"text_model.final_layer_norm."),
)
ALIASES = ((r"^(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model."),)  # as transformers 5 writes them
UNUSED = (r"text_model\.embeddings\.position_ids",)

CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")

_ARGMAX = 2  # the eos_token_id of old configurations, which says nothing: the largest id is the end token's

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class CLIPTextModel(nn.Module):
    """The text encoder; attributes are settings of transformers' `CLIPTextConfig`, a projection_dim of 0 is none."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, input_ids: jax.Array, skip: int = 0) -> dict[str, jax.Array]:
        """Encodes texts.

        With h_0 the embeddings and h_n the output of layer n, of N layers:

        Args:
          input_ids: (B, T), integers from 0 to vocab_size - 1, T at most max_position_embeddings.
          skip: how many of the last layers "skipped" and "skipped_normed" leave out, from 0 to N: a Python integer,
            which `module.apply` takes as it is; in a jitted function `Model.apply` would make it an array.

        Returns:
          "last", the final norm of h_N; "penultimate", h_{N-1}, and "penultimate_normed", its final norm; "skipped",
          h_{N-skip}, and "skipped_normed", its final norm, all (B, T, hidden_size); "pooled", "last" at the first end
          of text, (B, hidden_size); and with a projection "text_embeds", that projected, (B, projection_dim). In
          float32 at least. In a jitted function layers that no used output needs are not evaluated.

        Raises:
          ValueError: there are more tokens than positions, or skip is out of range.
        """
        length, layers = input_ids.shape[1], self.num_hidden_layers
        if length > self.max_position_embeddings:
            raise ValueError(f"texts must have at most {self.max_position_embeddings} tokens, got {length}")
        if not 0 <= skip <= layers:
            raise ValueError(f"skip must be from 0 to {layers}, the number of layers, got {skip}")
        tokens = nn.Embed(self.vocab_size, self.hidden_size, name="token_embedding")(input_ids)
        positions = nn.Embed(self.max_position_embeddings, self.hidden_size, name="position_embedding")
        h = _widened(tokens) + _widened(positions(jnp.arange(length)))
        hidden = [h]
        for i in range(layers):
            h = _Layer(
                self.num_attention_heads,
                self.intermediate_size,
                self.hidden_act,
                self.layer_norm_eps,
                self.dtype,
                name=f"layers_{i}",
            )(h)
            hidden.append(h)
        norm = _norm(self.layer_norm_eps, "final_layer_norm")
        last = norm(h)
        outputs = {
            "last": last,
            "penultimate": hidden[-2],
            "penultimate_normed": norm(hidden[-2]),
            "skipped": hidden[layers - skip],
            "skipped_normed": norm(hidden[layers - skip]),
            "pooled": jnp.take_along_axis(last, self._end(input_ids)[:, None, None], axis=1)[:, 0],
        }
        if self.projection_dim:
            projection = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
            outputs["text_embeds"] = _widened(projection(outputs["pooled"]))
        return outputs

    def _end(self, input_ids: jax.Array) -> jax.Array:
        """The position (B,) of the first end token."""
        return jnp.argmax(input_ids if self.eos_token_id == _ARGMAX else input_ids == self.eos_token_id, axis=1)


class _Layer(nn.Module):
    heads: int
    width: int
    act: str
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        attention = _Attention(self.heads, self.dtype, name="self_attn")
        h = h + attention(_norm(self.epsilon, "layer_norm1")(h))
        mlp = _MLP(self.width, self.act, self.dtype, name="mlp")
        return h + mlp(_norm(self.epsilon, "layer_norm2")(h))


class _Attention(nn.Module):
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        width = h.shape[-1]
        dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
        apart = lambda name: dense(name)(h).reshape(*h.shape[:2], self.heads, -1)
        attended = blocks.attend(apart("q_proj"), apart("k_proj"), apart("v_proj"), causal=True)
        return dense("out_proj")(attended.reshape(h.shape))


class _MLP(nn.Module):
    width: int
    act: str
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        inner = nn.Dense(self.width, dtype=self.dtype, name="fc1")(h)
        return nn.Dense(h.shape[-1], dtype=self.dtype, name="fc2")(_ACTIVATIONS[self.act](inner))


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of a class of transformers with a configuration.

    Args:
      cls: "CLIPTextModel" or "CLIPTextModelWithProjection".
      arguments: the settings, or a whole config.json; entries that do not change the outputs are ignored.
      dtype: of the computation, or None for that of the parameters.

    Returns:
      The module and what is known of it.

    Raises:
      ValueError: the class is unknown, or a setting is impossible or not supported.
    """
    if cls not in CLASSES:
        raise ValueError(f"unknown class {cls!r} of family 'clip_text'; known: {', '.join(CLASSES)}")
    kind = arguments.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise ValueError(f"{cls} needs the configuration of a 'clip_text_model', got that of a {kind!r}")
    if arguments.get("quantization_config"):
        raise ValueError(f"{cls} can't have quantised weights (quantization_config); use those in floating point")
    fields = [name for name in CLIPTextModel.__dataclass_fields__ if name not in ("parent", "name", "dtype")]
    given = {name: arguments[name] for name in fields if name in arguments}
    if cls == "CLIPTextModel":
        given["projection_dim"] = 0
    else:
        given.setdefault("projection_dim", 512)
    module = check_arguments(CLIPTextModel, given, cls)(dtype=dtype)
    if module.hidden_act not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{cls} has the unsupported hidden_act {module.hidden_act!r}; supported: {known}")
    if module.num_attention_heads < 1 or module.hidden_size % module.num_attention_heads:
        raise ValueError(
            f"{cls} can't split hidden_size {module.hidden_size} by num_attention_heads {module.num_attention_heads}"
        )
    if module.num_hidden_layers < 1:
        raise ValueError(f"{cls} needs num_hidden_layers of at least 1, got {module.num_hidden_layers}")
    inputs = {"input_ids": integers(1, module.max_position_embeddings)}
    return Network(
        module=module,
        inputs=inputs,
        image_shape=(0, 0, 0),
        num_classes=0,
        origin=ORIGIN,
        renamed=RENAMED,
        aliases=ALIASES,
        unused=UNUSED,
        stored=dtype,
        prediction="text",
    )


def _norm(epsilon: float, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


def _widened(h: jax.Array) -> jax.Array:
    return h.astype(at_least_float32(h.dtype))
