import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer, DistilBertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from hfkd.data import GLUE_TASKS, load_text_data, tokenize


ROWS = {
    "cola": (8551, 1043),
    "mnli": (8999, 1000),
    "mrpc": (3668, 408),
    "qnli": (9999, 5463),
    "qqp": (30868, 2000),
    "rte": (2490, 277),
    "sst2": (67349, 872),
    "stsb": (5749, 1500),
    "wnli": (635, 71),
}


@pytest.fixture(scope="module")
def vocab(data_dir):
    return str(data_dir / "bert-base-uncased-vocab")


@pytest.fixture(scope="module")
def roberta_like():
    words = ["<s>", "<pad>", "</s>", "<unk>", "the", "a", "film", "is", "good", "bad", "##x"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_glue(data_dir, task):
    data = load_text_data(task, data_dir=data_dir / "glue" / task)
    train, test = ROWS[task]
    assert len(data.test) == test
    assert len(data.validation) == round(0.1 * train)
    assert len(data.train) + len(data.validation) == train
    assert data.text_columns == list(GLUE_TASKS[task].text_columns)
    for split in data.splits().values():
        assert split.column_names == [*data.text_columns, "label", "index"]
    if task == "stsb":
        assert data.is_regression
        assert (data.num_labels, data.label_names) == (1, None)
        assert min(data.train["label"]) >= 0
        assert max(data.train["label"]) <= 5
        assert data.train.features["label"].dtype == "float32"
    else:
        assert data.label_names == list(GLUE_TASKS[task].label_names)
        assert set(data.train["label"]) == set(range(data.num_labels))
    hidden = data.extra.get("official_test")
    assert (hidden is not None) == (data_dir / "glue" / task / "test.parquet").exists()
    if hidden is not None:
        assert set(hidden["label"]) == {-100}
    raw = datasets.Dataset.from_parquet(str(data_dir / "glue" / task / "train.parquet"))
    for row in data.validation.select(range(20)):
        assert row == {**{c: raw[row["index"]][c] for c in [*data.text_columns, "label"]}, "index": row["index"]}


def test_the_folder_of_all_tasks_will_do(data_dir):
    data = load_text_data("rte", data_dir=data_dir / "glue", max_train_samples=10, max_eval_samples=20)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 20, 20)
    assert len(data.extra["official_test"]) == 3000


def text_split(columns, labels, label_type=None):
    feature = label_type or datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    content = {column: [f"{column} {i}" for i in range(len(labels))] for column in columns}
    features = {**dict.fromkeys(columns, datasets.Value("string")), "label": feature}
    return datasets.Dataset.from_dict({**content, "label": labels}, features=datasets.Features(features))


def mnli_splits():
    names = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    labels = {"train": [0, 1, 2] * 10, "validation_matched": [0, 1], "validation_mismatched": [2, 1, 0]}
    return {name: text_split(["premise", "hypothesis"], labels.get(name, [-1, -1])) for name in names}


def check_mnli(data):
    sizes = {name: len(split) for name, split in data.splits().items()}
    extra = {"mnli-mm": 3, "official_test": 2, "official_test_mnli-mm": 2, "ax": 1}
    assert sizes == {"train": 27, "validation": 3, "test": 2, **extra}
    assert data.extra["mnli-mm"]["label"][:] == [2, 1, 0]
    assert data.extra["ax"]["label"][:] == [-100]


def test_mnli_from_the_hub(monkeypatch):
    def load_dataset(hub_id, config, revision):
        assert hub_id == "nyu-mll/glue"
        return {"mnli": mnli_splits(), "ax": {"test": text_split(["premise", "hypothesis"], [-1])}}[config]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_mnli(load_text_data("mnli"))


