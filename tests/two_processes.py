"""What the tests compare between one process and two; launched by torchrun and by accelerate.

python -m torch.distributed.run --nproc_per_node=2 tests/two_processes.py FOLDER [SCENARIO ...] --use_cpu
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed
from helpers import (
    Bank,
    Mutual,
    Rows,
    Weighted,
    freeze_batch_norm,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hfkd.checkpoints import last_whole_checkpoint
from hfkd.distillers import AKD, CRD, KD, KDAIF, TTM, VID, Combined, HiddenStates, InContextKD, SelfDistillation


sys.path.append(str(Path(__file__).parent / "distillers"))
from test_contract import METHODS, NAMES, build_double  # found by the line above


def processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def share(total: int = 8) -> dict[str, int]:
    return {"per_device_train_batch_size": total // WORLD, "per_device_eval_batch_size": total // WORLD}


WORLD = 1  # set by main


def learnable(folder, *, find_unused: bool, max_grad_norm: float, family: str = "resnet") -> dict:
    """A distiller with parameters. Clipping shows whether gradients are averaged before it, none whether they are."""
    student, distiller = freeze_batch_norm(tiny(family)).double(), Weighted()
    trainer = make_trainer(
        folder,
        student,
        tiny_teacher(family).double(),
        distiller,
        rows(family).double(),
        max_steps=4,
        max_grad_norm=max_grad_norm,
        ddp_find_unused_parameters=find_unused,
        **share(),
    )
    trainer.train()
    wrapped = trainer.model_wrapped
    return {
        "weights": weights(student, distiller),
        "processes": trainer.accelerator.num_processes,
        "type": trainer.accelerator.distributed_type.value,
        "is_ddp": isinstance(wrapped, DistributedDataParallel),
        "find_unused": getattr(wrapped, "find_unused_parameters", None),
        "logs": {name: logged(trainer, name) for name in ("loss", "task", "kd")},
    }


class Epochs(Rows):
    """Notes what epochs it is told of."""

    def set_epoch(self, epoch):
        self.epochs = [*getattr(self, "epochs", []), epoch]


def with_idle_parts(*, unused: bool):
    """A student of which a part is frozen, and perhaps another trained by nothing."""
    student = tiny("bert")
    student.bert.embeddings.requires_grad_(False)
    student.bert.encoder.layer[0].requires_grad_(False)
    if unused:
        student.unused = torch.nn.Linear(3, 3)
    return student


def idle(folder) -> dict:
    """Parameters without gradient, with and without DDP looking for them; it must where some are not frozen."""
    results = {}
    for find_unused in (True, False):
        student, distiller = with_idle_parts(unused=find_unused).double(), Weighted()
        trainer = make_trainer(
            Path(folder, str(find_unused)),
            student,
            tiny_teacher("bert").double(),
            distiller,
            rows("bert"),
            ddp_find_unused_parameters=find_unused,
            **share(),
        )
        trainer.train()
        results[str(find_unused)] = weights(student, distiller)
    return results


def adapted(folder) -> dict:
    """A LoRA student of an adapted teacher, in double precision and in bfloat16."""
    results = {}
    for bf16 in (False, True):
        config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
        models = [
            model if bf16 else model.double()
            for model in (get_peft_model(tiny("bert"), config), get_peft_model(tiny_teacher("bert"), config))
        ]
        trainer = make_trainer(Path(folder, str(bf16)), *models, HiddenStates(), rows("bert"), bf16=bf16, **share())
        trainer.train()
        results["bf16" if bf16 else "double"] = weights(models[0])
    return results


def student_alone(folder) -> dict:
    student, dataset = tiny("bert"), Epochs(rows("bert").columns)
    trainer = make_trainer(folder, student, dataset=dataset, gradient_accumulation_steps=2, **share(4))
    trainer.train()
    return {"weights": weights(student), "loss": logged(trainer, "loss"), "epochs": dataset.epochs}


class RankProbe(Bank):
    """Has a buffer that is its process's own, to see whether DDP writes over it."""

    def setup(self, context):
        super().setup(context)
        self.register_buffer("own", torch.tensor([float(rank())]))


