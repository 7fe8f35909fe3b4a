import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hfkd.data import DistillationCollator


def make_tokenizer(pad_id, side):
    vocab = {("[PAD]" if i == pad_id else f"w{i}"): i for i in range(10)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w9")), pad_token="[PAD]", padding_side=side
    )


STUDENT, TEACHER = make_tokenizer(0, "right"), make_tokenizer(1, "left")
FEATURES = [
    {
        "input_ids": [2, 3, 4],
        "attention_mask": [1, 1, 1],
        "token_type_ids": [0, 1, 1],
        "teacher_input_ids": [5],
        "teacher_attention_mask": [1],
        "label": 1,
        "index": 7,
        "sample_weight": 0.5,
        "sentence": "a b c",
    },
    {
        "input_ids": [2],
        "attention_mask": [1],
        "token_type_ids": [0],
        "teacher_input_ids": [5, 6],
        "teacher_attention_mask": [1, 1],
        "label": -100,
        "index": 9,
        "sample_weight": 2.0,
        "sentence": "d",
    },
]


def test_each_tokenizer_pads_its_own_columns():
    batch = DistillationCollator(STUDENT, TEACHER)(FEATURES)
    expected = {
        "input_ids": [[2, 3, 4], [2, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
        "teacher_input_ids": [[1, 5], [5, 6]],
        "teacher_attention_mask": [[0, 1], [1, 1]],
        "labels": [1, -100],
        "index": [7, 9],
        "sample_weight": [0.5, 2.0],
    }
    assert {name: column.tolist() for name, column in batch.items()} == expected
    assert batch["sample_weight"].dtype == torch.float32
    assert batch["labels"].dtype == batch["input_ids"].dtype == torch.int64


def test_real_tokenizers(data_dir):
    from transformers import BertTokenizer

    student = BertTokenizer.from_pretrained(str(data_dir / "bert-base-uncased-vocab"))
    texts = ["a short one", "a somewhat longer sentence, with more words"]
    rows = [{**student(text), "teacher_input_ids": [5] * (3 - i), "labels": i} for i, text in enumerate(texts)]
    batch = DistillationCollator(student, TEACHER)(rows)
    expected = student(texts, padding=True, return_tensors="pt")
    for name in expected:
        assert torch.equal(batch[name], expected[name])
    assert batch["teacher_input_ids"].tolist() == [[5, 5, 5], [1, 5, 5]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_padded_batches_give_the_same_logits(data_dir):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(str(data_dir / "bert-base-uncased-vocab"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    rows = [dict(tokenizer(text)) for text in ("short", "a somewhat longer sentence")]
    with torch.no_grad():
        together = model(**DistillationCollator(tokenizer)(rows)).logits
        alone = [model(**DistillationCollator(tokenizer)([row])).logits for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


def test_a_finished_batch_passes():
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2)}
    assert DistillationCollator()(batch) is batch


def test_other_columns_are_stacked():
    rows = [{"pixel_values": torch.full((3, 2, 2), float(i)), "soft": [0.1, 0.9], "label": 0.5} for i in range(2)]
    batch = DistillationCollator()(rows)
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["soft"].dtype == batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 0.5]


def test_label_names_choose_the_labels():
    """And what is left out need not be numbers."""
    rows = [{"x": 0.5, "coarse": i, "label": "a word"} for i in range(2)]
    batch = DistillationCollator(label_names=["coarse"])(rows)
    assert {name: column.tolist() for name, column in batch.items()} == {"x": [0.5, 0.5], "labels": [0, 1]}
    with pytest.raises(ValueError, match="the columns labels and label may both be the labels: drop or rename one"):
        DistillationCollator()([{"label": 0, "labels": 1}])


def test_numpy_rows():
    soft = np.array([[0.5, 0.5], [0.25, 0.75]], dtype=np.float32)
    batch = DistillationCollator()([{"label": np.int64(i + 1), "soft": soft[i]} for i in range(2)])
    assert batch["labels"].tolist() == [1, 2]
    assert batch["soft"].tolist() == [[0.5, 0.5], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("collator", "features", "message"),
    [
        (
            DistillationCollator(),
            FEATURES,
            "samples have input_ids: pass the tokenizer that made it as processing_class",
        ),
        (DistillationCollator(STUDENT), FEATURES, "samples have teacher_input_ids: .* as teacher_processing_class"),
        (DistillationCollator(), [{"a": [1]}, {"a": [1, 2]}], "column 'a' differs in length"),
        (DistillationCollator(), [{"a": torch.zeros(1)}, {"a": torch.zeros(2)}], "column 'a' differs in length"),
        (DistillationCollator(), [{"image": Image.new("L", (2, 2))}], "wrap the split in hfkd.data.ImageDataset"),
    ],
)
def test_refusals(collator, features, message):
    with pytest.raises(ValueError, match=message):
        collator(features)