def test_mnli_from_a_folder(tmp_path):
    for folder in ("mnli", "ax"):
        (tmp_path / folder).mkdir()
    for name, split in mnli_splits().items():
        split.to_parquet(tmp_path / "mnli" / f"{name}-00000-of-00001.parquet")
    text_split(["premise", "hypothesis"], [-1]).to_parquet(tmp_path / "ax" / "test-00000-of-00001.parquet")
    check_mnli(load_text_data("mnli", data_dir=tmp_path))
    check_mnli(load_text_data("mnli", data_dir=tmp_path / "mnli"))
    with pytest.raises(ValueError, match=r"load_text_data\('mnli'\).extra\['mnli-mm'\]"):
        load_text_data("mnli-mm", data_dir=tmp_path)


def test_other_hub_ids(monkeypatch):
    split = text_split(["text"], [0, 1, 2] * 10)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: {"train": split, "test": split, "unsupervised": split}
    )
    data = load_text_data("somebody/reviews")
    assert {name: len(s) for name, s in data.splits().items()} == {"train": 27, "validation": 3, "test": 30}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"test": split})
    with pytest.raises(ValueError, match="there is no train split, only test"):
        load_text_data("somebody/reviews")


def test_csv_files(tmp_path):
    train, validation, test = (tmp_path / f"{name}.csv" for name in ("train", "validation", "test"))
    train.write_text("sentence1,sentence2,label\n" + 'null,"a, b",yes\nNA,c,no\n' * 10)
    validation.write_text("label,sentence2,sentence1\nno,x,y\n,z,w\n")
    test.write_text("sentence1,sentence2\nx,y\n")
    data = load_text_data("mine", train_file=train, validation_file=validation, test_file=test)
    assert data.label_names == ["no", "yes"]
    assert data.text_columns == ["sentence1", "sentence2"]
    assert data.train[0] == {"sentence1": "null", "sentence2": "a, b", "label": 1, "index": 0}
    assert data.validation["label"][:] == [0, -100]
    assert data.test is None
    assert data.extra["predict"][0] == {"sentence1": "x", "sentence2": "y", "label": -100, "index": 0}
    alone = load_text_data("mine", train_file=train, validation_fraction=0.2)
    assert (len(alone.train), len(alone.validation), alone.test) == (16, 4, None)


def test_json_and_tsv_files(tmp_path):
    (tmp_path / "train.json").write_text('[{"text": "a", "label": 0.5}, {"text": "b", "label": 1}]')
    (tmp_path / "test.tsv").write_text("label\ttext\n2.5\ta 'b\n")
    data = load_text_data(
        "mine", train_file=tmp_path / "train.json", test_file=tmp_path / "test.tsv", validation_fraction=0
    )
    assert data.is_regression
    assert data.test[0] == {"text": "a 'b", "label": 2.5, "index": 0}


def test_files_without_labels(tmp_path):
    (tmp_path / "train.csv").write_text("text\n" + "a\n" * 20)
    (tmp_path / "labelled.csv").write_text("text,label\na,0\n")
    data = load_text_data("mine", train_file=tmp_path / "train.csv")
    assert set(data.train["label"]) == set(data.validation["label"]) == {-100}
    assert (len(data.validation), data.label_names) == (2, None)
    with pytest.raises(ValueError, match="train has no label column, but test has 'label': add one to train"):
        load_text_data("mine", train_file=tmp_path / "train.csv", test_file=tmp_path / "labelled.csv")


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("text,category", "some words,sport"),
        ("text,target", "some words,1"),
        ("premise,hypothesis", "some words,others"),
        ("text,author,category", "some words,me,sport"),
        ("sentence1,sentence2,class", "some words,others,1"),
    ],
)
def test_columns_that_may_be_the_labels_are_not_taken_for_text(tmp_path, header, row):
    (tmp_path / "train.csv").write_text("\n".join([header, *[row] * 20]))
    names = header.replace(",", ", ")
    message = f"called label, among {names}: rename the one that holds the labels, .*keep the text alone"
    with pytest.raises(ValueError, match=message):
        load_text_data("mine", train_file=tmp_path / "train.csv")


