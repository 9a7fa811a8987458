# SPDX-License-Identifier: Apache-2.0
"""Load a vision-language model and its processor by one name: that of a bundled one, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_attn.evals.reading import read_json

SCENES = "scenes"
BUNDLED = {SCENES: "ar", "scenes-smol": "smol", "scenes-diffusion": "diffusion"}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(device: str = "auto") -> str:
    """The device to run on; ``auto``: the first of CUDA, Apple's GPU and the CPU that is there.

    Raises:
        ValueError: not a device, or one that this machine does not have.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {_first_line(error)}") from error
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers: choose cpu or cuda")
    return device


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    *,
    device_map: str | None = None,
    bits: int | None = None,
) -> tuple[Any, Any]:
    """Load a model for generation, and its processor with padding on the left.

    Args:
        name: ``"scenes"``, ``"scenes-smol"`` or ``"scenes-diffusion"`` for a bundled model, else a folder or a hub id
            that ``AutoModelForImageTextToText`` loads. Only safetensors weights are read.
        device: ``"auto"``, or a torch device such as ``"cpu"`` or ``"cuda:1"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; ``"auto"``: float32 on a CPU, else what the
            checkpoint was saved in.
        trust_remote_code: let the checkpoint run code of its own.
        device_map: spread the weights over all devices that are there, as accelerate does: ``"auto"``, ``"balanced"``,
            ``"balanced_low_0"`` or ``"sequential"``; default: all on ``device``.
        bits: 4 or 8 to quantise the weights with bitsandbytes (4: nf4, computing in ``dtype``, for ``"auto"`` in
            bfloat16, on a CPU in float32); default: as they are.

    Returns:
        ``(model, processor)``.

    Raises:
        ValueError: unknown device, dtype, device map or bits, a device beside a device map, a name that is neither a model
            folder nor a model on the hub, weights that are not safetensors, or files that are broken or incomplete.
        ImportError: bitsandbytes or accelerate is needed and is not installed; ``"scenes-smol"``: its language model can be
            had nowhere.
        FileNotFoundError: the bundled model is not in this installation.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    options = _placing(device, device_map, bits, dtype)
    device = pick_device(device)
    source = name
    if name in BUNDLED:
        from vlm_attn.evals.scenes import model_path

        source = str(model_path(BUNDLED[name]))
    elif (folder := Path(name).expanduser()).exists():
        source = str(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {name!r}: this folder has no config.json, so it is not a saved model")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model {name!r}: no such folder")
    else:
        _check_hub(name)

    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    wanted = "float32" if dtype == "auto" and device == "cpu" else dtype
    if bits is not None and device_map is None:
        options["device_map"] = {"": device}
    check_weights(name, source)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        with _no_loading_bar():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=wanted,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **options,
            )
            model, found = loaded
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what tokenizers, safetensors and configs raise depends on what is broken
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    for kind, what in (("missing_keys", "are not in the checkpoint"), ("mismatched_keys", "have another shape there")):
        if found.get(kind):
            first = min(map(str, found[kind]))
            raise ValueError(
                f"model {name!r} cannot be loaded: {len(found[kind])} of its weights {what} (first: {first}), so they would "
                "be random"
            )
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(processor, "image_processor"):
        raise ValueError(f"model {name!r}: its processor does not take both text and images")
    tokenizer.padding_side = "left"  # a row's answer has to follow its prompt without a gap
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if options else model.to(device)).eval(), processor


def _placing(device: str, device_map: str | None, bits: int | None, dtype: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told of where the weights go and how they are kept; checked before anything is read."""
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise ValueError(f"device map {device_map!r}: expected one of {', '.join(DEVICE_MAPS)}")
    if device_map is not None and device != "auto":
        raise ValueError(
            f"device {device!r} and device map {device_map!r}: both say where the model goes; give one of them"
        )
    if bits not in (None, 4, 8):
        raise ValueError(f"bits={bits!r}: expected 4 or 8")
    for library, why in (
        ("accelerate", device_map and "a device map"),
        ("bitsandbytes", bits and f"loading in {bits} bits"),
    ):
        if why and importlib.util.find_spec(library) is None:
            raise ImportError(f"{library} is not installed, and {why} needs it: pip install {library}")
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if bits is not None:
        from transformers import BitsAndBytesConfig

        # Left alone it computes in float32, which on a GPU is slow.
        computes = dtype if dtype != "auto" else "float32" if pick_device(device) == "cpu" else "bfloat16"
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computes}
        options["quantization_config"] = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return options


