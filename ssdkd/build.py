"""From a configuration to an engine: networks, weights, evaluation set, and the checks that need all of them."""

from __future__ import annotations

import dataclasses
import math
from importlib import resources
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.parameter import is_lazy

from ssdkd.config import ImageConfig, RunConfig
from ssdkd.data import ImageSpec, LabelledImages, dataset_spec, load_dataset, plain_spec, require_same_task
from ssdkd.devices import choose_device, keep_freed_memory, laid_out, lay_out, layout_for, seed_torch
from ssdkd.engine import Engine, copy_of
from ssdkd.errors import CheckpointError, ConfigError, in_one_line
from ssdkd.files import expanded
from ssdkd.inversion import Observer
from ssdkd.models import create_model, load_weights
from ssdkd.models.counting import evaluating
from ssdkd.trouble import learned

EMBEDDED = {"embedded": "digits_teacher.safetensors"}


def build_engine(config: RunConfig, teacher: nn.Module | None = None, student: nn.Module | None = None) -> Engine:
    """Build everything that `config` names; a teacher or student that is handed over takes its place."""
    require_budget(config)
    if config.distillation.batch > config.buffer.capacity:
        raise ConfigError(
            f"buffer.capacity is {config.buffer.capacity} but distillation.batch is {config.distillation.batch}; "
            "a buffer must hold at least one batch: raise the one or lower the other."
        )
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    spec = image_spec(config)
    evaluation = _evaluation(config, spec)
    if teacher is None:
        teacher = _load_teacher(config, spec)
    if student is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            student = build_student(config, spec)
    require_apart(teacher, student)
    layout = layout_for(config.layout)
    for network, role in ((teacher, "teacher"), (student, "student")):
        _require_fit(network, role, spec, layout)
        _require_finite(network, role)
    require_trainable(student, "student", spec, layout, min(config.distillation.batch, 2))
    seed_torch(config.seed, device)
    return Engine(teacher, student, spec, config, device, evaluation)


def require_apart(teacher: nn.Module, student: nn.Module) -> None:
    """The student is trained in place, the teacher stays as it is: what is trained must not be of both.

    Statistics of batch norm move in training, whether its weights are frozen or not.
    """
    taught = set(map(id, learned(teacher).values()))
    for name, values in learned(student).items():
        frozen = isinstance(values, nn.Parameter) and not values.requires_grad
        if id(values) in taught and not frozen:
            raise ConfigError(
                f"the student's {name} is the teacher's own, which training would change: give the student a copy of "
                "it (copy.deepcopy)."
            )


def require_budget(config: RunConfig) -> None:
    """A run needs one budget, above zero."""
    if config.rounds is None and config.minutes is None:
        raise ConfigError("no budget: give --rounds R or --minutes M.")
    if config.minutes is not None and config.minutes <= 0:
        raise ConfigError(f"minutes: a budget of {config.minutes:g} leaves nothing to do; give more than 0.")


def image_spec(config: RunConfig) -> ImageSpec:
    """What the teacher sees: the data set's facts, overridden by what `image` sets."""
    given: ImageConfig = config.image
    if config.dataset is not None:
        base = dataset_spec(config.dataset, config.data_root)
    else:
        missing = [name for name in ("channels", "height", "width", "classes") if getattr(given, name) is None]
        if missing:
            raise ConfigError(
                f"image.{missing[0]} is not known: name the teacher's data set (--dataset) "
                "or give image.channels, image.height, image.width and image.classes."
            )
        numbered = tuple(map(str, range(given.classes or 0)))
        base = plain_spec(given.channels or 0, given.height or 0, given.width or 0, numbered)
    channels = given.channels or base.channels
    classes = given.classes or base.num_classes
    mean = tuple(given.mean) if given.mean is not None else _for_channels(base.mean, channels)
    std = tuple(given.std) if given.std is not None else _for_channels(base.std, channels)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ConfigError(f"image.{name} has {len(values)} entries for {channels} channels; give one for each.")
    if not all(map(math.isfinite, (*mean, *std))):
        raise ConfigError(f"image.mean and image.std must be finite numbers, got {list(mean)} and {list(std)}.")
    if not 0 <= min(mean) <= max(mean) <= 1 or max(std) > 10:  # which no scale of pixels in [0, 1] takes
        raise ConfigError(
            f"image.mean is {list(mean)} and image.std {list(std)}, but pixels are in [0, 1]: where these are of "
            "pixels up to 255, divide both by 255."
        )
    if min(std) <= 0:
        raise ConfigError(f"image.std must be above 0, got {list(std)}.")
    return dataclasses.replace(
        base,
        channels=channels,
        height=given.height or base.height,
        width=given.width or base.width,
        num_classes=classes,
        mean=mean,
        std=std,
        flip=base.flip if given.flip is None else given.flip,
        class_names=base.class_names if classes == base.num_classes else tuple(map(str, range(classes))),
    )


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One for each channel: as they are, or the mean of them where they are for another number of channels."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def has_evaluation(dataset: str | None, data_root: str | None) -> bool:
    """Whether these settings name images to measure accuracy on."""
    return dataset == "digits" or (dataset is not None and data_root is not None)


