"""Promises of `ssdkd.models`: known architectures, strict weights, one clear sentence for every mistake."""

import itertools
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from ssdkd.errors import CheckpointError, ConfigError
from ssdkd.models import (
    available_models,
    count_multiply_adds,
    count_parameters,
    create_model,
    load_weights,
    register_model,
    registry,
    save_weights,
)
from ssdkd.models.pooling import halved

ZOO = [
    "convnet",
    "convnet_small",
    "lenet5",
    "lenet5_bn",
    "lenet5_half",
    "lenet5_half_bn",
    "mobilenet_v2",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet56",
    "resnet8",
    "resnet8x4",
    "vgg11",
    "vgg8",
    "wrn16_1",
    "wrn16_2",
    "wrn40_1",
    "wrn40_2",
]


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which must be one line that ends like a sentence."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def config_error(*positional: object, **arguments: object) -> str:
    arguments = {"num_classes": 10, **arguments}
    with pytest.raises(ConfigError) as error:
        create_model(*positional, **arguments)  # type: ignore[arg-type]
    return message_of(error)


def load_error(model: nn.Module, path: Path) -> str:
    """The message of a refusal, which must leave every tensor of the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    text = message_of(error)
    assert str(path) in text
    return text


def small_model(num_classes: int = 10) -> nn.Module:
    return create_model("convnet", num_classes=num_classes, in_channels=1, image_size=8, widths=[4, 6])


def head(model: nn.Module) -> torch.Tensor:
    """Weight of the last layer of `small_model`."""
    return model.get_parameter("linear.weight")


# The zoo


def test_the_zoo_is_listed_by_name() -> None:
    assert set(ZOO) <= set(available_models())
    assert available_models() == sorted(available_models())


@pytest.mark.parametrize("name", ZOO)
def test_every_model_maps_images_to_logits_and_learns(name: str) -> None:
    model = create_model(name, num_classes=7, in_channels=1)
    logits = model(torch.randn(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "in_channels", "parameters"),
    [  # as published with the papers or counted on their authors' code
        ("lenet5", 10, 1, 61_706),
        ("lenet5_half", 10, 1, 15_738),
        ("resnet20", 100, 3, 278_324),
        ("resnet32", 100, 3, 472_756),
        ("resnet56", 100, 3, 861_620),
        ("resnet8x4", 100, 3, 1_233_540),
        ("resnet32x4", 100, 3, 7_433_860),
        ("resnet18", 10, 3, 11_173_962),
        ("resnet34", 10, 3, 21_282_122),
        ("vgg8", 100, 3, 3_965_028),
        ("wrn16_1", 10, 3, 175_066),
        ("wrn16_2", 100, 3, 703_284),
        ("wrn40_1", 100, 3, 569_780),
        ("wrn40_2", 100, 3, 2_255_156),
        ("mobilenet_v2", 1000, 3, 3_504_872),
    ],
)
def test_parameters_are_those_of_the_published_models(
    name: str, num_classes: int, in_channels: int, parameters: int
) -> None:
    assert count_parameters(create_model(name, num_classes=num_classes, in_channels=in_channels)) == parameters


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("lenet5", ["conv1.weight", "conv2.bias", "conv3.weight", "fc1.weight", "fc2.bias"]),
        ("lenet5_bn", ["conv1.weight", "bn1.running_mean", "bn3.weight", "fc2.weight"]),
        (
            "resnet18",
            [
                "conv1.weight",
                "bn1.weight",
                "layer1.0.conv1.weight",
                "layer2.0.shortcut.0.weight",
                "layer2.0.shortcut.1.running_var",
                "layer4.1.bn2.bias",
                "linear.weight",
            ],
        ),
        ("resnet20", ["conv1.weight", "layer2.0.downsample.0.weight", "layer3.2.bn2.weight", "fc.bias"]),
        ("vgg8", ["block0.0.weight", "block0.0.bias", "block4.1.running_mean", "classifier.weight"]),
        ("vgg11", ["block2.3.weight", "block2.4.weight", "block4.3.weight"]),
        (
            "wrn16_2",
            [
                "conv1.weight",
                "block1.layer.0.bn1.weight",
                "block1.layer.0.conv1.weight",
                "block1.layer.0.convShortcut.weight",
                "block3.layer.1.conv2.weight",
                "bn1.bias",
                "fc.weight",
            ],
        ),
        ("mobilenet_v2", ["features.0.0.weight", "features.2.conv.1.1.weight", "classifier.1.weight"]),
    ],
)
def test_weights_carry_the_names_of_published_checkpoints(name: str, names: list[str]) -> None:
    assert set(names) <= set(create_model(name, num_classes=10).state_dict())


def test_wide_resnet_computes_what_its_published_checkpoints_expect() -> None:
    model = create_model("wrn16_1", num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    w = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}

    def activated(x: torch.Tensor, name: str) -> torch.Tensor:
        statistics = (w[f"{name}.running_mean"], w[f"{name}.running_var"])
        return F.relu(F.batch_norm(x, *statistics, w[f"{name}.weight"], w[f"{name}.bias"]))

    x = F.conv2d(images, w["conv1.weight"], padding=1)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        for block in range(2):
            at = f"block{stage}.layer.{block}"
            step = stride if block == 0 else 1
            start = activated(x, f"{at}.bn1")
            inner = activated(F.conv2d(start, w[f"{at}.conv1.weight"], stride=step, padding=1), f"{at}.bn2")
            out = F.conv2d(inner, w[f"{at}.conv2.weight"], padding=1)
            shortcut = w.get(f"{at}.convShortcut.weight")
            x = out + (x if shortcut is None else F.conv2d(start, shortcut, stride=step))
    expected = activated(x, "bn1").mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_lenet_frames_28_pixels_with_zeros() -> None:
    model = create_model("lenet5", num_classes=10, in_channels=1, image_size=28)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(model(images), model(F.pad(images, [2, 2, 2, 2])))


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg8", "wrn16_1", "mobilenet_v2", "convnet"])
def test_larger_and_smaller_images_work(name: str) -> None:
    smallest = 4 if name in ("resnet20", "wrn16_1", "convnet") else 8
    for size in (smallest, 96):
        model = create_model(name, num_classes=5, image_size=size).eval()
        assert model(torch.randn(1, 3, size, size)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "size", "smallest"), [("resnet18", 7, 8), ("vgg11", 4, 8), ("wrn40_2", 3, 4), ("convnet", 2, 4)]
)
def test_images_that_are_too_small_are_refused(name: str, size: int, smallest: int) -> None:
    text = config_error(name, image_size=size)
    assert repr(name) in text
    assert f"{size}x{size}" in text
    assert f"at least {smallest}x{smallest}" in text


def test_models_of_fixed_size_say_so() -> None:
    text = config_error("lenet5_half_bn", image_size=8)
    assert "'lenet5_half_bn' cannot take 8x8 images" in text
    assert "fixed" in text
    assert "28x28 or 32x32" in text


def test_convnet_has_the_blocks_it_is_asked_for() -> None:
    model = create_model("convnet", num_classes=10, in_channels=1, image_size=8, widths=[5, 6], batch_norm=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert count_parameters(model) == (9 * 5 + 5) + (9 * 5 * 6 + 6) + (6 * 10 + 10)
    assert "widths" in config_error("convnet", widths=[])
    assert "widths" in config_error("convnet", widths="wide")


def test_without_batch_norm_values_do_not_fade_from_layer_to_layer() -> None:
    torch.manual_seed(0)
    net = create_model("convnet", {"batch_norm": False}, num_classes=10, in_channels=1, image_size=16)
    spreads: list[float] = []
    for block in net.get_submodule("blocks").children():
        block.register_forward_hook(lambda _block, _inputs, out: spreads.append(out.square().mean().sqrt().item()))
    net(torch.randn(256, 1, 16, 16))
    assert len(spreads) == 3
    assert all(after > 0.8 * before for before, after in itertools.pairwise(spreads)), spreads


def test_lenet_starts_like_the_other_published_networks() -> None:
    torch.manual_seed(0)
    deep = create_model("lenet5", num_classes=10, in_channels=1, image_size=28).get_submodule("conv3")
    assert isinstance(deep, nn.Conv2d)
    assert deep.weight.std().item() == pytest.approx((2.0 / (120 * 25)) ** 0.5, rel=0.05)
    assert deep.bias is not None
    assert not deep.bias.any()


def test_mobilenet_scales_in_width_and_keeps_its_shapes_across_reductions() -> None:
    full = create_model("mobilenet_v2", num_classes=10)
    half = create_model("mobilenet_v2", num_classes=10, width=0.5)
    assert count_parameters(half) < count_parameters(full) / 2
    coarse = create_model("mobilenet_v2", num_classes=10, reduction=32)
    coarse.load_state_dict(full.state_dict())
    assert count_multiply_adds(coarse, (3, 32, 32)) < count_multiply_adds(full, (3, 32, 32)) / 5
    assert "width" in config_error("mobilenet_v2", width=0)
    assert "8, 16 or 32" in config_error("mobilenet_v2", reduction=4)
    assert "at least 32x32" in config_error("mobilenet_v2", reduction=32, image_size=16)


def test_creating_a_model_moves_no_statistic_and_draws_the_same_weights_for_the_same_seed() -> None:
    torch.manual_seed(3)
    first = create_model("wrn16_1", num_classes=10)
    after_first = torch.rand(1)
    torch.manual_seed(3)
    second = create_model("wrn16_1", num_classes=10)
    assert torch.equal(after_first, torch.rand(1))
    assert first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        if name.endswith("running_mean") or name.endswith("num_batches_tracked"):
            assert not value.any()


# Counting


def test_multiply_adds_are_exact() -> None:
    # LeNet-5 on 32x32: output pixels x kernel x channels in x channels out, and the linear layers.
    expected = 28 * 28 * 25 * 6 + 10 * 10 * 25 * 6 * 16 + 25 * 16 * 120 + 120 * 84 + 84 * 10
    model = create_model("lenet5", num_classes=10, in_channels=1)
    assert count_multiply_adds(model, (1, 32, 32)) == expected
    depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
    assert count_multiply_adds(depthwise, (8, 16, 16)) == 8 * 8 * 9 * 8


def test_counting_leaves_the_model_as_it_was() -> None:
    model = create_model("resnet8", num_classes=10)
    model.get_submodule("layer1").eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count_multiply_adds(model, (3, 32, 32))
    assert model.training
    assert not model.get_submodule("layer1").training
    assert model.get_submodule("layer2").training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_counting_on_images_of_the_wrong_shape_says_so() -> None:
    with pytest.raises(ConfigError) as error:
        count_multiply_adds(create_model("resnet8", num_classes=10), (1, 32, 32))
    assert "cannot take images of shape (1, 32, 32)" in message_of(error)


# Names and arguments


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    assert "did you mean 'wrn16_2'?" in config_error("wrn16-2")
    assert "did you mean 'resnet18'?" in config_error("ResNet18")
    text = config_error("torchvision.models.resnet18")
    assert "the zoo has convnet, " in text
    assert "package.module:function" in text


def test_an_unknown_argument_is_named_with_those_that_exist() -> None:
    text = config_error("convnet", width=3)
    assert "has no argument 'width'" in text
    assert "widths, depth, batch_norm" in text
    assert "takes none" in config_error("vgg8", dropout=0.1)


@pytest.mark.parametrize(("key", "value"), [("num_classes", 0), ("in_channels", 2.0), ("image_size", True)])
def test_a_task_that_makes_no_sense_is_refused(key: str, value: object) -> None:
    assert f"{key} of model 'vgg8' must be a whole number of at least 1" in config_error("vgg8", **{key: value})


@pytest.mark.parametrize("shape", [8, "88", (8,), (8, 8, 1), (8, 2.0), (8, 0), ()])
def test_a_shape_that_is_no_height_and_width_is_refused(shape: object) -> None:
    assert "image_shape of model 'vgg8' must be height and width" in config_error("vgg8", image_shape=shape)


def test_a_task_argument_among_the_arguments_of_a_zoo_model_is_refused() -> None:
    assert "num_classes of model 'vgg8' is given by the task" in config_error("vgg8", {"num_classes": 5})


def test_a_model_is_one_function_under_a_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @register_model("test_only_linear")
    def build(*, num_classes: int, in_channels: int, image_size: int, scale: float = 1.0) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

    assert "test_only_linear" in available_models()
    model = create_model("test_only_linear", num_classes=4, in_channels=2, image_size=3, scale=2.0)
    assert count_parameters(model) == 2 * 9 * 4 + 4


def test_a_name_is_registered_once() -> None:
    def other(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
        return nn.Identity()

    with pytest.raises(ConfigError) as error:
        register_model("vgg8")(other)
    assert "'vgg8' is already taken by ssdkd.models.vgg.vgg8" in message_of(error)
    with pytest.raises(ConfigError, match="must not be empty or contain ':'"):
        register_model("a:b")


# Models by import path


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of the user's own."""
    package = tmp_path / "users_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "ready = nn.Linear(2, 2)\n"
        "constant = 3\n"
        "def build(classes, channels=3):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))\n"
        "def renamed(num_classes):\n"
        "    return build(num_classes)\n"
        "def wrong_kind():\n"
        "    return {'a': 1}\n"
        "def fails():\n"
        "    raise RuntimeError('no such variant\\nwith details')\n"
        "class Pair(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x, x\n"
    )
    (package / "broken.py").write_text("1 / 0\n")
    (package / "mismatched.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (package / "needs_timm.py").write_text("import timm.models\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("users_pkg")]:
        monkeypatch.delitem(sys.modules, name)
    return "users_pkg.nets"


