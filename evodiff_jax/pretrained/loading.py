"""From a file of weights to a model: what network it holds, and with which configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evodiff_jax.pretrained import checkpoint, folder_models, packaged
from evodiff_jax.pretrained.adm_release import RELEASED
from evodiff_jax.pretrained.dit import release as dit_release
from evodiff_jax.pretrained.folders import components, weights
from evodiff_jax.pretrained.model import FAMILIES, Model, build, digest_of, from_state
from evodiff_jax.pretrained.reading import Contents, inspect, read
from evodiff_jax.pretrained.states import Origin, check

_KIND = "original state"
_OF_FOLDERS = ("conv_in.", "encoder.", "decoder.", "text_model.", "embeddings.", "transformer_blocks.", "pos_embed.")
_told: set[str] = set()  # licences that this process has been told of


class Recognised(NamedTuple):
    """What a file holds, in the words of the original.

    Attributes:
      family: as for `from_state`.
      cls: the class of the original.
      arguments: of its constructor.
    """

    family: str
    cls: str
    arguments: dict[str, Any]


class Description(NamedTuple):
    """What is known of a file without evaluating anything.

    Attributes:
      format: of the file, in words.
      recognised: the network; None where it can't be told.
      problem: why `load` would not take the arrays, "" where it would.
      licence: of the weights, "" where that is not known.
      arrays: name to shape and dtype.
      bytes: of all arrays.
      refused: globals of the file that are not allowed, so that `load` refuses it.
    """

    format: str
    recognised: Recognised | None
    problem: str
    licence: str
    arrays: dict[str, tuple[tuple[int, ...], str]]
    bytes: int
    refused: tuple[str, ...]


def load(
    name_or_path: str | os.PathLike[str] = "fashion_mnist",
    *,
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
    entry: str | None = None,
) -> Model:
    """Loads a pretrained network, without running any code that its file carries.

    Files are known by their content: pickles of EDM, PyTorch files of state dicts (new and old format), safetensors, by
    themselves or as the index of several, and what training or `convert` wrote. They may hold a diffusion model of EDM
    or guided-diffusion, a classifier of guided-diffusion, DiT, SiT, or the Inception network of pytorch-fid. The
    licence of weights that are not for commercial use is printed to stderr, once.

    Folders are those of diffusers: of one network, as the U-Net, the autoencoder or a text encoder of a pipeline is, or
    of a pipeline without latents, as google/ddpm-cifar10-32 is; the whole of another is for `load_pipeline`.

    Args:
      name_or_path: the name of a packaged model, or the path of a file or folder.
      dtype: what the network computes in, "float32" or "bfloat16", see `from_state`.
      config: settings in place of the file's own, or of those that guided-diffusion's released files are known to have.
      entry: which state dict to take of a training checkpoint that holds several, for example "ema".

    Returns:
      The model.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: no packaged model has this name; the file is damaged, of an unknown kind, or holds what must not be
        read; its network or configuration is not known, or does not fit its arrays.
    """
    path = packaged.locate(name_or_path)
    if path.is_dir():
        if entry is not None:
            raise ValueError(f"{path} is a folder, whose files have no entries; leave out entry {entry!r}")
        model = folder_models.load_folder(path, dtype=dtype, config=config)
        tell(model.name, model.network.origin)
        return model
    contents = read(path, entry=entry)
    if _is_ours(contents):
        if config:
            raise ValueError(f"{path} has its configuration with it; leave config out")
        return packaged.load_model(path, Path(name_or_path).stem, dtype)
    found = recognise(path, contents, config)
    try:
        model = from_state(*found, contents.arrays, dtype=dtype, name=path.name, digest=digest_of(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tell(model.name, model.network.origin)
    return model


def recognise(path: Path, contents: Contents, config: Mapping[str, Any] | None = None) -> Recognised:
    """The network of a file and its configuration.

    Raises:
      ValueError: they can't be told from the file.
    """
    given = dict(config or {})
    if contents.metadata.get("kind") == _KIND:
        stored = json.loads(contents.metadata["config"])
        return Recognised(stored["family"], stored["cls"], {**stored["arguments"], **given})
    if contents.cls is not None:
        return Recognised("edm", contents.cls, {**(contents.arguments or {}), **given})
    names = contents.arrays
    if (path.parent / "config.json").is_file() and any(name.startswith(_OF_FOLDERS) for name in names):
        for component in folder_models.networks_of(components(path.parent)).values():
            if component.path == path.parent:
                cls = folder_models.class_of(component)
                return Recognised(folder_models.FAMILY_OF[cls], cls, {**component.config, **given})
    if any(name.startswith("model.diffusion_model.") for name in names):
        raise ValueError(
            f"{path} is a single file of Stable Diffusion in its first release's layout, which is not read: get the "
            "model as a folder in diffusers' layout, with model_index.json, unet/, vae/, text_encoder/ and so on"
        )
    if "Conv2d_1a_3x3.conv.weight" in names:
        return Recognised("inception", "InceptionV3", given)
    if "input_blocks.0.0.weight" in names:
        cls = "UNetModel" if any(name.startswith("output_blocks.") for name in names) else "EncoderUNetModel"
        return Recognised("adm", given.pop("cls", cls), _adm_arguments(path, given))
    if "x_embedder.proj.weight" in names and "blocks.0.attn.qkv.weight" in names:
        return Recognised("dit", *dit_release.recognise(path, names, given))
    if any(name.endswith("map_layer0.weight") for name in names):
        if "cls" not in given:
            raise ValueError(
                f"{path} holds a network of EDM without its configuration: give config with the class as 'cls', for "
                "example EDMPrecond, and the arguments of its constructor"
            )
        return Recognised("edm", given.pop("cls"), given)
    raise ValueError(
        f"{path} holds no network that is known here (EDM, guided-diffusion, DiT, SiT, Inception of pytorch-fid): its "
        f"arrays begin with {', '.join(list(names)[:3]) or 'nothing'}"
    )


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    entry: str | None = None,
) -> None:
    """Writes the arrays of a public checkpoint, as they are stored, with their configuration to a safetensors file.

    Args:
      path: the file of weights, as for `load`.
      out: the file to write; `load` reads it.
      config: as for `load`.
      entry: as for `load`.

    Raises:
      OSError: a file cannot be read or written.
      ValueError: as `load`; the network is built before anything is written.
    """
    path, out = Path(path), Path(out)
    contents = read(path, entry=entry)
    found = recognise(path, contents, config)
    try:
        network = build(*found)
        check(network, contents.arrays, found.cls)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tell(path.name, network.origin)
    card = {**network.origin._asdict(), "file": path.name, "digest": digest_of(path)}
    checkpoint.save(out, dict(contents.arrays), kind=_KIND, config=found._asdict(), card=card)


def describe(
    path: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None, entry: str | None = None
) -> Description:
    """What a file of weights holds, also where `load` would refuse it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or of an unknown format.
    """
    path = packaged.locate(path)
    contents = inspect(path, entry=entry)
    recognised, problem, licence = None, "", ""
    if _is_ours(contents):
        recognised = Recognised("packaged", "UNet", json.loads(contents.metadata["config"]))
    else:
        try:
            recognised = recognise(path, contents, config)
            if recognised.family in FAMILIES:
                licence = FAMILIES[recognised.family].origin.licence
            network = build(*recognised)
            licence = network.origin.licence
            check(network, contents.arrays, recognised.cls)
        except ValueError as error:
            problem = str(error)
    arrays = {name: (array.shape, str(array.dtype)) for name, array in contents.arrays.items()}
    size = sum(array.nbytes for array in contents.arrays.values())
    return Description(contents.format, recognised, problem, licence, arrays, size, contents.refused)


def describe_folder(path: Path) -> dict[str, Description]:
    """What the networks of a folder are, by the names of its components; that of a single one is "".

    Raises:
      ValueError: the folder is none of diffusers'.
    """
    found = {}
    for name, component in folder_models.networks_of(components(path)).items():
        try:
            found[name] = describe(weights(component))
        except ValueError as error:
            found[name] = Description("", None, str(error), "", {}, 0, ())
    return found


def _is_ours(contents: Contents) -> bool:
    """Whether training wrote the file."""
    return contents.metadata.get("format") == checkpoint.FORMAT and contents.metadata.get("kind") != _KIND


def _adm_arguments(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    if "model_channels" in given:
        return given
    if path.stem.endswith("_upsampler"):
        raise ValueError(f"{path.name} enlarges images, which is not supported; use one of {', '.join(RELEASED)}")
    flags = {**RELEASED.get(path.stem, {}), **given}
    if "num_channels" not in flags and "classifier_width" not in flags:
        raise ValueError(
            f"{path} holds a network of guided-diffusion, whose files have no configuration, and is named like none of "
            f"the released ones ({', '.join(RELEASED)}): rename it, or give config, the flags that it was trained with"
        )
    return flags


def tell(name: str, origin: Origin) -> None:
    """Prints the licence of weights that are not for commercial use to stderr, once in a process."""
    if origin.non_commercial and origin.licence not in _told:
        _told.add(origin.licence)
        print(f"{name}: weights of {origin.source}, licence {origin.licence}", file=sys.stderr)
