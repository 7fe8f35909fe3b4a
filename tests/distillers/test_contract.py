"""What every method promises, on one table: a new method adds a line."""

import functools
import inspect
import pickle

import pytest
import torch
from helpers import (
    MovingAverage,
    Mutual,
    Weighted,
    assert_identical,
    freeze_batch_norm,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from transformers import TrainerCallback

import hfkd.distillers
from hfkd.distillers import (
    AEKT,
    AKD,
    AT,
    CAM,
    CRD,
    DIST,
    DKD,
    DML,
    KD,
    KDAIF,
    NKD,
    PKT,
    RKD,
    SP,
    TTM,
    VID,
    WTTM,
    AttentionMaps,
    Combined,
    Distiller,
    FitNet,
    HiddenStates,
    InContextKD,
    LabelSmoothing,
    ModelOutputs,
    ReviewKD,
    SelfDistillation,
    SmallLoss,
    StandardizedLogits,
    StudentAlone,
    TfKD,
    Wrapper,
)
from hfkd.features import head_path, probe


def combined(**options):
    return Combined({"kd": KD(), "weighted": Weighted(TTM())}, {"weighted": 0.5}, task_from="kd", **options)


# Class (or maker) and arguments; those of the tests exercise what the library's own methods do not.
METHODS = [
    (StudentAlone, {}),
    (KD, {}),
    (KD, {"alpha": 0.5, "temperature": 1.0}),
    (TTM, {}),
    (WTTM, {"gamma": 0.1, "beta": 4.0}),
    (AEKT, {}),
    (AEKT, {"order": "classify_first", "explicit": "nll", "warm_up": 0.0}),
    (AEKT, {"order": None, "explicit": "confidence", "warm_up": 0.0}),
    (AEKT, {"adaptive": False}),
    (AKD, {}),
    (AKD, {"alpha": "learned", "cam": True}),
    (AKD, {"gap": "ce", "batch_mean": True}),
    (AKD, {"alpha_on": "ce", "ema": 0.5}),
    (CAM, {"base": WTTM()}),
    (DIST, {"temperature": 4.0}),
    (DKD, {}),
    (DKD, {"warm_up": 0.0}),
    (DML, {}),
    (LabelSmoothing, {}),
    (NKD, {}),
    (SelfDistillation, {"warm_up": 0.0, "decay": 0.5}),
    (StandardizedLogits, {}),
    (StandardizedLogits, {"base": DKD(warm_up=0.0, temperature=2.0)}),
    (TfKD, {}),
    (TfKD, {"mode": "virtual"}),
    (FitNet, {"weight": 0.1}),
    (AT, {"weight": 10.0}),
    (SP, {"weight": 10.0}),
    (RKD, {}),
    (PKT, {"weight": 10.0}),
    (VID, {}),
    (CRD, {"embedding_size": 4, "negatives": 8}),
    (ReviewKD, {"warm_up": 0.0}),
    (InContextKD, {"neighbours": 2, "negatives": 4}),
    (InContextKD, {"mode": "online", "neighbours": 2, "negatives": 4, "negative_loss": "hinge"}),
    (InContextKD, {"mode": "teacher_free", "neighbours": 2, "negatives": 4, "refresh": 0.3}),
    (KDAIF, {"warm_up": 0.0}),
    (KDAIF, {"base": WTTM(), "layers": "all", "hessian": "identity", "warm_up": 0.0}),
    (KDAIF, {"base": VID(), "weighting": "exp_minmax", "warm_up": 0.0}),
    (KDAIF, {"teacher_update": "weighted", "warm_up": 0.0}),
    (SmallLoss, {"noise_rate": 0.5, "warm_up": 0.0}),
    (HiddenStates, {}),
    (HiddenStates, {"loss": "cosine"}),
    (AttentionMaps, {}),
    (AttentionMaps, {"loss": "kl"}),
    (Wrapper, {"base": FitNet(weight=0.1)}),
    (Wrapper, {"base": WTTM()}),
    (combined, {}),
    (Weighted, {}),
    (Mutual, {}),
    (MovingAverage, {}),
]
# Those that compare maps; the others are tried on text.
ON_IMAGES = (FitNet, AT, SP, VID, ReviewKD)
NAMES = [f"{method.__name__}-{i}" for i, (method, _) in enumerate(METHODS)]
every_method = pytest.mark.parametrize(("method", "arguments"), METHODS, ids=NAMES)

FEATURES = (FitNet, AT, SP, RKD, PKT, VID, CRD, ReviewKD, HiddenStates, AttentionMaps)
# What is out of range, and what the message says to do.
REFUSED = [
    (KD, {"alpha": 2.0}, "0 is the labels alone, 1 the teacher alone"),
    (KD, {"temperature": 0.0}, "use 1.0 for no softening"),
    (TTM, {"gamma": 0.0}, "it is 1/temperature"),
    (TTM, {"beta": -1.0}, "0 is the labels alone"),
    (WTTM, {"gamma": 1.5}, "it is 1/temperature"),
    (WTTM, {"beta": -1.0}, "0 is the labels alone"),
    (AEKT, {"alpha": -1.0}, "alpha must not be negative"),
    (AEKT, {"beta": -1.0}, "beta must not be negative"),
    (AEKT, {"temperature": 0.0}, "use 1.0 for no softening"),
    (AEKT, {"explicit": "kl"}, "explicit must be one of tckd, nll, confidence, got 'kl'"),
    (AEKT, {"max_ratio": 0.5}, "max_ratio must be at least 1 and finite, got 0.5: 2 is the default"),
    (AEKT, {"max_ratio": float("inf")}, "max_ratio must be at least 1 and finite"),
    (AEKT, {"order": "both"}, 'order must be "distill_first", "classify_first" or None'),
    (AEKT, {"warm_up": 20}, "it is a share of training, 0 is no warm-up"),
    (AKD, {"alpha": 1.5}, r'"gap", "learned" or a number in \[0, 1\]'),
    (AKD, {"alpha": "fixed"}, r'"gap", "learned" or a number in \[0, 1\]'),
    (AKD, {"alpha_on": "nothing"}, 'alpha_on must be "kd" or "ce"'),
    (AKD, {"temperature": 0.0}, "use 1.0 for no softening"),
    (AKD, {"gap": "cosine"}, "gap must be one of exp, ratio, ce"),
    (AKD, {"kappa": 0.0}, "kappa must be positive, got 0.0: 1 is the default"),
    (AKD, {"ema": 1.0}, "None is no average"),
    (AKD, {"alpha": 0.5, "ema": 0.9}, 'use alpha="gap"'),
    (AKD, {"alpha": "learned", "batch_mean": True}, 'use alpha="gap"'),
    (CAM, {"width": 0}, "16 is the default"),
    (CAM, {"label_weight": -1.0}, "label_weight must not be negative, got -1.0: 0 leaves its term out"),
    (DIST, {"beta": -1.0}, "beta must not be negative, got -1.0: 0 leaves its term out"),
    (DIST, {"gamma": -1.0}, "gamma must not be negative"),
    (DIST, {"temperature": 0.0}, "use 1.0 for no softening"),
    (DKD, {"alpha": -1.0}, "alpha must not be negative"),
    (DKD, {"beta": -1.0}, "beta must not be negative"),
    (DKD, {"temperature": -1.0}, "use 1.0 for no softening"),
    (DKD, {"warm_up": 20}, "it is a share of training, 0 is no warm-up"),
    (DML, {"weight": -1.0}, "weight must not be negative"),
    (LabelSmoothing, {"epsilon": 1.1}, "it is the probability spread over all classes"),
    (NKD, {"gamma": -1.0}, "gamma must not be negative"),
    (NKD, {"weight": -1.0}, "weight must not be negative"),
    (NKD, {"temperature": 0.0}, "use 1.0 for no softening"),
    (SelfDistillation, {"weight": -1.0}, "weight must not be negative"),
    (SelfDistillation, {"temperature": 0.0}, "use 1.0 for no softening"),
    (SelfDistillation, {"decay": 1.0}, "at 1 the average would never learn"),
    (SelfDistillation, {"warm_up": -0.1}, "it is a share of training"),
    (TfKD, {"mode": "teacherless"}, 'mode must be "self" .* or "virtual"'),
    (TfKD, {"alpha": 2.0}, "0 is the labels alone, 1 the teacher alone"),
    (TfKD, {"temperature": 0.0}, "use 1.0 for no softening"),
    (TfKD, {"confidence": 1.0}, r"confidence must lie in \(0, 1\)"),
    *((method, {"weight": -1.0}, "weight must not be negative, got -1.0: 0 leaves") for method in FEATURES),
    (FitNet, {"student_layers": ["layer1", "layer2"], "teacher_layers": "layer1"}, "name as many of each"),
    (RKD, {"distance_weight": -1.0}, "distance_weight must not be negative"),
    (RKD, {"angle_weight": -1.0}, "angle_weight must not be negative"),
    (CRD, {"temperature": 0.0}, "use 1.0 for no softening"),
    (CRD, {"momentum": 1.0}, "0 keeps nothing of the old embedding"),
    (CRD, {"negatives": 0}, "must be at least 1, got 128 and 0"),
    (CRD, {"embedding_size": 0}, "must be at least 1, got 0 and 16384"),
    (CRD, {"student_layers": ["a", "b"]}, "combine several CRD"),
    (ReviewKD, {"warm_up": 20}, "it is a share of training"),
    (InContextKD, {"mode": "both"}, "mode must be one of offline, online, teacher_free"),
    (InContextKD, {"alpha": 2.0}, "0 is the labels alone, 1 the teacher alone"),
    (InContextKD, {"mode": "teacher_free", "alpha": 0.5}, "alpha has no meaning with mode='teacher_free'"),
    (InContextKD, {"refresh": 0.5}, "refresh has no meaning with mode='offline'"),
    (InContextKD, {"mode": "online", "refresh": 1.0}, "it is a share of training"),
    (InContextKD, {"retrieval_temperature": 0.0}, "use 1.0 for no softening"),
    (InContextKD, {"picd_weight": -1.0}, "picd_weight must not be negative"),
    (InContextKD, {"nicd_weight": -1.0}, "nicd_weight must not be negative"),
    (InContextKD, {"neighbours": 0}, "must be at least 1, got 0 and 64: picd_weight=0"),
    (InContextKD, {"negatives": 0}, "must be at least 1, got 8 and 0"),
    (InContextKD, {"negative_loss": "kl"}, "must be one of contrast, hinge, got 'kl'"),
    (InContextKD, {"margin": -1.0}, "margin must not be negative"),
    (InContextKD, {"index": "annoy"}, "index must be one of exact, faiss"),
    (InContextKD, {"teacher_layers": ["a", "b"]}, "name one"),
    (KDAIF, {"weighting": "linear"}, "weighting must be one of sigmoid, exp_minmax, got 'linear'"),
    (KDAIF, {"sharpness": -1.0}, "sharpness must not be negative"),
    (KDAIF, {"layers": "middle"}, "layers must be one of last, all, got 'middle'"),
    (KDAIF, {"hessian": "lissa"}, "hessian must be one of exact, identity with layers='last', got 'lissa'"),
    (KDAIF, {"layers": "all"}, "hessian must be one of identity, lissa, ekfac with layers='all', got 'exact'"),
    (KDAIF, {"damping": 0.0}, "None chooses it"),
    (KDAIF, {"iterations": 0}, "200 is the default"),
    (KDAIF, {"teacher_update": "often"}, "teacher_update must be one of none, weighted, meta"),
    (KDAIF, {"refresh_epochs": 0}, "1 refreshes at every epoch"),
    (KDAIF, {"warm_up": 1.0}, "0 is no warm-up"),
    (KDAIF, {"base": SP()}, "KDAIF weighs samples, and SP mixes the samples of a batch"),
    (SmallLoss, {"noise_rate": 1.0}, "it is the share of wrong labels"),
    (SmallLoss, {"warm_up": 20}, "it is a share of training"),
    (SmallLoss, {"base": SP()}, "SmallLoss leaves samples out, and SP mixes the samples of a batch"),
    (HiddenStates, {"loss": "l1"}, r'"mse" \(TinyBERT\) or "cosine" \(DistilBERT\)'),
    (AttentionMaps, {"loss": "l1"}, r'"mse" \(TinyBERT\) or "kl" \(MiniLM\)'),
]


def build(folder, method, arguments, *, student=tiny, teacher=tiny_teacher, data=rows, trainer=None, **more):
    """A method as a trainer has set it up, and the trainer.

    Images for those that compare maps, else text; a teacher for those that need one and make none; a held-out set for
    all, which few look at, so that a row of the table needs no more than class and arguments. ``student``, ``teacher``
    and ``data`` make what their defaults make; ``trainer`` and ``more`` are those of ``make_trainer``.
    """
    distiller = pickle.loads(pickle.dumps(method(**arguments)))  # the table's own stay as they are
    family = "cifar" if isinstance(getattr(distiller, "base", distiller), ON_IMAGES) else "bert"
    needs = distiller.needs_teacher and distiller.make_teacher(tiny(family)) is None
    made = make_trainer(
        folder,
        student(family),
        teacher(family) if needs else None,
        distiller,
        data(family),
        trainer={"held_out_dataset": data(family, 8, seed=1), **(trainer or {})},
        **more,
    )
    return distiller, made


def build_double(folder, method, arguments, **more):
    """The same in double precision and with BatchNorm frozen: batches of any size then add up exactly."""
    distiller, trainer = build(
        folder,
        method,
        arguments,
        student=lambda family: freeze_batch_norm(tiny(family)).double(),
        teacher=lambda family: tiny_teacher(family).double(),
        data=lambda *args, **kwargs: rows(*args, **kwargs).double(),
        **more,
    )
    return freeze_batch_norm(distiller).double(), trainer


@pytest.fixture
def ready(tmp_path):
    """``build`` in a folder of the test's own."""
    return functools.partial(build, tmp_path)


def random_arguments(distiller, trainer, seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, size, 5, generator=generator)
    student.requires_grad_()

    def features(model, layers):
        shapes = {name: feature.shape for name, feature in probe(model, trainer.context.sample(), layers).items()}
        return {name: torch.randn(size, *shape[1:], generator=generator) for name, shape in shapes.items()}

    outputs = ModelOutputs(student, features=features(trainer.model, distiller.student_layers))
    outputs.task_logits = distiller.task_logits(outputs)
    batch = {"labels": torch.randint(0, 5, (size,), generator=generator), "index": torch.arange(size)}
    if not distiller.needs_teacher:
        return student, (outputs, None, batch)
    other = ModelOutputs(teacher, features=features(trainer.teacher_model, distiller.teacher_layers))
    return student, (outputs, other, batch)


def seeded(distiller, call):
    """Its terms, with the same random draws every time."""
    torch.manual_seed(0)
    return distiller(*call)


def rows_of(outputs, some):
    task_logits = None if outputs.task_logits is None else outputs.task_logits[some]
    return ModelOutputs(outputs.logits[some], task_logits, {k: v[some] for k, v in outputs.features.items()})


@every_method
def test_terms_are_finite_and_reach_the_student_and_every_parameter(ready, method, arguments):
    distiller, trainer = ready(method, arguments)
    for _ in range(2):  # at the first step a last layer of zeros hides those before it
        distiller.zero_grad()
        student, call = random_arguments(distiller, trainer)
        terms = distiller(*call)
        assert terms
        assert all(term.shape in ((), (4,)) and term.isfinite().all() for term in terms.values())
        assert "task" in terms
        sum(term.mean() for term in terms.values()).backward()
        assert student.grad.abs().max() > 0
        for name, parameter in distiller.named_parameters():
            assert parameter.grad is not None, name
            parameter.data -= 0.1 * parameter.grad
    for name, parameter in distiller.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@every_method
def test_terms_per_sample_do_not_depend_on_the_rest_of_the_batch(ready, method, arguments):
    distiller, trainer = ready(method, arguments)
    if distiller.batch_coupled:
        pytest.skip("mixes the samples of a batch")
    _, (student, teacher, batch) = random_arguments(distiller, trainer)
    whole = distiller(student, teacher, batch)
    some = torch.tensor([2, 0])
    part = distiller(
        rows_of(student, some),
        teacher and rows_of(teacher, some),
        {name: column[some] for name, column in batch.items()},
    )
    for name, term in whole.items():
        torch.testing.assert_close(part[name], term[some])


@every_method
def test_training_moves_what_should_move_and_nothing_else(ready, method, arguments):
    # A rate at which three plain steps show, behind a last layer of zeros too.
    distiller, trainer = ready(method, arguments, distiller_learning_rate=1.0)
    learned = {name: tensor.detach().clone() for name, tensor in distiller.named_parameters()}
    student = weights(trainer.model)
    teacher = None if trainer.teacher_model is None else weights(trainer.teacher_model)
    moved = set()

    class Look(TrainerCallback):  # a head that is folded at the end is as it was
        def on_step_end(self, *args, **kwargs):
            now = dict(distiller.named_parameters())
            moved.update(name for name in learned if not torch.equal(now[name], learned[name]))

    trainer.add_callback(Look())
    trainer.train()
    head = f"0.{head_path(trainer.model)}.weight"
    assert not torch.equal(weights(trainer.model)[head], student[head])
    assert moved == learned.keys()
    if teacher is not None and not trainer._saves_teacher:
        assert_identical(weights(trainer.teacher_model), teacher)


@every_method
def test_state_makes_a_round_trip(ready, method, arguments):
    distiller, trainer = ready(method, arguments)
    trainer.train()
    other, _ = ready(method, arguments)
    other.load_state_dict(distiller.state_dict())
    copied = pickle.loads(pickle.dumps(distiller))
    _, call = random_arguments(distiller, trainer)
    terms = seeded(distiller, call)
    for twin in (other, copied):
        assert twin.state_dict().keys() == distiller.state_dict().keys()
        for name, term in seeded(twin, call).items():
            torch.testing.assert_close(term, terms[name], rtol=0, atol=0)


@every_method
def test_in_a_combination_it_counts_as_alone(ready, method, arguments):
    distiller, trainer = ready(method, arguments)
    partner = TTM()
    both = Combined({"method": distiller, "ttm": partner}, {"method": 2.0, "ttm": 0.5}, task_from="method")
    _, call = random_arguments(distiller, trainer)
    if call[1] is None:
        call = call[0], ModelOutputs(torch.randn(4, 5)), call[2]
    alone, ttm = seeded(distiller, call), partner(*call)["ttm"]
    terms = seeded(both, call)
    assert terms.keys() == {*alone, "ttm/ttm"}
    total = 2.0 * sum(term.mean() for term in alone.values()) + 0.5 * ttm.mean()
    torch.testing.assert_close(sum(term.mean() for term in terms.values()), total)


@pytest.mark.parametrize(("method", "arguments", "message"), REFUSED)
def test_values_out_of_range_are_refused_with_the_remedy(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)


def test_every_public_method_is_on_the_tables():
    public = [getattr(hfkd.distillers, name) for name in hfkd.distillers.__all__]
    methods = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, Distiller)} - {Distiller, Combined}
    with_options = {
        cls
        for cls in methods
        if any(p.default is not p.empty and p.name != "base" for p in inspect.signature(cls).parameters.values())
    }
    assert {KD, TTM, WTTM} <= with_options
    assert methods <= {method for method, _ in METHODS}
    assert with_options <= {method for method, _, _ in REFUSED}