def test_a_model_by_import_path_gets_its_own_arguments_only(nets: str) -> None:
    model = create_model(f"{nets}:build", num_classes=4, in_channels=1, classes=4, channels=1)
    assert count_parameters(model) == 8
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)


def test_a_mapping_can_hold_arguments_named_like_those_of_the_task(nets: str) -> None:
    assert count_parameters(create_model(f"{nets}:renamed", {"num_classes": 6}, num_classes=6)) == 24


def test_a_model_by_import_path_must_fit_the_task(nets: str) -> None:
    text = config_error(f"{nets}:build", classes=5)
    assert "(1, 5)" in text
    assert "10 classes" in text
    assert "cannot take images of shape (1, 32, 32)" in config_error(f"{nets}:build", in_channels=1, classes=10)
    assert "returns a tuple, not one tensor" in config_error(f"{nets}:Pair")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{}:buidl", "has no 'buidl': did you mean 'build'?"),
        ("{}:build", "cannot be built with the arguments given (none): TypeError"),
        ("{}:wrong_kind", "returned dict, not a torch.nn.Module"),
        ("{}:fails", "cannot be built: RuntimeError: no such variant."),
        ("{}:ready", "is a Linear, not a function or class"),
        ("{}:constant", "is a int, not a function or class"),
        ("users_pkg.broken:build", "users_pkg.broken fails with ZeroDivisionError"),
        ("users_pkg.absent:build", "there is no module 'users_pkg.absent'"),
        ("users_pkg.mismatched:build", "torchvision was built for another torch: install both from the same"),
        ("no_such_package_at_all:build", "no module 'no_such_package_at_all': install it"),
        ("not a path:build", "is not an import path: write 'package.module:function'"),
        ("users_pkg.nets:", "is not an import path"),
        ("users_pkg:nets:build", "is not an import path"),
        ("..nets:build", "is not an import path"),
    ],
)
def test_every_mistake_in_an_import_path_has_its_sentence(nets: str, path: str, expected: str) -> None:
    assert expected in config_error(path.format(nets))


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("os:system", {"command": "touch {}"}),
        ("torch:os.system", {"command": "touch {}"}),
        ("subprocess:getoutput", {"cmd": "touch {}"}),
        ("subprocess:Popen", {"args": "touch {}", "shell": True}),
        ("timeit:timeit", {"stmt": "open('{}', 'w')"}),
        ("torch:load", {"f": "{}", "weights_only": False}),
        ("torch.hub:load", {"repo_or_dir": "{}", "model": "any"}),
        ("numpy:load", {"file": "{}", "allow_pickle": True}),
    ],
)
def test_what_runs_commands_is_no_model_and_is_not_called(path: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """A run folder from a stranger has a configuration, too."""
    trace = tmp_path / "trace"
    filled = {key: value.format(trace) if isinstance(value, str) else value for key, value in arguments.items()}
    with pytest.raises(ConfigError, match="was refused and not called"):
        create_model(path, filled, num_classes=10)
    assert not trace.exists()


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_optional_package_is_named_with_the_way_to_install_it(
    nets: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(package), *sys.meta_path])
    assert "pip install 'ssdkd[zoo]'" in config_error(f"{package}:create_model")
    if package == "timm":  # also when it is the user's own module that wants it
        assert "pip install 'ssdkd[zoo]'" in config_error("users_pkg.needs_timm:build")