def bank(folder) -> dict:
    teacher, distiller = tiny_teacher("bert"), RankProbe()
    trainer = make_trainer(folder, tiny("bert"), teacher, distiller, rows("bert"), max_steps=4, **share())
    trainer.train()
    return {"bank": weights(distiller)}


def contrastive(folder) -> dict:
    """Two memories of embeddings, drawn from and written to; accumulated, so that a step has several batches."""
    student, distiller = freeze_batch_norm(tiny("resnet")).double(), CRD(embedding_size=4, negatives=6)
    trainer = make_trainer(
        folder,
        student,
        tiny_teacher("resnet").double(),
        distiller,
        rows("resnet").double(),
        max_steps=3,
        gradient_accumulation_steps=2,
        **share(4),
    )
    trainer.train()
    return {"weights": weights(student, distiller), "crd": logged(trainer, "crd")}


def influence(folder) -> dict:
    """Weights by influence, on shares of unequal size."""
    student, distiller = freeze_batch_norm(tiny("resnet")).double(), KDAIF(weighting="exp_minmax", warm_up=0.0)
    trainer = make_trainer(
        folder,
        student,
        tiny_teacher("resnet").double(),
        distiller,
        rows("resnet", 24).double(),
        max_steps=6,
        trainer={"held_out_dataset": rows("resnet", 7, seed=9).double()},
        **share(8),
    )
    trainer.train()
    tables = sorted((folder / "influence").iterdir())
    return {"weights": weights(student, distiller), "tables": [table.name for table in tables]}


def in_context(folder) -> dict:
    """Banks of the teacher, of two peers and of the student itself; one process passes over a sample more."""
    results = {}
    for mode in ("offline", "online", "teacher_free"):
        distiller = InContextKD(mode, neighbours=2, negatives=4, refresh=None if mode == "offline" else 0.25)
        student = freeze_batch_norm(tiny("resnet")).double()
        trainer = make_trainer(
            Path(folder, mode),
            student,
            tiny_teacher("resnet").double() if mode == "offline" else None,
            distiller,
            rows("resnet", 15).double(),
            max_steps=4,
            learning_rate=0.01,
            dataloader_drop_last=True,
            **share(),
        )
        if mode == "online":
            freeze_batch_norm(trainer.teacher_model)
        trainer.train()
        parts = [part for part in (student, distiller, trainer.teacher_model) if part is not None]
        results[mode] = {"weights": weights(*parts), "picd": logged(trainer, "picd")}
    return results


def draw_alike(module) -> None:
    """Let a second micro-batch meet the random numbers of the first, as the batch of a second process does."""
    first = []

    def before(*_):
        if first:
            torch.set_rng_state(first.pop())
        else:
            first.append(torch.get_rng_state())

    module.register_forward_pre_hook(before)


def every_method(folder) -> dict:
    """Two steps of each; where the samples of a batch depend on each other, a process's batch is a micro-batch."""
    trained = {}
    for name, (method, arguments) in zip(NAMES, METHODS, strict=True):
        micro_batches = 2 // WORLD if method(**arguments).batch_coupled else 1
        distiller, trainer = build_double(
            Path(folder, name),
            method,
            arguments,
            max_steps=2,
            per_device_train_batch_size=8 // WORLD // micro_batches,
            gradient_accumulation_steps=micro_batches,
        )
        if micro_batches > 1:
            draw_alike(trainer._module)
        assert trainer.accelerator.num_processes == WORLD
        trainer.train()
        learning = [trainer.teacher_model] if trainer._saves_teacher else []
        trained[name] = weights(trainer.model, distiller, *learning)
    return trained


def aligned(folder) -> dict:
    """Buffers of a network that are each process's own, integers among them, given those of the first."""
    student = tiny("resnet")
    for buffer in student.buffers():
        buffer.fill_(3 + rank())
    make_trainer(folder, student, dataset=rows("resnet")).context.align_buffers(student)
    return {"buffers": dict(student.named_buffers())}


