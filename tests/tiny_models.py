"""Model files with tiny networks, which compile in a moment."""

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.pretrained import checkpoint
from evodiff_jax.pretrained.unet import UNet, UNetConfig

CONFIG = UNetConfig(image_shape=(8, 8, 1), num_classes=10, widths=(16,), blocks=(1,), heads=2, condition_width=16)


def write_model(path, config=CONFIG, fill=None, dtype=np.float32, **settings):
    """Writes a model of random weights, or of one value, and returns its path; settings replace the network's."""
    args = (jnp.zeros((1, *config.image_shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(lambda: UNet(config).init(jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (0.2 * rng.standard_normal(leaf.shape) if fill is None else np.full(leaf.shape, fill)).astype(dtype)

    settings = config.to_dict() | {"sigma_data": 0.7} | settings
    checkpoint.save(path, jax.tree.map(draw, shapes), kind="diffusion model", config=settings, card={})
    return str(path)