class _Absent:
    """An import finder for which one package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


def test_models_of_torchvision_and_timm_work_where_installed() -> None:
    try:
        import timm  # noqa: F401
        import torchvision.models  # noqa: F401
    except Exception as error:  # torchvision built for another torch fails with more than ImportError
        pytest.skip(f"timm and torchvision do not import: {error}")
    model = create_model("torchvision.models:resnet18", {"num_classes": 10}, num_classes=10, image_size=64)
    assert count_parameters(model) == 11_181_642
    assert "1000" in config_error("torchvision.models:resnet18", image_size=64)
    arguments = {"model_name": "resnet18", "num_classes": 10, "in_chans": 1}
    assert create_model("timm:create_model", arguments, num_classes=10, in_channels=1, image_size=64).training
    assert "cannot be built" in config_error("timm:create_model", model_name="no_such_model")


# Weights: round trips


@pytest.mark.parametrize("name", ["lenet5_bn", "resnet20", "wrn16_1", "vgg8", "convnet"])
def test_saved_weights_load_into_a_fresh_model(name: str, tmp_path: Path) -> None:
    saved = create_model(name, num_classes=10, in_channels=1)
    saved(torch.randn(4, 1, 32, 32))  # moves the running statistics
    save_weights(saved, tmp_path / "new folder" / "weights.safetensors")
    loaded = create_model(name, num_classes=10, in_channels=1)
    load_weights(loaded, tmp_path / "new folder" / "weights.safetensors")
    for key, value in saved.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar"])
@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model_state_dict", "model", "net", "both"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "model.", "net.backbone."])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_other_tools_load(suffix: str, wrap: str, prefix: str, zipped: bool, tmp_path: Path) -> None:
    saved, loaded = small_model(), small_model()
    state: object = OrderedDict((prefix + name, value) for name, value in saved.state_dict().items())
    if wrap == "both":
        state = {"model": {"state_dict": state}}
    elif wrap != "bare":
        state = {wrap: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    load_weights(loaded, path)
    for key, value in saved.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_a_prefix_is_left_out_only_where_the_names_of_the_model_lack_it(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(3, 2))
    outer = nn.Sequential(OrderedDict(model=inner))
    torch.save(outer.state_dict(), tmp_path / "outer.pth")
    for network in (nn.Sequential(nn.Linear(3, 2)), nn.Sequential(OrderedDict(model=nn.Sequential(nn.Linear(3, 2))))):
        load_weights(network, tmp_path / "outer.pth")
        assert all(map(torch.equal, network.parameters(), outer.parameters()))
    torch.save({f"module.model.{name}": value for name, value in inner.state_dict().items()}, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(model\.0\.weight, model\.0\.bias\)"):
        load_weights(nn.Sequential(OrderedDict(other=nn.Linear(3, 2))), tmp_path / "both.pth")


def test_wrapped_models_save_and_load_under_plain_names(tmp_path: Path) -> None:
    wrapped, plain = nn.DataParallel(small_model()), small_model()
    save_weights(wrapped, tmp_path / "weights.safetensors")
    load_weights(plain, tmp_path / "weights.safetensors")
    assert torch.equal(head(plain), head(wrapped.module))
    again = nn.DataParallel(small_model())
    load_weights(again, tmp_path / "weights.safetensors")
    assert torch.equal(head(again.module), head(plain))


def test_half_precision_weights_load_into_a_full_precision_model(tmp_path: Path) -> None:
    model, state = small_model(), small_model().half().state_dict()
    torch.save(state, tmp_path / "half.pth")
    load_weights(model, tmp_path / "half.pth")
    assert head(model).dtype == torch.float32
    assert torch.equal(head(model), state["linear.weight"].float())


def test_old_checkpoints_without_batch_counters_load(tmp_path: Path) -> None:
    saved, loaded = small_model(), small_model()
    state = {k: v for k, v in saved.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    load_weights(loaded, tmp_path / "old.pth")
    assert torch.equal(head(loaded), head(saved))


def test_shared_and_strided_tensors_can_be_saved(tmp_path: Path) -> None:
    shared, strided = nn.Linear(3, 3), nn.Conv2d(2, 2, 3)
    strided.weight.data = strided.weight.data.contiguous(memory_format=torch.channels_last)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": strided})
    save_weights(model, tmp_path / "weights.safetensors")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.zeros_(shared.weight)
    nn.init.zeros_(strided.weight)
    load_weights(model, tmp_path / "weights.safetensors")
    assert model["a"].weight is model["b"].weight
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(small_model(), path)
    before = path.read_bytes()

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssdkd.models.loading.os.fsync", disk_full)
    with pytest.raises(CheckpointError) as error:
        save_weights(small_model(), path)
    assert "No space left on device" in message_of(error)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_are_saved_as_safetensors_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        save_weights(small_model(), tmp_path / "weights.pth")
    assert ".safetensors" in message_of(error)
    assert not list(tmp_path.iterdir())


# Weights: files that are refused


class Intruder:
    """Leaves a trace on the disk if anybody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


