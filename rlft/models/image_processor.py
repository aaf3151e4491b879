"""Choose what reads the images of a model, and hold its image processor against its vision tower."""

from __future__ import annotations

from typing import Any

from rlft.data.image_readers import FramedReader, GridReader, ImageReader, LineReader, SquareReader, TileReader
from rlft.errors import ConfigError


def reader_of(model: str, processor: Any, config: Any) -> ImageReader:
    """Return the reader of a model that takes images. model: the setting. processor, config: of transformers.

    Raises ConfigError for a processor that does not fit the vision tower, and for settings of it that are not followed.
    """
    makers = {"gemma3": _gemma3, "llava": _llava, "mistral3": _mistral3, "mllama": _mllama}
    return makers.get(config.model_type, _grid)(model, processor, config)


def _grid(model: str, processor: Any, config: Any) -> ImageReader:
    """Return the reader of Qwen2-VL and its successors."""
    vision = config.vision_config
    names = ("patch_size", "merge_size", "temporal_patch_size", "do_resize")
    wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, True)
    _check(model, processor, dict(zip(names, wanted, strict=True)))
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    if least is None or most is None or least > most:
        raise ConfigError(
            f"data.min_pixels and data.max_pixels: the image processor of {model} would take images of at least "
            f"{least} and at most {most} pixels; set both"
        )
    return GridReader(processor, config.image_token_id, config.video_token_id)


def _gemma3(model: str, processor: Any, config: Any) -> ImageReader:
    """Return the reader of Gemma 3. Its pan and scan, which shows crops of an image beside it, is refused."""
    vision = config.vision_config
    if getattr(processor, "do_pan_and_scan", None):
        raise ConfigError(
            f'model = "{model}": its image processor has do_pan_and_scan = True, which shows crops beside each image '
            f"and is not supported; set it to false in preprocessor_config.json"
        )
    _check_squares(model, processor, vision.image_size)
    window, tokens = config.get_text_config().sliding_window, config.mm_tokens_per_image
    if window is not None and tokens > window:
        raise ConfigError(
            f'model = "{model}": an image of {tokens} tokens (mm_tokens_per_image) is longer than the window of '
            f"{window} (sliding_window), where versions of transformers differ; give a config whose images fit"
        )
    patches = (vision.image_size // vision.patch_size) ** 2
    frame = (config.boi_token_index, config.eoi_token_index)
    return FramedReader(processor, config.image_token_id, patches, tokens, frame)


def _llava(model: str, processor: Any, config: Any) -> ImageReader:
    """Return the reader of LLaVA, whose tower is of CLIP, SigLIP or Pixtral."""
    vision, tower = config.vision_config, config.vision_config.model_type
    if tower == "pixtral":
        return _lines(model, processor, config, 1)
    if tower not in ("clip_vision_model", "siglip_vision_model"):
        raise ConfigError(
            f'model = "{model}": a LLaVA with a vision tower of {tower}, which is not supported yet; give one with a '
            f"tower of CLIP, SigLIP or Pixtral"
        )
    _check_squares(model, processor, vision.image_size)
    patches = (vision.image_size // vision.patch_size) ** 2
    # CLIP has a state for the whole image in front, which "default" leaves out.
    tokens = patches + (tower == "clip_vision_model") - (config.vision_feature_select_strategy == "default")
    return SquareReader(processor, config.image_token_id, "plain", patches, tokens)


def _mistral3(model: str, processor: Any, config: Any) -> ImageReader:
    """Return the reader of Mistral 3, whose tower is of Pixtral."""
    tower = config.vision_config.model_type
    if tower != "pixtral":
        raise ConfigError(
            f'model = "{model}": a Mistral 3 with a vision tower of {tower}, which is not supported: want Pixtral'
        )
    return _lines(model, processor, config, config.spatial_merge_size)


def _mllama(model: str, processor: Any, config: Any) -> ImageReader:
    """Return the reader of Llama 3.2 Vision."""
    vision = config.vision_config
    _check(model, processor, {"do_resize": True, "do_pad": True, "max_image_tiles": vision.max_num_tiles})
    size = dict(processor.size)
    if size.get("height") != vision.image_size or size.get("width") != vision.image_size:
        raise ConfigError(_unfit(model, processor, "size", size, f"{vision.image_size} x {vision.image_size} pixels"))
    return TileReader(processor, config.image_token_index, (vision.image_size // vision.patch_size) ** 2 + 1)


def _lines(model: str, processor: Any, config: Any, merge: int) -> ImageReader:
    """Return the reader for a tower of Pixtral."""
    _check(model, processor, {"do_resize": True})
    if not dict(processor.size).get("longest_edge"):
        raise ConfigError(_unfit(model, processor, "size", dict(processor.size), "a longest_edge"))
    return LineReader(processor, config.image_token_id, config.vision_config.patch_size, merge)


def _check_squares(model: str, processor: Any, side: int) -> None:
    """Raise ConfigError for a processor that does not make squares of `side` pixels."""
    from PIL import Image

    _check(model, processor, {"do_resize": True})
    made = processor([Image.new("RGB", (37, 23))], return_tensors="pt")["pixel_values"]
    found = " x ".join(map(str, made.shape[-2:]))
    if found != f"{side} x {side}":
        raise ConfigError(
            f'model = "{model}": its image processor ({type(processor).__name__}) makes pictures of {found} pixels, '
            f"and its vision tower needs {side} x {side}; give a folder whose files belong together"
        )


def _check(model: str, processor: Any, wanted: dict[str, Any]) -> None:
    """Raise ConfigError for a setting of a processor that the vision tower does not fit."""
    for name, value in wanted.items():
        found = getattr(processor, name, None)
        if found != value:
            raise ConfigError(_unfit(model, processor, name, found, value))


def _unfit(model: str, processor: Any, name: str, found: Any, wanted: Any) -> str:
    return (
        f'model = "{model}": its image processor ({type(processor).__name__}) has {name} = {found}, and its vision '
        f"tower needs {wanted}; give a folder whose files belong together"
    )
