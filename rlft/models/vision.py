"""Features of the images of a batch: the frozen vision tower, run once per image and step.

The rows of an image in the embedded tokens are replaced by its features. Qwen3-VL's tower has further features, which
are added to the residual stream behind the first layers of the decoder (deepstack). Both are held in host memory by the
digest of the image, up to a number of bytes, and nothing of them has a gradient. With an adapter on the tower
(`lora.vision`) nothing is held: each pass computes the features under the adapter that is active.

Shapes: n rows of images in a batch, H hidden size, L layers with deepstack features.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlft.config.data import Data
from rlft.data.image_readers import ImageReader
from rlft.environment import install, version
from rlft.errors import ConfigError
from rlft.models import image_processor
from rlft.models.cross import CrossStates
from rlft.models.kind import seeing_of, tower_of
from rlft.models.locate import explained, locate
from rlft.positions import feature_places
from rlft.types import Image
from rlft.upload import upload

LIMIT = 2 * 2**30
"""Bytes of features that are held in host memory; beyond them those used least recently are computed again."""
PATCHES = 16384
"""Patches that the tower takes at a time; a larger image runs alone."""
TRAINED = 4096
"""The same where the tower has a gradient, whose activations take many times as much."""


def image_reader(model: str, config: Any, data: Data | None = None) -> ImageReader | None:
    """Load what reads the images of a model; None for one that takes text alone.

    config: of transformers. data: for the limits of an image's pixels. Raises ConfigError for a model without a
    processor, or with one whose images do not fit its tower.
    """
    limits = {name: getattr(data, name) for name in ("min_pixels", "max_pixels") if data is not None}
    options: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if config is None:
        return None
    seeing = seeing_of(config)
    if options and (seeing is None or not seeing.limited):
        name, value = next(iter(options.items()))
        why = "takes text alone" if seeing is None else "has an image processor without such a limit"
        raise ConfigError(f'data.{name} = {value}: model = "{model}" {why}; leave it out')
    if seeing is None:
        return None
    if version("pillow") is None:
        raise ConfigError(f'model = "{model}" takes images, which need Pillow: {install("images")}')
    from transformers import AutoImageProcessor

    location = locate(model)
    with explained(model, location, "its image processor"):
        # False: code from the hub is not run, and transformers does not prompt for it.
        processor = AutoImageProcessor.from_pretrained(location.path, trust_remote_code=False, **options)
    return image_processor.reader_of(model, processor, config)


def adapted_tower(model: Any) -> bool:
    """Return whether the adapter of a PEFT model is on its vision tower too. Raises ConfigError for dropout there."""
    base = model.get_base_model()
    tower = tower_of(base.config)
    if not any(name.startswith(tower) and ".lora_A." in name for name, _ in base.named_parameters()):
        return False
    if any(getattr(module, "p", 0) for name, module in base.named_modules() if ".lora_dropout." in name):
        raise ConfigError(
            "lora.dropout with an adapter on the vision tower: the tower runs again in the backward, without dropout; "
            "set lora.dropout = 0"
        )
    return True


def save_image_processor(model: str, config: Any, data: Data | None, folder: Path) -> None:
    """Write the image processor of a model that takes images beside its weights, with the pixel limits of a run."""
    reader = image_reader(model, config, data)
    if reader is not None:
        reader.processor.save_pretrained(folder)


class Features(NamedTuple):
    """Features of one image, on the host."""

    rows: Tensor
    """[features, H], in place of embedded tokens."""
    deep: tuple[Tensor, ...]
    """L of [features, H], added behind layer 0, 1, ...; none in most families."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.rows, *self.deep))


