"""The model card: what it says, against the run that it is about."""

import math
import re
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from helpers import make_trainer, named, rows, tiny, tiny_teacher
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch.utils.data import Subset

from hfkd import distillers
from hfkd.data import TaskData
from hfkd.distillers import AKD, CAM, DML, KD, WTTM, Combined, Distiller, LabelSmoothing, SelfDistillation
from hfkd.metrics import compute_metrics
from hfkd.provenance import bibtex, command_line, data_origin, hub_origin, papers


pytestmark = pytest.mark.filterwarnings("ignore:of .* samples the teacher:UserWarning")  # it is a random net
TASK = {"dataset": "toy", "tasks": "text-classification"}


def trained(folder, student=None, teacher=None, distiller=None, dataset=None, evaluation=None, **arguments):
    """A trainer that has trained for a step and was evaluated on 40 other samples."""
    dataset = rows("bert") if dataset is None else dataset
    options = {"compute_metrics": compute_metrics("toy"), "eval_dataset": evaluation or rows("bert", 40, seed=9)}
    student = tiny("bert") if student is None else student
    trainer = make_trainer(folder, student, teacher, distiller, dataset, trainer=options, max_steps=1, **arguments)
    trainer.train()
    trainer.evaluate()
    return trainer


def card_of(trainer, **given):
    trainer.create_model_card(**{**TASK, **given})
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def table_of(card):
    """Row to column to cell of the table of results."""
    section = card.content.split("## Results")[1].split("## Training")[0]
    lines = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    head = re.search(r"^\|(.+)\|$", section, re.MULTILINE)[1].split("|")[1:]
    names = [cell.strip() for cell in head]
    kinds = ("teacher", "student", "student alone", "distilled student")
    return {line[0]: dict(zip(names, line[1:], strict=True)) for line in lines if line[0] in kinds}


@torch.no_grad()
def predictions(model, dataset):
    columns = {k: v for k, v in dataset.columns.items() if k not in ("labels", "index")}
    return model.eval()(**columns).logits.double().numpy()


def test_the_table_holds_what_was_measured(tmp_path):
    """Against logits computed here, one sample at a time."""
    teacher, evaluation = tiny_teacher("bert", num_hidden_layers=3), rows("bert", 40, seed=9)
    trainer = trained(tmp_path, teacher=teacher, evaluation=evaluation)
    card = card_of(trainer)
    labels, table = evaluation.labels, table_of(card)
    said = {"teacher": predictions(teacher, evaluation), "distilled student": predictions(trainer.model, evaluation)}
    assert list(table) == ["teacher", "distilled student"]
    for name, logits in said.items():
        right = logits.argmax(1) == labels
        confidence = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
        bins = np.ceil(15 * confidence)
        error = sum(abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(16)) / 40
        assert table[name]["accuracy"] == f"{right.mean():.4f}"
        assert float(table[name]["ECE"]) == pytest.approx(error, abs=2e-4)
    same = (said["teacher"].argmax(1) == said["distilled student"].argmax(1)).mean()
    assert table["distilled student"]["agreement"] == f"{same:.4f}"
    for name, model in (("teacher", teacher), ("distilled student", trainer.model)):
        count = sum(parameter.numel() for parameter in model.parameters())
        assert table[name]["parameters"] == f"{count:,}"
        assert table[name]["weights (MB)"] == f"{4 * count / 1e6:.2f}"
        assert float(table[name]["latency (ms)"]) > 0
    wrong = said["teacher"].argmax(1) != labels
    repeated = (wrong & (said["teacher"].argmax(1) == said["distilled student"].argmax(1))).sum()
    assert f"of {wrong.sum()} here the student repeats {repeated}." in card.content
    accuracy = float(trainer.evaluate()["eval_accuracy"])
    assert f"standard error of {100 * math.sqrt(accuracy * (1 - accuracy) / 40):.1f} points" in card.content


def test_the_index_of_scores_is_the_hubs(tmp_path):
    card = card_of(trained(tmp_path, teacher=tiny_teacher("bert")), model_name="pupil")
    results = {result.metric_type: result for result in card.data.eval_results}
    table = table_of(card)["distilled student"]
    assert {name: f"{result.metric_value:.4f}" for name, result in results.items()} == {
        "accuracy": table["accuracy"],
        "ece": table["ECE"],
    }
    assert {(r.task_type, r.dataset_name, r.dataset_type, r.dataset_split) for r in results.values()} == {
        ("text-classification", "toy", "toy", "validation")
    }
    assert (card.data.model_name, card.data.pipeline_tag, card.data.library_name) == (
        "pupil",
        "text-classification",
        "transformers",
    )


