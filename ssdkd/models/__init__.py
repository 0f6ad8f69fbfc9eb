"""Teachers and students: a zoo of small models by name, any other model by import path, and their weights.

    model = create_model("wrn16_2", num_classes=10)
    load_weights(model, "teacher.safetensors")

Adding a model is one function under `@register_model("name")`; see `ssdkd.models.registry`.
"""

from ssdkd.models import convnet, lenet, mobilenet, resnet, vgg, wide_resnet  # noqa: F401  (fills the registry)
from ssdkd.models.counting import count_multiply_adds, count_parameters, count_work
from ssdkd.models.loading import fingerprint, load_weights, save_trained, save_weights, unwrapped
from ssdkd.models.registry import available_models, create_model, register_model

__all__ = [
    "available_models",
    "count_multiply_adds",
    "count_parameters",
    "count_work",
    "create_model",
    "fingerprint",
    "load_weights",
    "register_model",
    "save_trained",
    "save_weights",
    "unwrapped",
]
