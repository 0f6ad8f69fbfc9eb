"""What an option names: something registered, or an import path to a user's own; and whose package `envs` is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssdkd.errors import ConfigError, in_one_line


def registered_or_imported(option: str, name: str, registered: Mapping[str, Any], example: str) -> Any:
    """What is registered under `name`, or what an import path such as `example` leads to.

    Raises:
        ConfigError: there is neither.
    """
    if name in registered:
        return registered[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        known = ", ".join(registered)
        raise ConfigError(f"{option}: expected one of {known} or an import path such as {example}, got {name!r}.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module runs any code when imported
        raise ConfigError(f"{option}: {name} cannot be imported: {in_one_line(error)}.") from error


def hidden(name: str) -> str | None:
    """Where another package called `name` stands in front of ssdkd's: a sentence that says so."""
    spec = importlib.util.find_spec(name)
    where = next(iter(spec.submodule_search_locations or ()), spec.origin) if spec else None
    if where is None or Path(where).resolve() == Path(__file__).resolve().parent.parent / name:
        return None
    return (
        f"the package {name!r} that Python finds is {where}, not ssdkd's; "
        "run from another folder or remove the other package."
    )
