"""A procedural data set: anti-aliased shapes over fine textures, drawn from closed forms.

Its textures (checks, stripes, dots, weaves of a few pixels' period) are what a latent model blurs first, so a
model's sharpness can be seen and measured on it without any download. Image ``i`` of a split is a function of the
seed, the split and ``i`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from lpl_lightning.arguments import at_least
from lpl_lightning.data.base import ImageDataModule, Split, to_unit_range

__all__ = ["ShapesDataModule", "ShapesDataset"]

Array = npt.NDArray[Any]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "crescent", "hexagon")
TEXTURES = ("checks", "stripes", "dots", "weave")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.15, 0.16),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.93, 0.82, 0.20),
    "green": (0.20, 0.62, 0.22),
    "cyan": (0.15, 0.72, 0.78),
    "blue": (0.16, 0.32, 0.80),
    "purple": (0.50, 0.22, 0.68),
    "pink": (0.93, 0.45, 0.68),
}
COLOR_NAMES = tuple(COLORS)
SPLIT_SEED: dict[Split, int] = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Scene:
    """The parameters of one image; lengths are fractions of the image's side, angles in radians."""

    shape: int
    texture: int
    shape_color: int
    texture_color: int
    center: tuple[float, float]
    radius: float
    shape_angle: float
    period: float
    phase: tuple[float, float]
    texture_angle: float
    contrast: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Scene:
        """Draw a scene; the shape's colour is never the texture's."""
        shape, texture = rng.integers(len(SHAPES)), rng.integers(len(TEXTURES))
        shape_color = rng.integers(len(COLORS))
        texture_color = (shape_color + rng.integers(1, len(COLORS))) % len(COLORS)
        x, y = rng.uniform(0.40, 0.60, 2)
        u, v = rng.uniform(0.0, 1.0, 2)
        return cls(
            shape=int(shape),
            texture=int(texture),
            shape_color=int(shape_color),
            texture_color=int(texture_color),
            center=(float(x), float(y)),
            radius=float(rng.uniform(0.22, 0.34)),
            shape_angle=float(rng.uniform(-0.25, 0.25)),
            period=float(rng.uniform(0.09, 0.15)),
            phase=(float(u), float(v)),
            texture_angle=float(rng.uniform(-0.4, 0.4)),
            contrast=float(rng.uniform(0.5, 0.9)),
        )

    @property
    def caption(self) -> str:
        """For example ``a red star on blue checks``."""
        article = "an" if COLOR_NAMES[self.shape_color][0] in "aeiou" else "a"
        return (
            f"{article} {COLOR_NAMES[self.shape_color]} {SHAPES[self.shape]} "
            f"on {COLOR_NAMES[self.texture_color]} {TEXTURES[self.texture]}"
        )


