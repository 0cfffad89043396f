"""Stored outputs of original networks, whose parameters are drawn from their names."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np

from evodiff_jax.pretrained.model import FAMILIES
from evodiff_jax.pretrained.states import original_shapes

DATA = Path(__file__).parent / "data" / "networks"

_SCALED = {
    "matrix": lambda z: z / np.sqrt(np.prod(z.shape[1:])),
    "relu_matrix": lambda z: z * np.sqrt(2 / np.prod(z.shape[1:])),
    "bias": lambda z: 0.1 * z,
    "norm": lambda z: 1 + 0.1 * z,
    "running_mean": lambda z: 0.1 * z,
    "running_var": lambda z: np.exp(0.1 * z),
    "fourier": lambda z: 16 * z,
}


def normal(name, shape):
    """Standard normal numbers, float64, by a seed made of a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


class Case:
    """One stored configuration: what it is, its parameters, inputs and outputs."""

    def __init__(self, folder, name):
        path = DATA / folder / f"{name}.json"
        self.facts = json.loads(path.read_text())
        self.stored = dict(np.load(path.with_suffix(".npz")))
        self.family, self.cls, self.arguments = (self.facts[key] for key in ("family", "cls", "arguments"))

    def arrays(self, dtype=np.float32):
        """The parameters in the original layout; float32 numbers, whatever the dtype."""
        drawn = {}
        for name, shape, _, kind in self.facts["state"]:
            if kind != "constant":
                drawn[name] = _SCALED[kind](normal(name, shape)).astype(np.float32).astype(dtype)
            elif name.endswith("resample_filter"):
                taps = np.array(self.arguments.get("resample_filter", [1, 1]), dtype)
                drawn[name] = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
            elif f"const:{name}" in self.stored:
                drawn[name] = self.stored[f"const:{name}"].astype(dtype)
            else:
                drawn[name] = np.zeros(shape, np.int64)
        return drawn

    def inputs(self, dtype=np.float32):
        """The inputs by the names that the network takes."""
        given = self.facts["inputs"]
        known = {name: _input(name, given[name], dtype) for name in _INPUTS if _is_given(given, name)}
        if "x" in known and "sqrt(cond" in given["x"]["recipe"]:
            x = normal("input:x", given["x"]["shape"]).astype(np.float32)
            x *= np.sqrt(np.square(given["sigma"]) + 0.25).astype(np.float32).reshape(-1, 1, 1, 1)
            known["x"] = nhwc(x).astype(dtype)
        if "added_cond_kwargs" in given:
            added = given["added_cond_kwargs"]
            known["added_cond_kwargs"] = {name: _input(name, value, dtype) for name, value in added.items()}
        return known

    def output(self, name):
        stored = self.stored[name]
        return nhwc(stored) if stored.ndim == 4 else stored


_INPUTS = (
    *("x", "image", "latent", "encoder_hidden_states", "sigma", "noise_labels", "timesteps"),
    *("labels", "y", "class_labels", "input_ids"),
)


def _input(name, given, dtype):
    if not isinstance(given, dict):
        array = np.array(given)
        integer = name in ("labels", "y") or (array.dtype.kind == "i" and name not in _REAL)
        return array.astype(np.int32 if integer else dtype)
    drawn = normal(f"input:{name}", given["shape"]) * (0.5 if "(0.5 *" in given["recipe"] else 1)
    array = drawn.astype(np.float32).astype(dtype)
    return nhwc(array) if array.ndim == 4 else array


def _is_given(given, name):
    return given.get(name) is not None and not isinstance(given[name], str)  # else words about another input


_REAL = ("sigma", "noise_labels", "timesteps", "time_ids")


def names(folder):
    return sorted(path.stem for path in (DATA / folder).glob("*.json"))


def full_size(name):
    """Facts of a released file: class, arguments, and the names and shapes of its arrays."""
    return json.loads(gzip.decompress((DATA / "full_size" / f"{name}.json.gz").read_bytes()))


def error(found, expected):
    """The largest difference relative to the largest element."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


def drawn(family, cls, arguments):
    """Parameters of any configuration by the same recipe; the kind of each is told from its name and shape."""
    shapes = original_shapes(FAMILIES[family].build(cls, arguments, None))
    arrays = {}
    for name, shape in shapes.items():
        kind = "matrix" if len(shape) > 1 else "norm" if name.endswith("weight") else "bias"
        arrays[name] = _SCALED[kind](normal(name, shape)).astype(np.float32)
    return arrays


# Small enough to compile in a moment: images of 8 x 8.
TINY_EDM = (
    "EDMPrecond",
    {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 3,
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    },
)
TINY_ADM = (
    "UNetModel",
    {
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 2,
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "channel_mult": [1],
        "num_heads": 2,
        "num_classes": 3,
        "noise_schedule": "cosine",
    },
)
TINY_CLASSIFIER = (
    "EncoderUNetModel",
    {
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "channel_mult": [1],
        "num_heads": 1,
        "pool": "adaptive",
        "noise_schedule": "cosine",
    },
)
