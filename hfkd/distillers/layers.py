"""What methods that compare inner features have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import Distiller, ModelOutputs, check_not_negative
from hfkd.features import base_model, probe, stage_paths


Pairs = list[tuple[Tensor, Tensor]]


def to_paths(layers: str | Iterable[str] | None) -> tuple[str, ...]:
    """Module paths as a tuple; a single one may come bare, and None is empty."""
    return (layers,) if isinstance(layers, str) else tuple(layers or ())


def to_common_size(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, C, H, W) maps, averaged down to the smaller height and width of the two."""
    if student_map.shape[2:] == teacher_map.shape[2:]:
        return student_map, teacher_map  # the gradient of adaptive pooling is not deterministic on a GPU
    size = tuple(min(sides) for sides in zip(student_map.shape[2:], teacher_map.shape[2:], strict=True))
    return F.adaptive_avg_pool2d(student_map, size), F.adaptive_avg_pool2d(teacher_map, size)


class BatchOnlyNorm(nn.BatchNorm2d):
    """BatchNorm by the batch alone: running averages would be each process's own, and nothing here is evaluated."""

    def __init__(self, channels: int):
        super().__init__(channels, track_running_stats=False)

    def forward(self, features: Tensor) -> Tensor:
        one_value = features.numel() == features.shape[1]  # a batch of one vector has no variance
        return features if one_value else super().forward(features)


def check_coupled(reduction: str) -> None:
    """Refuse a loss per sample where samples are compared with each other."""
    if reduction != "mean":
        raise ValueError(
            f'reduction must be "mean", got {reduction!r}: the samples of a batch are compared with each other, so '
            "there is no loss per sample"
        )


class LayerDistiller(Distiller):
    """A method that compares features of the student, layer by layer, with the teacher's: ``task + weight * term``.

    A subclass has a ``forward``, and where it needs them :meth:`propose` (which layers, if the user names none) and
    :meth:`allocate` (parameters for features of these shapes).

    Args:
        weight: Weight of the term, not negative.
        student_layers: Module paths of the student, ``"path:input"`` for a module's input; proposed where None.
        teacher_layers: As many of the teacher, in the same order.

    Attributes:
        named_layers: The layers that the user named, of the student and the teacher.
        dimensions: How many dimensions a feature may have, and what it then is.
        remedy: What the message says when it has another number.
        by_token: Whether both must see the same tokens.

    Raises:
        ValueError: If the weight is negative, or the numbers of layers differ.
    """

    problem_types = ("single_label", "regression")
    dimensions: dict[int, str] = {4: "a map (B, C, H, W)"}
    remedy = "name other layers with student_layers= and teacher_layers="
    by_token = False

    def __init__(
        self,
        weight: float,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__()
        check_not_negative(weight=weight)
        self.weight = weight
        self.named_layers = to_paths(student_layers), to_paths(teacher_layers)
        self.student_layers, self.teacher_layers = self.named_layers
        if all(self.named_layers):
            self._check_numbers()

    def propose(self, model: nn.Module) -> tuple[str, ...]:
        """The layers of a model to compare where the user names none."""
        return stage_paths(model)

    def choose_layers(self, student: nn.Module, teacher: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The layers of student and teacher to capture."""
        own, other = self.named_layers
        return own or self.propose(student), other or self.propose(teacher)

    def allocate(self, pairs: Pairs) -> None:
        """Make the parameters that compare student and teacher features such as these, one pair a layer."""

    def pairs(self, student: ModelOutputs, teacher: ModelOutputs) -> Pairs:
        """The features to compare, layer by layer."""
        return self._paired(student.features, teacher.features)

    def _paired(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Pairs:
        layers = zip(self.student_layers, self.teacher_layers, strict=True)
        return [(student[one], teacher[other]) for one, other in layers]

    def setup(self, context):
        self.student_layers, self.teacher_layers = self.choose_layers(context.student, context.teacher_model)
        self._check_numbers()
        samples = context.sample()
        if self.by_token and "teacher_input_ids" in samples:
            raise ValueError(
                f"{type(self).__name__} compares token by token, and the teacher has a tokenizer of its own: choose a "
                "student with the teacher's tokenizer, or a method that compares logits"
            )
        student = probe(context.student, samples, self.student_layers)
        teacher = probe(context.teacher_model, samples, self.teacher_layers, prefix="teacher_")
        models = base_model(context.student), base_model(context.teacher_model)
        for whose, model, features in zip(("student", "teacher"), models, (student, teacher), strict=True):
            for path, feature in features.items():
                if feature.ndim not in self.dimensions:
                    raise ValueError(
                        f"{type(self).__name__} compares {' or '.join(self.dimensions.values())}, and {path!r} of the "
                        f"{whose} gives {tuple(feature.shape)}: {self.remedy}"
                    )
                layout = getattr(getattr(model, "timm_model", None), "output_fmt", "NCHW")
                if feature.ndim == 4 and layout != "NCHW":
                    raise ValueError(
                        f"{type(self).__name__} compares {self.dimensions[4]}, and the {whose}'s are {layout} "
                        f"({type(model.timm_model).__name__}): take another {whose}, or a method that compares logits"
                    )
        pairs = self._paired(student, teacher)
        for own, other in pairs:
            if self.by_token and own.shape[1] != other.shape[1]:
                raise ValueError(
                    f"{type(self).__name__} compares token by token, and the student has {own.shape[1]} and the "
                    f"teacher {other.shape[1]}: choose models that cut an input alike, or compare logits"
                )
        self.allocate(pairs)

    def _check_numbers(self) -> None:
        if len(self.student_layers) != len(self.teacher_layers):
            raise ValueError(
                f"{type(self).__name__} compares layers in pairs, and there are {len(self.student_layers)} of the "
                f"student ({', '.join(self.student_layers)}) and {len(self.teacher_layers)} of the teacher "
                f"({', '.join(self.teacher_layers)}): name as many of each with student_layers= and teacher_layers="
            )