def test_own_files_for_a_glue_task_need_labels_or_text_alone(tmp_path):
    (tmp_path / "train.csv").write_text("premise,hypothesis,gold_label\n" + "a,b,neutral\n" * 20)
    with pytest.raises(ValueError, match=r"one column, or premise and hypothesis"):
        load_text_data("mnli", train_file=tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text("idx,premise,hypothesis\n" + "0,a,b\n" * 20)
    assert set(load_text_data("mnli", train_file=tmp_path / "train.csv").train["label"]) == {-100}


@pytest.mark.parametrize("name", ["id", "idx", "Index", "ID"])
def test_numbers_of_rows_are_no_text(tmp_path, name):
    (tmp_path / "train.csv").write_text(f"{name},text,label\n" + "".join(f"row-{i},w,{i % 2}\n" for i in range(20)))
    data = load_text_data("mine", train_file=tmp_path / "train.csv")
    assert data.text_columns == ["text"]
    (tmp_path / "train.csv").write_text(f"{name},text\n" + "".join(f"row-{i},w\n" for i in range(20)))
    assert load_text_data("mine", train_file=tmp_path / "train.csv").text_columns == ["text"]


def test_two_columns_that_may_be_the_labels_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("text,label,labels\n" + "a,0,1\nb,1,0\n" * 10)
    with pytest.raises(ValueError, match="the columns labels and label may both be the labels: drop or rename one"):
        load_text_data("mine", train_file=tmp_path / "train.csv")


def test_own_files_for_a_glue_task_take_its_class_order(tmp_path):
    rows = "".join(f"p{i},h,{name}\n" for i, name in enumerate(GLUE_TASKS["mnli"].label_names * 10))
    (tmp_path / "train.csv").write_text("premise,hypothesis,label\n" + rows)
    data = load_text_data("mnli", train_file=tmp_path / "train.csv")
    assert data.label_names == ["entailment", "neutral", "contradiction"]
    assert all(label == index % 3 for label, index in zip(data.train["label"], data.train["index"], strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,c,label\nx,y,z,0\n", r"found 3 \(a, b, c\).*name a pair sentence1 and sentence2"),
        ("number,label\n1,0\n", "found 0"),
        ("text,label\nx,0\n,1\n", "column 'text' of train has 1 rows without text: fill or drop"),
        ('text,label\n"x,y\n', "cannot read .*train.csv .*check that it has rows"),
        ("text,label\n", "cannot read .*train.csv .*check that it has rows"),
    ],
)
def test_unfit_files_are_refused(tmp_path, content, message):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_text_data("mine", train_file=tmp_path / "train.csv")


def test_unknown_sources_are_refused(tmp_path, data_dir):
    with pytest.raises(ValueError, match="unknown task 'mprc': use cola, mnli, mrpc"):
        load_text_data("mprc")
    with pytest.raises(FileNotFoundError, match="no file .*train.csv: correct train_file"):
        load_text_data("mine", train_file=tmp_path / "train.csv")
    with pytest.raises(ValueError, match="need a train_file"):
        load_text_data("mine", test_file=tmp_path / "test.csv")
    with pytest.raises(FileNotFoundError, match="holds no train.*parquet"):
        load_text_data("mrpc", data_dir=tmp_path)
    (tmp_path / "train.xls").touch()
    with pytest.raises(ValueError, match="train_file must end in .csv, .tsv, .json, .jsonl"):
        load_text_data("mine", train_file=tmp_path / "train.xls")
    with pytest.raises(ValueError, match="two sources"):
        load_text_data("mine", train_file=tmp_path / "train.xls", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"split lacks the columns \['premise', 'hypothesis'\]"):
        load_text_data("mnli", data_dir=data_dir / "glue" / "rte")


def test_tokenize_pairs(data_dir, vocab):
    tokenizer = BertTokenizer.from_pretrained(vocab)
    raw = load_text_data("rte", data_dir=data_dir / "glue", max_train_samples=50, max_eval_samples=20)
    data = tokenize(raw, tokenizer, max_length=48)
    columns = {"input_ids", "attention_mask", "token_type_ids", "labels", "index"}
    for name, split in data.splits().items():
        assert set(split.column_names) == columns
        assert split["labels"][:] == raw.splits()[name]["label"][:]
        assert split["index"][:] == raw.splits()[name]["index"][:]
        assert max(map(len, split["input_ids"])) <= 48
    row = raw.train[3]
    expected = tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=48)
    assert {name: data.train[3][name] for name in expected} == dict(expected)
    assert max(data.train[3]["token_type_ids"]) == 1
    assert (data.label_names, data.task, data.text_columns) == (raw.label_names, "rte", [])
    with pytest.raises(ValueError, match="no text among"):
        tokenize(data, tokenizer)


