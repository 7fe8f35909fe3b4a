"""Write a student as ONNX, check that it answers as in PyTorch, and time both.

    python scripts/export_student.py --student outputs/wttm --output_dir outputs/wttm-onnx
    python scripts/export_student.py --student outputs/mrpc --output_dir outputs/mrpc-onnx --int8 --data mrpc

The folder then holds model.onnx, config.json with the class names, and the image processor or tokenizer:
docs/export.md shows it in use. Batches of any size go in, and texts of any length. Answers are compared on batches of
1, 2 and 7, for texts also at three lengths with padding; where a logit is over 1e-4 off, nothing is written and the
exit status is 2. --int8 adds, for texts, model_int8.onnx with quantised weights; how often it gives the same answer is
counted on --data, else on random tokens. Needs pip install "hfkd[export]".
"""

import inspect
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import AutoConfig, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from hfkd.checks import check_labels, problem_type_of
from hfkd.cli import explain_refusals, parse_arguments
from hfkd.data import ImageDataset, load_image_data, load_text_data, load_tokenizer, processor_for
from hfkd.metrics import compute_metrics
from hfkd.models import load_model


TOLERANCE = 1e-4
BATCHES = (1, 2, 7)
TIMED_BATCHES = (1, 32)
RANDOM_SAMPLES = 256
TASKS = {"ForImageClassification": "image-classification", "ForSequenceClassification": "text-classification"}

Inputs = dict[str, Tensor]
Engine = Callable[[Inputs], np.ndarray]


