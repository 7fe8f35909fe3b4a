"""Train with a token wherever one can lie; ``test_security.py`` then looks for it. The working folder is in the home.

First paths are absolute, in the home; then they are relative, and everything is logged at INFO.
"""

import logging
import os
import warnings
from pathlib import Path

import torch
from helpers import Rows, make_trainer, rows, tiny, tiny_teacher, tokenizer
from huggingface_hub import get_token
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from hfkd.distillers import KD, KDAIF
from hfkd.models import load_model


TOKEN = os.environ["HF_TOKEN"]
assert get_token() == TOKEN
assert Path("~/.cache/huggingface/token").expanduser().read_text() == TOKEN

columns = rows("bert", 16).columns
held_out = Rows({name: column[:4] for name, column in columns.items()})


def run(place: Path, name: str, **arguments) -> None:
    torch.manual_seed(0)
    student = BertForSequenceClassification.from_pretrained(place / "start")
    if name == "adapter":
        student = get_peft_model(student, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    trainer = make_trainer(
        place / name,
        student,
        str(place / "teacher"),
        KDAIF(KD(), warm_up=0),
        rows("bert", 16),
        trainer={"eval_dataset": held_out, "held_out_dataset": held_out, "processing_class": tokenizer()},
        hub_token=TOKEN,
        hub_model_id="someone/something",
        teacher_cache=True,
        max_steps=2,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        **arguments,
    )
    results = trainer.train().metrics
    assert trainer.cache.misses + trainer.cache.hits
    assert trainer.state.best_model_checkpoint is not None
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("all", results)
    trainer.save_metrics("all", results)
    trainer.create_model_card(dataset="digits", tasks="text-classification")


for place in (Path.cwd() / "quiet", Path("verbose")):
    if not place.is_absolute():
        logging.basicConfig(level=logging.INFO)
        warnings.simplefilter("always")
    tiny_teacher("bert").save_pretrained(place / "teacher")
    tiny("bert", seed=1).save_pretrained(place / "start")
    for name in ("whole", "adapter"):
        run(place, name, log_level="passive" if place.is_absolute() else "info")
try:
    load_model(f"https://someone:{TOKEN}@huggingface.co/someone/something", num_labels=2)
except ValueError as error:
    print(f"refused: {error}")
