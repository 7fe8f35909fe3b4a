"""Fill a teacher's cache before training, with the flags of the run that will read it.

    python scripts/warm_teacher_cache.py run_image_kd --dataset cifar10 --teacher TEACHER --student resnet20
    torchrun --nproc_per_node 2 scripts/warm_teacher_cache.py run_glue_kd --task mrpc --teacher MODEL --use_cpu

The first word is the example that will train; behind it come its flags (or its YAML file), of which all that change
what the teacher sees must be the run's: data, teacher, student, augmentation, views, precision, --teacher_cache (here
true by default). Several processes share the work. Interrupted, it goes on where it was. The last line is a JSON
table: how many answers were asked for in how many seconds, how many bytes they take, and after how many epochs the
cache has cost no more than asking in each of them.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import run_glue_kd
import run_image_kd

from hfkd.cli import explain_refusals, parse_arguments


EXAMPLES = {"run_image_kd": run_image_kd, "run_glue_kd": run_glue_kd}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in EXAMPLES:
        raise ValueError(f"name the example that will train first: {' or '.join(EXAMPLES)}; then its flags")
    example = EXAMPLES[sys.argv[1]]
    types = (example.ModelArguments, example.DataArguments, example.TrainingArguments)
    model_args, data_args, args = parse_arguments(types, sys.argv[2:])
    if model_args.train_teacher:
        raise ValueError("the teacher must be trained already: name the folder it was saved in as --teacher")
    args.teacher_cache = args.teacher_cache or True
    report = example.run(model_args, data_args, args, only_warm=True)
    if args.process_index == 0:
        print(json.dumps(report))


if __name__ == "__main__":
    with explain_refusals():
        main()
