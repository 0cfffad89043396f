"""The Inception-v3 network of FID, as pytorch-fid has it: 2048 features of an image.

Its weights are those of the TensorFlow graph of 2015-12-05 that FID is defined by. The network differs from the
published Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) in the poolings: averages leave the padding out, and the
last block pools by the maximum. Modules are named as in the released file. Written from a description of that class,
not from its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from evodiff_jax.pretrained.states import Network, Origin, check_arguments, integers

ORIGIN = Origin("mseitzer/pytorch-fid", "Apache-2.0")
FEATURES = 2048  # of "pool3"
UNUSED = (r"fc\.(weight|bias)", r".*\.num_batches_tracked")

_SIZE = 299  # pixels
_EPSILON = 0.001  # of batch normalisation


class Branch(NamedTuple):
    """Convolutions one after the other, named `name`_1, `name`_2, ...; a single one is named `name`.

    Attributes:
      name: as above.
      layers: features, height and width of each kernel.
      halves: two kernels that both follow, side by side, named with the next number and "a" and "b".
    """

    name: str
    layers: tuple[tuple[int, int, int], ...]
    halves: tuple[tuple[int, int, int], ...] = ()


class Block(NamedTuple):
    """Branches side by side, and a pooled one.

    Attributes:
      branches: without the pooled one.
      pooled: features of a 1x1 convolution after pooling, 0 for none.
      pool: "average" or "max".
      stride: of the pooling and of the last layer of each branch; 2 goes without padding there.
    """

    branches: tuple[Branch, ...]
    pooled: int = 0
    pool: str = "average"
    stride: int = 1


def _a(pooled: int) -> Block:
    double = Branch("branch3x3dbl", ((64, 1, 1), (96, 3, 3), (96, 3, 3)))
    return Block((Branch("branch1x1", ((64, 1, 1),)), Branch("branch5x5", ((48, 1, 1), (64, 5, 5))), double), pooled)


def _c(width: int) -> Block:
    once = ((width, 1, 1), (width, 1, 7), (192, 7, 1))
    twice = ((width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7))
    return Block((Branch("branch1x1", ((192, 1, 1),)), Branch("branch7x7", once), Branch("branch7x7dbl", twice)), 192)


def _e(pool: str) -> Block:
    halves = ((384, 1, 3), (384, 3, 1))
    once, twice = ((384, 1, 1),), ((448, 1, 1), (384, 3, 3))
    branches = (
        Branch("branch1x1", ((320, 1, 1),)),
        Branch("branch3x3", once, halves),
        Branch("branch3x3dbl", twice, halves),
    )
    return Block(branches, 192, pool)


_B = (Branch("branch3x3", ((384, 3, 3),)), Branch("branch3x3dbl", ((64, 1, 1), (96, 3, 3), (96, 3, 3))))
_D = (
    Branch("branch3x3", ((192, 1, 1), (320, 3, 3))),
    Branch("branch7x7x3", ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))),
)
_BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": Block(_B, pool="max", stride=2),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": Block(_D, pool="max", stride=2),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("max"),
}


class BatchNorm(nn.Module):
    """Batch normalisation by stored statistics; all four arrays are parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        names = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
        names |= {"running_mean": nn.initializers.zeros, "running_var": nn.initializers.ones}
        scale, bias, mean, variance = (self.param(name, init, x.shape[-1:]) for name, init in names.items())
        factor = scale * jax.lax.rsqrt(variance + _EPSILON)
        return x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)