def _rotated(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _polygon(x: Array, y: Array, sides: int, apothem: float) -> Array:
    """Largest signed distance to the sides' lines of a regular polygon with one vertex up."""
    angles = np.pi / sides + 2 * np.pi * np.arange(sides) / sides
    distances = [np.sin(a) * x - np.cos(a) * y - apothem for a in angles]
    return np.asarray(np.maximum.reduce(distances), np.float32)


def _shape_distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to a shape of unit radius, negative inside, exact near its edges."""
    radius = np.hypot(x, y)
    distance: Array
    match shape:
        case "circle":
            distance = radius - np.float32(0.9)
        case "square":
            distance = np.maximum(np.abs(x), np.abs(y)) - np.float32(0.8)
        case "triangle":
            distance = _polygon(x, y - np.float32(0.2), 3, 0.55)
        case "hexagon":
            distance = _polygon(x, y, 6, 0.85)
        case "ring":
            distance = np.abs(radius - np.float32(0.72)) - np.float32(0.24)
        case "cross":
            low, high = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
            distance = np.maximum(low - np.float32(0.3), high - np.float32(0.95))
        case "crescent":
            bite = np.hypot(x - np.float32(0.5), y)
            distance = np.maximum(radius - np.float32(0.95), np.float32(0.75) - bite)
        case "star":
            # Fold the plane into a tenth of the turn, where the one edge that is left is a straight line.
            angle = np.arctan2(x, -y)
            folded = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
            inner, outer = 0.45, 1.1
            px, py = radius * np.cos(folded), radius * np.sin(folded)
            ex, ey = inner * np.cos(np.pi / 5) - outer, inner * np.sin(np.pi / 5)
            distance = (((px - outer) * ey - py * ex) / np.hypot(ex, ey)).astype(np.float32)
        case _:
            raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")
    return distance


def _texture_level(texture: str, u: Array, v: Array, pixel: float) -> Array:
    """Brightness in [0, 1] of a texture of period 1, with edges about ``pixel`` periods wide."""
    steep = np.float32(1.0 / (2 * np.pi * pixel))

    def edge(wave: Array) -> Array:
        return np.asarray(np.clip(np.float32(0.5) + steep * wave, 0, 1))

    wave_u, wave_v = np.sin(2 * np.pi * u), np.sin(2 * np.pi * v)
    match texture:
        case "stripes":
            return edge(wave_u)
        case "checks":
            return edge(wave_u * wave_v)
        case "dots":
            distance = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
            return np.asarray(np.clip(0.5 + (0.32 - distance) / pixel, 0, 1), np.float32)
        case "weave":
            # Two threads, one over the other by turns.
            over = edge(np.sin(np.pi * u) * np.sin(np.pi * v))
            return np.asarray(over * (0.5 + 0.5 * wave_u) + (1 - over) * (0.5 + 0.5 * wave_v))
    raise ValueError(f"unknown texture {texture!r}; expected one of {TEXTURES}")


def render(scene: Scene, size: int) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side of the image, in pixels.

    Returns:
        (3, size, size) uint8, RGB in [0, 255].
    """
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(grid, grid)
    sx, sy = _rotated(x - np.float32(scene.center[0]), y - np.float32(scene.center[1]), scene.shape_angle)
    distance = _shape_distance(SHAPES[scene.shape], sx / scene.radius, sy / scene.radius)
    coverage = np.clip(0.5 - distance * (scene.radius * size), 0, 1)

    tu, tv = _rotated(x, y, scene.texture_angle)
    level = _texture_level(
        TEXTURES[scene.texture],
        tu / scene.period + np.float32(scene.phase[0]),
        tv / scene.period + np.float32(scene.phase[1]),
        pixel=1.0 / (scene.period * size),
    )
    color = np.asarray(COLORS[COLOR_NAMES[scene.texture_color]], np.float32)
    light = color + (1 - color) * 0.75
    dark = light + (color * 0.8 - light) * scene.contrast
    background = dark[:, None, None] + (light - dark)[:, None, None] * level
    foreground = np.asarray(COLORS[COLOR_NAMES[scene.shape_color]], np.float32)[:, None, None]
    image = background + (foreground - background) * coverage
    return np.asarray(np.round(image * 255), dtype=np.uint8)


class ShapesDataset(Dataset[dict[str, Any]]):
    """Shapes over textures; see the module's docstring.

    Args:
        length: Number of images.
        image_size: Side of the images, in pixels.
        split: Splits of one seed share no image.
        seed: Seed of the whole data set.
    """

    def __init__(self, length: int, image_size: int = 64, split: Split = "train", seed: int = 0) -> None:
        at_least(1, length=length)
        self.length = length
        self.image_size = image_size
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The parameters of image ``index``."""
        return Scene.draw(np.random.default_rng((self.seed, SPLIT_SEED[self.split], index)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        scene = self.scene(index)
        image = to_unit_range(torch.from_numpy(render(scene, self.image_size)))
        return {"image": image, "label": scene.shape, "caption": scene.caption}


class ShapesDataModule(ImageDataModule):
    """The embedded default: shapes over fine textures, made as they are asked for.

    Args:
        image_size: Side of the images, in pixels.
        train_images: Training images per epoch.
        val_images: Images for validation, and as many others for the test.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 draws in the training process.
        seed: Seed of the data set.
        num_generate: How many images ``lpl predict`` generates.
        generate_seed: Generated image ``i`` is drawn from seed ``generate_seed + i``.
        prompts: Text file of the captions that ``lpl predict`` goes round, one a line; None takes those of the
            validation images.
    """

    def __init__(
        self,
        image_size: int = 64,
        train_images: int = 20_000,
        val_images: int = 512,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        num_generate: int = 64,
        generate_seed: int = 0,
        prompts: str | Path | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers, num_generate, generate_seed, prompts)
        at_least(1, train_images=train_images, val_images=val_images)
        self.train_images = train_images
        self.val_images = val_images
        self.seed = seed

    @property
    def class_names(self) -> tuple[str, ...]:
        """The shapes' names."""
        return SHAPES

    @property
    def has_captions(self) -> bool:
        """True."""
        return True

    def validation_captions(self) -> Iterator[str]:
        """The captions of the validation images, in order."""
        val = self.dataset("val")
        return (val.scene(index).caption for index in range(len(val)))

    def dataset(self, split: Split) -> ShapesDataset:
        """The images of one split."""
        length = self.train_images if split == "train" else self.val_images
        return ShapesDataset(length, self.image_size, split, self.seed)