def test_a_score_that_is_no_number_is_left_out_of_the_index(tmp_path):
    trainer = trained(tmp_path)
    trainer.log({"eval_strange": float("nan")})
    card = card_of(trainer)
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy", "ece"}
    assert table_of(card)["student"]["strange"] == "nan"


def test_a_teacher_that_was_asked_in_part_is_compared_on_that_part(tmp_path):
    teacher, evaluation = tiny_teacher("bert"), rows("bert", 40, seed=9)
    trainer = trained(tmp_path, teacher=teacher, evaluation=evaluation)
    trainer.evaluations._teacher.clear()
    trainer.evaluate_teacher(max_samples=7)
    card = card_of(trainer)
    part = torch.linspace(0, 39, 7).long().numpy()
    alike = predictions(teacher, evaluation).argmax(1) == predictions(trainer.model, evaluation).argmax(1)
    assert table_of(card)["distilled student"]["agreement"] == f"{alike[part].mean():.4f}"
    assert "Measured on 40 samples of the split `eval`. The teacher was asked about 7 of them" in card.content
    trainer.evaluate_teacher()
    trainer.evaluate_teacher(max_samples=7)  # the whole stays
    assert table_of(card_of(trainer))["distilled student"]["agreement"] == f"{alike.mean():.4f}"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_ensemble_takes_as_long_as_its_members(tmp_path, monkeypatch, dtype):
    """Each is asked about one sample, in the precision that it teaches in."""
    teachers = [tiny_teacher("bert"), tiny_teacher("distilbert", seed=7)]
    trainer = trained(tmp_path, None, teachers, WTTM(), teacher_dtype=dtype)
    seen = []
    for source in trainer.teacher.members:
        source.model.register_forward_hook(lambda *call: seen.append((type(call[0]), call[2].logits)))
    assert table_of(card_of(trainer))["teacher"]["latency (ms)"] != "–"
    assert [kind for kind, _ in seen] == [type(teacher) for teacher in teachers] * 9
    assert {(len(logits), logits.dtype) for _, logits in seen} == {(1, torch.bfloat16 if dtype else torch.float32)}


def test_answers_in_another_order_are_not_compared(tmp_path):
    trainer = trained(tmp_path, teacher=tiny_teacher("bert"))
    kept = trainer.evaluations.student["eval"]
    kept.labels = kept.labels[::-1].copy()
    assert "agreement" not in table_of(card_of(trainer))["distilled student"]


def test_the_test_split_goes_before_validation(tmp_path):
    trainer = trained(tmp_path, teacher=tiny_teacher("bert"))
    test = rows("bert", 24, seed=3)
    score = trainer.evaluate(test, metric_key_prefix="test")["test_accuracy"]
    card = card_of(trainer)
    table = table_of(card)
    assert table["distilled student"]["accuracy"] == f"{score:.4f}"
    assert table["teacher"]["accuracy"] == "–"  # who has not seen it
    assert "agreement" not in table["teacher"]
    trainer.evaluate_teacher(test)
    assert table_of(card_of(trainer))["teacher"]["accuracy"] != "–"
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}


def test_the_student_alone_stands_beside(tmp_path):
    alone = trained(tmp_path / "alone")
    alone.save_model()
    own = table_of(card_of(alone))["student"]
    taught = trained(tmp_path / "taught", teacher=tiny_teacher("bert"))
    taught.save_model()
    table = table_of(card_of(taught, baseline=tmp_path / "alone"))
    for name in ("accuracy", "ECE", "parameters", "weights (MB)"):
        assert table["student alone"][name] == own[name]
    other = trained(tmp_path / "other", tiny("bert", num_hidden_layers=1), tiny_teacher("bert"))
    other.save_model()
    cells = table_of(card_of(other, baseline=tmp_path / "alone"))["student alone"]
    assert (cells["accuracy"], cells["parameters"], cells["latency (ms)"]) == (own["accuracy"], "–", "–")
    with pytest.raises(FileNotFoundError, match="baseline= is the folder of the same student trained alone"):
        taught.create_model_card(baseline=tmp_path / "nowhere")


def test_a_push_keeps_what_the_card_was_told(tmp_path):
    """push_to_hub() writes the card again, with the name alone."""
    trainer = trained(tmp_path, teacher=tiny_teacher("bert"))
    card_of(trainer, license="mit", tags="small")
    trainer.create_model_card(model_name="pushed")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.model_name) == (
        "mit",
        "text-classification",
        "pushed",
    )
    assert {"small", "hfkd", "knowledge-distillation"} <= set(card.data.tags)
    assert card.data.eval_results