@contextlib.contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Without transformers' bar over the weights; those of a download stay, as it may take minutes."""
    import huggingface_hub
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_weights(name: str, source: str) -> None:
    """Refuse a checkpoint that would be loaded from anything but whole safetensors files, which can run no code.

    Args:
        name: what the user calls it.
        source: a folder or a hub id.

    Raises:
        ValueError: naming the file at fault.
    """
    folder = Path(source) if Path(source).is_dir() else None

    def file_of(file: str) -> Path | None:
        if folder is not None:
            return folder / file if (folder / file).is_file() else None
        from transformers.utils import cached_file

        try:
            found = cached_file(
                source,
                file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except OSError:
            found = None
        return Path(found) if found else None

    def content(file: str) -> dict[str, Any]:
        path = file_of(file)
        try:
            read = read_json(path) if path is not None else {}
        except ValueError as error:
            raise ValueError(f"model {name!r} cannot be loaded: {error}") from error
        if not isinstance(read, dict):
            raise ValueError(f"model {name!r} cannot be loaded: {path}: expected an object, got {type(read).__name__}")
        return read

    refused = f"model {name!r}: only safetensors are read"
    other = content("config.json").get("transformers_weights")
    if other is not None and not str(other).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"{refused}, but its config.json names {str(other)[:80]!r} as its weights")
    shards: list[str] = []
    if file_of("model.safetensors") is None or other is not None:
        index = str(other) if str(other).endswith(".json") else "model.safetensors.index.json"
        shards = list(dict.fromkeys(map(str, (content(index).get("weight_map") or {}).values())))
    wrong = [file for file in shards if not file.endswith(".safetensors") or Path(file).name != file]
    if wrong:
        raise ValueError(f"{refused}, but its index names {wrong[0][:80]!r}")
    adapter = content("adapter_config.json")
    if adapter:
        if file_of("adapter_model.safetensors") is None:
            raise ValueError(f"{refused}, but its adapter has no adapter_model.safetensors")
        base = adapter.get("base_model_name_or_path")
        if isinstance(base, str) and base != source:
            check_weights(name, base)
    if folder is not None:
        _check_whole(name, folder, [*shards, "model.safetensors", "adapter_model.safetensors"])


def _check_whole(name: str, folder: Path, files: list[str]) -> None:
    """Refuse safetensors of a folder that are missing or cut off; only their headers are read."""
    from safetensors import safe_open

    for file in files:
        path = folder / file
        if not path.is_file():
            if file in files[:-2]:
                raise ValueError(f"model {name!r} cannot be loaded: its index names {file}, which is not in the folder")
            continue
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:  # safetensors' own class is no ValueError
            raise ValueError(
                f"model {name!r} cannot be loaded: {path} is cut off or broken ({_first_line(error)})"
            ) from error


def _check_hub(name: str) -> None:
    """Ask the hub once and briefly: transformers itself would retry each of many files for minutes."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    expected = f"expected {', '.join(map(repr, BUNDLED))}, a folder made by save_pretrained, or a hub id"
    try:
        if huggingface_hub.try_to_load_from_cache(name, "config.json") is None:
            huggingface_hub.model_info(name, timeout=10)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(f"model {name!r}: no such folder, and no such model on the hub ({expected})") from error
    except Exception as error:  # whatever the HTTP library of the day raises when there is no network
        raise ValueError(
            f"model {name!r}: no such folder, and the Hugging Face hub cannot be reached ({expected})"
        ) from error


def caption_tokens(name: str) -> int | None:
    """The longest caption that a bundled model writes, in tokens; None for other models."""
    return {"scenes-smol": 192}.get(name, 64) if name in BUNDLED else None


def weights_hash(model: Any) -> str:
    """A short hash over a few numbers of every parameter: tells whether two runs used the same weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return line if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: {line}".rstrip(": ")
