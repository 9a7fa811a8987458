# SPDX-License-Identifier: Apache-2.0
"""What the engine must know of a model family, as a table.

A family that is not in the table still works if its text model, image token and decoder layers can be found by the
general rules; its images then have no grid (``[1, n]``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_attn import host
from vlm_attn.layout import ImageSpan, Span, visual_columns
from vlm_attn.method import Wide
from vlm_attn.tiles import Join, Tiled, rows_of_one, rows_together, tiles_by_pixels, tiles_of_one, tiles_together

# (config, call inputs, row-major index of the image, tokens of the run) -> grid and index of its first token
Grid = tuple[tuple[int, int], int]
Size = tuple[int, int]
GridRule = Callable[[Any, Mapping[str, Any], int, int], Grid]
# (config, call inputs, runs of a row, row, images in the rows before) -> runs, each of one image
CutRule = Callable[[Any, Mapping[str, Any], Sequence[Span], int, int], Sequence[Span]]
# (config, call inputs, row-major index of the video) -> frames, and the grid of each; None = not known
FrameRule = Callable[[Any, Mapping[str, Any], int], tuple[int, tuple[int, int]] | None]


def _square(config: Any, inputs: Mapping[str, Any], image: int, tokens: int) -> Grid:
    """One square grid; the last square of several tiles (their overview) if there are more tokens than one tile's."""
    side = round(tokens**0.5)
    return ((side, side), 0) if side * side == tokens else ((1, tokens), 0)


