"""model_init, distiller_init and hyperparameter_search: every trial is a run of its own."""

import copy
import re
from pathlib import Path

import optuna
import pytest
import torch
from helpers import (
    Bank,
    MovingAverage,
    Mutual,
    Weighted,
    assert_identical,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from transformers import TrainerCallback

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.data import ImageDataset, load_image_data, processor_for
from hfkd.distillers import KD, StudentAlone
from hfkd.models import load_model


optuna.logging.set_verbosity(optuna.logging.WARNING)
SEARCH = {"eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "linear"}


def student(trial=None):
    """A new one by the seed of the moment, with dropout: what a trial leaves behind would show."""
    return tiny("vit", seed=torch.initial_seed() % 1000, dropout=0.1)


def method(trial):
    """A method with parameters of its own, and a setting of the trial."""
    return Weighted(KD(alpha=0.5 if trial is None else trial.suggest_float("alpha", 0.1, 0.9), temperature=2.0))


def space(trial):
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.2),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [2, 4]),
    }


def trainer_with(folder, *, teacher=None, make=method, **arguments):
    """A trainer that keeps what every train() came to in ``trained``."""
    trained = []

    class Recorder(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            trained.append(
                {
                    "weights": weights(trainer.model, trainer.distiller),
                    "arguments": {name: getattr(args, name) for name in ("learning_rate", "seed")},
                    "batch": trainer._train_batch_size,
                    "alpha": getattr(getattr(trainer.distiller, "base", None), "alpha", None),
                    "student": trainer.model,
                    "distiller": trainer.distiller,
                    "module": trainer._module,
                    "hits": None if trainer.cache is None else (trainer.cache.hits, trainer.cache.misses),
                }
            )

    more = {"eval_dataset": rows("vit", 8, seed=5), "model_init": student, "callbacks": [Recorder()]}
    if make is not None:
        more["distiller_init"] = make
    teacher = tiny_teacher("vit") if teacher is None else teacher
    trainer = make_trainer(folder, None, teacher, None, rows("vit", 16), trainer=more, **{**SEARCH, **arguments})
    trainer.trained = trained
    return trainer


def search(trainer, n_trials=2, **kwargs):
    kwargs = {"sampler": optuna.samplers.RandomSampler(seed=0), "direction": "minimize", **kwargs}
    return trainer.hyperparameter_search(
        hp_space=kwargs.pop("hp_space", space),
        compute_objective=kwargs.pop("compute_objective", lambda metrics: metrics["eval_loss"]),
        n_trials=n_trials,
        backend="optuna",
        **kwargs,
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A trainer after a search of three trials, its teacher before, the best trial and the folder."""
    folder = tmp_path_factory.mktemp("search")
    teacher = tiny_teacher("vit")
    before = weights(teacher)
    trainer = trainer_with(folder, teacher=teacher, save_strategy="steps", save_steps=3)
    study = []
    best = search(trainer, 3, compute_objective=lambda metrics: study.append(metrics["eval_loss"]) or study[-1])
    return trainer, teacher, before, best, study, folder


def test_parameters_reach_the_arguments_and_the_method(searched):
    trainer, _, _, best, losses, _ = searched
    assert set(best.hyperparameters) == {"learning_rate", "seed", "per_device_train_batch_size", "alpha"}
    assert len(trainer.trained) == 3
    chosen = trainer.trained[int(best.run_id)]
    assert chosen["arguments"] == {name: best.hyperparameters[name] for name in ("learning_rate", "seed")}
    assert chosen["alpha"] == best.hyperparameters["alpha"]
    assert chosen["batch"] == best.hyperparameters["per_device_train_batch_size"]
    assert len({trial["alpha"] for trial in trainer.trained}) == 3
    assert best.objective == min(losses)


def test_each_trial_has_a_student_a_method_and_a_module_of_its_own(searched):
    trainer, teacher, before, _, _, folder = searched
    for part in ("student", "distiller", "module"):
        assert len({id(trial[part]) for trial in trainer.trained}) == 3
    assert all(trial["module"].student is trial["student"] for trial in trainer.trained)
    assert trainer._given_teacher is teacher
    assert_identical(weights(teacher), before)
    assert {path.name for path in folder.iterdir()} == {"run-0", "run-1", "run-2"}
    assert all((folder / f"run-{i}" / "checkpoint-3" / "model.safetensors").is_file() for i in range(3))


def test_a_trial_is_the_run_made_alone_to_the_bit(searched, tmp_path):
    trainer = searched[0]
    # Not the first: it has predecessors that could have left something behind.
    for number, trial in enumerate(trainer.trained[1:]):
        settings = {**trial["arguments"], "per_device_train_batch_size": trial["batch"]}
        torch.manual_seed(settings["seed"])
        alone = make_trainer(
            tmp_path / str(number),
            student(),
            tiny_teacher("vit"),
            Weighted(KD(alpha=trial["alpha"], temperature=2.0)),
            rows("vit", 16),
            trainer={"eval_dataset": rows("vit", 8, seed=5)},
            **{**SEARCH, **settings},
        )
        alone.train()
        assert_identical(weights(alone.model, alone.distiller), trial["weights"])


def test_train_behind_a_search_is_as_before_it(searched, tmp_path):
    trainer = searched[0]
    fresh = trainer_with(tmp_path)
    for one in (trainer, fresh):
        one.train()
    assert trainer.trained[-1]["arguments"] == fresh.trained[-1]["arguments"] == {"learning_rate": 0.1, "seed": 42}
    assert trainer.trained[-1]["batch"] == fresh.trained[-1]["batch"] == 8
    assert trainer.trained[-1]["alpha"] == 0.5
    assert_identical(trainer.trained[-1]["weights"], fresh.trained[-1]["weights"])


def test_train_twice_starts_anew(tmp_path):
    trainer = trainer_with(tmp_path)
    trainer.train()
    trainer.train()
    one, other = trainer.trained
    assert one["student"] is not other["student"]
    assert_identical(one["weights"], other["weights"])


def test_arguments_that_one_trial_sets_are_gone_in_the_next(tmp_path):
    def sometimes(trial):
        return {"learning_rate": 0.2} if trial.number == 0 else {}

    trainer = trainer_with(tmp_path)
    search(trainer, 2, hp_space=sometimes)
    assert [trial["arguments"]["learning_rate"] for trial in trainer.trained] == [0.2, 0.1]


def test_a_method_that_was_given_is_copied_for_each_trial(tmp_path):
    own = Weighted()
    before = copy.deepcopy(own.state_dict())
    trainer = make_trainer(
        tmp_path,
        None,
        tiny_teacher("vit"),
        own,
        rows("vit", 16),
        trainer={"model_init": student, "eval_dataset": rows("vit", 8)},
        **SEARCH,
    )
    search(trainer, 2, hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.2)})
    trainer.train()
    assert trainer.distiller is not own
    assert not torch.equal(trainer.distiller.log_factor, before["log_factor"])
    made = trainer._distiller_init(None)
    assert_identical(made.state_dict(), before)


@pytest.mark.parametrize("make", [Bank, MovingAverage], ids=lambda cls: cls.__name__)
def test_banks_and_made_teachers_start_empty(tmp_path, make):
    teacher = None if make is MovingAverage else tiny_teacher("vit")
    more = {"model_init": student, "distiller_init": lambda trial: make(), "eval_dataset": rows("vit", 8)}
    trainer = make_trainer(tmp_path, None, teacher, None, rows("vit", 16), trainer=more, **SEARCH)
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append(weights(trainer.distiller, trainer.teacher_model))
    assert_identical(*ends)


def test_trials_share_the_teachers_cache(tmp_path):
    trainer = trainer_with(tmp_path / "out", teacher_cache=str(tmp_path / "cache"))
    search(trainer, 2, hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.2)})
    first, second = (trial["hits"] for trial in trainer.trained)
    assert first[1] == 16
    assert second == (24, 0)


def test_a_pruned_trial_leaves_nothing_to_the_next(tmp_path):
    class Second(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    trainer = trainer_with(tmp_path / "pruned", max_steps=6)
    storage = optuna.storages.InMemoryStorage()
    search(trainer, 3, pruner=Second(), storage=storage, study_name="pruned")
    study = optuna.load_study(study_name="pruned", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    whole = trainer_with(tmp_path / "whole", max_steps=6)
    search(whole, 3, pruner=optuna.pruners.NopPruner())
    pruned, others = trainer.trained[1], (trainer.trained[2], whole.trained[2])
    assert pruned["alpha"] == whole.trained[1]["alpha"]
    assert_identical(others[0]["weights"], others[1]["weights"])


# What is refused


def test_a_search_without_model_init_names_the_remedy(tmp_path):
    trainer = make_trainer(tmp_path, tiny("vit"), tiny_teacher("vit"), KD(), rows("vit"))
    with pytest.raises(ValueError, match="every trial of a search needs a student of its own: pass model_init="):
        trainer.hyperparameter_search(n_trials=1, backend="optuna")


def test_trials_at_a_time_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one process with one trial at a time"):
        search(trainer_with(tmp_path), n_jobs=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": True, "model_init": student}, "leave out model= and optimizers="),
        ({"model_init": student, "optimizers": (None, object())}, "leave out model= and optimizers="),
        ({"model": True, "distiller_init": method}, "pass it with model_init= and without"),
        ({"model_init": student, "distiller_init": method, "distiller": KD()}, "pass it with model_init= and without"),
    ],
)
def test_what_would_be_shared_or_unused_is_refused(tmp_path, given, message):
    model, distiller = tiny("vit") if given.pop("model", None) else None, given.pop("distiller", None)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, tiny_teacher("vit"), distiller, rows("vit"), trainer=given)


def test_a_factory_of_something_else_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"distiller must be a Distiller, got str: pass KD\(\)"):
        trainer_with(tmp_path, make=lambda trial: "kd")
    later = trainer_with(tmp_path, make=lambda trial: KD() if trial is None else StudentAlone())
    with pytest.raises(ValueError, match="StudentAlone uses no teacher"):
        search(later, 1)


def test_a_teacher_that_learns_is_not_shared(tmp_path):
    with pytest.raises(ValueError, match="Mutual trains the teacher, which all students of model_init share"):
        trainer_with(tmp_path, make=lambda trial: Mutual())


def test_the_snippet_of_the_docs_runs(tmp_path):
    text = (Path(__file__).resolve().parents[1] / "docs" / "comparing.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.+?)```", text, re.S)
    data = load_image_data("digits", max_train_samples=32, max_eval_samples=16)
    teacher = tiny_teacher("cifar", num_labels=10)
    teacher.config.id2label = dict(enumerate(data.label_names))
    processor = processor_for(teacher)
    names = {
        "data": data,
        "teacher": teacher,
        "processor": processor,
        "train": ImageDataset(data.train, processor),
        "validation": ImageDataset(data.validation, processor),
        "args": DistillationTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True),
        "DistillationTrainer": DistillationTrainer,
        "KD": KD,
        "load_model": load_model,
    }
    exec(compile(snippet.replace("n_trials=10", "n_trials=1"), "comparing.md", "exec"), names)
    assert set(names["best"].hyperparameters) == {"learning_rate", "alpha"}
    assert names["method"](optuna.trial.FixedTrial(names["best"].hyperparameters)).alpha == pytest.approx(
        names["best"].hyperparameters["alpha"]
    )