def from_hub(model, name, commit):
    model.config.name_or_path, model.config._commit_hash = name, commit
    return model


def test_where_weights_came_from(tmp_path):
    teachers = [from_hub(tiny_teacher("bert"), "big/one", "a" * 40), tiny_teacher("bert", seed=7)]
    teachers[1].config.name_or_path = "never/loaded"
    student = from_hub(tiny("bert"), "small/start", "b" * 40)
    card = card_of(trained(tmp_path, student, teachers, WTTM()))
    assert (card.data.base_model, card.data.base_model_relation) == ("small/start", "finetune")
    assert card.data.teachers == [{"id": "big/one", "revision": "a" * 40}]
    assert [tag for tag in card.data.tags if tag.startswith("teacher:")] == ["teacher:big/one"]
    assert f"[big/one](https://huggingface.co/big/one), revision `{'a' * 40}`" in card.content
    assert f"[small/start](https://huggingface.co/small/start), revision `{'b' * 40}`" in card.content
    assert hub_origin(teachers[1]) is None
    own = trained(tmp_path, from_hub(tiny("bert"), "small/start", "b" * 40), None, SelfDistillation())
    assert [tag for tag in card_of(own).data.tags if tag.startswith("teacher:")] == []


def test_data_from_the_hub_have_their_revision(tmp_path):
    columns = {name: column.tolist() for name, column in rows("bert").columns.items()}
    address = f"hf://datasets/some/data@{'c' * 40}/default/train-00000-of-00001.parquet"
    sets = []
    for split in ("train", "validation"):
        made = Dataset.from_dict(columns, split=split)
        made.info.download_checksums = {address: {"num_bytes": 3, "checksum": None}}
        made.info.config_name = "default"
        sets.append(made.select(range(10)).map(lambda row: row))  # as the loaders cut and change it
    assert data_origin(Subset(sets[0], [0])) == {
        "id": "some/data",
        "revision": "c" * 40,
        "config": "default",
        "split": "train",
    }
    for evaluation, split in ((sets[1], "validation"), (sets[0], "validation")):  # the latter cut from train
        card = card_of(trained(tmp_path, dataset=sets[0], evaluation=evaluation))
        assert card.data.datasets == ["some/data"]
        assert (
            f"[some/data](https://huggingface.co/datasets/some/data), `default`, revision `{'c' * 40}`" in card.content
        )
        (result, *_) = card.data.eval_results
        known = (result.dataset_type, result.dataset_config, result.dataset_revision, result.dataset_split)
        assert known == ("some/data", "default", "c" * 40, split)
    assert data_origin(rows("bert")) is None
    assert "- Data: toy, not loaded from the Hub" in card_of(trained(tmp_path)).content


# Methods


PUBLIC = [
    item
    for name in distillers.__all__
    if isinstance(item := getattr(distillers, name), type)
    and issubclass(item, Distiller)
    and item.__module__ != "hfkd.distillers.base"
]


@pytest.mark.parametrize("method", [item for item in PUBLIC if item is not Combined])
def test_every_method_names_its_paper(method):
    part = method.__new__(method)
    torch.nn.Module.__init__(part)
    found = papers(part)
    assert found
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", number) for number in found)


def test_papers_of_what_is_combined():
    found = papers(Combined({"a": CAM(WTTM()), "b": KD()}, task_from="b"))
    assert found["2402.11148"] == (
        "Zheng and Yang",
        "2024",
        "Knowledge Distillation Based on Transformed Teacher Matching",
    )
    assert found["1503.02531"] == ("Hinton et al.", "2015", "Distilling the Knowledge in a Neural Network")
    assert "2509.05319" in found

    class Own(Distiller):
        def forward(self, student, teacher, batch):
            return {}

    assert papers(Own()) == {}


def test_bibtex_of_a_paper():
    assert bibtex("1503.02531", "Hinton et al.", "2015", "Distilling") == (
        "@misc{hinton2015,\n  title = {Distilling},\n  author = {Hinton and others},\n  year = {2015},\n"
        "  eprint = {1503.02531},\n  archivePrefix = {arXiv},\n  url = {https://arxiv.org/abs/1503.02531}\n}"
    )
    assert "@misc{arxiv2409.01679,\n  title = {arXiv:2409.01679},\n  year = {2024}" in bibtex("2409.01679", "", "", "")