def _llava(config: Any, inputs: Mapping[str, Any], image: int, tokens: int) -> Grid:
    sizes = inputs.get("image_sizes")
    if sizes is not None:  # Pixtral towers keep the aspect ratio
        patch = config.vision_config.patch_size
        h, w = (int(v) // patch for v in sizes[image])
        if h * w == tokens:
            return (h, w), 0
    return _square(config, inputs, image, tokens)


def _overview_first(config: Any, inputs: Mapping[str, Any], image: int, tokens: int) -> Grid:
    """LLaVA-NeXT: the whole picture on a g x g grid, then the high-resolution rows. The first grid is the picture."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return ((side, side), 0) if side * side <= tokens else ((1, tokens), 0)


def _merge(config: Any) -> int | None:
    found = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    return found if isinstance(found, int) else None


def _thw(config: Any, inputs: Mapping[str, Any], image: int, tokens: int) -> Grid:
    """Qwen-VL and its kin: ``image_grid_thw`` in patches, merged ``spatial_merge_size`` x ``spatial_merge_size``."""
    grids, merge = inputs.get("image_grid_thw"), _merge(config)
    if grids is None or merge is None or image >= len(grids):
        return (1, tokens), 0
    t, h, w = (int(v) for v in grids[image])
    h, w = h // merge, w // merge
    return ((t * h, w), 0) if t * h * w == tokens else ((1, tokens), 0)


def _thw_frames(config: Any, inputs: Mapping[str, Any], video: int) -> tuple[int, tuple[int, int]] | None:
    """Qwen-VL: ``video_grid_thw``, as its images."""
    grids, merge = inputs.get("video_grid_thw"), _merge(config)
    if grids is None or merge is None or video >= len(grids):
        return None
    t, h, w = (int(v) for v in grids[video])
    return t, (h // merge, w // merge)


def _pooled_frames(config: Any, inputs: Mapping[str, Any], video: int) -> tuple[int, tuple[int, int]] | None:
    """LLaVA-OneVision: square frames, two by two patches a token, and one newline token behind the last."""
    frames = inputs.get("pixel_values_videos")
    if frames is None:
        return None
    side = -(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)
    return frames.shape[1], (side, side)


def _positions(config: Any, inputs: Mapping[str, Any], image: int, tokens: int) -> Grid:
    """Gemma 4: ``image_position_ids`` of the patches (x, y; -1 is padding), pooled ``pooling_kernel_size`` each way."""
    places = inputs.get("image_position_ids")
    if places is None:
        return (1, tokens), 0
    pool = config.vision_config.pooling_kernel_size
    w, h = (int(size + 1) // pool for size in places[image].amax(0))
    return ((h, w), 0) if h * w == tokens else ((1, tokens), 0)


def _tiles(config: Any, inputs: Mapping[str, Any], image: int, tokens: int) -> Grid:
    """InternVL: square tiles; of several, the last is the overview of the whole picture."""
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    size, patch = (v[0] if isinstance(v, Sequence) else v for v in (size, patch))
    side = int(size // patch * config.downsample_ratio)
    return ((side, side), tokens - side * side) if side * side <= tokens else ((1, tokens), 0)


def _one(config: Any, tokens: int, size: Size | None) -> int:
    return 1


def _as_they_are(config: Any, values: Tensor, size: Size | None) -> Tensor:
    return values[0]


@dataclass(frozen=True)
class Family:
    """Facts of one model family.

    Attributes:
        grid: how an image's tokens form a picture; by default as ``image_grid_thw`` says, where it is given and fits.
        frames: how a video's tokens form frames; by default as ``video_grid_thw`` says.
        cut: the runs of a row, with those of several images side by side cut apart; None = one run, one image.
        join: the runs of a row that are one image each (rows of patches, tiles).
        tiled: of an image of several runs its grid, the order of its tokens on it, and its overview.
        prefix_lm: prompt rows see the whole prompt, so the last token is run again instead of being split off.
        reducible: its decoder layers are known to take fewer rows (positions and masks come as arguments, nothing else runs
            along the sequence).
        cls: attention modules of a vision tower whose CLS token stands first.
        tiles: how many pictures the tower sees of an image of so many tokens and of that size.
        place: numbers ``[tiles, patches, d]`` of an image's patches as numbers ``[tokens, d]`` of its tokens.
        tile_cells: ``[tokens, 2]`` row and column on the grid for tokens of tiles as well; None = only the grid's own have any.
        whole_patches: whether every token is one patch of the tower, so that patches can be merged inside it.
        projects: whether a token is what the projector makes of one feature, so that features can be merged before it.
        counted_positions: its text model counts positions in the 2-D padding mask, so no other mask can stand in its place.
    """

    grid: GridRule = _thw
    frames: FrameRule = _thw_frames
    cut: CutRule | None = None
    join: Join | None = None
    tiled: Tiled | None = None
    prefix_lm: bool = False
    reducible: bool = False
    cls: Callable[[Any], Sequence[Any]] | None = None
    tiles: Callable[[Any, int, Size | None], int] = _one
    place: Callable[[Any, Tensor, Size | None], Tensor] = _as_they_are
    tile_cells: Callable[[Any, ImageSpan], Tensor] | None = None
    whole_patches: bool = False
    projects: bool = False
    counted_positions: bool = False


def _cut_clip(config: Any, inputs: Mapping[str, Any], runs: Sequence[Span], row: int, before: int) -> Sequence[Span]:
    """Images side by side, each of the tower's patches."""
    if inputs.get("image_sizes") is not None:
        return runs
    side = config.vision_config.image_size // config.vision_config.patch_size
    whole = getattr(config, "vision_feature_select_strategy", "default") != "default"
    return _cut(runs, side * side + (whole and config.vision_config.model_type == "clip_vision_model"))


def _cut_anyres(config: Any, inputs: Mapping[str, Any], runs: Sequence[Span], row: int, before: int) -> Sequence[Span]:
    """LLaVA-NeXT: as many tokens as an image of that size has."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return runs
    side = config.vision_config.image_size // config.vision_config.patch_size
    found: list[Span] = []
    for start, stop in runs:
        first = start
        here: list[Span] = []
        while first < stop and before + len(found) + len(here) < len(sizes):
            h, w = (int(v) for v in sizes[before + len(found) + len(here)])
            rows, columns = host.tile_grid(config, (h, w))
            last = first + len(_anyres(config, torch.ones(rows * columns + 1, side * side, 1), (h, w)))
            here.append((first, last))
            first = last
        found += here if here and first == stop else [(start, stop)]
    return found


def _cut_several(config: Any, inputs: Mapping[str, Any], runs: Sequence[Span], row: int, before: int) -> Sequence[Span]:
    """LLaVA-OneVision: of several images in a prompt each is its overview and one newline token."""
    counts = inputs.get("batch_num_images")
    if counts is None or row >= len(counts) or int(counts[row]) < 2:
        return runs
    side = config.vision_config.image_size // config.vision_config.patch_size
    return _cut(runs, side * side + 1)


def _cut(runs: Sequence[Span], size: int) -> list[Span]:
    found: list[Span] = []
    for start, stop in runs:
        step = size if (stop - start) % size == 0 else stop - start
        found += [(first, first + step) for first in range(start, stop, step)]
    return found


def _tower(model: Any) -> Any:
    """The vision tower, None where there is none of that name."""
    return next((m for name, m in model.named_modules() if name.split(".")[-1] == "vision_tower"), None)


def _has_cls(tower: Any) -> bool:
    return tower is not None and any(name.endswith("class_embedding") for name, _ in tower.named_parameters())


def _clip_attention(model: Any) -> list[Any]:
    tower = _tower(model)
    if not _has_cls(tower):
        return []
    return [m for name, m in tower.named_modules() if name.endswith("self_attn")]


def _internvl_attention(model: Any) -> list[Any]:
    return [m for name, m in _tower(model).named_modules() if name.endswith(".attention")]


def _internvl_tiles(config: Any, tokens: int, size: Size | None) -> int:
    (side, _), first = _tiles(config, {}, 0, tokens)
    return first // (side * side) + 1


def _shuffled(config: Any, values: Tensor, size: Size | None) -> Tensor:
    """InternVL puts neighbouring patches into one token: their mean."""
    side = round(values.shape[1] ** 0.5)
    grid = values.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.avg_pool2d(grid, round(1 / config.downsample_ratio)).flatten(2).transpose(1, 2).flatten(0, 1)


def _anyres_tiles(config: Any, tokens: int, size: Size | None) -> int:
    if size is None:
        return 1
    rows, columns = host.tile_grid(config, size)
    return rows * columns + 1


def _anyres(config: Any, values: Tensor, size: Size | None) -> Tensor:
    """LLaVA-NeXT: the overview, then the tiles' rows without their padding, each with a newline token: it has zeros."""
    newline = values.new_zeros(1, values.shape[2])
    if len(values) == 1 or size is None:
        return torch.cat([values[0], newline])
    side = round(values.shape[1] ** 0.5)
    rows = values[1:].unflatten(0, host.tile_grid(config, size)).unflatten(2, (side, side))
    picture = host.without_padding(rows.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3), size)
    return torch.cat([values[0], nn.functional.pad(picture, (0, 1)).flatten(1).T])


