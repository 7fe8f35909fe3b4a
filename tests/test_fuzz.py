"""Mutated files: what is read from a disk gives what it held or an error of ours, and takes little memory.

    HFKD_FUZZ=10000 python -m pytest tests/test_fuzz.py

spreads so many examples over the tests; by default there are a few hundred, always the same.
"""

import json
import os
import struct
import tracemalloc
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import NUM_LABELS, Rows, Weighted, assert_identical, make_trainer, rows, tiny, tiny_teacher
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import hfkd.report.galleries
from hfkd.cache import TeacherCache
from hfkd.checks import check_resume, teacher_column
from hfkd.cli import parse_arguments
from hfkd.data.images import load_image_data
from hfkd.distillers import KD, KDAIF, Combined, InContextKD, ModelOutputs
from hfkd.models import load_model
from hfkd.models.loading import BATCH_COUNT
from hfkd.report import influence_gallery
from hfkd.saving import BATCH_NAME, DISTILLER_NAME


EXAMPLES = int(os.environ.get("HFKD_FUZZ", 300))
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def fuzz(share):
    """So many of a hundred examples."""
    number = max(1, round(EXAMPLES * share / 100))
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=EXAMPLES < 1000,
        suppress_health_check=CHECKS,
        phases=[Phase.generate],  # to make an example smaller would take a minute
    )


@contextmanager
def ours(path, size):
    """No other error than ours, which names the file, and no memory beyond a few times what the file takes."""
    tracemalloc.start()
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        names_it = os.path.basename(path) in message or os.path.dirname(path) in message
        if not names_it or "allocate" in message:
            raise AssertionError(f"no error of ours: {message}") from error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 30 * size + 2**20, (peak, size)


WORDS = [0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]


@st.composite
def mutated(draw, content):
    """A file with bits flipped, words overwritten, pieces cut out, doubled, or put behind it."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "word", "truncate", "extend", "cut", "double", "digits"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "word":
            content[place : place + 8] = struct.pack("<Q", draw(st.sampled_from(WORDS)))
        elif kind == "truncate":
            del content[place:]
        elif kind == "extend":
            content += draw(st.binary(max_size=64)) * draw(st.sampled_from([1, 100]))
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 64))]
        elif kind == "double":
            content[place:place] = content[place : place + draw(st.integers(1, 64))]
        else:
            content[place : place + 1] = str(draw(st.sampled_from(WORDS))).encode()
    return bytes(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def lying(draw, content):
    """A safetensors file whose header says something else of one of its tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw(st.sampled_from(sorted(header)))
    number = st.sampled_from(WORDS) | st.integers(-2, 70)
    entry = dict(header[name])
    field = draw(st.sampled_from(["shape", "dtype", "data_offsets", "name", "any", "data"]))
    if field == "shape":
        entry["shape"] = draw(st.lists(number, max_size=4))
    elif field == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3"]))
    elif field == "data_offsets":
        entry["data_offsets"] = draw(st.lists(number, min_size=1, max_size=3))
    elif field == "any":
        entry = draw(JSON)
    elif field == "data":
        data = draw(mutated(data)).ljust(len(data), b"\xff")[: len(data)]
    header.pop(name)
    header[draw(st.text(max_size=8)) if field == "name" else name] = entry
    text = json.dumps(header).encode()
    claimed = draw(st.sampled_from([len(text)] * 6 + WORDS))
    return struct.pack("<Q", claimed) + text + data


# The teacher's cache

INDEX = np.arange(20)


class Fake:
    """Says of sample i what only i can have."""

    precision = "float32"

    def __call__(self, batch):
        return ModelOutputs(torch.sin(batch["index"][:, None] * 7.0 + torch.arange(6)))


def open_cache(folder, **identity):
    return TeacherCache(
        Fake(), INDEX, {"precision": "float32", "dtype": "float16", **identity}, classes=6, folder=folder
    )


def ask(cache):
    index = torch.from_numpy(INDEX)
    return cache({"index": index, "view": torch.zeros_like(index)}).logits


def use(cache):
    cache.note_asked(3, 1.0)
    cache.note_score({"accuracy": 0.5})
    cache.figures(1, 1, 1.0, 1.0)


def filled(folder, **identity):
    cache = open_cache(folder, **identity)
    answers = ask(cache)
    use(cache)
    return cache, answers