def test_the_card_cites_the_paper_and_hfkd(tmp_path):
    card = card_of(trained(tmp_path, teacher=tiny_teacher("bert"), distiller=WTTM(gamma=0.5)))
    assert "`WTTM(gamma=0.5, beta=1.5)`" in card.content
    assert "[2402.11148](https://arxiv.org/abs/2402.11148)" in card.content
    assert "@misc{zheng2024,\n  title = {Knowledge Distillation Based on Transformed Teacher Matching}" in card.content
    assert "@software{hfkd," in card.content
    assert "| seed | 42 |" in card.content


# The command


def in_script(monkeypatch, folder, script, *words):
    """As if this process ran a script with these words in that working folder."""
    monkeypatch.chdir(folder)
    main = type(sys)("__main__")
    main.__file__, main.__spec__ = str(script), None
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    return main


def test_the_command_is_exact_and_for_a_shell(tmp_path, monkeypatch):
    words = ["--distiller_kwargs", '{"alpha": 0.5}', "--seed=1", "--output_dir", f"{tmp_path}/out"]
    in_script(monkeypatch, tmp_path, tmp_path / "examples" / "run.py", *words)
    lines = ["python examples/run.py", "--distiller_kwargs '{\"alpha\": 0.5}'", "--seed=1", "--output_dir out"]
    assert command_line(1) == " \\\n    ".join(lines)
    assert command_line(2).startswith("torchrun \\\n    --nproc_per_node 2 examples/run.py")


def test_the_command_of_a_module_and_of_a_notebook(tmp_path, monkeypatch):
    main = in_script(monkeypatch, tmp_path, tmp_path / "x.py")
    main.__spec__ = type("Spec", (), {"name": "package.__main__"})
    assert command_line(1) == "python -m package"
    main.__file__ = None
    assert command_line(1) is None


def test_the_command_has_no_token_and_no_home(tmp_path, monkeypatch):
    home = tmp_path / "somebody"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    inside = str(tmp_path).strip("/")
    words = [
        *("--hub_token", "secret1", "--hub_token=secret2", "--token", "secret3", "--api-key", "secret4"),
        *("--tokenizer_name", "kept", "--note", "hf_abcdefghijklmnop", "--url", "https://me:secret5@host/x"),
        *("--data_dir", f"{home}/data set", "--teacher", f"../../{inside}/somebody/t", "--also", "secret6"),
        *("--cache", f"{home}/work/c", "--json", f'{{"a": "{home}"}}', "--other", f"{home}s/x"),
    ]
    in_script(monkeypatch, home / "work", home / "run.py", *words)
    line = command_line(1, [None, "secret6"])
    assert "secret" not in line
    assert "hf_" not in line
    assert "kept" in line
    assert re.sub(r"\s*\\\n\s*", " ", line) == (
        "python ~/run.py --hub_token TOKEN --hub_token=TOKEN --token TOKEN --api-key TOKEN --tokenizer_name kept "
        "--note TOKEN --url https://host/x --data_dir '~/data set' --teacher ~/t --also TOKEN "
        f'--cache c --json \'{{"a": "~"}}\' --other {home}s/x'
    )


def test_a_script_from_elsewhere_is_named_without_its_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    in_script(monkeypatch, tmp_path / "here", tmp_path / "else" / "where" / "run.py")
    assert command_line(1) == "python run.py"


def test_the_card_shows_the_command(tmp_path, monkeypatch):
    trainer = trained(tmp_path, hub_token="hf_planted")
    in_script(monkeypatch, tmp_path, tmp_path / "run.py", "--hub_token", "hf_planted", "--copy", "hf_planted")
    content = card_of(trainer).content
    assert "```bash\npython run.py \\\n    --hub_token TOKEN \\\n    --copy TOKEN\n```" in content


# Other runs


def test_regression_has_a_correlation_and_no_classes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    dataset = rows("bert").with_columns(labels=torch.randn(16, generator=generator))
    evaluation = rows("bert", 40, seed=9).with_columns(labels=torch.randn(40, generator=generator))
    student, teacher = tiny("bert", num_labels=1), tiny_teacher("bert", num_labels=1)
    task = TaskData(Dataset.from_dict({"label": np.zeros(2, np.float32)}), None, None, "toy", None)
    options = {"compute_metrics": compute_metrics(task), "eval_dataset": evaluation}
    trainer = make_trainer(tmp_path, student, teacher, KD(), dataset, trainer=options, max_steps=1, learning_rate=1e-3)
    trainer.train()
    trainer.evaluate()
    card = card_of(trainer)
    table = table_of(card)["distilled student"]
    both = np.stack([predictions(model, evaluation)[:, 0] for model in (teacher, trainer.model)])
    assert float(table["agreement"]) == pytest.approx(np.corrcoef(both)[0, 1], abs=1e-4)
    assert "ECE" not in table
    assert "Agreement is Pearson's correlation" in card.content
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["training_curves.png"]
    assert 'function_to_apply="none"' in card.content


