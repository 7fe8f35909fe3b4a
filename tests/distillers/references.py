"""Losses written apart from hfkd: numpy, float64, one sample and one class at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

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


def five_classes() -> SimpleNamespace:
    """As much of a context as a method asks that allocates by the number of classes."""
    return SimpleNamespace(student=SimpleNamespace(config=SimpleNamespace(num_labels=5)))


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


def without(values: list[float], target: int) -> list[float]:
    return values[:target] + values[target + 1 :]


def tckd(student, teacher, target: int, temperature: float) -> float:
    s, t = (probabilities(z, temperature)[target] for z in (student, teacher))
    return divergence([t, 1 - t], [s, 1 - s])


def nckd(student, teacher, target: int, temperature: float) -> float:
    s, t = (probabilities(without(z, target), temperature) for z in (student, teacher))
    return divergence(t, s)


def dkd(student, teacher, target: int, alpha: float, beta: float, temperature: float) -> float:
    parts = alpha * tckd(student, teacher, target, temperature) + beta * nckd(student, teacher, target, temperature)
    return temperature**2 * parts


def nkd(student, teacher, target: int, gamma: float, temperature: float) -> float:
    on_target = -probabilities(teacher)[target] * math.log(probabilities(student)[target])
    s, t = (probabilities(without(z, target), temperature) for z in (student, teacher))
    return on_target - gamma * temperature**2 * math.fsum(b * math.log(a) for a, b in zip(s, t, strict=True))


def dist(student: torch.Tensor, teacher: torch.Tensor, beta: float, gamma: float, temperature: float) -> float:
    p, q = (np.array([probabilities(z, temperature) for z in logits.tolist()]) for logits in (student, teacher))
    rows = np.mean([np.corrcoef(p[i], q[i])[0, 1] for i in range(p.shape[0])])
    columns = np.mean([np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(p.shape[1])])
    return temperature**2 * (beta * (1 - rows) + gamma * (1 - columns))


def virtual_kd(student, target: int, temperature: float, confidence: float) -> float:
    teacher = [confidence if c == target else (1 - confidence) / (len(student) - 1) for c in range(len(student))]
    return temperature**2 * divergence(power_transform(teacher, 1 / temperature), probabilities(student, temperature))


def over_labelled_batch(function, student: torch.Tensor, *others: torch.Tensor, **options) -> np.ndarray:
    """Sample by sample with logits and a label last; 0 where there is none."""
    rows = zip(*(tensor.tolist() for tensor in (student, *others)), strict=True)
    return np.array([0.0 if row[-1] == -100 else function(*row, **options) for row in rows])


def aekt(student, teacher, target, alpha, beta, temperature, explicit, max_ratio, adaptive=True) -> float:
    s, t = (probabilities(z, temperature)[target] for z in (student, teacher))
    on_target = {
        "tckd": divergence([t, 1 - t], [s, 1 - s]),
        "nll": -math.log(s),
        "confidence": -t * math.log(s),
    }[explicit]
    ratio = min(t / s, max_ratio) if adaptive else 1.0
    return temperature**2 * (alpha * ratio * on_target + beta * nckd(student, teacher, target, temperature))
