"""Folders in the layout of diffusers: which networks they hold, their files, and what their scheduler says."""

from evodiff_jax.pretrained.folders._components import Component, components, index_of, is_folder_of, weights
from evodiff_jax.pretrained.folders._scheduler import Scheduler, read_scheduler

__all__ = ["Component", "Scheduler", "components", "index_of", "is_folder_of", "read_scheduler", "weights"]