def test_a_column_of_answers_has_no_row(tmp_path):
    dataset = rows("bert").with_columns(teacher_logits=torch.randn(16, 5))
    card = card_of(trained(tmp_path, None, None, KD(), dataset))
    assert list(table_of(card)) == ["distilled student"]
    assert "The teacher's errors are handed on; how many was not measured." in card.content


@pytest.mark.parametrize(
    ("distiller", "rows_of_table"),
    [
        (LabelSmoothing(), ["student"]),
        (DML(), ["teacher", "distilled student"]),
        (SelfDistillation(), ["teacher", "distilled student"]),
    ],
)
def test_methods_without_an_outside_teacher_have_a_card(tmp_path, distiller, rows_of_table):
    student = tiny("bert", dropout=0.1)
    card = card_of(trained(tmp_path, student, None, distiller))
    assert list(table_of(card)) == rows_of_table
    assert "agreement" not in table_of(card)[rows_of_table[-1]]


def test_an_adapter_tells_its_base_and_its_own_size(tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    student = get_peft_model(from_hub(tiny("bert"), "small/start", "b" * 40), config)
    card = card_of(trained(tmp_path, student, tiny_teacher("bert")))
    assert (card.data.base_model, card.data.base_model_relation, card.data.library_name) == (
        "small/start",
        "adapter",
        "peft",
    )
    own = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    assert f"of its weights {4 * own / 1e6:.2f} MB are its own" in card.content
    assert 'PeftModel.from_pretrained(base, "' in card.content


def test_a_card_before_any_training_and_without_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), rows("bert"))
    card = card_of(trainer)
    assert "accuracy" not in table_of(card)["teacher"]
    assert not (tmp_path / "figures").exists()
    assert card.data.eval_results is None


def test_an_evaluation_set_without_labels_leaves_latency(tmp_path):
    hidden = rows("bert", 12, seed=3).with_columns(labels=None)
    card = card_of(trained(tmp_path, teacher=tiny_teacher("bert"), evaluation=hidden))
    columns = {"parameters", "weights (MB)", "latency (ms)"}
    assert {name: set(cells) for name, cells in table_of(card).items()} == {
        "teacher": columns,
        "distilled student": columns,
    }


def test_a_diverged_student_still_gets_its_card(tmp_path):
    trainer = trained(tmp_path, teacher=tiny_teacher("bert"))
    trainer.evaluations.student["eval"].logits[3] = np.nan
    table = table_of(card_of(trainer))
    assert "ECE" not in table["distilled student"]


def test_labels_that_are_hidden_leave_agreement_alone(tmp_path):
    trainer = trained(tmp_path, teacher=tiny_teacher("bert"))
    test = rows("bert", 12, seed=3).with_columns(labels=torch.full((12,), -100))
    trainer.evaluate(test, metric_key_prefix="test")
    trainer.evaluate_teacher(test)
    trainer.log({"test_something": 1.0})
    table = table_of(card_of(trainer))["distilled student"]
    assert "agreement" in table
    assert "ECE" not in table


# Pictures


def test_the_pictures_are_there_small_and_linked(tmp_path):
    student = named(tiny("bert"), ["a", "b", "c", "d", "e"])
    trainer = trained(tmp_path, student, tiny_teacher("bert"), AKD())
    content = card_of(trainer).content
    files = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in files] == ["confusion_difference.png", "reliability.png", "training_curves.png"]
    for path in files:
        assert f"](figures/{path.name})" in content
        assert path.stat().st_size < 200_000
        with PIL.Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_evaluating_and_the_card_ask_the_teacher_no_more_than_before(tmp_path, monkeypatch):
    teacher = tiny_teacher("bert")
    trainer = trained(tmp_path, teacher=teacher)
    seen = []
    monkeypatch.setattr(trainer, "_answers", lambda *arguments, **options: seen.append(arguments))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    card_of(trainer)
    assert not seen
    assert torch.equal(state, torch.get_rng_state())
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
