"""Text for diffusion models: CLIP's tokenizer and text encoders."""