@fuzz(12)
@given(data=st.data())
def test_fuzz_a_manifest_with_other_values(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    filled(folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    name = data.draw(st.sampled_from([*manifest, "asked", "asked", "teacher_score"]))
    value = data.draw(JSON | st.fixed_dictionaries({"answers": JSON, "seconds": JSON}))
    text = json.dumps({**manifest, name: value})
    if data.draw(st.booleans()):
        text = f'{{"{name}": {json.dumps(data.draw(JSON))}, {text[1:]}'
    path.write_text(text)
    with ours(path, len(text)):
        use(open_cache(folder))


@fuzz(10)
@given(data=st.data())
def test_fuzz_a_manifest_of_other_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    filled(folder)
    path = folder / "manifest.json"
    nested = st.integers(1, 10**5).map(lambda depth: b"[" * depth)
    content = data.draw(mutated(path.read_bytes()) | JSON.map(lambda value: json.dumps(value).encode()) | nested)
    path.write_bytes(content)
    with ours(path, len(content)):
        use(open_cache(folder))


@fuzz(20)
@given(data=st.data())
def test_fuzz_damaged_rows_are_asked_again(tmp_path_factory, data):
    """So what the cache says is what the teacher said, to the bit."""
    folder = tmp_path_factory.mktemp("cache")
    identity = data.draw(st.sampled_from([{}, {"top_k": 2}]))
    _, answers = filled(folder, **identity)
    path = folder / data.draw(st.sampled_from(["logits", "logits.checksums"]))
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    if data.draw(st.integers(0, 9)) == 0:
        os.truncate(path, 2**40)  # sparse
    with ours(path, 2**12):
        torch.testing.assert_close(ask(open_cache(folder, **identity)), answers, rtol=0, atol=0)


@fuzz(6)
@given(content=st.binary(min_size=240, max_size=240))
def test_fuzz_rows_with_a_checksum_that_fits(tmp_path_factory, content):
    """Whoever can compute one can say anything, but for what is no answer at all."""
    folder = tmp_path_factory.mktemp("cache")
    cache, _ = filled(folder, top_k=2)
    array = cache.logits
    packed = np.frombuffer(content[: array.values.nbytes], array.values.dtype).reshape(array.values.shape)
    array.write(INDEX, packed)
    with ours(folder / "logits", 2**12):
        assert ask(open_cache(folder, top_k=2)).shape == (20, 6)


# What a checkpoint holds


def trained(folder, distiller, **others):
    dataset = rows("bert", 16)
    held_out = Rows({name: column[:4] for name, column in dataset.columns.items()})
    trainer = make_trainer(
        folder,
        tiny("bert"),
        tiny_teacher("bert"),
        distiller,
        dataset,
        max_steps=2,
        save_steps=2,
        save_strategy="steps",
        trainer={"held_out_dataset": held_out},
    )
    trainer.train()
    trainer._saves_teacher = False
    return trainer, folder / "checkpoint-2"


@pytest.fixture(scope="module")
def with_bank(tmp_path_factory):
    distiller = Combined(
        {"weighted": Weighted(), "context": InContextKD(neighbours=2, negatives=3)}, task_from="context"
    )
    return trained(tmp_path_factory.mktemp("bank"), distiller)


@pytest.fixture(scope="module")
def with_influence(tmp_path_factory):
    distiller = KDAIF(KD(), warm_up=0, teacher_update="meta")
    return trained(tmp_path_factory.mktemp("influence"), distiller)


def load(trained, content, after):
    trainer, checkpoint = trained
    path = checkpoint / DISTILLER_NAME
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        with ours(path, len(content)):
            trainer._load_distiller(str(checkpoint))
            after(trainer)
    finally:
        path.write_bytes(original)
        trainer._load_distiller(str(checkpoint))


def learn(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    try:
        trainer.compute_loss(trainer._module, trainer._prepare_inputs(batch))
    except FloatingPointError as error:  # of numbers that no file shows to be wrong
        if not str(error).startswith("the loss of step 3 is not finite, and the step was not taken:"):
            raise


@fuzz(12)
@given(data=st.data())
def test_fuzz_a_distiller_with_a_bank(with_bank, data):
    content = (with_bank[1] / DISTILLER_NAME).read_bytes()
    load(with_bank, data.draw(lying(content) | lying(content) | mutated(content)), learn)


@fuzz(8)
@given(data=st.data())
def test_fuzz_influence_weights_and_kept_batches(with_influence, data):
    content = (with_influence[1] / DISTILLER_NAME).read_bytes()
    load(with_influence, data.draw(lying(content) | mutated(content)), lambda trainer: None)


@fuzz(5)
@given(data=st.data())
def test_fuzz_what_a_checkpoint_says_of_its_processes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("checkpoint") / BATCH_NAME
    batch = {"processes": 1, "samples_per_step": 8}
    content = data.draw(
        mutated(json.dumps(batch).encode())
        | JSON.map(lambda value: json.dumps(value).encode())
        | st.fixed_dictionaries({"processes": JSON, "samples_per_step": JSON}).map(lambda v: json.dumps(v).encode())
    )
    path.write_bytes(content)
    with ours(path, len(content)):
        check_resume(str(path.parent), BATCH_NAME, batch, is_sharded=False)


# Weights, tables, columns, settings


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A whole one: what is fuzzed gets past the names and shapes, to the numbers."""
    path = tmp_path_factory.mktemp("whole") / "net.safetensors"
    state = tiny("cifar").state_dict()
    safetensors.torch.save_file(state, path)
    assert_identical(load_model(path).state_dict(), state)
    return path.read_bytes()


def small_akamaster():
    """Of a ResNet in akamaster's naming, the names and shapes that its reader looks at; too few to be one."""
    return {
        "conv1.weight": torch.zeros(16, 3, 3, 3),
        "bn1.weight": torch.zeros(16),
        **{f"layer{i}.0.conv{j}.weight": torch.zeros(4, 4, 3, 3) for i in (1, 2, 3) for j in (1, 2)},
        "linear.weight": torch.zeros(NUM_LABELS, 64),
        "linear.bias": torch.zeros(NUM_LABELS),
    }


@fuzz(8)
@given(data=st.data())
def test_fuzz_a_file_of_weights(tmp_path_factory, weights_file, data):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    content = data.draw(lying(weights_file) | lying(weights_file) | mutated(weights_file))
    path.write_bytes(content)
    state = {}
    with ours(path, max(len(content), 2**17)):
        state = load_model(path).state_dict()
    if state:
        held = safetensors.torch.load(content)
        for name in state.keys() - {name for name in state if name.endswith(BATCH_COUNT)}:
            assert torch.equal(state[name].nan_to_num(), held[name].to(state[name].dtype).nan_to_num())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    columns = {
        "index": list(range(16)),
        "label": [0, 1] * 8,
        "influence": np.linspace(-1, 1, 16).tolist(),
        "weight": [1.0] * 16,
    }
    path = tmp_path_factory.mktemp("influence") / "table.parquet"
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def split():
    return load_image_data("digits", max_train_samples=16).train.remove_columns("index").add_column("index", range(16))


@fuzz(7)
@given(data=st.data())
def test_fuzz_an_influence_table(tmp_path_factory, table, split, data):
    folder = tmp_path_factory.mktemp("table")
    path = folder / "table.parquet"
    content = data.draw(mutated(table))
    path.write_bytes(content)
    with ours(path, len(content) + 2**18), pytest.MonkeyPatch.context() as patch:
        patch.setattr(hfkd.report.galleries, "draw_rows", lambda *_: None)  # which takes a second
        influence_gallery(split, path, folder / "picture.png", count=2)


CELLS = (
    st.none() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=4) | st.lists(st.floats(), max_size=3)
)


@fuzz(5)
@given(answers=st.lists(st.lists(CELLS, max_size=6) | CELLS, min_size=4, max_size=4), name=st.booleans())
def test_fuzz_a_column_of_answers(answers, name):
    column = "teacher_probabilities" if name else "teacher_logits"

    class Given(Rows):
        def __getitem__(self, i):
            return {column: answers[i]}

    with ours(column, 2**12):
        teacher_column(Given({column: torch.zeros(4)}), tiny_config())


def tiny_config():
    return type("Config", (), {"num_labels": NUM_LABELS})()


SETTINGS = b"student: resnet20\nteacher: a/b\nseed: 1\nlr: 0.1\nnames: [a, b]\nextra: {a: 1}\nwhen: no\n"
PIECES = [
    "&a",
    "*a",
    "!!int",
    "!!float",
    "!!timestamp",
    "!!python/object/apply:os.mkdir",
    "? ",
    "<<: ",
    "[",
    "{",
    "- ",
]
PIECES += ["2001-99-99", "1:2:3", ".nan", "!!bool", "!!binary", "!!set", "\t", "'", '"', "|", "%"]


@st.composite
def settings_of(draw):
    content = SETTINGS
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.sampled_from(PIECES)).encode() + content[place:]
    return content


@fuzz(7)
@given(content=settings_of() | mutated(SETTINGS) | st.integers(1, 3000).map(lambda depth: b"[" * depth))
def test_fuzz_settings(tmp_path_factory, content):
    """argparse ends the process where a flag is unknown; here any is, so that this is what a good file comes to."""
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_bytes(content)
    with ours(path, len(content) + 2**14):
        try:
            parse_arguments([], [str(path)])
        except SystemExit:
            pass
        except ValueError as error:
            if "no flag takes" not in str(error):
                raise


def test_aliases_of_aliases_are_refused(tmp_path):
    """A kilobyte that would come to a gigabyte."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"bomb.yaml is neither YAML nor JSON: .*aliases are not read"):
        parse_arguments([], [str(tmp_path / "bomb.yaml")])


def test_a_tensor_of_no_bytes_makes_no_classes(tmp_path):
    """A shape of (10^12, 0) takes none, and a classifier of so many classes all memory."""
    tensors = small_akamaster()
    tensors["linear.weight"] = torch.zeros(10**12, 0)
    safetensors.torch.save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="net.safetensors has weights of shapes that no CIFAR ResNet has"):
        load_model(tmp_path / "net.safetensors")
