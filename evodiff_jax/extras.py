"""Packages that only parts of the library need, and the extra of the installation that brings them."""

import importlib.util


def require(*packages: str, extra: str) -> None:
    """Checks that packages are installed, before anything is imported or computed for their sake.

    Args:
      *packages: their import names.
      extra: the extra of evodiff-jax that installs them.

    Raises:
      ModuleNotFoundError: when one is missing; the message says how to install it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            message = f"{package} is not installed and is needed here: pip install 'evodiff-jax[{extra}]'"
            raise ModuleNotFoundError(message, name=package)
