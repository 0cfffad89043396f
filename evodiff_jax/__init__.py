"""Few-step sampling of diffusion and flow models in JAX."""

__version__ = "0.1.0"
