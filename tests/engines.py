"""What the tests of engines compare with one process; launched by torchrun.

python -m torch.distributed.run --nproc_per_node=2 tests/engines.py ENGINE FOLDER SCENARIO ...

ENGINE is ddp or fsdp. Accelerate shards on accelerators alone, and on a CPU runs DDP in silence. So here it is told
that its gloo processes are GPUs: it then shards by its own code, with ``fully_shard`` over a mesh of CPUs. Where there
is a GPU, nothing is pretended.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from helpers import Bank, Weighted, logged, make_trainer, rows, tiny, tiny_teacher
from torch.distributed.tensor import DTensor

from hfkd import DistillationTrainer
from hfkd.distillers import (
    AEKT,
    AKD,
    CRD,
    DML,
    KD,
    KDAIF,
    WTTM,
    Combined,
    FitNet,
    HiddenStates,
    InContextKD,
    SelfDistillation,
)
from hfkd.sharding import whole_state


sys.path.append(str(Path(__file__).parent / "distillers"))
from test_contract import build, build_double  # found by the line above


WORLD, OPTIONS = 1, {}  # set by main

METHODS = {
    "KD": (KD, {}),
    "WTTM": (WTTM, {}),
    "AKD": (AKD, {"alpha": "learned"}),
    "HiddenStates": (HiddenStates, {}),
    "FitNet": (FitNet, {"weight": 0.1}),
    "CRD": (CRD, {"embedding_size": 4, "negatives": 8}),
    "AEKT": (AEKT, {"order": "classify_first", "warm_up": 0.0}),
    "DML": (DML, {}),
    "InContextKD": (InContextKD, {"neighbours": 2, "negatives": 4}),
    "InContextKD-online": (InContextKD, {"mode": "online", "neighbours": 2, "negatives": 4, "refresh": 0.4}),
    "InContextKD-teacher_free": (
        InContextKD,
        {"mode": "teacher_free", "neighbours": 2, "negatives": 4, "refresh": 0.4},
    ),
    "KDAIF": (KDAIF, {"warm_up": 0.0}),
}
# What a user may have asked of FSDP, for methods whose hooks run the student by itself.
WRAPPING = {
    "KDAIF": {"transformer_layer_cls_to_wrap": ["BertLayer"]},
    "InContextKD-teacher_free": {"auto_wrap_policy": "NO_WRAP"},
}
ON_NODES = ("KD", "AKD", "CRD", "InContextKD", "KDAIF")
REFUSED = {
    "AEKT": (AEKT, {}),
    "KDAIF": (KDAIF, {"layers": "all", "hessian": "identity"}),
    "SelfDistillation": (SelfDistillation, {}),
}


def state_of(trainer) -> dict[str, torch.Tensor]:
    """All that trains, whole."""
    models = [trainer.model, trainer.distiller, *([trainer.teacher_model] if trainer._saves_teacher else [])]
    states = enumerate(whole_state(model) for model in models)
    return {f"{i}.{name}": tensor.cpu().clone() for i, state in states for name, tensor in state.items()}


def methods(folder, names=tuple(METHODS)) -> dict:
    """Three clipped steps of each: what is logged, all weights, banks and tables of influence."""
    results = {}
    for name in names:
        method, arguments = METHODS[name]
        wrapping = {"fsdp_config": dict(WRAPPING[name])} if "fsdp" in OPTIONS and name in WRAPPING else {}
        micro_batches = 2 // WORLD if method is FitNet else 1  # whose BatchNorm is of a process's batch
        _, trainer = build_double(
            Path(folder, name),
            method,
            arguments,
            max_steps=3,
            per_device_train_batch_size=8 // WORLD // micro_batches,
            gradient_accumulation_steps=micro_batches,
            max_grad_norm=1.0,
            **OPTIONS,
            **wrapping,
        )
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        tables = [pq.read_table(table) for table in sorted(Path(folder, name, "influence").glob("*.parquet"))]
        results[name] = {
            "type": trainer.accelerator.distributed_type.value,
            "processes": trainer.accelerator.num_processes,
            "sharded": all(isinstance(parameter, DTensor) for parameter in trainer._module.parameters()),
            "logs": {key: logged(trainer, key) for key in steps[0]},
            "state": state_of(trainer),
            "influence": [torch.tensor(table["influence"].to_numpy()) for table in tables],
        }
    return results


def on_nodes(folder) -> dict:
    return methods(folder, ON_NODES)


def refused(folder) -> dict:
    """What methods say that cannot be sharded."""
    messages = {}
    for name, (method, arguments) in REFUSED.items():
        try:
            build(Path(folder, name), method, arguments, **OPTIONS)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def resumable(folder, distiller=None, **arguments):
    """AdamW, a schedule, a bank and learned weights; four steps an epoch, a checkpoint after steps 3 and 6."""
    trainer = make_trainer(
        folder,
        tiny("vit").double(),
        tiny_teacher("vit").double(),
        Combined({"a": Weighted(), "b": Bank()}, task_from="a") if distiller is None else distiller,
        rows("vit", 32).double(),
        trainer={"eval_dataset": rows("vit", 13, seed=5).double()},
        **{
            "max_steps": 6,
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 1.0,
            "save_strategy": "steps",
            "save_steps": 3,
            "per_device_train_batch_size": 8 // WORLD,
            **OPTIONS,
            **arguments,
        },
    )
    trainer.distiller.double()
    return trainer


def resume(folder) -> dict:
    """Interrupted after step 3 and gone on."""
    whole = resumable(folder)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    after = whole.evaluate()["eval_loss"]
    whole.save_model()
    whole.create_model_card()
    resumed = resumable(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return {
        "state": state_of(whole),
        "resumed": state_of(resumed),
        "losses": [logged(trainer, "loss") for trainer in (whole, resumed)],
        "eval_loss": [before, after],
        "files": sorted(path.name for path in (folder / "checkpoint-3").iterdir()),
    }


def from_others(folder) -> dict:
    """Gone on from a checkpoint that other processes wrote, which lies beside the results; or what is said instead."""
    trainer = resumable(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train(resume_from_checkpoint=str(Path(folder).parent / "written" / "checkpoint-3"))
        except ValueError as error:
            return {"refused": str(error)}
    told = [str(warning.message) for warning in caught if "was written by" in str(warning.message)]
    return {"state": state_of(trainer), "warned": told}


def more(folder) -> dict:
    """Accumulation, the best model, answers from the cache, and train() once more."""
    cache = str(folder.parent / "cache")
    cached = {"teacher_cache": cache, "teacher_cache_dtype": "float32", "gradient_accumulation_steps": 2}
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "logging_steps": 3}
    batch = {"per_device_train_batch_size": 4 // WORLD}
    trainer = resumable(folder, AKD("learned"), **cached, **best, **batch)
    trainer.train()
    result = {"state": state_of(trainer), "answers": trainer.cache.hits + trainer.cache.misses, "again": ""}
    try:
        trainer.train()
    except RuntimeError as error:
        result["again"] = str(error)
    return result


def half(folder) -> dict:
    """bfloat16 by autocast: the losses of three steps, and the precision of the weights."""
    trainer = make_trainer(
        folder,
        tiny("bert"),
        tiny_teacher("bert"),
        AKD("learned"),
        rows("bert"),
        bf16=True,
        per_device_train_batch_size=8 // WORLD,
        **OPTIONS,
    )
    trainer.train()
    return {"loss": logged(trainer, "loss"), "dtypes": sorted({str(t.dtype) for t in state_of(trainer).values()})}


def batch_norm(folder) -> dict:
    """Statistics of batches that differ between processes, after an evaluation."""
    trainer = make_trainer(
        folder,
        tiny("resnet"),
        tiny_teacher("resnet"),
        KD(),
        rows("resnet"),
        trainer={"eval_dataset": rows("resnet", 6, seed=5)},
        per_device_train_batch_size=8 // WORLD,
        **OPTIONS,
    )
    trainer.train()
    own = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.evaluate()
    return {"before": own, "after": dict(trainer.model.named_buffers())}


SCENARIOS = {
    function.__name__: function
    for function in (methods, on_nodes, refused, resume, from_others, more, half, batch_norm)
}


def pretend() -> None:
    """Let Accelerate take these processes for GPUs, as it asks before it shards."""
    create = DistillationTrainer.create_accelerator_and_postprocess

    def as_gpus(trainer):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)

    DistillationTrainer.create_accelerator_and_postprocess = as_gpus


def main():
    global WORLD
    # transformers 5.17 reads an optimizer's tensors to "cpu:0", which torch does not know; later ones to "cpu".
    torch.serialization.register_package(100, lambda _: None, lambda kept, where: kept if where == "cpu:0" else None)
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["ddp", "fsdp"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenarios", nargs="+")
    options = parser.parse_args()
    if options.engine == "fsdp":
        OPTIONS["fsdp"] = True
        if torch.cuda.is_available():
            OPTIONS["use_cpu"] = False
        else:
            pretend()
    make_trainer(options.folder / "first", tiny("bert"), dataset=rows("bert"), **OPTIONS)  # joins the processes
    WORLD = dist.get_world_size()
    for name in options.scenarios:
        result = SCENARIOS[name](options.folder / name)
        torch.save(result, options.folder / f"{name}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
