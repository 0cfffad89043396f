"""What training minimises: EDM's denoising error, and the classifier's cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from evodiff_jax.preconditioning import precondition
from evodiff_jax.pretrained.classifier import ClassifierConfig, apply_classifier
from evodiff_jax.pretrained.unet import UNetConfig, apply_unet

Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""loss(params, images, labels, key) -> scalar, for images (B, H, W, C) float32 and labels (B,) int32."""


def edm_loss(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    x0: jax.Array,
    sigma: ArrayLike,
    noise: jax.Array,
    sigma_data: float,
) -> jax.Array:
    """Weighted denoising error, EDM's Eq. 2 with the weight of its Table 1 (arXiv 2206.00364).

        (sigma^2 + sigma_data^2) / (sigma sigma_data)^2  mean (D(x0 + sigma noise; sigma) - x0)^2

    In terms of the raw network it is the plain squared error of F against a target of unit variance, so a network
    that returns 0 has a loss of about 1 at every noise level.

    Args:
      denoise: `denoise(x, sigma) -> x0` for x (B, ...) and sigma (B,).
      x0: images (B, ...), float32.
      sigma: noise levels (B,).
      noise: standard normal noise of x0's shape.
      sigma_data: standard deviation of the data.

    Returns:
      Loss of each image, (B,).
    """
    sigma = jnp.asarray(sigma)
    per_image = sigma.reshape(sigma.shape + (1,) * (x0.ndim - 1))
    error = denoise(x0 + per_image * noise, sigma) - x0
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * jnp.mean(jnp.square(error), axis=tuple(range(1, x0.ndim)))


def diffusion_loss(network: UNetConfig, sigma_data: float, p_mean: float, p_std: float, label_dropout: float) -> Loss:
    """Returns the loss of a U-Net as a denoiser at random noise levels.

    Args:
      network: the network's settings.
      sigma_data: standard deviation of the data.
      p_mean: mean of log(sigma).
      p_std: standard deviation of log(sigma).
      label_dropout: probability that an image is shown without its label.

    Returns:
      The mean of `edm_loss` over a batch, as a function of (params, images, labels, key).
    """

    def loss(params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        sigma_key, noise_key, label_key, dropout_key = jax.random.split(key, 4)
        sigma = jnp.exp(p_mean + p_std * jax.random.normal(sigma_key, labels.shape, images.dtype))
        noise = jax.random.normal(noise_key, images.shape, images.dtype)
        dropped = jax.random.bernoulli(label_key, label_dropout, labels.shape)
        shown = jnp.where(dropped, jnp.int32(network.num_classes), labels)
        denoise = precondition(
            lambda x, c_noise: apply_unet(network, params, x, c_noise, shown, dropout_key), sigma_data
        )
        return jnp.mean(edm_loss(denoise, images, sigma, noise, sigma_data))

    return loss


def classifier_loss(network: ClassifierConfig) -> Loss:
    """Returns the mean cross-entropy of a classifier, on images mirrored and shifted at random."""

    def loss(params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        flip_key, shift_key, dropout_key = jax.random.split(key, 3)
        flip = jax.random.bernoulli(flip_key, 0.5, labels.shape)
        images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
        shifts = jax.random.randint(shift_key, (*labels.shape, 2), -2, 3, jnp.int32)
        images = jax.vmap(lambda image, shift: jnp.roll(image, shift, axis=(0, 1)))(images, shifts)
        logits = apply_classifier(network, params, images, dropout_key).logits
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return loss