def mutual(folder) -> dict:
    student, peer = tiny("bert"), tiny("bert", seed=7)
    trainer = make_trainer(folder, student, peer, Mutual(), rows("bert"), **share())
    trainer.train()
    return {"weights": weights(student, peer), "teacher_kd": logged(trainer, "teacher_kd")}


def evaluation(folder) -> dict:
    """An evaluation set that does not divide by the batch, with some samples unlabelled."""
    dataset = rows("bert", 13, seed=5)
    dataset.columns["labels"][3] = -100
    trainer = make_trainer(
        folder,
        tiny("bert"),
        tiny_teacher("bert"),
        None,
        rows("bert"),
        max_steps=1,
        trainer={"eval_dataset": dataset},
        **share(4),
    )
    trainer.train()
    return {
        "teacher_accuracy": logged(trainer, "teacher_accuracy"),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "predictions": torch.from_numpy(trainer.predict(dataset).predictions),
    }


def second_train(folder) -> dict:
    student, distiller = tiny("vit"), Weighted()
    trainer = make_trainer(folder, student, tiny_teacher("vit"), distiller, rows("vit"), max_steps=2, **share())
    trainer.train()
    trainer.train()
    return {"weights": weights(student, distiller)}


def resumable(folder):
    """AdamW, dropout, accumulation; a checkpoint after step 3 of 4 a process and epoch."""
    return make_trainer(
        Path(folder, "shared"),
        tiny("vit", dropout=0.1),
        tiny_teacher("vit"),
        Combined({"a": Weighted(), "b": Bank()}, task_from="a"),
        rows("vit", 16),
        max_steps=6,
        optim="adamw_torch",
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2 // WORLD,
    )


def resume(folder) -> dict:
    whole = resumable(folder)
    whole.train()
    resumed = resumable(folder)
    try:
        resumed.train(resume_from_checkpoint=str(Path(folder, "shared", "checkpoint-3")))
    except RuntimeError as error:
        if "tagged with cpu:0" not in str(error):
            raise
        return {"upstream": "this transformers loads no optimizer on several CPU processes"}
    one, other = (weights(t.model, t.distiller) for t in (whole, resumed))
    return {"difference": largest_difference(one, other), "weights": one}


def terminated(folder) -> dict:
    """The last process alone gets SIGTERM, on its way to step 1."""

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0 and rank() == WORLD - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        on_save = on_step_begin

    whole = resumable(folder / "whole")
    whole.train()
    trainer = resumable(folder)
    trainer.add_callback(Terminate())
    status = None
    try:
        trainer.train()
    except SystemExit as stopped:
        status = stopped.code
    step, checkpoint = trainer.state.global_step, str(last_whole_checkpoint(Path(folder, "shared")))
    resumed = resumable(folder)
    try:
        resumed.train(resume_from_checkpoint=True)
    except RuntimeError as error:
        if "tagged with cpu:0" not in str(error):
            raise
        return {"upstream": "this transformers loads no optimizer on several CPU processes"}
    one, other = (weights(t.model, t.distiller) for t in (whole, resumed))
    return {"status": status, "step": step, "checkpoint": checkpoint, "difference": largest_difference(one, other)}


def averages(folder) -> dict:
    """Averages over steps, which each process keeps: of a network with BatchNorm, and of a figure of the batches."""
    student = tiny("resnet")
    distiller = Combined({"own": SelfDistillation(decay=0.5), "akd": AKD(ema=0.5)}, task_from="own")
    trainer = make_trainer(folder, student, None, distiller, rows("resnet"), max_steps=4, **share())
    start = weights(trainer.teacher_model)
    trainer.train()
    teacher = weights(trainer.teacher_model)
    return {
        "teacher": teacher,
        "distiller": weights(distiller),
        "moved": all(largest_difference({n: teacher[n]}, {n: start[n]}) > 0 for n in teacher if "running_mean" in n),
    }