def _anyres_cells(config: Any, image: ImageSpan) -> Tensor:
    """LLaVA-NeXT: the overview's cell that a high-resolution token lies in; a newline has none."""
    h, w = image.grid
    ones = torch.ones(image.tiles, h * w, 1)
    rest = _anyres(config, ones, image.size)[h * w :, 0].bool()  # rows of the picture, a newline behind each
    width = int((~rest).nonzero()[0]) + 1
    row, column = torch.arange(len(rest)) // width, torch.arange(len(rest)) % width
    tiles = torch.stack([row * h // (len(rest) // width), column * w // max(1, width - 1)], 1)
    overview = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    return torch.cat([overview, tiles.masked_fill(~rest[:, None], -1)])


# Model type, or model type and the tower's -> facts. Adding a family is one row.
FAMILIES: dict[str, Family] = {
    "llava": Family(
        grid=_llava,
        cut=_cut_clip,
        reducible=True,
        cls=_clip_attention,
        whole_patches=True,
        projects=True,
    ),
    "llava_next": Family(
        grid=_overview_first,
        cut=_cut_anyres,
        reducible=True,
        cls=_clip_attention,
        tiles=_anyres_tiles,
        place=_anyres,
        tile_cells=_anyres_cells,
        whole_patches=True,
        projects=True,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), Family(reducible=True)),
    "llava_onevision": Family(grid=_overview_first, frames=_pooled_frames, cut=_cut_several),
    "llava pixtral": Family(grid=_llava, join=rows_of_one, tiled=rows_together, reducible=True),
    "mistral3": Family(join=rows_of_one, tiled=rows_together),
    "idefics3": Family(grid=_square, join=tiles_of_one, tiled=tiles_together),
    "smolvlm": Family(grid=_square, join=tiles_of_one, tiled=tiles_together),
    "llama4": Family(grid=_square, join=tiles_of_one, tiled=tiles_together),
    "aya_vision": Family(grid=_square, join=tiles_of_one, tiled=tiles_by_pixels),
    "internvl": Family(
        grid=_tiles, reducible=True, cls=_internvl_attention, tiles=_internvl_tiles, place=_shuffled, projects=True
    ),
    "gemma3": Family(grid=_square, reducible=True),
    "paligemma": Family(grid=_square, cut=_cut_clip, prefix_lm=True, reducible=True, whole_patches=True),
    "gemma4": Family(grid=_positions),
    "diffusion_gemma": Family(grid=_positions),
    "blip-2": Family(counted_positions=True),
    "instructblip": Family(counted_positions=True),
}


def family_of(config: Any) -> Family:
    """The table's row for a model's config, or the general one."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return FAMILIES.get(f"{config.model_type} {tower}") or FAMILIES.get(config.model_type, Family())


def image_token_ids(config: Any) -> tuple[int, ...]:
    """Ids that stand for image tokens in a prompt.

    Raises:
        NotImplementedError: the config names none (image tokens do not stand in the prompt of this family).
    """
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index", "image_patch_id")]
    ids = tuple(dict.fromkeys(int(i) for i in found if isinstance(i, int)))
    if not ids:
        raise NotImplementedError(
            f"model type {config.model_type!r}: its config has no image_token_id, "
            "so the image's columns cannot be found"
        )
    return ids


def video_token_ids(config: Any) -> tuple[int, ...]:
    """Ids that stand for the tokens of a video in a prompt; none where images and videos share theirs."""
    found = [getattr(config, name, None) for name in ("video_token_id", "video_token_index")]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and i not in image_token_ids(config)))


def video_columns(config: Any, ids: Tensor) -> Tensor:
    """``[B, P]`` bool: where the tokens of a video are: those of its own kind, and those between the marks of a video."""
    found = visual_columns(ids, video_token_ids(config))
    marks: list[Any] = [getattr(config, name, None) for name in ("video_start_token_id", "video_end_token_id")]
    if all(isinstance(mark, int) for mark in marks):  # GLM-4V: frames are made of image tokens
        start, end = ((ids == mark).cumsum(1) for mark in marks)
        found |= (start > end) & visual_columns(ids, image_token_ids(config))
    return found


def image_marker_ids(config: Any) -> list[int]:
    """Ids of the tokens that stand around an image, where the config names them."""
    names = ("vision_start_token_id", "vision_end_token_id", "boi_token_index", "eoi_token_index")
    return [i for name in names if isinstance(i := getattr(config, name, None), int)]


def check_maskable(config: Any, methods: Sequence[Any]) -> None:
    """Refuse a prompt mask where the host needs its own.

    Raises:
        NotImplementedError: names the method and the family.
    """
    for method in methods:
        if method.mask is not None and family_of(config).counted_positions:
            raise NotImplementedError(
                f"{method.name}: the text model of {config.model_type} counts positions in the padding mask, "
                "so its mask cannot be replaced"
            )


def deepstack_layers(config: Any) -> int:
    """How many of the first decoder layers get features of the vision tower added to their visual rows."""
    return len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def check_reducible(config: Any, reducer: Any) -> None:
    """Refuse to take visual tokens from a family whose layers were never tried with fewer, or where it needs them all.

    Args:
        config: the model's config.
        reducer: a bound :class:`~vlm_attn.reduction.Reducer`.

    Raises:
        NotImplementedError: names the families that are known, or the layers that need every visual row.
    """
    method = reducer.name
    if not family_of(config).reducible:
        known = ", ".join(name for name, family in FAMILIES.items() if family.reducible)
        why = "its layers may read the image by place"
        if hasattr(config, "qformer_config"):
            why = "its image tokens are a Q-Former's queries, learned ones that stand for no place of the picture"
        raise NotImplementedError(
            f"{method} takes visual tokens out of the sequence. For model type {config.model_type!r} that is not known to be "
            f"safe: {why}. Known: {known}"
        )
    deep = deepstack_layers(config)
    early = [at for stage, at in enumerate(reducer.stages) if at < deep and reducer.left(stage, 1000) < 1000]
    early += [layer for layer in reducer.skipped if layer < deep]
    if early and reducer.mode == "drop" and not reducer.neutral:
        raise NotImplementedError(
            f"{method} takes visual tokens away before layer {early[0]}, but {config.model_type} adds features of the vision "
            f"tower to the visual rows of layers 0..{deep - 1} (deepstack), which must all be there. Take them away from layer "
            f'{deep} on, or hide them with mode="mask"'
        )


def cls_attention_module(model: Any, config: Any, layer: int | Wide, method: str) -> Any:
    """An attention module of the vision tower.

    Args:
        model: the model.
        config: its config.
        layer: -1 = the layer whose output is projected; else a layer of 24, taken at the same depth; or ``Wide`` of one.
        method: who asks, for the message.

    Raises:
        NotImplementedError: the family's tower has no CLS token, or its patches are not the image's tokens.
    """
    find = family_of(config).cls
    modules = find(model) if find is not None else []
    projected = getattr(config, "vision_feature_layer", None)
    if not modules or not isinstance(projected, int):
        known = ", ".join(name for name, family in FAMILIES.items() if family.cls is not None)
        raise NotImplementedError(
            f"{method} ranks tokens by the attention of the vision tower's CLS token, which model type "
            f"{config.model_type!r} lacks or does not hand on patch by patch. Known: {known}, with a tower that has one"
        )
    layer = layer.layer if isinstance(layer, Wide) else layer
    if layer >= 0:
        return modules[layer * len(modules) // 24]
    # hidden_states[0] is the embedding, so -1 is the last layer's output and 1 the first's
    return modules[projected if projected < 0 else projected - 1]


def projector(model: Any, config: Any) -> tuple[Any, Any | None] | None:
    """The module that makes an image's tokens of the vision tower's features, and the tower's layer these come from (None where
    none has a CLS token to hand on); None where a token is not made of one feature, or features of several layers."""
    if not family_of(config).projects or not isinstance(getattr(config, "vision_feature_layer", None), int):
        return None
    found = next((m for name, m in model.named_modules() if name.split(".")[-1] == "multi_modal_projector"), None)
    if found is None:
        return None
    attention = _clip_attention(model) if family_of(config).whole_patches else []
    number = config.vision_feature_layer
    last = attention[number if number < 0 else number - 1] if attention else None
    return found, next((m for m in model.modules() if last is not None and getattr(m, "self_attn", None) is last), None)


def merging_tower(model: Any, config: Any, method: str) -> tuple[Any, list[Any], bool]:
    """The vision tower, if tokens can be merged inside it.

    Args:
        model: the model.
        config: its config.
        method: who asks, for the message.

    Returns:
        The tower, its layers up to the one whose output is projected, and whether a CLS token stands first.

    Raises:
        NotImplementedError: its layers are not of CLIP's shape, or its patches are not the image's tokens; attention that takes
            no bias.
    """
    tower = _tower(model)
    layers = [] if tower is None else [m for m in tower.modules() if hasattr(getattr(m, "self_attn", None), "k_proj")]
    first = _has_cls(tower)
    projected = getattr(config, "vision_feature_layer", -1)
    count = 0 if not isinstance(projected, int) else projected if projected >= 0 else len(layers) + 1 + projected
    layers = layers[:count]
    whole = first and getattr(config, "vision_feature_select_strategy", "default") != "default"
    if not family_of(config).whole_patches or not layers or whole:
        known = ", ".join(sorted(name for name, family in FAMILIES.items() if family.whole_patches))
        raise NotImplementedError(
            f"{method} merges tokens inside the vision tower. That of model type {config.model_type!r} is not known to hand on "
            f"its patches one by one. Known: {known}, with a tower of CLIP or SigLIP of which one layer is projected, without "
            "its CLS token"
        )
    host.check_bias(tower.config, method)
    return tower, layers, first


def cells(config: Any, image: ImageSpan) -> Tensor:
    """``[tokens, 2]`` row and column of every token of an image on its grid; -1 for one that has no place there."""
    (h, w), total = image.grid, image.total
    if (rule := family_of(config).tile_cells) is not None and len(found := rule(config, image)) == total:
        return found
    found = torch.full((total, 2), -1)
    found[image.cells] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    return found


def split_images(
    config: Any, spans: Sequence[Sequence[Span]], inputs: Mapping[str, Any], ids: Tensor | None = None
) -> tuple[ImageSpan, ...]:
    """Images of a batch from the runs of image tokens of its rows.

    Args:
        config: the model's config.
        spans: per row, the half-open runs of image tokens.
        inputs: the call's inputs (``image_sizes``, ``image_grid_thw`` ... where given).
        ids: ``[B, P]`` token ids, which tell the parts of one image from several images; None = every run is an image.
    """
    family = family_of(config)
    sizes = inputs.get("image_sizes")
    sizes = [] if sizes is None else [(int(h), int(w)) for h, w in sizes]
    parts: list[list[list[Span]]] = []
    for row, runs in enumerate(spans):
        if family.join is not None and ids is not None:
            parts.append(family.join(runs, ids[row].tolist()))
        else:
            before = sum(map(len, parts))
            parts.append([[run] for run in (family.cut(config, inputs, runs, row, before) if family.cut else runs)])
    given = max(
        (len(v) for name in ("image_sizes", "image_grid_thw") if (v := inputs.get(name)) is not None), default=0
    )
    earlier = (
        max(0, sum(map(len, parts)) - given) if given else 0
    )  # of earlier turns, where only the new ones are given
    # Pixels of the tiles of every image, where they come one by one; those of earlier turns may be left out.
    pixels, seen = inputs.get("pixel_values"), 0
    pixels = pixels if isinstance(pixels, Tensor) and pixels.ndim == 4 else None
    if pixels is not None:
        seen = len(pixels) - sum(len(runs) for of_row in parts for runs in of_row)
        pixels = None if seen > 0 else pixels
    images: list[ImageSpan] = []
    for row, of_row in enumerate(parts):
        for runs in of_row:
            number, own = len(images) - earlier, None
            if pixels is not None and seen >= 0:
                own = pixels[seen : seen + len(runs)]
            seen += len(runs)
            (start, stop), total = (runs[0][0], runs[-1][1]), sum(last - first for first, last in runs)
            size = sizes[number] if 0 <= number < len(sizes) else None
            if len(runs) > 1 and family.tiled is not None and ids is not None:
                breaks = tuple(i for (_, a), (b, _) in zip(runs, runs[1:], strict=False) for i in range(a, b))
                grid, order, overview = family.tiled(runs, ids[row].tolist(), own)
                images.append(ImageSpan(row, start, stop, grid, 0, 1, size, None, 0, breaks, order, overview))
                continue
            grid, first = family.grid(config, inputs if number >= 0 else {}, max(0, number), total)
            images.append(ImageSpan(row, start, stop, grid, first, family.tiles(config, total, size), size))
    return tuple(images)


def split_videos(config: Any, spans: Sequence[Sequence[Span]], inputs: Mapping[str, Any]) -> tuple[ImageSpan, ...]:
    """Frames of the videos of a batch from the runs of video tokens of its rows.

    A video is one run, or one run per frame where text (the frame's time) stands between them.

    Args:
        config: the model's config.
        spans: per row, the half-open runs of video tokens.
        inputs: the call's inputs (``video_grid_thw``, ``pixel_values_videos`` where given).
    """
    frames: list[ImageSpan] = []
    video = -1
    for row, row_spans in enumerate(spans):
        left, frame, grid = 0, 0, (1, 0)  # frames of the video that are still to come
        for start, stop in row_spans:
            if not left:
                video += 1
                known = family_of(config).frames(config, inputs, video)
                left, grid = known if known is not None else (1, (1, stop - start))
                frame = 0
            size = grid[0] * grid[1]
            here = min(left, (stop - start) // size)
            # A newline may stand behind the last; what else is not as the inputs say is one frame.
            if not here or stop - start > here * size + 1:
                here, left, size, grid = 1, 1, stop - start, (1, stop - start)
            for n in range(here):
                first = start + n * size
                last = stop if n == here - 1 else first + size
                frames.append(ImageSpan(row, first, last, grid, video=video, frame=frame))
                frame, left = frame + 1, left - 1
    return tuple(frames)