class Convolution(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x (B, H, W, C)."""
        padding = [(side // 2 * self.padded,) * 2 for side in self.kernel]
        options = {"strides": self.stride, "padding": padding, "use_bias": False, "dtype": self.dtype}
        return nn.relu(BatchNorm(name="bn")(nn.Conv(self.features, self.kernel, name="conv", **options)(x)))


class Mixed(nn.Module):
    """The branches of a block, in one axis of channels."""

    block: Block
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Evaluates the block on x (B, H, W, C)."""
        stride = self.block.stride
        side_by_side = [h for branch in self.block.branches for h in self._branch(branch, x)]
        padding: Any = ((1, 1), (1, 1)) if stride == 1 else "VALID"
        if self.block.pool == "max":
            pooled = nn.max_pool(x, (3, 3), (stride, stride), padding)
        else:
            pooled = nn.avg_pool(x, (3, 3), (stride, stride), padding, count_include_pad=False)
        if self.block.pooled:
            pooled = Convolution(self.block.pooled, (1, 1), dtype=self.dtype, name="branch_pool")(pooled)
        return jnp.concatenate([*side_by_side, pooled], axis=-1)

    def _branch(self, branch: Branch, x: jax.Array) -> list[jax.Array]:
        count, stride = len(branch.layers), self.block.stride
        for i, (features, height, width) in enumerate(branch.layers, 1):
            name = branch.name if count == 1 and not branch.halves else f"{branch.name}_{i}"
            step = stride if i == count else 1
            x = Convolution(features, (height, width), step, step == 1, self.dtype, name=name)(x)
        names = (f"{branch.name}_{count + 1}{letter}" for letter in "ab")
        halves = zip(names, branch.halves, strict=False)
        return [Convolution(f, (h, w), dtype=self.dtype, name=name)(x) for name, (f, h, w) in halves] or [x]


class InceptionV3(nn.Module):
    """The network; attributes are the arguments of the released class, `dtype` is that of the computation.

    Attributes:
      resize_input: resize images to 299 x 299, bilinear between pixel centres, without a filter where they shrink.
      normalize_input: scale 0 .. 1 to -1 .. 1.
    """

    resize_input: bool = True
    normalize_input: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Computes features.

        Args:
          images: (B, H, W, 3), integers in 0 .. 255, or floating-point numbers in 0 .. 1.

        Returns:
          "pool3" (B, 2048), the features of FID, and the spatial means "block0" (B, 64), "block1" (B, 192) and "block2"
          (B, 768) of earlier blocks.
        """
        x = images
        if jnp.issubdtype(images.dtype, jnp.integer):
            x = images.astype(jnp.result_type(float)) / 255
        if self.resize_input:
            x = jax.image.resize(x, (len(x), _SIZE, _SIZE, x.shape[-1]), "bilinear", antialias=False)
        if self.normalize_input:
            x = 2 * x - 1

        def convolution(features: int, size: int, name: str, stride: int = 1, padded: bool = False) -> None:
            nonlocal x
            x = Convolution(features, (size, size), stride, padded, self.dtype, name=name)(x)

        found = {}
        convolution(32, 3, "Conv2d_1a_3x3", stride=2)
        convolution(32, 3, "Conv2d_2a_3x3")
        convolution(64, 3, "Conv2d_2b_3x3", padded=True)
        x = nn.max_pool(x, (3, 3), (2, 2))
        found["block0"] = x.mean((1, 2))
        convolution(80, 1, "Conv2d_3b_1x1")
        convolution(192, 3, "Conv2d_4a_3x3")
        x = nn.max_pool(x, (3, 3), (2, 2))
        found["block1"] = x.mean((1, 2))
        for name, block in _BLOCKS.items():
            x = Mixed(block, self.dtype, name=name)(x)
            if name == "Mixed_6e":
                found["block2"] = x.mean((1, 2))
        return found | {"pool3": x.mean((1, 2))}


def build(cls: str, arguments: Mapping[str, Any], dtype: Any) -> Network:
    """The module of a released class with the arguments of its constructor.

    Args:
      cls: "InceptionV3", with or without a remark after it.
      arguments: resize_input and normalize_input, both true in FID.
      dtype: of the computation, or None for that of the inputs.

    Returns:
      The module and what is known of it.

    Raises:
      ValueError: the class or an argument is unknown.
    """
    if not cls.startswith("Inception"):
        raise ValueError(f"unknown class {cls!r} of family 'inception'; known: InceptionV3")
    module = check_arguments(InceptionV3, arguments, cls)(dtype=dtype)
    shape = (_SIZE, _SIZE, 3)
    return Network(module, {"images": integers(1, *shape)}, shape, 0, ORIGIN, unused=UNUSED, prediction="features")
