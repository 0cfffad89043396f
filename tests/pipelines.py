"""Small folders in the layout of diffusers, with parameters drawn from their names."""

import json
import shutil

import networks
import safetensors.numpy

TOKENIZER = networks.DATA / "clip_tokenizer"
VOCABULARY, START, END, LENGTH = 573, 571, 572, 77

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
AUTOENCODER = {
    "sample_size": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "model_type": "clip_text_model",
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.42.1",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
DDPM = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
}
PLAIN, V = {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def write_network(folder, family, cls, config, stem="diffusion_pytorch_model", dtype=None):
    """One component: its configuration and its drawn parameters."""
    named = {"architectures": [cls]} if family == "clip_text" else {"_class_name": cls}
    write_json(folder / "config.json", {**named, **config})
    arrays = networks.drawn(family, cls, config)
    if dtype is not None:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / f"{stem}.safetensors", {"format": "pt"})


def write_tokenizer(folder, pad="<|endoftext|>"):
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, folder / name)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH})
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", {**special, "pad_token": pad})


def write_index(folder, cls, **components):
    write_json(folder / "model_index.json", {"_class_name": cls, "_diffusers_version": "0.42.1", **components})


def write_sd1(folder, prediction=PLAIN, **unet):
    """As Stable Diffusion 1: a text encoder's last layer, convolutions around attention, one number of heads."""
    write_index(
        folder,
        "StableDiffusionPipeline",
        feature_extractor=[None, None],
        safety_checker=[None, None],
        requires_safety_checker=False,
        scheduler=["diffusers", "PNDMScheduler"],
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
    )
    write_network(folder / "unet", "unet2d_condition", "UNet2DConditionModel", {**UNET, **unet})
    write_network(folder / "vae", "autoencoder_kl", "AutoencoderKL", AUTOENCODER)
    write_network(folder / "text_encoder", "clip_text", "CLIPTextModel", TEXT, "model")
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, **prediction})
    return folder


def write_sd2(folder):
    """As Stable Diffusion 2: linear layers around attention, heads by level, gelu, padding with "!", v."""
    write_sd1(folder, V, use_linear_projection=True, attention_head_dim=[2, 4], upcast_attention=True)
    write_network(folder / "text_encoder", "clip_text", "CLIPTextModel", {**TEXT, "hidden_act": "gelu"}, "model")
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", "!")
    return folder


def write_xl(folder):
    """As Stable Diffusion XL: two text encoders, sizes and pooled text beside the time."""
    projection = {**TEXT, "hidden_act": "gelu", "hidden_size": 40, "projection_dim": 20}
    write_index(
        folder,
        "StableDiffusionXLPipeline",
        force_zeros_for_empty_prompt=True,
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        text_encoder=["transformers", "CLIPTextModel"],
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizer"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
    )
    unet = {
        **UNET,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 72,
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68,
    }
    write_network(folder / "unet", "unet2d_condition", "UNet2DConditionModel", unet)
    autoencoder = {**AUTOENCODER, "scaling_factor": 0.13025, "force_upcast": True}
    write_network(folder / "vae", "autoencoder_kl", "AutoencoderKL", autoencoder)
    write_network(folder / "text_encoder", "clip_text", "CLIPTextModel", TEXT, "model")
    write_network(folder / "text_encoder_2", "clip_text", "CLIPTextModelWithProjection", projection, "model")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", "!")
    write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, "_class_name": "EulerDiscreteScheduler"})
    return folder


def write_dit(folder):
    """As DiT in diffusers' layout: classes in latents."""
    write_index(
        folder,
        "DiTPipeline",
        id2label={"0": "tench"},
        scheduler=["diffusers", "DDIMScheduler"],
        transformer=["diffusers", "Transformer2DModel"],
        vae=["diffusers", "AutoencoderKL"],
    )
    write_network(folder / "transformer", "dit", "DiTTransformer2DModel", DIT)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    write_json(folder / "transformer" / "config.json", config)
    write_network(folder / "vae", "autoencoder_kl", "AutoencoderKL", AUTOENCODER)
    linear = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "_class_name": "DDIMScheduler"}
    write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, **linear})
    return folder


def write_ddpm(folder, old=False):
    """As google/ddpm-*: pixels; in old folders all files are in one place."""
    write_index(folder, "DDPMPipeline", scheduler=["diffusers", "DDPMScheduler"], unet=["diffusers", "UNet2DModel"])
    write_network(folder if old else folder / "unet", "unet2d", "UNet2DModel", DDPM)
    scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    path = folder / "scheduler_config.json" if old else folder / "scheduler" / "scheduler_config.json"
    write_json(path, {**scheduler, "clip_sample": True, "variance_type": "fixed_small", "num_train_timesteps": 1000})
    return folder