def test_a_distilbert_student_keeps_the_segments_for_its_teacher(data_dir, vocab):
    raw = load_text_data("rte", data_dir=data_dir / "glue", max_train_samples=50, max_eval_samples=20)
    student, teacher = DistilBertTokenizer.from_pretrained(vocab), BertTokenizer.from_pretrained(vocab)
    data = tokenize(raw, student, teacher_tokenizer=teacher)
    assert set(data.train.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "index"}
    assert data.train["token_type_ids"][:] == tokenize(raw, teacher).train["token_type_ids"][:]


def test_gpt2_gets_no_segments(tmp_path):
    """Its tokenizer gives none of itself, and its model would add an embedding for them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = GPT2Tokenizer(vocab=words, merges=[], pad_token="<|endoftext|>", model_max_length=32)
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "good,a\nbad,b\n" * 20)
    data = tokenize(load_text_data("own", train_file=path), tokenizer)
    assert set(data.train.column_names) == {"input_ids", "attention_mask", "labels", "index"}


def test_twins_only_where_the_teacher_reads_otherwise(data_dir, vocab, roberta_like):
    raw = load_text_data("sst2", data_dir=data_dir / "glue", max_train_samples=50, max_eval_samples=20)
    tokenizer = BertTokenizer.from_pretrained(vocab)
    same = tokenize(raw, tokenizer, teacher_tokenizer=BertTokenizer.from_pretrained(vocab))
    assert not [name for name in same.train.column_names if name.startswith("teacher_")]
    left = BertTokenizer.from_pretrained(vocab, padding_side="left")
    assert "teacher_input_ids" in tokenize(raw, tokenizer, teacher_tokenizer=left).train.column_names
    data = tokenize(raw, tokenizer, teacher_tokenizer=roberta_like, max_length=8)
    twins = {name for name in data.train.column_names if name.startswith("teacher_")}
    # RoBERTa knows no segments, and what its model takes is respected.
    assert twins == {"teacher_input_ids", "teacher_attention_mask"}
    for split in data.splits().values():
        assert set(split.column_names) >= twins
    assert (
        data.train[0]["teacher_input_ids"]
        == roberta_like(raw.train[0]["sentence"], truncation=True, max_length=8)["input_ids"]
    )
    assert (
        data.train[0]["input_ids"] == tokenizer(raw.train[0]["sentence"], truncation=True, max_length=8)["input_ids"]
    )


def test_tokenize_regression_and_empty_splits(data_dir, vocab):
    raw = load_text_data("stsb", data_dir=data_dir / "glue", max_train_samples=20, validation_fraction=0)
    data = tokenize(raw, BertTokenizer.from_pretrained(vocab))
    assert data.train.features["labels"].dtype == "float32"
    assert data.num_labels == 1
    assert len(data.validation) == 0
    assert data.validation.column_names == data.train.column_names
    assert np.isfinite(data.test["labels"]).all()