@dataclass(frozen=True)
class ImageRows:
    """The features of all images in a batch, on the device."""

    rows: Tensor
    """[n] int64: rows of the batch."""
    features: Tensor
    """[n, H]: what is there in place of the embedded tokens."""
    deep: tuple[Tensor, ...] = ()
    """L of [n, H], added to the output of layer 0, 1, ..."""
    blocks: Tensor | None = None
    """[n] int64: the image of each row, where all rows of an image attend to each other; None: rows are causal."""

    def embedded(self, tokens: Tensor) -> Tensor:
        """Return embedded tokens [T, H] with the features in place of those of images."""
        return tokens.index_copy(0, self.rows, self.features.to(tokens.dtype))

    def spread(self, tokens: Tensor) -> ImageRows | None:
        """Return the same for rows that each repeat a row of the batch; None where none of them is an image's.

        tokens: [rows] int64, the row of the batch that each repeats, -1 for none.
        """
        found = tokens.new_full((int(max(tokens.max(), self.rows.max())) + 2,), -1)  # the last one is that of -1
        found[self.rows] = torch.arange(len(self.rows), device=tokens.device)
        places = found[tokens]
        rows = (places >= 0).nonzero().squeeze(1)
        if not len(rows):
            return None
        places = places[rows]
        blocks = None if self.blocks is None else self.blocks[places]
        return ImageRows(rows, self.features[places], tuple(deep[places] for deep in self.deep), blocks)

    def behind(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the output [T, H] of a layer, in place, with what is added behind it."""
        if layer >= len(self.deep):
            return hidden
        return hidden.index_add_(0, self.rows, self.deep[layer].to(hidden.dtype))


Seen = ImageRows | CrossStates
"""What a decoder gets of the images of a batch."""


class Vision:
    """The vision tower of a base, with the features of the images of a step."""

    def __init__(self, base: Any, reader: ImageReader, limit: int = LIMIT, trained: bool = False) -> None:
        """base: a model of a type in `rlft.models.kind.SEEING`. limit: bytes of features that are held. trained: the
        tower has an adapter, so that nothing is held, and features have a gradient where it is enabled."""
        seeing = seeing_of(base.config)
        assert seeing is not None
        self.reader, self.seeing, self.trained = reader, seeing, trained
        self._base, self._limit = base, limit
        self._held: OrderedDict[tuple[str, int, int], Features] = OrderedDict()
        self._bytes = 0

    @property
    def peak(self) -> int:
        """Bytes of device memory that the tower takes while it runs over as many images as it may."""
        config, item = self._base.config, self._base.get_input_embeddings().weight.dtype.itemsize
        without = tower_bytes(config, max(PATCHES, self.reader.most_patches), item)
        if not self.trained:
            return without
        return max(without, trained_bytes(config, max(TRAINED, self.reader.most_patches), item))

    def clear(self) -> None:
        """Forget all features, at the start of a step.

        Images then run together as in a resumed run, so that their features are the same bits.
        """
        self._held.clear()
        self._bytes = 0

    def rows(self, placed: Sequence[tuple[Image, int]], device: torch.device) -> Seen:
        """Return the features of images for the rows of a batch. placed: each with the row of its first token.

        Raises DataError for an image whose file has changed.
        """
        images = [image for image, _ in placed]
        features = self._with_gradient(images) if self.trained and torch.is_grad_enabled() else self.features(images)
        if placed[0][0].layout == "cross":
            tiles = self._base.config.vision_config.max_num_tiles
            states = tuple(_on(device, each.rows) for each in features)
            shares = (len(each) // tiles * image.width for each, (image, _) in zip(states, placed, strict=True))
            return CrossStates(states, tuple(shares))
        rows = torch.from_numpy(np.concatenate([row + feature_places(image) for image, row in placed]))
        blocks = None
        if any(image.layout == "block" for image, _ in placed):
            lengths = torch.tensor([image.tokens for image, _ in placed])
            blocks = upload(torch.arange(len(placed)).repeat_interleave(lengths), device)
        deep = zip(*(each.deep for each in features), strict=True)
        return ImageRows(
            upload(rows, device),
            _on(device, torch.cat([each.rows for each in features])),
            tuple(_on(device, torch.cat(layer)) for layer in deep),
            blocks,
        )

    def features(self, images: Sequence[Image]) -> list[Features]:
        """Return the features of each image; those of equal images are computed once. Raises DataError."""
        found = {_key(image): self._held[_key(image)] for image in images if _key(image) in self._held}
        missing = {_key(image): image for image in images if _key(image) not in found}
        # In the parts that the pass with gradient has, whose results are to be equal to the bit.
        for part in _parts(list(missing.values()), self.reader, TRAINED if self.trained else PATCHES):
            for image, features in zip(part, self._computed(part), strict=True):
                found[_key(image)] = features
        for key, features in found.items() if not self.trained else ():
            self._hold(key, features)
        return [found[_key(image)] for image in images]

    def _computed(self, images: Sequence[Image]) -> Iterator[Features]:
        """Run the tower over images that fit together, without gradient."""
        given = self._given(images)
        # Tensors of inference mode, in which engines sample, could not be used by a training pass.
        with torch.inference_mode(False), torch.no_grad():
            for features in self._run(images, given):
                yield Features(_on_host(features.rows), tuple(map(_on_host, features.deep)))

    def _with_gradient(self, images: Sequence[Image]) -> list[Features]:
        """Return the features of each image on the device, with gradient to the adapter of the tower.

        The tower runs again in the backward, for a few images at a time, so that its activations are there for these
        alone, when those of the decoder are gone.
        """
        found: dict[tuple[str, int, int], Features] = {}
        for part in _parts(list({_key(image): image for image in images}.values()), self.reader, TRAINED):
            given = self._given(part)
            features: Any = checkpoint(lambda *args: tuple(self._run(*args)), part, given, use_reentrant=False)
            found |= zip(map(_key, part), features, strict=True)
        return [found[_key(image)] for image in images]

    def _given(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return the tower's arguments on its device. Raises DataError for an image whose file has changed."""
        device = self._base.get_input_embeddings().weight.device
        return {name: tensor.to(device) for name, tensor in self.reader.given(images).items()}

    def _run(self, images: Sequence[Image], given: dict[str, Tensor]) -> Iterator[Features]:
        """Run the tower over images together; their features are on its device."""
        out = image_features(self._base, given)
        # transformers 5.17 returns deepstack features of all images together, 5.19 by image.
        layers = getattr(out, "deepstack_features", None) or ()
        sizes = [len(rows) for rows in out.pooler_output]
        parts = [layer.split(sizes) if isinstance(layer, Tensor) else layer for layer in layers]
        deep = list(zip(*parts, strict=True)) or [()] * len(images)
        for image, rows, added in zip(images, out.pooler_output, deep, strict=True):
            fits = image.layout == "cross" or len(rows) == image.height * image.width
            assert fits, f"{len(rows)} features of an image of {image.tokens} tokens"
            yield Features(rows, tuple(added))

    def _hold(self, key: tuple[str, int, int], features: Features) -> None:
        if key in self._held:
            self._held.move_to_end(key)
            return
        self._held[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._limit and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes


def image_features(base: Any, given: dict[str, Tensor]) -> Any:
    """Run the tower of a model and its projector. given: from `ImageReader.given`."""
    if base.config.model_type != "mllama":
        return base.get_image_features(**given)
    model = base.model
    with warnings.catch_warnings():
        # transformers 5.19 warns of the name of an argument by which it calls its own layers.
        warnings.filterwarnings("ignore", "`hidden_state` is deprecated", FutureWarning)
        states = model.multi_modal_projector(model.vision_model(**given).last_hidden_state)
    return SimpleNamespace(pooler_output=states.flatten(1, 3))


def tower_bytes(config: Any, patches: int, item: int) -> int:
    """Return the bytes of a tower's largest temporaries over patches of images, without gradient.

    config: of the model. item: bytes of an element of the tower's dtype.
    """
    vision: Any = config.vision_config
    if config.model_type == "mllama":
        return patches * _tile_patch_bytes(config, item)
    if not hasattr(vision, "temporal_patch_size"):
        return patches * (_plain_patch_bytes(vision, item) + (patches * item if vision.model_type == "pixtral" else 0))
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(vision.mlp_ratio * width)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    # Input and positions; queries, keys, values and their copies by head; the rotation of two of them in fp32.
    attention = 8 * width * item + 7 * width * 4
    # Input, positions and normed input; the activation of the gate, and the product of both.
    gated = (4 * width + 3 * inner) * item
    # A row of features for four patches, and those behind layers.
    out = vision.hidden_size if hasattr(vision, "embed_dim") else vision.out_hidden_size
    features = out * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))) // vision.spatial_merge_size**2
    return patches * (pixels * (4 + item) + max(attention, gated) + features * item)