def _evaluation(config: RunConfig, spec: ImageSpec) -> LabelledImages | None:
    if config.dataset is None or not has_evaluation(config.dataset, config.data_root):
        return None
    data = load_dataset(config.dataset, config.data_root, "test")
    require_same_task(data.spec, spec.num_classes, spec.channels)
    if (data.spec.height, data.spec.width) != (spec.height, spec.width):
        raise ConfigError(
            f"{config.dataset} has images of {data.spec.height}x{data.spec.width} pixels but image.height and "
            f"image.width say {spec.height}x{spec.width}; leave those out or choose another evaluation set."
        )
    return data


def build_student(config: RunConfig, spec: ImageSpec) -> nn.Module:
    """The student that `config` names, with fresh weights."""
    return model_for(config.student.name, config.student.arguments, spec)


def name_in_memory(network: nn.Module) -> str:
    """What stands in a configuration for a network that was handed over rather than named."""
    return f"<{type(network).__name__}>"


def is_in_memory(name: str) -> bool:
    """Whether a name in a configuration stands for such a network."""
    return name.startswith("<")


def model_for(name: str, arguments: dict[str, Any], spec: ImageSpec) -> nn.Module:
    """The model of that name for images of that kind, with fresh weights."""
    if is_in_memory(name):
        raise ConfigError(
            f"the run was given {name[1:-1]} as a network in memory, which no name rebuilds: "
            "go on with ssdkd.distill(teacher, student, resume=RUN)."
        )
    return create_model(
        name,
        arguments,
        num_classes=spec.num_classes,
        in_channels=spec.channels,
        image_size=min(spec.height, spec.width),
        image_shape=(spec.height, spec.width),
    )


