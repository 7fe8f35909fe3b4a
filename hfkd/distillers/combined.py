"""Several methods at once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hfkd.distillers.base import Distiller


class Combined(Distiller):
    """A weighted sum of methods that counts the hard-label term once.

    ``Combined({"wttm": WTTM(), "crd": CRD()}, task_from="wttm")`` keeps the terms of ``wttm`` under their names and
    adds those of ``crd``, without its task term, as ``crd/…``. This is WTTM + CRD of Zheng and Yang 2024 (arXiv
    2402.11148) with its μ of 0.8, which ``CRD()`` has as its own weight: ``weights`` multiply what a method weighs
    already, so ``weights={"crd": 0.8}`` goes with ``CRD(weight=1.0)``.

    Args:
        distillers: The methods by name.
        weights: Factor on a method's terms, 1 where it is not named.
        task_from: The method whose ``"task"`` term and ``task_logits`` count.

    Raises:
        ValueError: If a name in ``weights`` or ``task_from`` is not among the distillers, a weight is negative, there
            are no distillers, another than ``task_from`` has a task head, or two of them bring a teacher of their own.
    """

    def __init__(
        self, distillers: Mapping[str, Distiller], weights: Mapping[str, float] | None = None, *, task_from: str
    ):
        super().__init__()
        weights = dict(weights or {})
        if not distillers:
            raise ValueError("Combined needs at least one distiller")
        if task_from not in distillers:
            raise ValueError(f"task_from={task_from!r} is not among the distillers: {', '.join(distillers)}")
        if unknown := set(weights) - set(distillers):
            raise ValueError(
                f"weights for {sorted(unknown)}, which are not among the distillers: {', '.join(distillers)}"
            )
        if negative := [name for name, weight in weights.items() if not weight >= 0]:
            raise ValueError(f"weights must not be negative: {negative}")
        if headed := [name for name, part in distillers.items() if part.has_task_head and name != task_from]:
            raise ValueError(
                f"{', '.join(headed)} would train a task head that task_from={task_from!r} leaves out: name it in "
                "task_from, or make it without one (AEKT: order=None)"
            )
        self.parts = nn.ModuleDict(distillers)
        self.weights = {name: weights.get(name, 1.0) for name in distillers}
        self.task_from = task_from
        parts = list(distillers.values())
        self._join("student_layers", "teacher_layers", "batch_columns")
        for flag in ("needs_teacher", "trains_teacher", "needs_hard_labels", "batch_coupled", "has_task_head"):
            setattr(self, flag, any(getattr(part, flag) for part in parts))
        kinds = (set(part.problem_types) for part in parts)
        self.problem_types = tuple(sorted(set.intersection(*kinds)))

    def _join(self, *flags: str) -> None:
        for flag in flags:
            items = (item for part in self.parts.values() for item in getattr(part, flag))
            setattr(self, flag, tuple(dict.fromkeys(items)))

    def make_teacher(self, student):
        made = [teacher for part in self.parts.values() if (teacher := part.make_teacher(student)) is not None]
        if len(made) > 1:
            raise ValueError(
                "two of the combined distillers bring a teacher of their own: combine at most one of them"
            )
        return made[0] if made else None

    def setup(self, context):
        for part in self.parts.values():
            part.setup(context)
        self._join("student_layers", "teacher_layers")

    def forward(self, student, teacher, batch):
        return self._named({name: part(student, teacher, batch) for name, part in self.parts.items()})

    def teacher_terms(self, teacher, student, batch):
        return self._named({name: part.teacher_terms(teacher, student, batch) for name, part in self.parts.items()})

    def _named(self, terms_of: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            self._prefix(name) + term: self.weights[name] * value
            for name, terms in terms_of.items()
            for term, value in terms.items()
            if name == self.task_from or term != "task"
        }

    def _prefix(self, name: str) -> str:
        return "" if name == self.task_from else f"{name}/"

    def logged_values(self):
        return {
            self._prefix(name) + figure: value
            for name, part in self.parts.items()
            for figure, value in part.logged_values().items()
        }

    def task_logits(self, student):
        return self.parts[self.task_from].task_logits(student)

    def on_train_begin(self, context):
        for part in self.parts.values():
            part.on_train_begin(context)

    def on_epoch_begin(self, context):
        for part in self.parts.values():
            part.on_epoch_begin(context)

    def on_step_end(self, context):
        for part in self.parts.values():
            part.on_step_end(context)

    def on_train_end(self, context):
        for part in self.parts.values():
            part.on_train_end(context)

    def folded(self, student):
        return self.parts[self.task_from].folded(student)

    def on_load(self, context):
        for part in self.parts.values():
            part.on_load(context)
