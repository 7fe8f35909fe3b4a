"""Adaptive explicit knowledge transfer (AEKT) with task serialization."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import Distiller, Ramp, check_not_negative, check_temperature, reduce_batch
from hfkd.distillers.dkd import label_and_rest, nckd_loss, without_unlabelled
from hfkd.features import base_model, find_module, linear_heads, try_out


EXPLICIT = ("tckd", "nll", "confidence")
ORDERS = ("distill_first", "classify_first", None)


def _check_explicit(explicit: str, max_ratio: float) -> None:
    if explicit not in EXPLICIT:
        raise ValueError(f"explicit must be one of {', '.join(EXPLICIT)}, got {explicit!r}")
    if not 1 <= max_ratio < float("inf"):
        raise ValueError(f"max_ratio must be at least 1 and finite, got {max_ratio}: 2 is the default")


def aekt_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    explicit: str = "tckd",
    adaptive: bool = True,
    max_ratio: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Explicit knowledge, weighted by how much surer the teacher is of the label, and implicit one. Our reading.

    .. math:: T^2 \left(\alpha \, r \, L + \beta \, \mathrm{NCKD}\right), \qquad
        r = \min\left(p^T_t / p^S_t, r_{\max}\right)

    with L = TCKD (``"tckd"``), :math:`-\log p^S_t` (``"nll"``) or :math:`-p^T_t \log p^S_t` (``"confidence"``), all at
    temperature T, and no gradient through r. ``"tckd"`` vanishes where the student has the teacher's logits, the other
    two do not; ``"nll"`` has the gradient of the ratio :math:`p^T_t / p^S_t` itself.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        labels: Class indices; a sample with -100 contributes 0.
        alpha: Weight of the explicit part; 1 as in DKD.
        beta: Weight of the implicit part, :func:`~hfkd.functional.nckd_loss`; 8 as in DKD on CIFAR-100.
        temperature: Softening of both distributions; 4 on CIFAR-100, 1 on ImageNet.
        explicit: ``"tckd"``, ``"nll"`` or ``"confidence"``.
        adaptive: Whether there is an r; without it r = 1, and ``"tckd"`` is :func:`~hfkd.functional.dkd_loss`.
        max_ratio: Largest r, at least 1.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        logits: (B, C), labels: (B,). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If temperature or max_ratio is out of range, or explicit or the reduction is unknown.

    Source: Park and Lee 2024, "Adaptive Explicit Knowledge Transfer for Knowledge Distillation", arXiv 2409.01679,
    whose analysis of the gradients of TCKD and NCKD holds exactly; the term built on it is our reading: the paper was
    not available to us in full.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0, 1.0]])
    >>> aekt_loss(z, z, torch.tensor([0])).item()
    0.0
    """
    check_temperature(temperature)
    _check_explicit(explicit, max_ratio)
    student = label_and_rest(student_logits / temperature, labels)
    teacher = label_and_rest(teacher_logits / temperature, labels)
    if explicit == "tckd":
        explicit_part = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    else:
        explicit_part = -student[:, 0] * (teacher[:, 0].exp() if explicit == "confidence" else 1.0)
    if adaptive:
        # The two probabilities may both be 0 in any precision; their logarithms are not infinite.
        explicit_part = explicit_part * (teacher - student)[:, 0].detach().clamp(max=math.log(max_ratio)).exp()
    explicit_part = without_unlabelled(explicit_part, labels)
    implicit_part = nckd_loss(student_logits, teacher_logits, labels, temperature=temperature, reduction="none")
    return reduce_batch(temperature**2 * (alpha * explicit_part + beta * implicit_part), reduction)


@torch.no_grad()
def fold(head: nn.Linear, classifier: nn.Linear) -> None:
    """Make a classifier give at once what a head gives of its outputs: two linear layers in sequence are one."""
    weight, inner = (layer.weight.to("cpu", torch.float64) for layer in (head, classifier))
    classifier.weight.copy_(weight @ inner)
    if classifier.bias is not None:
        bias, inner = (layer.bias.to("cpu", torch.float64) for layer in (head, classifier))
        classifier.bias.copy_(weight @ inner + bias)


