"""The inverters: a meta-learned generator that adapts to each batch in a few steps, or a few steps on textures.

Each call of the first, a copy of the base generator adapts together with fresh latents; the base then takes a
first-order step toward what helped (FOMAML or Reptile), so that the next copy starts nearer. The others learn
nothing from call to call: they bend random textures, pixel by pixel or on all scales at once.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdkd.buffer import random_views, render
from ssdkd.devices import laid_out
from ssdkd.errors import ConfigError
from ssdkd.inversion.generators import ConvGenerator, standard_latents, to_bytes
from ssdkd.inversion.observer import Observer
from ssdkd.inversion.terms import TERMS, Scene
from ssdkd.inversion.textures import random_textures

JITTER = 2  # pixels by which the search on a pyramid looks past its images, so that none of them counts alone


@dataclass(frozen=True)
class InverterSettings:
    """How a batch of candidates is searched for; what each means stands in `ssdkd.config.InversionConfig`."""

    steps: int
    latent: int
    generator_rate: float
    latent_rate: float
    meta_rate: float
    meta: Literal["fomaml", "reptile", "continue"]
    memory: float
    pixel_rate: float = 0.05
    terms: dict[str, float] = field(default_factory=dict)
    shift: int = 0  # pixels by which each step moves the images that it looks at, at most
    flip: bool = False  # whether it mirrors half of them
    border: str = "mirrored"  # what a shift brings in


class Search:
    """What every search for images shares: what is seen of a batch, and what it is worth."""

    def __init__(
        self,
        observer: Observer,
        mean: Tensor,
        std: Tensor,
        settings: InverterSettings,
        random: torch.Generator,
        autocast: AbstractContextManager[Any],
    ) -> None:
        """`mean` and `std` (1, c, 1, 1) are the teacher's normalisation of pixels in [0, 1]."""
        self.observer = observer
        self.mean, self.std = mean, std
        self.settings = settings
        self.random = random
        self.autocast = autocast
        self.remembered: list[tuple[Tensor, Tensor]] | None = None
        self.pace = 1.0  # share of the rates of `settings`
        self.layout = torch.channels_last  # in which the teacher's inputs lie
        self._reads = {TERMS[name].reads for name, weight in settings.terms.items() if weight}
        self.reads_student = "student" in self._reads

    def invert(
        self, targets: Tensor, student: nn.Module | None, adversarial: float, steps: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Search images for `targets` (B,): -> images (B, H, W, c) uint8 and each term's last value.

        `student`, in evaluation mode, is what the adversarial terms search against; `adversarial` scales them. The
        search takes `steps`, by default those of the settings.
        """
        raise NotImplementedError

    def _look(self, images: Tensor, targets: Tensor, student: nn.Module | None) -> Scene:
        with self.autocast:
            inputs = laid_out((self._augmented(images) - self.mean) / self.std, self.layout)
            teacher_logits = self.observer.observe(
                inputs, statistics="statistics" in self._reads, features="features" in self._reads
            )
            student_logits = student(inputs).float() if student is not None and self.reads_student else None
        return Scene(
            images=images,
            inputs=inputs,
            targets=targets,
            teacher_logits=teacher_logits,
            student_logits=student_logits,
            batch=self.observer.batch,
            remembered=self.remembered,
            running=self.observer.running,
            features=self.observer.features,
            memory=self.settings.memory,
        )

    def _augmented(self, images: Tensor) -> Tensor:
        """Each image (B, c, H, W) under a random view of its own, as the settings allow."""
        settings = self.settings
        if not settings.shift and not settings.flip:
            return images
        views = random_views(len(images), 2, settings.shift, settings.flip, self.random)[:, 1]
        rows = torch.arange(len(images), device=images.device)
        return render(images.permute(0, 2, 3, 1), rows, views, settings.border)

    def _weigh(self, scene: Scene, adversarial: float) -> tuple[Tensor, dict[str, Tensor]]:
        total = scene.images.new_zeros(())
        values: dict[str, Tensor] = {}
        for name, weight in self.settings.terms.items():
            term = TERMS[name]
            searches_student = term.reads == "student"
            if weight == 0 or (searches_student and scene.student_logits is None):
                continue
            if term.reads == "statistics" and not scene.batch:
                continue
            value = term.compute(scene)
            values[name] = value.detach()
            total = total + (weight * adversarial if searches_student else weight) * value
        if not total.requires_grad:
            raise ConfigError(
                "inversion.terms: none of them can be searched by, of this teacher and before there is a student; give "
                "one_hot or balance a weight."
            )
        return total, values

    @torch.no_grad()
    def _remember(self, batch: list[tuple[Tensor, Tensor]]) -> None:
        """Average the statistics over batches: a small batch alone is a noisy witness of a whole data set."""
        if self.settings.memory == 0 or not batch:
            return
        seen = [(mean.detach(), variance.detach()) for mean, variance in batch]
        if self.remembered is None:
            self.remembered = seen
            return
        share = 1.0 - self.settings.memory
        self.remembered = [
            (torch.lerp(past_mean, mean, share), torch.lerp(past_variance, variance, share))
            for (past_mean, past_variance), (mean, variance) in zip(self.remembered, seen, strict=True)
        ]

    def slow_down(self, pace: float) -> None:
        """Go on with this share of the rates in the settings."""
        self.pace = pace

    def state_dict(self) -> dict[str, Any]:
        return {"remembered": self.remembered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        remembered, device = state["remembered"], self.mean.device
        self.remembered = (
            None if remembered is None else [(mean.to(device), variance.to(device)) for mean, variance in remembered]
        )


class Inverter(Search):
    """Turns target classes into images that the teacher takes for its own data."""

    def __init__(
        self,
        generator: ConvGenerator,
        observer: Observer,
        mean: Tensor,
        std: Tensor,
        settings: InverterSettings,
        random: torch.Generator,
        autocast: AbstractContextManager[Any],
    ) -> None:
        super().__init__(observer, mean, std, settings, random, autocast)
        self.base = generator
        self.adapted = copy.deepcopy(generator)
        self.base_optimizer = torch.optim.Adam(
            self.base.parameters(), lr=settings.meta_rate, betas=(0.5, 0.999), fused=True
        )

    def invert(
        self, targets: Tensor, student: nn.Module | None, adversarial: float, steps: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Search.invert`; the images are those of the step with the smallest loss."""
        settings = self.settings
        fast = self.adapted
        _copy(fast, self.base)
        latents = standard_latents(len(targets), settings.latent, self.random).requires_grad_(True)
        parameters = list(fast.parameters())
        optimizer = torch.optim.Adam(
            [
                {"params": parameters, "lr": settings.generator_rate * self.pace},
                {"params": [latents], "lr": settings.latent_rate * self.pace},
            ],
            betas=(0.5, 0.999),
            fused=True,
        )
        summed = [torch.zeros_like(p) for p in parameters] if settings.meta == "fomaml" else []
        best_loss: Tensor | None = None
        best_images = torch.empty(0)
        values: dict[str, Tensor] = {}
        for _ in range(steps or settings.steps):
            with self.autocast:
                images = fast(latents, targets)
            scene = self._look(images, targets, student)
            loss, values = self._weigh(scene, adversarial)
            gradients = torch.autograd.grad(loss, [*parameters, latents])
            gradients = tuple(g.nan_to_num(0.0, 0.0, 0.0) for g in gradients)  # of a teacher that answers NaN
            detached, seen = loss.detach(), images.detach()
            if best_loss is None:
                best_loss, best_images = detached, seen
            else:
                better = (detached < best_loss) | ~best_loss.isfinite()
                best_images = torch.where(better, seen, best_images)
                best_loss = torch.where(better, detached, best_loss)
            if summed:
                torch._foreach_add_(summed, gradients[:-1])
            for parameter, gradient in zip([*parameters, latents], gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        self._move_base(summed)
        self._remember(scene.batch)
        return to_bytes(best_images), {"loss": cast(Tensor, best_loss), **values}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin the base's first layer, and the batch norm that follows it, anew; what lies behind them stays."""
        first: tuple[Any, ...] = (self.base.project, self.base.body[0])
        for layer in first:
            layer.weight.normal_(0.0, 0.02, generator=self.random)
            layer.bias.zero_()

    @torch.no_grad()
    def _move_base(self, summed: list[Tensor]) -> None:
        base: list[Tensor] = list(self.base.parameters())
        fast: list[Tensor] = list(self.adapted.parameters())
        if self.settings.meta == "continue":
            torch._foreach_copy_(base, fast)
        else:
            toward = summed or [b - f for b, f in zip(base, fast, strict=True)]
            for parameter, gradient in zip(base, toward, strict=True):
                parameter.grad = gradient
            self.base_optimizer.step()
        torch._foreach_copy_(list(self.base.buffers()), list(self.adapted.buffers()))

    def slow_down(self, pace: float) -> None:
        super().slow_down(pace)
        for group in self.base_optimizer.param_groups:
            group["lr"] = self.settings.meta_rate * pace

    def state_dict(self) -> dict[str, Any]:
        of_generator = {"base": self.base.state_dict(), "base_optimizer": self.base_optimizer.state_dict()}
        return {**super().state_dict(), **of_generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.base.load_state_dict(state["base"])
        self.base_optimizer.load_state_dict(state["base_optimizer"])


class FromTextures(Search):
    """What the searches that start from random textures share."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        observer: Observer,
        mean: Tensor,
        std: Tensor,
        settings: InverterSettings,
        random: torch.Generator,
        host_random: torch.Generator,
        autocast: AbstractContextManager[Any],
    ) -> None:
        super().__init__(observer, mean, std, settings, random, autocast)
        self.image_shape = image_shape
        self.host_random = host_random  # for numbers that the host needs to know

    def _textures(self, count: int) -> Tensor:
        """Where the search starts: -> (count, c, H, W)."""
        return random_textures(count, self.image_shape, self.mean, self.std, self.random, self.host_random)


class TextureInverter(FromTextures):
    """Searches on the pixels themselves, from random textures: what a teacher without batch norm needs.

    Nothing then tells a generator what the teacher's data looked like, and images that it is sure of are far from
    them. A few short steps from a texture bend it toward a class and to where the student errs, and no further.
    """

    def invert(
        self, targets: Tensor, student: nn.Module | None, adversarial: float, steps: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = self._textures(len(targets))
        values: dict[str, Tensor] = {}
        for _ in range(steps or self.settings.steps):
            images.requires_grad_(True)
            scene = self._look(images, targets, student)
            loss, values = self._weigh(scene, adversarial)
            (slope,) = torch.autograd.grad(loss, images)
            # the same step for every image, however steep its loss; outliers cut, so that it spreads over pixels
            slope = slope.nan_to_num(0.0, 0.0, 0.0)  # of a teacher that answers NaN
            slope = slope / (slope.abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-12)
            images = (images.detach() - self.settings.pixel_rate * self.pace * slope.clamp(-2.0, 2.0)).clamp(0.0, 1.0)
            values = {"loss": loss.detach(), **values}
        self._remember(scene.batch)
        return to_bytes(images), values


class PyramidInverter(FromTextures):
    """Searches from random textures on all scales at once, where batch norm tells what the teacher's data was like.

    What is searched for is a pyramid of corrections, each twice as coarse as the one before, that add up to one:

        image = texture + 32x32 + enlarged(16x16) + enlarged(8x8) + enlarged(4x4)

    An optimiser that steps every number alike (Adam) then moves colours and shapes as fast as it moves pixels, so that
    ten steps or so are enough; and unlike a generator it needs no rounds of practice.
    """

    COARSEST = 4  # pixels across at the pyramid's top

    def invert(
        self, targets: Tensor, student: nn.Module | None, adversarial: float, steps: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        textures = self._textures(len(targets)).contiguous(memory_format=torch.channels_last)
        levels = self._levels(len(targets), textures.device)
        optimizer = torch.optim.Adam(levels, lr=settings.pixel_rate * self.pace, betas=(0.5, 0.9), fused=True)
        reach = JITTER + 1
        shape = (steps or settings.steps, 2)
        chance = self.host_random
        shifts = torch.randint(1 - reach, reach, shape, generator=chance, device=chance.device)
        values: dict[str, Tensor] = {}
        for shift in shifts.tolist():
            images = self._image(textures, levels)
            scene = self._look(torch.roll(images, shift, (2, 3)), targets, student)
            loss, values = self._weigh(scene, adversarial)
            for level, slope in zip(levels, torch.autograd.grad(loss, levels), strict=True):
                level.grad = slope.nan_to_num(0.0, 0.0, 0.0)  # of a teacher that answers NaN
            optimizer.step()
            values = {"loss": loss.detach(), **values}
        self._remember(scene.batch)
        with torch.no_grad():
            return to_bytes(self._image(textures, levels)), values

    def _levels(self, count: int, device: torch.device) -> list[Tensor]:
        """Nothing added yet, at each scale."""
        channels, height, width = self.image_shape
        levels: list[Tensor] = []
        while min(height, width) >= self.COARSEST or not levels:
            level = torch.zeros((count, channels, height, width), device=device)
            levels.append(level.contiguous(memory_format=torch.channels_last).requires_grad_(True))
            height, width = (height + 1) // 2, (width + 1) // 2
        return levels

    def _image(self, textures: Tensor, levels: list[Tensor]) -> Tensor:
        """What the corrections make of the textures: -> (B, c, H, W), clipped where no pixel can be."""
        size = self.image_shape[1:]
        coarse = sum(F.interpolate(level, size, mode="bilinear") for level in levels[1:])
        return (textures + levels[0] + coarse).clamp(-0.1, 1.1)


@torch.no_grad()
def _copy(into: nn.Module, source: nn.Module) -> None:
    """Copy parameters and buffers, without a loop in Python over them."""
    for kind in ("parameters", "buffers"):
        targets: list[Tensor] = list(getattr(into, kind)())
        sources: list[Tensor] = list(getattr(source, kind)())
        torch._foreach_copy_(targets, sources)
