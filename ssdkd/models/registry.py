"""A model is a name plus keyword arguments: a name of the zoo, or `package.module:function` for any other."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ssdkd.errors import ConfigError, SsdkdError, in_one_line
from ssdkd.models.counting import dry_run

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}
_TASK_ARGUMENTS = ("num_classes", "in_channels", "image_size")
_PACKAGES_OF_ZOO_EXTRA = ("timm", "torchvision")


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Make the decorated function available to `create_model` under `name`.

    The function takes `num_classes`, `in_channels` and `image_size` as keywords, and whatever else it likes
    with defaults; it returns a model from images `(N, in_channels, image_size, image_size)` to logits
    `(N, num_classes)`.
    """
    if ":" in name or not name:
        raise ConfigError(f"a model cannot be registered as {name!r}: a name must not be empty or contain ':'.")

    def register(builder: Builder) -> Builder:
        known = _BUILDERS.get(name)
        # Running a notebook cell twice defines the same function again, which is no clash.
        if known is not None and (known.__module__, known.__qualname__) != (builder.__module__, builder.__qualname__):
            raise ConfigError(
                f"the model name {name!r} is already taken by {known.__module__}.{known.__qualname__}: "
                "register yours under another name."
            )
        _BUILDERS[name] = builder
        return builder

    return register


def available_models() -> list[str]:
    """Names that `create_model` knows, sorted."""
    return sorted(_BUILDERS)


def create_model(
    name: str,
    more_arguments: Mapping[str, Any] | None = None,
    /,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    image_shape: tuple[int, int] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build a model from images `(N, in_channels, image_size, image_size)` to logits `(N, num_classes)`.

    Args:
        name: a name of `available_models()`, or `package.module:function`, such as `timm:create_model` or
            `torchvision.models:resnet18`.
        more_arguments: the same as `arguments`, as a mapping; the way to hand an imported function an
            argument that is itself called `num_classes`, `in_channels` or `image_size`.
        num_classes: classes of the task.
        in_channels: channels of its images.
        image_size: height and width of its images; the smaller of them where they differ.
        image_shape: height and width where they differ.
        arguments: the model's own arguments. A model of the zoo gets the three above as well; an imported
            function gets these arguments only, and its model is then checked against the task.

    Returns:
        The model with fresh weights, on the CPU unless an imported function puts it elsewhere.

    Raises:
        ConfigError: an unknown name, arguments that do not fit, or a model that does not fit the task.
    """
    if not isinstance(name, str):
        raise ConfigError(f"a model is chosen by its name, a string, not by {name!r}.")
    for key, number in zip(_TASK_ARGUMENTS, (num_classes, in_channels, image_size), strict=True):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{key} of model {name!r} must be a whole number of at least 1, not {number!r}.")
    shape = (image_size, image_size) if image_shape is None else image_shape
    if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(type(n) is int and n >= 1 for n in shape):
        raise ConfigError(f"image_shape of model {name!r} must be height and width, in pixels, not {image_shape!r}.")

    own = {**(more_arguments or {}), **arguments}
    if ":" in name:
        model = _call(name, _import_builder(name), own)
    else:
        builder = _zoo_builder(name)
        _refuse_unknown_arguments(name, builder, own)
        task = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        model = _call(name, builder, {**task, **own})

    logits = dry_run(model, (in_channels, *shape), name=f"model {name!r}")
    if not isinstance(logits, torch.Tensor):
        raise ConfigError(
            f"model {name!r} returns a {type(logits).__name__}, not one tensor of logits: "
            "wrap it in a function that picks the logits."
        )
    if logits.ndim < 2 or logits.shape[1] != num_classes:
        raise ConfigError(
            f"model {name!r} gives an output of shape {tuple(logits.shape)} for one image, but the task has "
            f"{num_classes} classes: give the model its own argument for the number of classes."
        )
    return model


def require_image_size(name: str, image_size: int, smallest: int) -> None:
    """Refuse images that would vanish inside the model."""
    if image_size < smallest:
        raise ConfigError(
            f"model {name!r} cannot take {image_size}x{image_size} images: they must be at least {smallest}x{smallest}."
        )


# A configuration that came with somebody else's run folder could name what runs commands or unpickles files.
_BUILDS_NO_MODELS = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}


def _zoo_builder(name: str) -> Callable[..., nn.Module]:
    if name in _BUILDERS:
        return _BUILDERS[name]
    nearest = difflib.get_close_matches(name.lower(), available_models(), n=1, cutoff=0.5)
    meant = f"did you mean {nearest[0]!r}?" if nearest else f"the zoo has {', '.join(available_models())}."
    raise ConfigError(
        f"there is no model {name!r}: {meant} A model from elsewhere is written 'package.module:function'."
    )


def _refuse_unknown_arguments(name: str, builder: Callable[..., nn.Module], own: Mapping[str, Any]) -> None:
    for key in _TASK_ARGUMENTS:
        if key in own:
            raise ConfigError(f"{key} of model {name!r} is given by the task: take it out of the model's arguments.")
    parameters = inspect.signature(builder).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    allowed = [key for key in parameters if key not in _TASK_ARGUMENTS]
    for key in own:
        if key not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise ConfigError(f"model {name!r} has no argument {key!r}: {takes}.")


def _import_builder(name: str) -> Callable[..., Any]:
    module_path, _, attribute_path = name.partition(":")
    parts = [*module_path.split("."), *attribute_path.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(
            f"{name!r} is not an import path: write 'package.module:function', such as 'timm:create_model'."
        )

    try:
        found: Any = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        package = (error.name or module_path).partition(".")[0]
        if package in _PACKAGES_OF_ZOO_EXTRA:
            advice = "install it with: pip install 'ssdkd[zoo]'"
        else:
            advice = "install it, or start from the folder that holds it"
        raise ConfigError(
            f"model {name!r} cannot be imported because there is no module {error.name!r}: {advice}."
        ) from error
    except Exception as error:  # a module runs any code when imported, so anything can come out of it
        if "operator torchvision::" in str(error):
            raise ConfigError(
                f"model {name!r} cannot be imported because torchvision was built for another torch: "
                "install both from the same index."
            ) from error
        raise ConfigError(
            f"model {name!r} cannot be imported: {module_path} fails with {in_one_line(error)}."
        ) from error

    reached = module_path
    for part in attribute_path.split("."):
        if not hasattr(found, part):
            nearest = difflib.get_close_matches(part, dir(found), n=1)
            meant = f"did you mean {nearest[0]!r}?" if nearest else "check the spelling."
            raise ConfigError(f"model {name!r} cannot be imported because {reached} has no {part!r}: {meant}")
        found = getattr(found, part)
        reached = f"{reached}.{part}"
    if isinstance(found, nn.Module) or not callable(found):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, not a function or class that builds a model.")
    home = str(getattr(found, "__module__", None) or "builtins").partition(".")[0]
    if home in _BUILDS_NO_MODELS and not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(
            f"model {name!r} was refused and not called: it is of {home!r}, which builds no models; name a function of "
            "your own that calls it."
        )
    return found


def _call(name: str, builder: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model = builder(**arguments)
    except SsdkdError:
        raise
    except TypeError as error:
        given = ", ".join(arguments) or "none"
        raise ConfigError(
            f"model {name!r} cannot be built with the arguments given ({given}): {in_one_line(error)}."
        ) from error
    except Exception as error:  # the builder may be anyone's code
        raise ConfigError(f"model {name!r} cannot be built: {in_one_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model {name!r} returned {type(model).__name__}, not a torch.nn.Module: let it return the model itself."
        )
    return model