class AEKT(Distiller):
    r"""Explicit and implicit knowledge, on other logits than classification: ``task + ramp * aekt``. Our reading.

    The term is :func:`aekt_loss`, its weight the factor ``min(progress / warm_up, 1)``. So that classification and
    distillation do not pull at the same logits, one more linear layer W, a C × C matrix that starts as the identity,
    follows the student's logits z (task serialization):

    - ``order="distill_first"``: distillation on z, cross-entropy and prediction on Wz + b. Wherever the student is
      written, and for good when training ends, W is folded into its classifier (:math:`W W_h`, :math:`W b_h + b`,
      computed in float64), so that the student keeps its architecture and predicts as before, but for rounding to the
      classifier's precision. A checkpoint keeps W and the unfolded classifier in ``distiller.safetensors``. Callbacks
      find W folded in ``on_epoch_end``, ``on_evaluate``, ``on_save`` and ``on_train_end``; elsewhere, as in
      ``on_step_end``, ``trainer.save_model(folder)`` writes the student that predicts, not the model's own
      ``save_pretrained``.
    - ``order="classify_first"``: cross-entropy and prediction on z, distillation on Wz + b. W is dropped at the end.
    - ``order=None``: no such layer.

    W has a bias where the student's classifier has one, and learns at the student's learning rate, for
    ``"classify_first"`` at 1e-3, unless ``distiller_learning_rate`` is given. Without a label there is no target
    class: an unlabelled sample adds nothing, and the term is scaled up as the task term is.

    Cost over :class:`~hfkd.distillers.DKD` with C classes and D features before the classifier: C² + C parameters with
    their gradients and optimizer state, and 6C² + 2C FLOP a sample and training step, 2C² + C to predict during
    training; ``"distill_first"`` keeps a second copy of the classifier (CD + C numbers), and a fold takes 2C²D FLOP.
    For C = 100 that is 10,100 parameters and 0.06 MFLOP a sample (forward and backward of a ResNet-20 on CIFAR: 247),
    for C = 1,000 1.0 million and 6.0 MFLOP. The finished student costs nothing more.

    Args:
        alpha: Weight of the explicit part, not negative.
        beta: Weight of the implicit part, not negative.
        temperature: Softening of both distributions.
        explicit: ``"tckd"``, ``"nll"`` or ``"confidence"``; see :func:`aekt_loss`.
        adaptive: Whether the explicit part is weighted by the ratio of the probabilities of the label.
        max_ratio: Largest ratio, at least 1.
        order: ``"distill_first"``, ``"classify_first"`` or None.
        warm_up: Share of training during which the term's weight rises from 0; 1/12 as in DKD.

    Raises:
        ValueError: If an argument is out of range; at setup, for ``"distill_first"``, if the student does not end in
            one trainable linear layer (an adapted one must save it whole), FSDP is active, or
            ``load_best_model_at_end`` meets ``save_only_model``.

    Source: arXiv 2409.01679; see :func:`aekt_loss`.
    """

    needs_hard_labels = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        explicit: str = "tckd",
        adaptive: bool = True,
        max_ratio: float = 2.0,
        order: str | None = "distill_first",
        warm_up: float = 1 / 12,
    ):
        super().__init__()
        check_not_negative(alpha=alpha, beta=beta)
        check_temperature(temperature)
        _check_explicit(explicit, max_ratio)
        if order not in ORDERS:
            raise ValueError(f'order must be "distill_first", "classify_first" or None (no head), got {order!r}')
        self.alpha, self.beta, self.temperature, self.explicit = alpha, beta, temperature, explicit
        self.adaptive, self.max_ratio, self.order, self.warm_up = adaptive, max_ratio, order, warm_up
        self.has_task_head = order == "distill_first"
        # Its gradient is there the explicit term's, up to max_ratio times DKD's: with 10 and at 0.05 it diverged.
        self.default_learning_rate = 1e-3 if order == "classify_first" else None
        self.ramp = Ramp(warm_up)

    def setup(self, context):
        if self.order is None:
            return
        student, heads = context.student, linear_heads(context.student)
        like, has_bias = next(student.parameters()), True
        if heads:
            last = find_module(base_model(student), heads[-1])
            like, has_bias = last.weight, last.bias is not None
        classes = student.config.num_labels
        self.head = nn.Linear(classes, classes, bias=has_bias, device=like.device, dtype=like.dtype)
        self._reset_head()
        if self.has_task_head:
            if context.is_sharded:
                raise ValueError(
                    'AEKT(order="distill_first") folds its head into the student\'s classifier, which FSDP spreads '
                    'over processes: use order="classify_first" or order=None, or plain data parallelism'
                )
            if not heads:
                self._refuse(student, "come from no linear layer")
            self._set_up_folding(student, heads[-1])
            self._check_folding(context)

    def _set_up_folding(self, student: nn.Module, path: str) -> None:
        classifier = find_module(base_model(student), path)
        saved_whole = base_model(student) is student or "modules_to_save" in path.split(".")
        if not (classifier.weight.requires_grad and saved_whole):
            name = re.split(r"\.(?:base_layer|lora_\w+)\b", path)[0]
            raise ValueError(
                f"AEKT folds its head into the student's classifier, and {name!r} is frozen or only adapted: train it "
                f"whole (with PEFT: modules_to_save=[{name!r}]), or leave the head out (order=None)"
            )
        self.classifier_path = path
        for name, parameter in classifier.named_parameters():
            self.register_buffer(f"unfolded_{name}", parameter.detach().clone())

    @torch.no_grad()
    def _check_folding(self, context) -> None:
        """Refuse a student whose logits are not the classifier's outputs, by folding a random head into it."""
        student, samples = context.student, context.sample()
        for parameter in self.head.parameters():
            nn.init.normal_(parameter)
        wanted = self.task_logits(try_out(student, samples))
        with self.folded(student):
            folded = try_out(student, samples).logits
        self._reset_head()
        rounding = torch.finfo(self.head.weight.dtype).eps ** (1 / 3)
        if not (folded - wanted).abs().max() <= rounding * wanted.abs().max():
            self._refuse(student, f"are not the outputs of {self.classifier_path!r} alone")

    def _refuse(self, student: nn.Module, why: str) -> None:
        heads = ", ".join(linear_heads(student)) or "none"
        raise ValueError(
            f'AEKT(order="distill_first") folds its head into the student\'s last linear layer, and the logits of '
            f"{type(base_model(student)).__name__} {why} (linear layers with an output for each class: {heads}; "
            'distilled DeiTs have two): use order=None or order="classify_first"'
        )

    def _reset_head(self) -> None:
        nn.init.eye_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def _serialized(self, logits: Tensor) -> Tensor:
        bias = None if self.head.bias is None else self.head.bias.to(logits.dtype)
        return F.linear(logits, self.head.weight.to(logits.dtype), bias)

    def task_logits(self, student):
        return self._serialized(student.logits) if self.order == "distill_first" else student.logits

    def forward(self, student, teacher, batch):
        distillation = aekt_loss(
            self._serialized(student.logits) if self.order == "classify_first" else student.logits,
            teacher.logits,
            batch["labels"],
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            explicit=self.explicit,
            adaptive=self.adaptive,
            max_ratio=self.max_ratio,
            reduction="none",
        )
        return {
            "task": self.task_loss(student, batch),
            "aekt": self.ramp(self.hard_label_loss.scale * distillation),
        }

    def on_epoch_begin(self, context):
        self.ramp.update(context.progress)

    def on_step_end(self, context):
        self.ramp.update(context.progress)

    def on_train_end(self, context):
        if self.has_task_head:
            fold(self.head, self._classifier(context.student))
            self._reset_head()

    def on_load(self, context):
        if self.has_task_head:
            self._unfold(context.student)

    @contextmanager
    def folded(self, student):
        if not self.has_task_head:
            yield
            return
        classifier = self._classifier(student)
        for name, parameter in classifier.named_parameters():
            self.get_buffer(f"unfolded_{name}").copy_(parameter.detach())
        try:
            fold(self.head, classifier)
            yield
        finally:
            self._unfold(student)

    @torch.no_grad()
    def _unfold(self, student: nn.Module) -> None:
        for name, parameter in self._classifier(student).named_parameters():
            parameter.copy_(self.get_buffer(f"unfolded_{name}"))

    def _classifier(self, student: nn.Module) -> nn.Linear:
        return find_module(base_model(student), self.classifier_path)
