"""Class-wise adaptive matching (CAM): attention over the classes reweights the teacher's logits."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import Distiller, ModelOutputs, Wrapper, check_not_negative
from hfkd.distillers.kd import KD


class ClassAttention(Distiller):
    """What :class:`CAM` and ``AKD(cam=True)`` share: the network, its own loss term and its figures in the log.

    Args:
        width: Size of a class's token.
        label_weight: Weight of the cross-entropy of the reweighted logits.
    """

    default_learning_rate = 1e-3

    def __init__(self, width: int = 16, label_weight: float = 16.0):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, got {width}: 16 is the default")
        check_not_negative(label_weight=label_weight)
        self.width, self.label_weight = width, label_weight
        self._figures: dict[str, Tensor] = {}

    def setup(self, context):
        if context.student.config.num_labels == 2:
            raise ValueError(
                "CAM cannot act on two classes: their weights add up to 2, which leaves the difference of the two "
                "centred logits as it was. Use the method without it"
            )
        self.embedding = nn.Linear(3, self.width)
        # A bias on the keys or on the score would add the same to all classes, which the softmax takes away again.
        self.query_key_value = nn.Linear(self.width, 3 * self.width, bias=False)
        self.hidden = nn.Linear(self.width, 2 * self.width)
        self.score = nn.Linear(2 * self.width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def weights(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The classes' weights, (B, C), positive and of mean 1 over a sample's classes; no gradient to the student."""
        student, teacher = student_logits.detach().softmax(-1), teacher_logits.softmax(-1)
        tokens = torch.stack([teacher, student, (teacher - student).abs()], -1)
        hidden = self.embedding(tokens.to(self.embedding.weight.dtype))
        query, key, value = self.query_key_value(hidden)[:, None].chunk(3, -1)
        hidden = hidden + F.scaled_dot_product_attention(query, key, value)[:, 0]
        scores = self.score(F.gelu(self.hidden(hidden)))[..., 0]
        return (scores.shape[-1] * scores.softmax(-1)).to(teacher_logits.dtype)

    def reweigh(self, student: ModelOutputs, teacher: ModelOutputs) -> ModelOutputs:
        """The teacher with its logits centred, then multiplied class by class."""
        weights = self.weights(student.logits, teacher.logits)
        self._figures = {
            "cam_weight_min": weights.detach().amin(-1),
            "cam_weight_max": weights.detach().amax(-1),
        }
        return replace(teacher, logits=weights * (teacher.logits - teacher.logits.mean(-1, keepdim=True)))

    def forward(self, student, teacher, batch):
        """The term on the labels that keeps the reweighted teacher, which reweigh returned, a good one."""
        labels = batch["labels"]
        classes = labels.argmax(-1) if labels.ndim > 1 else labels
        right = teacher.logits.argmax(-1) == classes  # never where there is no label, which the scale makes up for
        self._figures["cam_accuracy"] = self.hard_label_loss.scale * right.float()
        return {"cam": self.label_weight * self.hard_label_loss(teacher.logits, labels)}

    def logged_values(self):
        return self._figures


class CAM(Wrapper):
    r"""Lets a small trained network choose how much each class of the teacher's answer counts. Our reading.

    .. math:: \tilde z^T = w \odot (z^T - \bar z^T), \qquad w = C \cdot \mathrm{softmax}(e)

    For each class a token :math:`[p^T_c, p^S_c, |p^T_c - p^S_c|]` goes through a linear layer, self-attention over the
    C tokens of the sample, and a two-layer perceptron that gives e_c; the student's side carries no gradient. The last
    layer starts at zero, so that w = 1 and training starts as the wrapped method alone. The wrapped method sees z̃ in
    place of the teacher's logits. Trained on the distillation term alone, w could flatten the teacher to make the task
    easy; a cross-entropy of z̃ on the labels (the term ``cam``) is against that. With two classes there is nothing to
    choose.

    Logged: the mean over samples of the smallest and the largest weight (``cam_weight_min``, ``cam_weight_max``), and
    the accuracy of z̃ on the training labels (``cam_accuracy``), to be held against the teacher's own.

    Cost: 1,408 parameters, whatever the number of classes. A forward pass takes 0.03, 0.9 and 67 MFLOP a sample for
    10, 100 and 1,000 classes (attention grows with their square; a ResNet-20 on CIFAR takes 82, a ResNet-18 at 224
    pixels 3,628). Forward and backward of a batch of 64 took 1.3, 6.8 and 276 ms on one core of a busy CPU, KD alone
    0.2, 0.1 and 0.3 ms.

    Args:
        base: The method to change; any that compares logits, :class:`~hfkd.distillers.KD` by default.
        width: Size of a class's token.
        label_weight: Weight of the term on the labels, not negative. It must hold against the distillation term, so 16
            is the T² of KD at T = 4: at 0.1 the network learns to hide the right class, and what is left of a teacher
            that is right on 99 % of CIFAR-10 is right on 2 %.

    Raises:
        ValueError: If an argument is out of range, or there are only two classes.

    Source: Li 2025, "Context-Aware Knowledge Distillation with Adaptive Weighting for Image Classification",
    arXiv 2509.05319, of which only "MLP + Attention to adaptively reweight class-wise teacher outputs" is certain. The
    network's learning rate is 1e-3 unless ``distiller_learning_rate`` is given.
    """

    needs_teacher = True

    def __init__(self, base: Distiller | None = None, width: int = 16, label_weight: float = 16.0):
        super().__init__(KD() if base is None else base)
        self.width, self.label_weight = width, label_weight
        self.attention = ClassAttention(width, label_weight)

    def setup(self, context):
        super().setup(context)
        self.attention.setup(context)

    def forward(self, student, teacher, batch):
        teacher = self.attention.reweigh(student, teacher)
        return {**super().forward(student, teacher, batch), **self.attention(student, teacher, batch)}

    def logged_values(self):
        return {**super().logged_values(), **self.attention.logged_values()}
