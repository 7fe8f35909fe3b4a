"""Knowledge distillation with adaptive influence weights (KD-AIF)."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hfkd.distillers.base import Distiller, ModelOutputs, Wrapper, check_not_negative
from hfkd.distillers.kd import KD
from hfkd.features import (
    base_model,
    evaluating,
    find_module,
    head_path,
    in_float32,
    in_precision_of,
    run_model,
    select_inputs,
    try_out,
)
from hfkd.influence import (
    directional_derivatives,
    ekfac_influence,
    forward_mode_ready,
    inverse_hessian_product,
    last_layer_gradient,
    last_layer_influence,
    last_layer_inverse_product,
    mean_gradient,
)


TABLE_FOLDER = "influence"
WEIGHTINGS = ("sigmoid", "exp_minmax")
_TEACHER = "teacher_outputs"  # beside the columns of a batch
_LISSA_SHARE = 3  # a Hessian-vector product keeps up to three times what a training step on as many samples does


def _log_weights(influence: Tensor, weighting: str, sharpness: float) -> Tensor:
    """Logarithm of the weights as they are defined, before they are scaled; 0 for all where the range is 0."""
    low, high = influence.aminmax()
    if low == high:
        return torch.zeros_like(influence)
    if weighting == "sigmoid":
        return F.logsigmoid(-sharpness * influence / (high - low))
    return 1 - 2 * (influence - low) / (high - low)


def influence_weights(
    influence: Tensor, *, weighting: str = "sigmoid", sharpness: float = 10.0, clip: float = 0.005
) -> Tensor:
    r"""Weights of the training samples from their influence: more for those that help (φ < 0).

    .. math:: w_i \propto \frac{1}{1 + e^{k \varphi_i / (\max \varphi - \min \varphi)}} \;(\text{sigmoid}), \qquad
        w_i = e^{1 - 2 (\varphi_i - \min \varphi) / (\max \varphi - \min \varphi)} \;(\text{exp minmax})

    The sigmoid's are scaled to mean 1, so that the learning rate keeps its meaning; the others, in [1/e, e], are not.
    Neither depends on the unit of φ. Where all φ are equal, all weights are 1.

    Args:
        influence: φ of the whole training set: the range is over all of it.
        weighting: ``"sigmoid"`` or ``"exp_minmax"``, that of the authors' example.
        sharpness: k, not negative: 0 weighs all alike; without meaning for ``"exp_minmax"``.
        clip: Share of the samples at either end whose φ is cut to that of the quantile, in [0, 0.5), so that a few
            outliers do not set the range; 0 for none.

    Shapes:
        ``influence``: (N,). Returns (N,).

    Raises:
        ValueError: If an argument is out of range, or an influence is not finite.

    Source: Wu et al. 2025, "Knowledge Distillation with Adapted Weight", arXiv 2501.02705, and its example code for
    ``"exp_minmax"``; sigmoid, scaling and clipping are our reading.

    >>> import torch
    >>> influence_weights(torch.tensor([-1.0, 1.0]), sharpness=0.0)
    tensor([1., 1.])
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    check_not_negative(sharpness=sharpness)
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip must lie in [0, 0.5), got {clip}: it is a share of the samples at either end")
    if wrong := (~influence.isfinite()).sum().item():
        raise ValueError(
            f"{wrong} of {len(influence)} influences are not finite: the student has diverged (lower its learning "
            "rate), or its losses overflow in half precision"
        )
    exact = influence.double()
    low, high = exact.quantile(exact.new_tensor([clip, 1 - clip]))
    logarithms = _log_weights(exact.clamp(low, high), weighting, sharpness)
    if weighting == "sigmoid":
        # Mean 1 by way of logarithms: where all φ are far from 0, every sigmoid underflows.
        return (len(influence) * logarithms.softmax(0)).to(influence)
    return logarithms.exp().to(influence)