class Custom:
    """A class of somebody's training script."""


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_runs_none(form: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    bait = {"state_dict": {**small_model().state_dict(), "intruder": Intruder(trace)}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(bait))
    else:
        torch.save(bait, path, _use_new_zipfile_serialization=form == "zip")
    text = load_error(small_model(), path)
    assert "nothing in it was run" in text
    assert "safetensors" in text
    assert not trace.exists()


def test_a_whole_pickled_model_is_refused_with_the_class_and_the_way_out(tmp_path: Path) -> None:
    torch.save({"model": small_model().state_dict(), "args": Custom()}, tmp_path / "weights.pth")
    text = load_error(small_model(), tmp_path / "weights.pth")
    assert "Custom" in text
    assert "save_file(model.state_dict()" in text


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/data.pkl", b"")
        archive.writestr("program/constants.pkl", b"")
    assert "TorchScript" in load_error(small_model(), path)


def test_a_missing_file_a_folder_and_an_unknown_kind_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in load_error(small_model(), tmp_path / "no.pth")
    assert "is not a file" in load_error(small_model(), tmp_path)
    (tmp_path / "empty.pth").touch()
    assert "is empty" in load_error(small_model(), tmp_path / "empty.pth")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    assert "unknown kind" in load_error(small_model(), tmp_path / "weights.onnx")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(form: str, kept: float, tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_weights(model, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(3, int(kept * len(whole)))])
    assert "damaged or cut short" in load_error(model, path)


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_page_or_a_pointer_saved_as_weights_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    said = load_error(small_model(), path)
    assert "damaged or cut short" in said
    assert "weights_only" not in said, "PyTorch's own words advise to run what the file holds"


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        junk = bytes(torch.randint(0, 256, (200,), generator=generator).tolist())
        for name, start in (("a.pth", b"\x80\x02"), ("b.pth", b"PK\x03\x04"), ("c.safetensors", b"")):
            path = tmp_path / f"{trial}{name}"
            path.write_bytes(start + junk)
            assert "weights_only" not in load_error(small_model(), path)


@pytest.mark.parametrize("claimed", [2**63, 2**40, 10_000])
def test_a_safetensors_header_that_claims_more_than_the_file_is_refused(claimed: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}" + b" " * 100)
    assert f"claims {claimed} bytes but 102 are there" in load_error(small_model(), path)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
            "promises 4000000000000",
        ),
        ({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 16]}}, "not a valid safetensors file"),
        (
            {"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
            "not a valid safetensors file",
        ),
        ({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "not a valid safetensors file"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": "0, 16"}}, "safetensors"),
        ({"w": 3}, "no readable safetensors header"),
        ([], "no readable safetensors header"),
    ],
)
def test_a_safetensors_header_that_lies_about_its_tensors_is_refused(
    header: object, expected: str, tmp_path: Path
) -> None:
    encoded = json.dumps(header).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(16))
    assert expected in load_error(small_model(), path)


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(20_000_000))
    text = load_error(small_model(), path)
    assert "would unpack to 20000" in text
    assert "was refused" in text


