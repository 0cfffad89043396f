"""Training of the packaged models: the EDM loss, averaged weights, runs that can be stopped and resumed.

A run is a pure function of its settings: the batch and the noise of step n come from (seed, n), so a run that was
stopped and resumed is, on the same machine, bit for bit the run that was not.

A run's folder holds two files, both replaced atomically at every checkpoint:

    state.safetensors   everything a resumed run needs
    model.safetensors   the averaged weights, ready for `evodiff_jax.pretrained.load`
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from tqdm import tqdm

from evodiff_jax.evaluation.data import Dataset
from evodiff_jax.pretrained import checkpoint
from evodiff_jax.pretrained.classifier import Classifier, ClassifierConfig
from evodiff_jax.pretrained.unet import UNet, UNetConfig
from training import objectives

STATE_FILE = "state.safetensors"
MODEL_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. A resumed run may change `steps`, `cooldown`, `log_every` and `checkpoint_every` alone.

    Attributes:
      network: what is trained: a U-Net as a diffusion model, or a classifier.
      steps: optimizer steps in all.
      batch: images a step.
      seed: decides initialisation, batches and noise.
      learning_rate: its highest value, reached after `warmup` steps.
      warmup: steps of linear warmup.
      decay_start: step after which the rate falls as 1/sqrt(step), which needs no planned end.
      cooldown: steps at the end of the run over which the rate falls further, linearly to 0.
      clip: largest norm of a step's gradient.
      ema_exponent: the weights that are exported average the last steps with weight ~ step^ema_exponent (power-
        function average, arXiv 2312.02696): early weights never dominate, however short the run.
      p_mean: mean of log(sigma) in training.
      p_std: standard deviation of log(sigma) in training.
      label_dropout: probability that an image is shown without its label, for guidance.
      sigma_data: standard deviation of the training images.
      log_every: steps between log lines.
      checkpoint_every: steps between checkpoints.
    """

    network: UNetConfig | ClassifierConfig = UNetConfig()  # noqa: RUF009 (frozen)
    steps: int = 20_000
    batch: int = 64
    seed: int = 0
    learning_rate: float = 2e-3
    warmup: int = 400
    decay_start: int = 2_000
    cooldown: int = 0
    clip: float = 1.0
    ema_exponent: float = 10.0
    p_mean: float = -0.85
    p_std: float = 1.4
    label_dropout: float = 0.1
    sigma_data: float = 0.706
    log_every: int = 100
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warmup", "decay_start", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "p_std", "sigma_data"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.cooldown <= self.steps:
            raise ValueError(f"cooldown must be in 0 .. {self.steps} steps, got {self.cooldown}")
        if not 0.0 <= self.label_dropout <= 1.0:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0 .. 2^32 - 1, got {self.seed}")
        if self.ema_exponent < 0:
            raise ValueError(f"ema_exponent must not be negative, got {self.ema_exponent}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as a dictionary that `json.dumps` takes."""
        return dataclasses.asdict(self) | {"network": self.network.to_dict()}


class TrainState(NamedTuple):
    """What one step turns into the next.

    Attributes:
      step: int32 scalar, steps taken.
      params: weights.
      opt_state: the optimizer's state.
      average: averaged weights, what is exported.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any


def batch_indices(seed: int, step: int, batch: int, size: int) -> np.ndarray:
    """Returns which images step `step` sees: every epoch is a new permutation, cut into whole batches.

    Args:
      seed: the run's seed.
      step: the step, from 0.
      batch: images a step, at most `size`.
      size: images in all.

    Returns:
      int64 (batch,) of indices.
    """
    per_epoch = size // batch
    epoch, position = divmod(step, per_epoch)
    return np.random.default_rng((seed, epoch)).permutation(size)[position * batch : (position + 1) * batch]


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam with clipped gradients, linear warmup, a rate that falls as 1/sqrt(step), and a linear end."""

    def rate(count: ArrayLike) -> jax.Array:
        step = jnp.asarray(count).astype(jnp.float32) + 1.0
        decay = jnp.sqrt(jnp.maximum(step / config.decay_start, 1.0))
        end = jnp.clip((config.steps + 1.0 - step) / (config.cooldown + 1.0), 0.0, 1.0)
        return config.learning_rate * jnp.minimum(step / config.warmup, 1.0) / decay * end

    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate, b1=0.9, b2=0.99))


def initial_state(config: TrainConfig) -> TrainState:
    """Returns the state before the first step; a pure function of the settings."""
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31)  # no step has this number
    image = jnp.zeros((1, *config.network.image_shape), jnp.float32)
    if isinstance(config.network, UNetConfig):
        net, args = UNet(config.network), (image, jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.int32))
    else:
        net, args = Classifier(config.network), (image,)
    params = net.init(key, *args)["params"]
    return TrainState(jnp.int32(0), params, optimizer(config).init(params), params)


