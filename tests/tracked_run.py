"""Train under TensorBoard and trackio, in the working folder and with no way out; ``test_trackers.py`` then looks."""

import json
import socket
from pathlib import Path

import trackio
from helpers import make_trainer, rows, tiny, tiny_teacher
from trackio.sqlite_storage import SQLiteStorage

from hfkd.distillers import AKD
from hfkd.metrics import compute_metrics


outside, connect = [], socket.socket.connect


def here_alone(self, address):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
        outside.append(address)
        raise OSError("no network here")
    return connect(self, address)


socket.socket.connect = here_alone
trainer = make_trainer(
    "run",
    tiny("bert"),
    tiny_teacher("bert"),
    AKD(),
    rows("bert"),
    trainer={"eval_dataset": rows("bert", 40, seed=9), "compute_metrics": compute_metrics("toy")},
    report_to=["tensorboard", "trackio"],
    eval_strategy="epoch",
    project="toy",
    run_name="one",
)
trainer.train()
trainer.evaluate(rows("bert", 24, seed=3), metric_key_prefix="test")
trainer.create_model_card()
trackio.finish()
Path("trackio.json").write_text(json.dumps(SQLiteStorage.get_logs("toy", "one")))
Path("log.json").write_text(json.dumps(trainer.state.log_history))
assert not outside, outside
