"""Networks of the diffusers library in Flax: U-Nets with and without text, and the autoencoder of latent diffusion.

Attributes of the modules are the settings of `config.json`, parameters have the names of the library's files. The code
of diffusers is under the Apache-2.0 licence; each set of weights has a licence of its own.
"""
