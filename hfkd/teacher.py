"""Where teacher outputs come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.distillers.base import HardLabelLoss, ModelOutputs, autocast_off, check_temperature
from hfkd.features import Capture, at_model, in_float32, in_precision_of, is_outline, select_inputs


class TeacherEnsemble(nn.Module):
    r"""Several classifiers that teach as one: ``teacher_model=TeacherEnsemble([one, other])``.

    .. math:: z = T \log \sum_k w_k \, \mathrm{softmax}(z_k / T)
        \qquad\text{or}\qquad z = \sum_k w_k z_k

    The first (``"probabilities"``) is such that a method which softens the teacher at the same T learns from exactly
    the mean of the members' probabilities; so give it the method's temperature (1/γ for TTM and WTTM). The second is
    ``"logits"``. The weights are 1/K, or by sample

    .. math:: w_k = \frac{1}{K - 1} \left(1 - \frac{\exp \mathrm{CE}_k}{\sum_j \exp \mathrm{CE}_j}\right)

    with a member's cross-entropy against the label: who is wrong about a sample says less about it. They sum to 1, and
    are equal for a sample without label. The source weighs the members' losses, which for ``"probabilities"`` has the
    same gradient (its code divides by K once more); for ``"logits"`` it is our reading.

    Every member is checked, put into the student's order of classes and frozen as a single teacher is, and all of them
    see the same columns ``teacher_…`` where there are any, so let them share tokenizer and image processor. Methods
    that look inside the teacher, or train it, are refused. The score that is logged for the teacher is the
    ensemble's, with equal weights, as it has no labels to look at then.

    Args:
        members: Two or more classifiers over the student's classes.
        average: ``"probabilities"`` or ``"logits"``; regression takes the latter.
        temperature: T of the mean of probabilities: the method's.
        weighting: ``"equal"`` or ``"cross_entropy"``.

    Raises:
        ValueError: If there are fewer than two members, or an argument is out of range.

    Source: the weights are those of Zhang et al. 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation",
    arXiv 2201.00007; github.com/Rorozhl/CA-MKD.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        average: str = "probabilities",
        temperature: float = 4.0,
        weighting: str = "equal",
    ):
        super().__init__()
        if len(members) < 2:
            raise ValueError(
                f"an ensemble has at least two members, got {len(members)}: pass a single teacher as it is"
            )
        if average not in ("probabilities", "logits"):
            raise ValueError(f'average must be "probabilities" or "logits", got {average!r}')
        if weighting not in ("equal", "cross_entropy"):
            raise ValueError(f'weighting must be "equal" or "cross_entropy" (by sample), got {weighting!r}')
        check_temperature(temperature)
        self.members = nn.ModuleList(members)
        self.average, self.temperature, self.weighting = average, temperature, weighting

    def combine(self, logits: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The logits of the ensemble from those of its members, in the same order of classes.

        Args:
            logits: One tensor a member.
            labels: Of the samples; None weighs the members alike.

        Shapes:
            Logits (B, C) each, labels (B,) of class indices or (B, C) of probabilities. Returns (B, C).
        """
        stacked = torch.stack(tuple(logits))
        weights = stacked.new_full(stacked.shape[:2], 1 / len(logits))
        if self.weighting == "cross_entropy" and labels is not None:
            losses = torch.stack([HardLabelLoss()(member, labels) for member in stacked])
            weights = (1 - losses.softmax(0)) / (len(logits) - 1)
        if self.average == "logits":
            return (weights[..., None] * stacked).sum(0)
        log_probabilities = (stacked / self.temperature).log_softmax(-1)
        return self.temperature * (weights.log()[..., None] + log_probabilities).logsumexp(0)


def members_of(teacher: nn.Module) -> list[nn.Module]:
    """The members of an ensemble; of a single teacher itself."""
    return list(teacher.members) if isinstance(teacher, TeacherEnsemble) else [teacher]


def has_packed_weights(model: nn.Module) -> bool:
    """Whether it is one of torch's own quantised models, whose layers have no parameters."""
    return any(not isinstance(value, Tensor) for value in model.state_dict().values())


class Teacher:
    """A frozen model that is asked at every step.

    It sees the columns ``teacher_…`` of a batch where there are any, in the precision of the surrounding autocast, or
    in its own ``dtype``. One loaded with ``device_map``, or offloaded by Accelerate, stays where that put it; inputs
    go there, outputs come back.

    Args:
        model: A classifier, perhaps quantised; put into evaluation mode, its parameters frozen.
        layers: Module paths to capture.
        label_order: For each of the student's classes the teacher's index of it; None where the orders agree.
        dtype: Precision of its own, outside autocast; None follows the student.
        device: Where it runs.
        compile_options: Of torch.compile; None runs it as it is. Only what is asked here is compiled: the model itself
            stays as it was for others.

    Raises:
        ValueError: If a quantised model is to have another precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str] = (),
        label_order: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        compile_options: Mapping[str, Any] | None = None,
    ):
        is_packed = has_packed_weights(model)
        if is_packed and dtype is None:
            dtype = torch.float32  # torch's own quantised layers take nothing else
        if dtype not in (None, next(model.parameters()).dtype):
            if is_packed or getattr(model, "is_quantized", False):
                raise ValueError(
                    f"a quantised teacher cannot be turned into {dtype}: leave out teacher_dtype, and load it with "
                    "from_pretrained(..., dtype=...) in the precision that its other layers should have"
                )
            model = copy.deepcopy(model).to(dtype)  # the caller's stays as it is
        self.model = model.eval().requires_grad_(False)
        self.label_order = None if label_order is None else torch.tensor(label_order, device=device)
        if hasattr(model, "hf_device_map") or hasattr(model, "_hf_hook"):
            device = None
        else:
            self.model.to(device)
        self.dtype, self.device = dtype, device
        self._modules, self._parameters = list(model.modules()), list(model.parameters())
        self._answer = self._run if compile_options is None else torch.compile(self._run, **compile_options)
        self.watch(layers)

    def watch(self, layers: Sequence[str]) -> None:
        """Choose the module paths to capture."""
        self.layers = tuple(layers)
        self._capture = Capture(self.model, self.layers)

    @property
    def precision(self) -> str:
        """In which it would answer here and now: by its own dtype, else the autocast around it, else its weights'."""
        parameter, dtype = next(self.model.parameters()), self.dtype
        device = (self.device or parameter.device).type
        if dtype is None and device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return str(dtype or parameter.dtype).removeprefix("torch.")

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> ModelOutputs:
        """Teacher outputs for a batch, without gradient.

        Raises:
            RuntimeError: If somebody put the teacher into training mode or unfroze it.
        """
        training = any(module.training for module in self._modules)
        if training or any(parameter.requires_grad for parameter in self._parameters):
            raise RuntimeError(
                "the teacher is in training mode or has trainable parameters: it must stay frozen. "
                "Keep it out of the student's modules, and use a distiller with trains_teacher=True to train it"
            )
        # Of its inputs alone, or torch.compile would compile for each set of other columns.
        inputs = at_model(self.model, select_inputs(self.model, batch, prefix="teacher_"))
        if self.dtype is not None:
            inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        elif not torch.is_autocast_enabled(next(iter(inputs.values())).device.type):
            inputs = in_precision_of(self.model, inputs)
        with (
            self._capture,
            nullcontext() if self.dtype is None else autocast_off(next(self.model.parameters()).device),
        ):
            outputs = self._answer(inputs)
        here = next(column.device for column in batch.values() if isinstance(column, Tensor))
        features = {name: feature.to(here) for name, feature in outputs.features.items()}
        logits = outputs.logits.to(here)
        return ModelOutputs(logits if self.label_order is None else logits[:, self.label_order], features=features)

    def _run(self, inputs: Mapping[str, Tensor]) -> ModelOutputs:
        return self._capture.run(inputs)


class DeferredTeacher(Teacher):
    """A teacher whose weights are loaded when somebody needs them: behind a full cache, never.

    Args:
        outline: The model on the device ``meta``; it becomes the loaded one in place.
        load: Gives the model.
        **options: As for :class:`Teacher`.
    """

    def __init__(self, outline: nn.Module, load: Callable[[], nn.Module], **options):
        self.model, self.load, self.options = outline, load, options
        self.dtype, self.device = options["dtype"], options["device"]
        self.label_order = None if options["label_order"] is None else torch.tensor(options["label_order"])
        self.watch(())

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are there."""
        return not is_outline(self.model)

    def materialize(self) -> None:
        """Load the weights if they are not there."""
        if not self.is_loaded:
            with torch.random.fork_rng():  # a run draws the same numbers whether it comes to this or not
                vars(self.model).update(vars(self.load()))
            super().__init__(self.model, **{**self.options, "layers": self.layers})

    def __call__(self, batch: Mapping[str, Tensor]) -> ModelOutputs:
        """As :class:`Teacher`'s."""
        self.materialize()
        return super().__call__(batch)


class ColumnTeacher:
    """Answers that are a column of the training set, bought once from a model that is not here.

    Args:
        column: ``"teacher_logits"``, or ``"teacher_probabilities"``, whose logarithms stand for the logits: the same
            up to a number for each sample, which no softmax sees.
    """

    def __init__(self, column: str):
        self.column = column

    def __call__(self, batch: Mapping[str, Tensor]) -> ModelOutputs:
        """The answers to a batch that holds them.

        Raises:
            ValueError: If it does not.
        """
        if self.column not in batch:
            raise ValueError(
                f"the batch has no {self.column}, only {', '.join(batch)}: let the data collator keep the column "
                "(hfkd.data.DistillationCollator does)"
            )
        answers = batch[self.column]
        answers = answers.reshape(len(answers), -1).float()
        if self.column == "teacher_probabilities":
            answers = answers.clamp(min=torch.finfo(answers.dtype).tiny).log()
        return ModelOutputs(answers)


class Teachers:
    """The frozen members of an ensemble, asked at every step for one answer; without features.

    Args:
        ensemble: How they are averaged.
        members: Each as a teacher of its own.
    """

    def __init__(self, ensemble: TeacherEnsemble, members: Sequence[Teacher]):
        self.ensemble, self.members = ensemble, tuple(members)

    @property
    def precision(self) -> str:
        """In which the members would answer here and now."""
        return ", ".join(dict.fromkeys(member.precision for member in self.members))

    def __call__(self, batch: Mapping[str, Tensor]) -> ModelOutputs:
        """What the ensemble says about a batch, in float32 and without gradient.

        Raises:
            RuntimeError: If somebody put a member into training mode or unfroze it.
        """
        logits = [in_float32(member(batch)).logits for member in self.members]
        with autocast_off(logits[0].device):
            return ModelOutputs(self.ensemble.combine(logits, batch.get("labels")))