def make_step(
    config: TrainConfig,
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """Returns the pure step (state, images, labels) -> (next state, loss), to be jitted by the caller."""
    if isinstance(config.network, UNetConfig):
        loss = objectives.diffusion_loss(
            config.network, config.sigma_data, config.p_mean, config.p_std, config.label_dropout
        )
    else:
        loss = objectives.classifier_loss(config.network)
    update = optimizer(config)

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        value, grads = jax.value_and_grad(loss)(state.params, images, labels, key)
        updates, opt_state = update.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        taken = state.step + jnp.int32(1)
        keep = (1.0 - 1.0 / taken.astype(jnp.float32)) ** (config.ema_exponent + 1.0)
        average = jax.tree.map(lambda a, p: keep * a + (1.0 - keep) * p, state.average, params)
        return TrainState(taken, params, opt_state, average), value

    return step


def train(
    config: TrainConfig,
    dataset: Dataset,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    command: str = "",
) -> Path:
    """Trains a model, writing checkpoints and the exported weights into a folder.

    Args:
      config: the settings.
      dataset: training images and labels.
      out: the run's folder, made if need be.
      resume: go on from the folder's checkpoint.
      command: the command line, for the exported file's card.

    Returns:
      The path of the exported model.

    Raises:
      ValueError: the data do not fit the network, or the folder holds a run already, none, or another one.
      OSError: the folder cannot be written.
      FloatingPointError: the loss is no longer finite.
    """
    out = Path(out)
    _check_data(config, dataset)
    if not resume and (out / STATE_FILE).exists():
        raise ValueError(f"{out} already holds a run; go on with it (--resume) or choose another folder")
    state = _resumed_state(config, out / STATE_FILE) if resume else None
    first = 0 if state is None else int(state.step)
    if first >= config.steps:
        raise ValueError(f"the run in {out} has taken {first} steps already; ask for more than {config.steps}")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"cannot write to {out}; choose another folder")
    if state is None:
        state = jax.jit(lambda: initial_state(config))()

    step = jax.jit(make_step(config))
    losses: list[jax.Array] = []
    loss, logged, since = math.nan, first, time.perf_counter()
    # disable=None: a bar on a terminal, log lines elsewhere.
    with tqdm(total=config.steps, initial=first, unit="step", disable=None) as bar:
        for n in range(first, config.steps):
            chosen = batch_indices(config.seed, n, config.batch, len(dataset.labels))
            state, value = step(state, dataset.images[chosen], dataset.labels[chosen])
            losses.append(value)
            bar.update()
            done = n + 1
            if done % config.log_every == 0 or done == config.steps:
                loss = float(np.mean(jax.device_get(losses)))
                rate = (done - logged) * config.batch / (time.perf_counter() - since)
                losses, logged, since = [], done, time.perf_counter()
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
                if bar.disable:
                    print(f"step {done}/{config.steps}  loss {loss:.4f}  {rate:.0f} images/s", file=sys.stderr)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {done}; lower the learning rate")
            if done % config.checkpoint_every == 0 or done == config.steps:
                write_checkpoint(config, state, out, {"loss": loss, "command": command})
    return out / MODEL_FILE


def write_checkpoint(config: TrainConfig, state: TrainState, out: Path, facts: dict[str, Any]) -> None:
    """Writes the run's state, and the model with its averaged weights in half precision, into `out`."""
    checkpoint.save(out / STATE_FILE, state, kind="training state", config=config.to_dict(), card=facts)
    diffusion = isinstance(config.network, UNetConfig)
    left_out = {"network"} if diffusion else {"network", "p_mean", "p_std", "label_dropout", "sigma_data"}
    card = facts | {
        "steps": int(state.step),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "training": {k: v for k, v in config.to_dict().items() if k not in left_out},
    }
    checkpoint.save(
        out / MODEL_FILE,
        state.average,
        kind="diffusion model" if diffusion else "classifier",
        config=config.network.to_dict() | ({"sigma_data": config.sigma_data} if diffusion else {}),
        card=card,
        half=True,
    )


def _check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Raises a ValueError if the data do not fit the settings."""
    if dataset.images.shape[1:] != config.network.image_shape:
        raise ValueError(f"the network takes {config.network.image_shape}, images are {dataset.images.shape[1:]}")
    if len(dataset.labels) < config.batch:
        raise ValueError(f"batch must be at most the {len(dataset.labels)} images there are, got {config.batch}")
    if dataset.labels.min() < 0 or dataset.labels.max() >= config.network.num_classes:
        raise ValueError(f"labels must be in 0 .. {config.network.num_classes - 1}, got {dataset.labels.max()}")


def _resumed_state(config: TrainConfig, path: Path) -> TrainState:
    """Reads the state of a run with the same settings."""
    found = checkpoint.load(path, kind="training state")
    free = {"steps", "cooldown", "log_every", "checkpoint_every"}
    wanted = config.to_dict()
    changed = [k for k in wanted if k not in free and wanted[k] != found.config.get(k)]
    if changed:
        was = ", ".join(f"{k}={found.config.get(k)}" for k in changed)
        raise ValueError(f"{path} is of a run with {was}; resume it with the same settings")
    template = jax.eval_shape(lambda: initial_state(config))
    return jax.tree.map(jnp.asarray, checkpoint.restore(template, found, path))
