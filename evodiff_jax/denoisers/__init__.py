"""From a network to `denoise(x, t)`, the data prediction that every solver works with, guidance of it and corrections.

Everything here turns functions into functions and composes: first `from_prediction`, then guidance, then corrections.
"""

from evodiff_jax.denoisers._corrections import clip, dynamic_threshold
from evodiff_jax.denoisers._exact import gaussian_mixture
from evodiff_jax.denoisers._guidance import classifier_free_guidance, classifier_guidance
from evodiff_jax.denoisers._networks import counted, split_nnx
from evodiff_jax.denoisers._prediction import NEED_SIGNAL, PREDICTIONS, TIMES, from_prediction

__all__ = [
    "NEED_SIGNAL",
    "PREDICTIONS",
    "TIMES",
    "classifier_free_guidance",
    "classifier_guidance",
    "clip",
    "counted",
    "dynamic_threshold",
    "from_prediction",
    "gaussian_mixture",
    "split_nnx",
]