class _SampleLosses(nn.Module):
    """The loss of each sample of a batch, (B,), as a function that forward-mode differentiation can go through.

    Args:
        student: The model whose parameters the losses depend on.
        distiller: Whose terms are summed; None is the cross-entropy of :meth:`Distiller.task_logits`.
        task: Where ``task_logits`` come from.
    """

    def __init__(self, student, distiller, task):
        super().__init__()
        self.student, self.distiller = student, distiller
        self.others = (task,)  # in a tuple, which does not make it a part

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.of_model(self.student, batch)

    def of_model(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.of_outputs(self.outputs(student, batch), batch)

    def outputs(self, student: nn.Module, batch: Mapping[str, Tensor], *more_layers: str) -> ModelOutputs:
        layers = () if self.distiller is None else self.distiller.student_layers
        columns = {name: column for name, column in batch.items() if name != _TEACHER}
        return in_float32(run_model(student, in_precision_of(student, columns), layers=(*layers, *more_layers)))

    def of_outputs(self, student: ModelOutputs, batch: Mapping[str, Tensor]) -> Tensor:
        (task,) = self.others
        student.task_logits = task.task_logits(student)
        if self.distiller is None:
            return F.cross_entropy(student.task_logits, batch["labels"], reduction="none")
        return torch.stack(list(self.distiller(student, batch[_TEACHER], batch).values())).sum(0)

    def functional(self, parameters: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        named = {f"student.{name}": parameter for name, parameter in parameters.items()}
        return torch.func.functional_call(self, named, (batch,))


class _Batches(nn.Module):
    """A list of batches as buffers: saved and restored whatever their number and shapes."""

    def replace(self, batches: list[dict[str, Tensor]]) -> None:
        for name in list(self._buffers):
            del self._buffers[name]
        for i, batch in enumerate(batches):
            for name, tensor in batch.items():
                self.register_buffer(f"{i}/{name}", tensor)

    def get(self, i: int | str) -> dict[str, Tensor]:
        """Batch i; empty where there is none."""
        prefix = f"{i}/"
        return {name.removeprefix(prefix): tensor for name, tensor in self._buffers.items() if name.startswith(prefix)}

    def check(self, classes: int) -> None:
        """Refuse batches out of a file that are none: of several lengths, or with answers that are no class."""
        for i in {name.partition("/")[0] for name in self._buffers}:
            batch = self.get(i)
            answers = batch.get("answers")
            if answers is None or answers.ndim != 1 or answers.dtype != torch.int64:
                raise ValueError(f"its batch {i} has no answers")
            if any(tensor.ndim == 0 or len(tensor) != len(answers) for tensor in batch.values()):
                raise ValueError(f"its batch {i} has columns of several lengths")
            if ((answers < 0) | (answers >= classes)).any():
                raise ValueError(f"its batch {i} has answers that are none of {classes} classes")

    def _load_from_state_dict(self, state_dict, prefix, *others):
        own = {name.removeprefix(prefix): t.clone() for name, t in state_dict.items() if name.startswith(prefix)}
        self._buffers.clear()
        self._buffers.update(own)


def _summing(context) -> Callable[[Tensor], Tensor]:
    return lambda tensor: context.gather(tensor[None]).sum(0)


class KDAIF(Wrapper):
    r"""Weights every training sample by its influence on held-out data, over any method with terms per sample.

    .. math:: \frac{1}{B} \sum_i w_i \, \ell_i, \qquad \varphi_i = -g_\text{val}^\top (H + \delta I)^{-1} g_i, \qquad
        w_i \propto \frac{1}{1 + e^{k \varphi_i / (\max \varphi - \min \varphi)}}

    :math:`\ell_i` is the loss of the base method (KD: :math:`(1 - \lambda) \mathrm{CE} + \lambda T^2 \mathrm{KL}`),
    :math:`g_i` its gradient at the student for the sample as
    :meth:`DistillationContext.batches <hfkd.context.DistillationContext.batches>` gives it, un-augmented,
    :math:`g_\text{val}` that of the mean cross-entropy on ``held_out_dataset``. φ < 0 helps, φ > 0 harms. A sample
    without a label has the influence of its distillation terms. Weights are found at the start of an epoch for the
    whole training set and kept until the next refresh; before the first they are 1. They are buffers, and resume with
    the run; another ``train()`` starts with weights of 1 again. A refresh works through batches of training's size.

    Each refresh writes ``influence/epoch-NNN.parquet`` into the output folder, with the columns ``index``, ``label``
    (as it was trained on), ``influence``, ``weight`` and ``epoch``. Costs, per refresh, a pass of student and teacher
    over the training and the held-out set (``layers="last"``), or about three passes (``layers="all"``);
    :func:`~hfkd.influence.inverse_hessian_product` and :func:`~hfkd.influence.ekfac_influence` more.

    Args:
        base: The method to weigh; ``KD()`` by default. Its terms must be per sample.
        layers: Which parameters count: ``"last"``, the final linear layer in closed form, or ``"all"``, by one
            forward-mode pass.
        hessian: H. Of the last layer ``"exact"``, that of the cross-entropy of its outputs, also where the task has
            others (AEKT; :func:`~hfkd.influence.last_layer_inverse_product`), or ``"identity"`` (first order); of all
            layers ``"identity"``, ``"lissa"`` or ``"ekfac"`` (linear and convolution layers; needs
            ``pip install "hfkd[influence]"``). To first order, the mean of the features outweighs what tells samples
            apart.
        damping: δ, positive; None is a tenth of the mean eigenvalue for ``"exact"`` and ``"ekfac"`` (there layer by
            layer), and 0.01 for ``"lissa"``.
        iterations: Mini-batches of ``"lissa"``, each a Hessian-vector product on as many samples as a batch of
            evaluation has; it warns where they do not suffice.
        weighting: ``"sigmoid"`` or ``"exp_minmax"``; see :func:`influence_weights`.
        sharpness: k of the sigmoid; 10.
        teacher_update: What the teacher does: ``"none"``, frozen; ``"weighted"``, it learns from
            :math:`w_i \mathrm{CE}`; ``"meta"``, also from Meta Pseudo Labels: one step late,
            :math:`(R_\text{val}^\text{old} - R_\text{val}^\text{new}) \cdot \mathrm{CE}(p^T, \hat y)` on the batch of
            the student's step and the teacher's own answers :math:`\hat y` to it. The risk is measured on one
            held-out batch a step, with the student in evaluation mode. Trains on one process only. A trained
            teacher has a hundredth of the student's learning rate unless ``teacher_learning_rate`` is given; at the
            same one it unlearns what it knew.
        refresh_epochs: Epochs between refreshes.
        warm_up: Share of training with weights of 1 before the first refresh; our choice.

    Raises:
        ValueError: If an argument is out of range or the base couples the samples of a batch; at setup without
            ``held_out_dataset`` or with unlabelled samples in it, without a training set or if its column ``index``
            repeats itself, if ``layers="last"`` and the student ends in no linear layer, or with
            ``teacher_update="meta"`` or ``hessian="ekfac"`` on several processes, or ``layers="all"`` under FSDP.

    Source: arXiv 2501.02705, equations partly our reading: the released example's sign of φ differs between its
    notebooks and its queries are test images. Koh and Liang 2017, "Understanding Black-box Predictions via
    Influence Functions", arXiv 1703.04730, for φ; Pham et al. 2021, "Meta Pseudo Labels", arXiv 2003.10580, for the
    teacher's update.
    """

    batch_columns = ("index",)
    needs_hard_labels = True

    def __init__(
        self,
        base: Distiller | None = None,
        *,
        layers: str = "last",
        hessian: str = "exact",
        damping: float | None = None,
        iterations: int = 200,
        weighting: str = "sigmoid",
        sharpness: float = 10.0,
        teacher_update: str = "none",
        refresh_epochs: int = 1,
        warm_up: float = 0.1,
    ):
        super().__init__(KD() if base is None else base)
        if self.batch_coupled:
            raise ValueError(
                f"KDAIF weighs samples, and {type(self.base).__name__} mixes the samples of a batch: wrap a method "
                "with terms per sample, such as KD() or WTTM()"
            )
        for name, value, choices in (
            ("layers", layers, ("last", "all")),
            ("hessian", hessian, ("exact", "identity") if layers == "last" else ("identity", "lissa", "ekfac")),
            ("teacher_update", teacher_update, ("none", "weighted", "meta")),
        ):
            if value not in choices:
                where = f" with layers={layers!r}" if name == "hessian" else ""
                raise ValueError(f"{name} must be one of {', '.join(choices)}{where}, got {value!r}")
        if hessian == "ekfac" and importlib.util.find_spec("kronfluence") is None:
            raise ValueError('hessian="ekfac" works by Kronfluence: pip install "hfkd[influence]", or use "lissa"')
        if damping is not None and not 0 < damping < float("inf"):
            raise ValueError(f"damping must be positive, got {damping}: None chooses it")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}: 200 is the default")
        influence_weights(torch.zeros(2), weighting=weighting, sharpness=sharpness)  # checks them
        if refresh_epochs < 1:
            raise ValueError(f"refresh_epochs must be at least 1, got {refresh_epochs}: 1 refreshes at every epoch")
        if not 0 <= warm_up < 1:
            raise ValueError(f"warm_up must lie in [0, 1), got {warm_up}: it is a share of training, 0 is no warm-up")
        if teacher_update != "none" and (self.trains_teacher or not self.needs_teacher):
            raise ValueError(
                f"teacher_update={teacher_update!r} trains the teacher that the user passes, and "
                f"{type(self.base).__name__} trains or makes its own, or has none: use KD() as the base"
            )
        self.layers, self.hessian, self.damping, self.iterations = layers, hessian, damping, iterations
        self.weighting, self.sharpness = weighting, sharpness
        self.teacher_update = teacher_update
        self.trains_teacher = self.trains_teacher or teacher_update != "none"
        self.teacher_learning_rate_ratio = 1.0 if teacher_update == "none" else 0.01
        self.refresh_epochs, self.warm_up = refresh_epochs, warm_up

    def setup(self, context):
        super().setup(context)
        if context.held_out_dataset is None:
            raise ValueError(
                "KDAIF measures influence on held-out samples: pass held_out_dataset=, a split that is neither "
                "trained nor tested on (in the examples: --held_out_fraction 0.1)"
            )
        if isinstance(context.held_out_dataset, IterableDataset) or not len(context.held_out_dataset):
            raise ValueError("the held-out set is a stream or empty: pass a map-style data set with some rows")
        held_out = context.labels(context.held_out_dataset)
        if held_out is not None and (held_out < 0).any():
            raise ValueError("the held-out set has samples without a label, which show no risk: remove them")
        if context.train_dataset is None:
            raise ValueError("KDAIF weighs the training samples: pass train_dataset=")
        index = context.sample_index().sort().values
        self.register_buffer("sample_index", index, persistent=False)
        self.register_buffer("influence", torch.zeros(len(index)))
        self.register_buffer("weights", torch.ones(len(index)))
        self.register_buffer("effective_samples", torch.tensor(1.0))
        self.register_buffer("refreshed", torch.tensor(-1))  # the epoch of the latest refresh
        if self.layers == "last":
            self._check_last_layer(context)
        if self.layers == "all" and context.is_sharded:
            raise ValueError(
                'KDAIF(layers="all") differentiates by all weights at once, and FSDP spreads them over processes: use '
                'layers="last", or plain data parallelism'
            )
        if self.hessian == "ekfac" and context.processes > 1:
            raise ValueError('hessian="ekfac" works in one process: train on one, or use "lissa"')
        if self.teacher_update == "meta":
            if "sample_weight" in context.sample():
                raise ValueError(
                    'teacher_update="meta" has a term on the batch before, which the weights of this one would weigh: '
                    'drop the column sample_weight, or use "weighted"'
                )
            if context.processes > 1:
                raise ValueError(
                    'teacher_update="meta" keeps the batch of the latest step, which differs between processes: train '
                    'on one process, or use "weighted"'
                )
            self._teacher = (context.teacher_model,)  # in a tuple, which does not make it a part of the method
            self._seen: list[dict[str, Tensor]] = []
            self.kept = _Batches()
            self.register_buffer("risk", torch.tensor(torch.nan))  # of the student before its step; NaN: none yet
            self.register_buffer("gain", torch.tensor(0.0))
            self.register_buffer("turn", torch.tensor(0))

    def _weight_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.weights[torch.searchsorted(self.sample_index, batch["index"])]

    # Loss

    def forward(self, student, teacher, batch):
        weight = self._weight_of(batch)
        return {name: weight * term for name, term in super().forward(student, teacher, batch).items()}

    def teacher_terms(self, teacher, student, batch):
        weight = self._weight_of(batch)
        if self.teacher_update == "none":
            return {name: weight * term for name, term in super().teacher_terms(teacher, student, batch).items()}
        terms = {"teacher_task": weight * self.hard_label_loss(teacher.logits, batch["labels"])}
        if self.teacher_update == "meta":
            terms["teacher_meta"] = self._meta_term(teacher, batch)
        return terms

    def _meta_term(self, teacher: ModelOutputs, batch: Mapping[str, Tensor]) -> Tensor:
        model = self._teacher[0]
        inputs = select_inputs(model, batch, prefix="teacher_")
        earlier = self.kept.get(len(self._seen))
        self._seen.append({**inputs, "answers": teacher.logits.detach().argmax(-1)})
        if not earlier:
            return torch.zeros_like(teacher.logits[:, 0])
        logits = in_float32(run_model(model, in_precision_of(model, earlier))).logits
        return self.gain * F.cross_entropy(logits, earlier["answers"], reduction="none")

    def logged_values(self):
        return {**super().logged_values(), "effective_samples": self.effective_samples}

    # Refreshing

    def on_train_begin(self, context):
        super().on_train_begin(context)
        is_new = not context.progress
        if is_new and self.refreshed >= 0:  # a second run: those weights were of the first one's student
            self.influence.zero_()
            self.weights.fill_(1)
            self.effective_samples.fill_(1)
            self.refreshed.fill_(-1)
        if self.refreshed < 0 and (context.epochs - 1) / context.epochs < self.warm_up:
            warnings.warn(
                f"KDAIF weighs all samples alike in this run: its {context.epochs} epoch(s) end before the first "
                f"refresh, at the epoch that starts at or behind {self.warm_up:.0%} of training. Train longer, or "
                "lower warm_up (0 weighs from the first step on)",
                UserWarning,
                stacklevel=2,
            )
        if self.teacher_update == "meta":
            self._seen.clear()
            if is_new:
                self.gain.zero_()
                self.kept.replace([])
                self.risk.copy_(self._held_out_risk(context))

    def on_epoch_begin(self, context):
        super().on_epoch_begin(context)
        epoch, latest = context.epoch, int(self.refreshed)
        is_warm = epoch / context.epochs >= self.warm_up
        # A run that resumes within an epoch comes here again: its weights are in the checkpoint.
        if is_warm and epoch > latest and (latest < 0 or epoch - latest >= self.refresh_epochs):
            self.refresh(context)

    def on_load(self, context):
        super().on_load(context)
        if not (self.weights.isfinite() & (self.weights >= 0)).all():
            raise ValueError("its weights are not all finite and at least 0")
        if self.teacher_update == "meta":
            self.kept.check(context.student.config.num_labels)
            self.kept.to(context.device)  # a checkpoint's tensors come on the CPU, and it had none to copy them to

    def on_step_end(self, context):
        super().on_step_end(context)
        if self.teacher_update == "meta":
            self.gain.copy_(self.risk - self._held_out_risk(context))
            self.turn += 1
            self.risk.copy_(self._held_out_risk(context))
            self.kept.replace(self._seen)
            self._seen = []

    def refresh(self, context) -> None:
        """Measure the influence of all training samples, set the weights by it and write the table."""
        index, labels, influence = (context.gather(part) for part in self._measure(context))
        order = index.argsort()
        index, labels, influence = index[order], labels[order], influence[order]
        if not torch.equal(index, self.sample_index):
            raise ValueError(
                "the column index of the training set is not 0, 1, …, and the set does not show it: give it an "
                "`index` attribute, an array with one number a row, each another"
            )
        self.influence.copy_(influence)
        self.weights.copy_(influence_weights(self.influence, weighting=self.weighting, sharpness=self.sharpness))
        # How many samples would weigh as much in equal parts, as a share of all.
        self.effective_samples.copy_(self.weights.sum() ** 2 / self.weights.square().sum() / len(self.weights))
        self.refreshed.fill_(context.epoch)
        if context.is_main_process:
            columns = {"index": index, "label": labels, "influence": influence, "weight": self.weights}
            columns["epoch"] = torch.full_like(index, context.epoch)
            table = pa.table({name: column.cpu().numpy() for name, column in columns.items()})
            path = Path(context.output_dir, TABLE_FOLDER, f"epoch-{context.epoch:03d}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)

    def _measure(self, context) -> tuple[Tensor, Tensor, Tensor]:
        """Index, label and influence of this process's share of the training set."""
        with self._at_rest(context) as (train_losses, held_out_losses, teacher):
            index, labels = [], []
            # What a training step has memory for, whatever the batch of evaluation.
            size = math.ceil(context.train_batch_size / (_LISSA_SHARE if self.hessian == "lissa" else 1))
            by_length = self.hessian != "lissa"  # whose last steps, and so its answer, would be of the shortest texts

            def train() -> Iterator[dict[str, Tensor]]:
                index.clear()
                labels.clear()
                for batch in context.batches(context.train_dataset, size, by_length=by_length):
                    index.append(batch["index"])
                    labels.append(batch["labels"])
                    # Here, since what is not PyTorch's, a teacher's cache, cannot be differentiated through.
                    yield {**batch, _TEACHER: teacher(batch)}

            def held_out() -> Iterator[dict[str, Tensor]]:
                return context.batches(context.held_out_dataset, size, by_length=by_length)

            if self.layers == "last":
                influence = self._of_last_layer(context, train_losses, held_out_losses, train, held_out)
            else:
                influence = self._of_all_layers(context, train_losses, held_out_losses, train, held_out)
        return torch.cat(index), torch.cat(labels), influence

    @contextmanager
    def _at_rest(self, context) -> Iterator[tuple[_SampleLosses, _SampleLosses, Callable]]:
        """The losses of training and of held-out samples, and the teacher, with all models in evaluation mode."""
        student, frozen = context.student, context.teacher
        live = context.teacher_model if frozen is None else None  # a peer, or a teacher that learns too

        @torch.no_grad()
        def teacher(batch: Mapping[str, Tensor]) -> ModelOutputs | None:
            if not self.base.needs_teacher:
                return None
            with context.autocast():  # it may be in a precision that needs it
                if frozen is not None:
                    return in_float32(frozen(batch))
                return in_float32(run_model(live, batch, layers=self.base.teacher_layers, prefix="teacher_"))

        with ExitStack() as stack:
            for model in (student, live):
                if model is not None:
                    context.align_buffers(model)
                    stack.enter_context(evaluating(model))
            stack.enter_context(evaluating(self.base))
            yield (
                _SampleLosses(student, self.base, self.base),
                _SampleLosses(student, None, self.base),
                teacher,
            )

    def _of_last_layer(self, context, train_losses, held_out_losses, train, held_out) -> Tensor:
        student, reduce = context.student, _summing(context)
        head = find_module(base_model(student), head_path(student))
        bias = head.bias is not None
        total = sum(
            len(features) * last_layer_gradient(residuals, features, bias=bias)
            for residuals, features, _ in self._residuals(held_out_losses, held_out())
        )
        direction = reduce(total) / len(context.held_out_dataset)
        parts = self._residuals(train_losses, train())
        if self.hessian == "exact":
            residuals, features, logits = map(torch.cat, zip(*parts, strict=True))
            direction = last_layer_inverse_product(logits, features, direction, damping=self.damping, reduce=reduce)
            return last_layer_influence(residuals, features, direction)
        return torch.cat([last_layer_influence(residuals, features, direction) for residuals, features, _ in parts])

    def _residuals(self, losses: _SampleLosses, batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batch by batch the gradients of the losses by the logits, the inputs of the last layer, and the logits."""
        layer = f"{head_path(losses.student)}:input"
        for batch in batches:
            outputs = losses.outputs(losses.student, batch, layer)
            with torch.enable_grad():
                logits = outputs.logits.requires_grad_()
                (residuals,) = torch.autograd.grad(losses.of_outputs(outputs, batch).sum(), logits)
            yield residuals, outputs.features[layer], logits.detach()

    def _of_all_layers(self, context, train_losses, held_out_losses, train, held_out) -> Tensor:
        student = context.student
        parameters = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
        if self.hessian == "ekfac":
            losses = train_losses.of_model, held_out_losses.of_model
            return ekfac_influence(student, *losses, train, held_out, damping=self.damping)
        with forward_mode_ready(student):
            direction = mean_gradient(held_out_losses.functional, parameters, held_out, reduce=_summing(context))
            if self.hessian == "lissa":
                direction = inverse_hessian_product(
                    train_losses.functional,
                    parameters,
                    train,
                    direction,
                    damping=0.01 if self.damping is None else self.damping,
                    iterations=self.iterations,
                    group=math.ceil(context.eval_batch_size / math.ceil(context.train_batch_size / _LISSA_SHARE)),
                    reduce=_summing(context),
                )
            return -directional_derivatives(train_losses.functional, parameters, train, direction)

    def _check_last_layer(self, context) -> None:
        student = context.student
        path = head_path(student)
        outputs = try_out(student, context.sample(), layers=(f"{path}:input",))
        features = outputs.features[f"{path}:input"]
        head = find_module(base_model(student), path)
        with torch.no_grad():
            again = F.linear(features.to(head.weight), head.weight, head.bias) if features.ndim == 2 else None
        rounding = torch.finfo(head.weight.dtype).eps ** 0.5
        if again is None or not torch.allclose(again.to(outputs.logits), outputs.logits, rtol=rounding, atol=rounding):
            raise ValueError(
                f"the logits of {type(base_model(student)).__name__} are not the outputs of its last linear layer "
                f'{path!r} alone, so that the gradient there has no closed form: use layers="all"'
            )

    def _held_out_risk(self, context) -> Tensor:
        size = min(context.train_batch_size, len(context.held_out_dataset))
        rows = [(int(self.turn) * size + i) % len(context.held_out_dataset) for i in range(size)]
        with self._at_rest(context) as (_, losses, _):
            return losses(context.take(context.held_out_dataset, rows)).mean()
