"""Losses written apart from hfkd: numpy, float64, one sample and one class at a time."""

from __future__ import annotations

import math

import numpy as np
import torch


# The design's golden input.
STUDENT = torch.tensor([[1.0, 0.5, -0.5, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
TARGET = torch.tensor([0])


def batch(size: int = 6, classes: int = 5, *, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Student logits, teacher logits, labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, size, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (size,), generator=generator)


def probabilities(logits, temperature: float = 1.0) -> list[float]:
    exponents = [math.exp(z / temperature) for z in logits]
    return [e / math.fsum(exponents) for e in exponents]


def divergence(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def power_transform(p: list[float], gamma: float) -> list[float]:
    powers = [a**gamma for a in p]
    return [a / math.fsum(powers) for a in powers]


def entropy(p: list[float]) -> float:
    return -math.fsum(a * math.log(a) for a in p)


def renyi_entropy(p: list[float], order: float) -> float:
    return math.log(math.fsum(a**order for a in p)) / (1 - order)


def kd(student, teacher, temperature: float) -> float:
    return temperature**2 * divergence(probabilities(teacher, temperature), probabilities(student, temperature))


def ttm(student, teacher, gamma: float) -> float:
    return divergence(power_transform(probabilities(teacher), gamma), probabilities(student))


def wttm(student, teacher, gamma: float) -> float:
    return math.fsum(a**gamma for a in probabilities(teacher)) * ttm(student, teacher, gamma)


def over_batch(function, student: torch.Tensor, teacher: torch.Tensor, **options) -> np.ndarray:
    return np.array([function(s, t, **options) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)])
