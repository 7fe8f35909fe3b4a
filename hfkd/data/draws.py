"""Random draws that are pure functions of (seed, epoch, index): whatever the batch, the worker or the process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def splitmix(state: np.ndarray) -> np.ndarray:
    """Mix 64-bit words so that neighbours share nothing.

    Shapes:
        Any shape, uint64; returns the same.

    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", the finaliser of SplitMix64.
    """
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample_draws(seed: int, epoch: int | np.ndarray, index: np.ndarray) -> np.ndarray:
    """One 64-bit random word for each sample.

    Shapes:
        ``index``: (B,) integers, and ``epoch`` one integer, or as many as it broadcasts with. Returns (B,) uint64.

    >>> bool(sample_draws(0, 0, np.array([7, 8]))[1] == sample_draws(0, 0, np.array([8]))[0])
    True
    """
    key = splitmix(splitmix(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    return splitmix(key ^ index.astype(np.uint64))


def batch_draw(draws: np.ndarray) -> int:
    """One random word for a batch, from those of its samples in their order."""
    positions = np.arange(1, len(draws) + 1, dtype=np.uint64) << np.uint64(32)
    return int(np.bitwise_xor.reduce(splitmix(draws ^ positions)))


def seed_global(draw: int) -> None:
    """Seed the generators that timm's augmentations draw from."""
    random.seed(int(draw))
    np.random.seed(int(draw) % 2**32)


@contextmanager
def kept_global_state() -> Iterator[None]:
    """Put the global generators of ``random`` and numpy back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