def _load_teacher(config: RunConfig, spec: ImageSpec) -> nn.Module:
    described = config.teacher
    if described.checkpoint in EMBEDDED and config.dataset not in (None, "digits"):
        raise ConfigError(
            f"the embedded teacher knows 8x8 digits, not {config.dataset}: name a teacher of that "
            "(--teacher.name NAME --teacher.checkpoint FILE)."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        teacher = model_for(described.name, described.arguments, spec)
    if described.checkpoint is None and not set(":<") & set(described.name):
        raise ConfigError(
            f"teacher.checkpoint is missing: {described.name} would be an untrained teacher; "
            "give its weights (--teacher.checkpoint FILE)."
        )
    if described.checkpoint in EMBEDDED:
        with resources.as_file(resources.files("ssdkd") / "assets" / EMBEDDED[described.checkpoint]) as path:
            load_weights(teacher, path)
    elif described.checkpoint is not None:
        load_weights(teacher, expanded(described.checkpoint))
    return teacher


def _require_fit(network: nn.Module, role: str, spec: ImageSpec, layout: torch.memory_format) -> None:
    """Show the network two images, laid out as in a run: it must return one logit a class for each.

    A teacher's logits must lead back to the images, which are searched for by them.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise ConfigError(f"the {role} is a TorchScript program; hand over the module that it was made of.")
    parameter = next(network.parameters(), torch.zeros(()))
    if parameter.is_meta or (not is_lazy(parameter) and parameter.is_inference()):
        made = "on the meta device" if parameter.is_meta else "under inference_mode"
        raise ConfigError(f"the {role} was made {made}, where weights cannot be used; make it anew outside of that.")
    size = f"{spec.channels}x{spec.height}x{spec.width}"
    grey = torch.full((2, *spec.shape), 0.5, device=parameter.device, requires_grad=True)
    shown = laid_out(1.0 * grey, layout)
    before = shown._version
    try:
        with evaluating(network), torch.set_grad_enabled(role == "teacher"):
            take_shape(network, spec)
            lay_out(network, layout)
            answer = network(shown)
            leads_back = role == "student" or _leads_back(network, answer, grey, layout)
    except Exception as error:  # the network may be anyone's code
        said, advice = in_one_line(error), ""
        if "view size is not compatible" in said:
            advice = " Maps lie channels last: give --layout contiguous, or flatten them by reshape instead of view."
        if isinstance(error, torch.utils.checkpoint.CheckpointError):  # the second time nothing watches
            advice = (
                " Its batch norm is watched, which torch.utils.checkpoint does not bear: leave that out in evaluation "
                "mode."
            )
        if "hook is not supported on ScriptModules" in said:
            advice = " Its batch norm is watched, which TorchScript does not bear: hand that part over as written."
        if "eval() is not supported" in said:
            advice = " It is a program of torch.export: hand over the module that it was made of."
        if parameter.dtype != torch.float32:
            advice = f" Its weights are {parameter.dtype}: hand over the network.float()."
        raise ConfigError(f"the {role} cannot take images of {size}: {said}.{advice}") from error
    if not isinstance(answer, torch.Tensor):
        kind = type(answer).__name__
        raise ConfigError(f"the {role} answers with a {kind}; wrap it in a module that returns the logits alone.")
    if answer.shape != (2, spec.num_classes):
        raise ConfigError(
            f"the {role} answers two images of {size} with {tuple(answer.shape)}, but {spec.num_classes} classes were "
            f"expected (2, {spec.num_classes}); teacher and student need the same classes: see image.classes."
        )
    if not answer.is_floating_point():
        raise ConfigError(f"the {role} answers with numbers of {answer.dtype}, not logits; let it return floats.")
    if (answer >= 0).all() and torch.allclose(answer.sum(dim=1), answer.new_ones(()), atol=1e-5):
        raise ConfigError(f"the {role} answers with probabilities, not logits; leave out the softmax at its end.")
    if shown._version != before:
        raise ConfigError(
            f"the {role} changes the images that it is shown, which others see too: let the first operation of its "
            "forward make a new tensor (x = x * 2 instead of x.mul_(2), no inplace=True)."
        )
    if not leads_back:
        raise ConfigError(
            "the teacher's answer does not lead back to its input, by which images are searched for: its forward "
            "detaches it, or is under no_grad or inference_mode; take that out."
        )


def take_shape(network: nn.Module, spec: ImageSpec) -> None:
    """Give layers that are to know their shapes after a first look that look."""
    parameter = next(network.parameters(), None)
    if parameter is not None and any(map(is_lazy, network.parameters())):
        network(torch.full((2, *spec.shape), 0.5, device=parameter.device))


def _leads_back(teacher: nn.Module, answer: Any, images: torch.Tensor, layout: torch.memory_format) -> bool:
    if not isinstance(answer, torch.Tensor) or not answer.requires_grad:
        return False
    answer = Observer(teacher).observe(laid_out(1.0 * images, layout), statistics=True, features=False)
    return torch.autograd.grad(answer.sum(), images, allow_unused=True)[0] is not None


def require_trainable(network: nn.Module, role: str, spec: ImageSpec, layout: torch.memory_format, images: int) -> None:
    """Take a copy through a step on so many images: it must answer each, and its answers lead back to its weights."""
    weights = [p for p in network.parameters() if p.requires_grad]
    if not weights or not all(p.is_leaf for p in weights):
        raise ConfigError(f"the {role} has no weights that could learn (none of them is a leaf that requires_grad).")
    try:
        trial = copy_of(network, role).train()
    except Exception:
        return  # a student may be one that cannot be copied, where no mean of its weights is asked for
    blank = torch.zeros((images, *spec.shape), device=weights[0].device)
    try:
        answer = trial(laid_out(blank, layout))
        is_fit = isinstance(answer, torch.Tensor) and answer.shape == (images, spec.num_classes)
        if is_fit and answer.requires_grad:
            answer.sum().backward()
    except Exception as error:  # the network may be anyone's code
        advice = "; it was shown one image, as batches are of one: raise that" if images == 1 else ""
        raise ConfigError(f"the {role} cannot be trained: {in_one_line(error)}{advice}.") from error
    if not is_fit:
        told = tuple(answer.shape) if isinstance(answer, torch.Tensor) else f"a {type(answer).__name__}"
        raise ConfigError(
            f"the {role} cannot be trained: it answers {images} images in training with {told}, not "
            f"{(images, spec.num_classes)}; let it return the logits alone then too."
        )
    if all(p.grad is None for p in trial.parameters()):
        raise ConfigError(f"the {role} cannot be trained: its answers do not depend on its weights.")


def _require_finite(network: nn.Module, role: str) -> None:
    for name, tensor in learned(network).items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"the {role}'s weights hold NaN or infinity in {name}; nothing can be learned so.")