def test_a_torch_file_whose_tensors_claim_more_than_is_stored_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "honest.pth")
    path = tmp_path / "lying.pth"
    with zipfile.ZipFile(tmp_path / "honest.pth") as honest, zipfile.ZipFile(path, "w") as lying:
        for entry in honest.infolist():
            data = honest.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"Kd" in data
                data = data.replace(b"Kd", b"J\x00\x00\x00\x7f")
            lying.writestr(entry.filename, data)
    load_error(small_model(), path)


def test_weights_of_another_model_list_the_first_few_differences(tmp_path: Path) -> None:
    torch.save(create_model("wrn16_1", num_classes=10).state_dict(), tmp_path / "weights.pth")
    model = create_model("wrn40_1", num_classes=10)
    text = load_error(model, tmp_path / "weights.pth")
    assert "120 missing (block1.layer.2.bn1.weight, block1.layer.2.bn1.bias, " in text
    assert "..." in text
    assert "unexpected" not in text
    assert "check the model's name" in text

    text = load_error(small_model(), tmp_path / "weights.pth")
    assert "missing (" in text
    assert "unexpected (" in text


def test_weights_of_another_width_list_shapes(tmp_path: Path) -> None:
    torch.save(create_model("wrn16_2", num_classes=10).state_dict(), tmp_path / "weights.pth")
    text = load_error(create_model("wrn16_1", num_classes=10), tmp_path / "weights.pth")
    assert "block1.layer.0.conv1.weight 32x16x3x3 instead of 16x16x3x3" in text
    assert "3 unexpected (block1.layer.0.convShortcut.weight" not in text
    assert "1 unexpected (block1.layer.0.convShortcut.weight)" in text


