"""Diffusion transformers: DiT, SiT, and DiT in diffusers' form."""
