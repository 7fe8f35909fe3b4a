"""Decoded images, kept between runs: decoding 50,000 of them takes as long as importing everything else."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import PIL
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def default_root() -> Path:
    """Where caches are kept: ``HFKD_CACHE``, or ``~/.cache/hfkd``."""
    return Path(os.environ.get("HFKD_CACHE") or "~/.cache/hfkd").expanduser()


def kept_pixels(encoded: Iterable[bytes], decode: Callable[[], np.ndarray | None]) -> np.ndarray | None:
    """What ``decode`` gives, from a file of an earlier run where there is a whole one.

    Args:
        encoded: The images as they were read, and whatever else decides what they decode to: what the file is known
            by.
        decode: Called where they have not been decoded before; None is not kept.
    """
    key = hashlib.blake2b(PIL.__version__.encode(), digest_size=16)
    for content in encoded:
        key.update(len(content).to_bytes(8, "little") + content)
    path = default_root() / "pixels" / f"{key.hexdigest()}.safetensors"
    # Not there, or not as it was written: then it is written again.
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError), safe_open(path, framework="np") as file:
        pixels = file.get_tensor("pixels")
        if file.metadata()["digest"] == _digest(pixels):
            return pixels
    pixels = decode()
    if pixels is not None:
        # A full or unwritable disk costs the next run its time, and nothing else.
        with contextlib.suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            save_file({"pixels": pixels}, part, metadata={"digest": _digest(pixels)})
            part.replace(path)
    return pixels


def _digest(pixels: np.ndarray) -> str:
    shape = f"{pixels.dtype} {pixels.shape}".encode()
    return hashlib.blake2b(shape + np.ascontiguousarray(pixels).tobytes(), digest_size=16).hexdigest()