@pytest.mark.parametrize("name", ["lenet5", "resnet8", "resnet18", "vgg8", "wrn16_1", "mobilenet_v2", "convnet"])
def test_a_different_number_of_classes_is_recognised(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(create_model(name, num_classes=100), path)
    text = load_error(create_model(name, num_classes=10), path)
    assert "a model with 100 classes, but the model here has 10" in text
    assert "set the number of classes to 100" in text


def test_a_layer_by_itself_with_another_number_of_classes_is_named_by_its_tensors(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 7).state_dict(), tmp_path / "weights.pth")
    assert "here has 5 (only weight and bias differ): set" in load_error(nn.Linear(4, 5), tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(suffix: str, value: float, tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / f"weights{suffix}"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["linear.bias"][3] = value
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    text = load_error(model, path)
    assert "NaN or infinite numbers in linear.bias" in text


def test_weights_too_large_for_the_models_number_type_are_refused(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in small_model().state_dict().items()}
    state["linear.bias"] = torch.full((10,), 1e300, dtype=torch.float64)
    torch.save(state, tmp_path / "weights.pth")
    assert "linear.bias" in load_error(small_model(), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({}, "holds nothing"),
        (torch.zeros(2), "holds a Tensor, not tensors by name"),
        ({"epoch": 3}, "entry 'epoch', a int"),
        ({"state_dict": {"a": torch.zeros(1), "lr": 0.1}}, "entry 'lr', a float"),
        ({3: torch.zeros(1)}, "entry 3, a Tensor"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(content: object, expected: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert expected in load_error(small_model(), tmp_path / "weights.pth")


@pytest.mark.parametrize("kind", ["sparse", "meta", "complex"])
def test_tensors_that_hold_no_plain_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    state = dict(small_model().state_dict())
    weight = state["linear.weight"]
    changed = {"sparse": weight.to_sparse, "meta": lambda: weight.to("meta"), "complex": lambda: weight + 0j}
    state["linear.weight"] = changed[kind]()
    torch.save(state, tmp_path / "weights.pth")
    assert "holds linear.weight in a form that cannot be used" in load_error(small_model(), tmp_path / "weights.pth")


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(2, 3, 8, 8), (1, 5, 7, 9), (2, 1, 2, 3)])
def test_pooling_without_a_gradient_is_the_same(size: tuple[int, ...], layout: torch.memory_format) -> None:
    maps = torch.randn(size).contiguous(memory_format=layout)
    maps[0, 0, 0, 0] = torch.nan
    expected = F.max_pool2d(maps, 2)
    assert torch.equal(halved(maps.requires_grad_()).nan_to_num(9.0), expected.nan_to_num(9.0))
    with torch.no_grad():
        pooled = halved(maps)
    assert torch.equal(pooled.nan_to_num(9.0), expected.nan_to_num(9.0))
    assert pooled.is_contiguous(memory_format=layout)


def test_a_network_that_pools_can_be_recorded() -> None:
    network, images = (
        create_model("lenet5", {}, num_classes=10, in_channels=1, image_size=28).eval(),
        torch.randn(2, 1, 28, 28),
    )
    traced = torch.jit.trace(network, images)  # compares one recording with a gradient and one without
    with torch.no_grad():
        assert torch.allclose(traced(images), network(images), atol=1e-6)
        exported = torch.export.export(network, (images,))
    assert any("max_pool2d" in str(node.target) for node in exported.graph.nodes)


def test_an_imported_model_is_tried_on_images_as_high_and_wide_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 10))\n"
    (tmp_path / "wide_nets.py").write_text(flat)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    model = create_model("wide_nets:build", image_shape=(8, 16), **task)
    assert model(torch.zeros(2, 1, 8, 16)).shape == (2, 10)
    with pytest.raises(ConfigError, match=r"cannot take images of shape \(1, 8, 8\)"):
        create_model("wide_nets:build", **task)