def trained_bytes(config: Any, patches: int, item: int) -> int:
    """Return an upper bound of what a tower takes over patches of images while its adapter has a gradient.

    config: of the model. item: bytes of an element of the tower's dtype.
    """
    vision: Any = config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(vision.mlp_ratio * width)
    layers = (getattr(vision, "depth", None) or vision.num_hidden_layers) + getattr(vision, "num_global_layers", 0)
    # Of each layer: both norms, queries, keys and values with their rotation, attention's output, the MLP; inputs of
    # adapters are in fp32.
    kept = 24 * width + 6 * inner
    return tower_bytes(config, patches, item) + patches * layers * kept * max(item, 4)


def _tile_patch_bytes(config: Any, item: int) -> int:
    """Return the bytes per patch of the tower of Llama 3.2 Vision, whose patches of all tiles attend to each other."""
    vision = config.vision_config
    width, inner, layers = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    tile = (vision.image_size // vision.patch_size) ** 2 + 1
    padded = -(-tile // 8) * 8
    pixels = vision.num_channels * vision.patch_size**2
    # The mask between all patches of an image, twice while it is made.
    mask = 2 * vision.max_num_tiles * padded * item
    # Inputs of all layers, those that are read, again side by side, and with the last one.
    kept = (layers + 2 + len(vision.intermediate_layers_indices)) * width + vision.vision_output_dim
    hidden = 2 * width + max(5 * width, 2 * inner)
    return pixels * (4 + item) + padded * (kept * item + hidden * item + mask) // tile


def _plain_patch_bytes(vision: Any, item: int) -> int:
    """Return the bytes per patch of a tower of SigLIP, CLIP or Pixtral."""
    width, inner = vision.hidden_size, vision.intermediate_size
    pixels = vision.num_channels * vision.patch_size**2
    # Input and normed input; queries, keys, values, and attention's output.
    attention = 6 * width * item
    # Input and normed input; before and after the activation, whose tanh has two more.
    plain = (2 * width + 3 * inner) * item
    # Of CLIP and Pixtral, transformers returns the input of every layer, of which one is read; what the patches were
    # embedded to, and the state in front of CLIP's, are there too.
    kept = 0 if vision.model_type == "siglip_vision_model" else (vision.num_hidden_layers + 2) * width * item
    return pixels * (4 + item) + max(attention, plain) + kept


def _key(image: Image) -> tuple[str, int, int]:
    return image.digest, image.height, image.width


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    # Those with a gradient are there already.
    return tensor if tensor.requires_grad else upload(tensor, device)


def _on_host(tensor: Tensor) -> Tensor:
    # A copy on a CPU too: parts of one output would keep all of it.
    return tensor.to("cpu", copy=True)


def _parts(images: Iterable[Image], reader: ImageReader, most: int = PATCHES) -> Iterator[list[Image]]:
    """Divide images, in order, into parts of at most `most` patches."""
    part: list[Image] = []
    patches = 0
    for image in images:
        own = reader.patches(image)
        if part and patches + own > most:
            yield part
            part, patches = [], 0
        part.append(image)
        patches += own
    if part:
        yield part