@dataclass
class ExportArguments:
    student: str = field(metadata={"help": "Hub id or local folder of a trained classifier."})
    output_dir: str = field(default="outputs/onnx", metadata={"help": "Where it goes: a new folder, or an empty one."})
    int8: bool = field(default=False, metadata={"help": "Also write model_int8.onnx, quantised; for texts."})
    data: str | None = field(
        default=None, metadata={"help": "A GLUE task, an image data set or a Hub id: score all on its test split."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Local folder of parquet files in the Hub's layout."})
    max_eval_samples: int = field(default=1000, metadata={"help": "Use so many samples of it."})
    max_length: int = field(default=128, metadata={"help": "Most tokens of a text; timed texts have so many."})
    rounds: int = field(default=20, metadata={"help": "Timed runs of each, in turn, of which the median is shown."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a Hub id."})


class Logits(nn.Module):
    """A classifier that takes its inputs in order and returns the logits alone."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str]):
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def find_task(student: str, trust_remote_code: bool) -> str:
    try:
        config = AutoConfig.from_pretrained(student, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot read a configuration of {student!r} ({line}): name a folder that save_model wrote, or a Hub id"
        ) from error
    if config.model_type == "timm_wrapper":
        return "image-classification"
    for name, (ending, task) in itertools.product(config.architectures or (), TASKS.items()):
        if name.endswith(ending):
            return task
    raise ValueError(
        f"{student!r} is {config.architectures}: name a classifier of images or texts ({', '.join(TASKS)})"
    )


def image_inputs(model: PreTrainedModel, processor) -> Callable[..., Inputs]:
    mode = "L" if model.config.to_dict().get("num_channels") == 1 else "RGB"
    shape = processor(PIL.Image.new(mode, (256, 256)), return_tensors="pt")["pixel_values"].shape[1:]

    def draw(batch: int, length: int | None = None) -> Inputs:
        return {"pixel_values": torch.randn(batch, *shape)}

    return draw


def text_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Inputs]:
    """Random tokens; the first text has the full length, the others end (or start) in padding."""
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in accepted]

    def draw(batch: int, length: int) -> Inputs:
        lengths = torch.randint(1, length + 1, (batch, 1))
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        if tokenizer.padding_side == "left":
            mask = mask.flip(1)
        tokens = torch.randint(len(tokenizer), (batch, length))
        made = {
            "input_ids": torch.where(mask == 1, tokens, tokenizer.pad_token_id),
            "attention_mask": mask,
            "token_type_ids": torch.randint(2, (batch, length)) * mask,
        }
        return {name: made[name] for name in names}

    return draw


def export(model: PreTrainedModel, example: Inputs, path: Path) -> None:
    """Write a model; the first axis of every input is of any size, and the second one of texts."""
    any_size = torch.export.Dim.DYNAMIC
    axes = tuple({0: any_size, 1: any_size} if tensor.ndim == 2 else {0: any_size} for tensor in example.values())
    try:
        program = torch.onnx.export(
            Logits(model, example).eval(),
            tuple(example.values()),
            input_names=list(example),
            output_names=["logits"],
            dynamic_shapes={"tensors": axes},
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"torch.onnx cannot export {type(model).__name__} ({cause}): try newer versions of torch and onnxscript, "
            "or a student of another architecture"
        ) from error
    program.save(path)


def onnx_engine(path: Path) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> np.ndarray:
        return session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]

    return run


def torch_engine(model: PreTrainedModel) -> Engine:
    @torch.inference_mode()
    def run(inputs: Inputs) -> np.ndarray:
        return model(**inputs).logits.numpy()

    return run


def check_answers(torch_answers: Engine, onnx_answers: Engine, batches: Iterable[Inputs]) -> float:
    """The largest difference between two engines.

    Raises:
        ValueError: If it is above the tolerance, or a batch cannot be run.
    """
    largest = 0.0
    for inputs in batches:
        shape = "×".join(map(str, next(iter(inputs.values())).shape))
        try:
            found = onnx_answers(inputs)
        except Exception as error:  # onnxruntime's have no common class but this
            line = str(error).strip().splitlines()[0]
            raise ValueError(
                f"onnxruntime cannot run the exported model on inputs of {shape} ({line}): nothing was written. Where "
                "the model's code depends on the size of a batch, or on a length, leave that out and export again"
            ) from error
        difference = float(np.abs(found - torch_answers(inputs)).max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"exported, the model is {difference:.2g} off on inputs of {shape}, and may be {TOLERANCE:g}: nothing "
                "was written. Its code may depend on the size of a batch, or on a length; else try other versions of "
                "torch, onnxscript and onnxruntime"
            )
        largest = max(largest, difference)
    return largest


def quantise(path: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    # The exporter leaves the shapes of weights that it then turned around, on which the quantiser stumbles.
    del model.graph.value_info[:]
    # Seven bits: on processors without VNNI a sum of two products of eight would not fit its register.
    quantize_dynamic(model, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


def milliseconds(engines: dict[str, Engine], inputs: Inputs, rounds: int) -> dict[str, float]:
    """Medians of runs in turn, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(2 + rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine(inputs)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def load_batches(
    args: ExportArguments, model: PreTrainedModel, processor, names: Iterable[str]
) -> tuple[list[Inputs], np.ndarray, Callable]:
    """Inputs, labels and metrics of a data set's test split, or of validation where it has none."""
    is_text = isinstance(processor, PreTrainedTokenizerBase)
    load = load_text_data if is_text else load_image_data
    raw = load(args.data, data_dir=args.data_dir, max_eval_samples=args.max_eval_samples)
    split = raw.test or raw.validation
    check_labels(split, "test", model.config, problem_type_of(model))
    images = None if is_text else ImageDataset(split, processor)
    batches = []
    for start in range(0, len(split), 32):
        rows = range(start, min(start + 32, len(split)))
        if is_text:
            texts = [list(split.select(rows)[column]) for column in raw.text_columns]
            longest = min(args.max_length, processor.model_max_length)
            batch = processor(*texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        else:
            batch = images.__getitems__(list(rows))
        batches.append({name: batch[name].contiguous() for name in names})
    return batches, np.asarray(split["label"]), compute_metrics(raw)


def run(args: ExportArguments) -> dict[str, dict[str, float]]:
    """Export; return the table's rows: megabytes, milliseconds, agreement and scores of every engine."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'exporting works by {error.name}: pip install "hfkd[export]"') from error
    folder = Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a new folder as --output_dir, or empty it")
    if args.rounds < 1:
        raise ValueError(f"rounds={args.rounds} times nothing: 1 or more, 20 is the default")
    task = find_task(args.student, args.trust_remote_code)
    is_text = task == "text-classification"
    if args.int8 and not is_text:
        raise ValueError(
            "--int8 quantises activations as they come, which serves the matrix products of texts and slows "
            "convolutions down: leave it out for images"
        )
    options = {"refuse_new_head": True, "trust_remote_code": args.trust_remote_code}
    model = load_model(args.student, task=task, **options)
    torch.manual_seed(0)
    if is_text:
        processor = load_tokenizer(args.student, trust_remote_code=args.trust_remote_code)
        if processor.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token, which batches need: set one and save it again")
        longest = min(args.max_length, processor.model_max_length)
        lengths = sorted({min(5, longest), (longest + 5) // 2, longest})
        draw = text_inputs(model, processor)
    else:
        processor = processor_for(model, args.student)
        longest, lengths, draw = None, [None], image_inputs(model, processor)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch, folder.name)
        made.mkdir()
        # Three texts of eleven tokens: sizes that are equal, or 1, are taken for the same one, or for fixed.
        export(model, draw(3, min(11, longest or 11)), made / "model.onnx")
        engines = {"PyTorch float32": torch_engine(model), "ONNX float32": onnx_engine(made / "model.onnx")}
        check_answers(*engines.values(), (draw(*sizes) for sizes in itertools.product(BATCHES, lengths)))
        if args.int8:
            quantise(made / "model.onnx", made / "model_int8.onnx")
            engines["ONNX int8"] = onnx_engine(made / "model_int8.onnx")
        model.config.save_pretrained(made)
        processor.save_pretrained(made)

        if args.data is None:
            batches = [draw(32, longest) for _ in range(RANDOM_SAMPLES // 32)]
        else:
            batches, labels, metrics = load_batches(args, model, processor, draw(1, lengths[0]))
        check_answers(*list(engines.values())[:2], batches)
        answers = {name: np.concatenate([engine(inputs) for inputs in batches]) for name, engine in engines.items()}

        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        sizes = [weights, *(sum(p.stat().st_size for p in made.glob(f"{n}.onnx*")) for n in ("model", "model_int8"))]
        rows = {name: {"MB": size / 1e6} for name, size in zip(engines, sizes, strict=False)}
        for batch in TIMED_BATCHES:
            for name, taken in milliseconds(engines, draw(batch, longest), args.rounds).items():
                rows[name][f"ms at batch {batch}"] = taken
        reference = answers["PyTorch float32"]
        for name, logits in answers.items():
            rows[name]["largest difference"] = float(np.abs(logits - reference).max())
            if model.config.num_labels > 1:
                rows[name]["same answer, %"] = 100 * float((logits.argmax(1) == reference.argmax(1)).mean())
            if args.data is not None:
                rows[name] |= metrics(EvalPrediction(predictions=logits, label_ids=labels))
        made.replace(folder)

    columns = list(rows["PyTorch float32"])
    print("|".join(["", "", *columns, ""]), "|---" * (1 + len(columns)) + "|", sep="\n")
    for name, row in rows.items():
        print("|".join(["", name, *(f"{row[column]:.4g}" for column in columns), ""]))
    of = f"{len(reference)} samples of {args.data}" if args.data else f"{len(reference)} random inputs"
    tokens = f" of {longest} tokens" if is_text else ""
    print(
        f"\nTimes: medians of {args.rounds} runs in turn on the CPU{tokens}, threads: {torch.get_num_threads()} "
        f"(OMP_NUM_THREADS). Answers: on {of}, against PyTorch.\nWritten: {folder}"
    )
    return rows


if __name__ == "__main__":
    with explain_refusals():
        run(*parse_arguments((ExportArguments,)))