def cached(folder) -> dict:
    """One cache that all processes fill, and then read; the second run has no answer to wait for."""
    results = {}
    for name in ("first", "second"):
        student = tiny("bert")
        trainer = make_trainer(
            Path(folder, name),
            student,
            tiny_teacher("bert"),
            KD(),
            rows("bert"),
            max_steps=4,
            teacher_cache=str(folder / "cache"),
            teacher_cache_dtype="float32",
            **share(),
        )
        metrics = trainer.train().metrics
        metrics = {key: value for key, value in metrics.items() if key.startswith("teacher_cache")}
        figures = {name: getattr(trainer.cache, name) for name in ("hits", "misses", "filled")}
        results[name] = {"weights": weights(student), "metrics": metrics, **figures}
    dataset = rows("bert", 13)
    trainer = make_trainer(
        folder / "third",
        tiny("bert"),
        tiny_teacher("bert"),
        KD(),
        dataset,
        teacher_cache=str(folder / "warm"),
        **share(),
    )
    answers = trainer.warm_teacher_cache()["answers"]
    return {**results, "warm": (answers, trainer.cache.misses, trainer.cache.filled)}


def fully_sharded(folder) -> dict:
    """An engine that is asked for and not active; the last scenario, because it leaves its wish in the environment."""
    try:
        make_trainer(folder, tiny("bert"), tiny_teacher("bert"), KD(), rows("bert"), fsdp="full_shard")
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


def compiled(folder) -> dict:
    """The step and the teacher, with layers of both looked at and a layer of the method's own."""
    student, distiller = freeze_batch_norm(tiny("resnet")).double(), VID()
    trainer = make_trainer(
        folder,
        student,
        tiny_teacher("resnet").double(),
        distiller,
        rows("resnet").double(),
        max_steps=4,
        learning_rate=0.01,
        torch_compile=WORLD > 1,
        torch_compile_backend="aot_eager" if WORLD > 1 else None,
        **share(),
    )
    torch._dynamo.utils.counters.clear()
    trainer.train()
    counters = torch._dynamo.utils.counters
    return {
        "weights": weights(student, distiller),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": len(counters["graph_break"]),
        "is_ddp": isinstance(trainer.model_wrapped, DistributedDataParallel),
    }


def term_logs(folder) -> dict:
    """One step of fixed models, no update: what is logged can be computed by hand."""
    distiller = Combined({"kd": KD(alpha=0.5), "ttm": TTM()}, {"ttm": 0.5}, task_from="kd")
    trainer = make_trainer(
        folder,
        tiny("bert"),
        tiny_teacher("bert"),
        distiller,
        rows("bert"),
        max_steps=4,
        logging_steps=2,
        learning_rate=0.0,
        **share(),
    )
    trainer.train()
    return {name: logged(trainer, name) for name in ("loss", "task", "kd", "ttm/ttm")}


SCENARIOS = {
    "learnable_find_unused": lambda folder: learnable(folder, find_unused=True, max_grad_norm=0.0),
    "learnable_all_used": lambda folder: learnable(folder, find_unused=False, max_grad_norm=1.0),
    "student_alone": student_alone,
    "idle": idle,
    "adapted": adapted,
    "bank": bank,
    "contrastive": contrastive,
    "influence": influence,
    "aligned": aligned,
    "in_context": in_context,
    "every_method": every_method,
    "mutual": mutual,
    "evaluation": evaluation,
    "second_train": second_train,
    "resume": resume,
    "terminated": terminated,
    "term_logs": term_logs,
    "averages": averages,
    "cached": cached,
    "compiled": compiled,
    "fully_sharded": fully_sharded,
}


def main():
    global WORLD
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenarios", nargs="*", default=[])
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args()
    # The first trainer joins the processes, or refuses to.
    make_trainer(options.folder / "first", tiny("bert"), dataset=rows("bert"), use_cpu=options.use_cpu)
    WORLD = processes()
    for name in options.scenarios or SCENARIOS:
        result = SCENARIOS[name](options.folder / name)
        torch.save(result, options.folder / f"{name}-{rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
