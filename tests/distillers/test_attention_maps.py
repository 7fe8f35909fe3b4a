"""Attention: the scores are those that the model uses, and the losses are their definitions."""

import math

import pytest
import torch
from helpers import logged, make_trainer, rows, tiny, tiny_teacher
from setups import features, network, outputs, set_up
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hfkd.distillers import AttentionMaps, Combined, HiddenStates
from hfkd.distillers.attention_maps import _scores
from hfkd.features import run_model
from hfkd.functional import attention_relation_loss, attention_score_loss


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": 60, "num_labels": 5, "initializer_range": 0.2}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 5, "initializer_range": 0.2}
OTHERS = {
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(embedding_size=8, **TEXT)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**IMAGE)),
}


def tokens(i):
    return [t for t in range(4) if MASK[i, t]]


def test_the_score_loss_is_its_definition():
    student, teacher = features(3, 2, 4, 4), features(3, 2, 4, 4, seed=1)
    for masked in (False, True):
        per_sample = attention_score_loss(student, teacher, mask=MASK if masked else None, reduction="none")
        for i, value in enumerate(per_sample.tolist()):
            own = tokens(i) if masked else range(4)
            squares = [
                (student[i, h, a, b] - teacher[i, h, a, b]).item() ** 2 for h in range(2) for a in own for b in own
            ]
            assert value == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_the_relation_loss_is_its_definition():
    student, teacher = features(3, 2, 4, 4), features(3, 2, 4, 4, seed=1)

    def softmax(scores):
        exponents = [math.exp(s) for s in scores]
        return [e / sum(exponents) for e in exponents]

    for masked in (False, True):
        per_sample = attention_relation_loss(student, teacher, mask=MASK if masked else None, reduction="none")
        for i, value in enumerate(per_sample.tolist()):
            own = tokens(i) if masked else list(range(4))
            total = 0.0
            for h in range(2):
                for a in own:
                    p, q = (softmax(s[i, h, a, own].tolist()) for s in (teacher, student))
                    total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            assert value == pytest.approx(total / (2 * len(own)), rel=1e-10, abs=1e-15)
        assert attention_relation_loss(student, teacher + 3.0, mask=MASK).item() == pytest.approx(
            attention_relation_loss(student, teacher, mask=MASK).item()
        )


def test_golden_values():
    student, teacher = torch.zeros(1, 1, 2, 2), torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]).view(1, 1, 2, 2)
    assert attention_score_loss(student, teacher).item() == pytest.approx(math.log(3) ** 2 / 4)
    expected = (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert attention_relation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [attention_score_loss, attention_relation_loss])
def test_padding_does_not_count(loss):
    student, teacher = features(3, 2, 4, 4).requires_grad_(), features(3, 2, 4, 4, seed=1)
    per_sample = loss(student, teacher, mask=MASK, reduction="none")
    torch.testing.assert_close(
        per_sample[1:2], loss(student[1:2, :, :2, :2], teacher[1:2, :, :2, :2], reduction="none")
    )
    per_sample.sum().backward()
    assert student.grad.isfinite().all()
    outside = (MASK[:, :, None] * MASK[:, None] == 0)[:, None].expand_as(student)
    assert (student.grad[outside] == 0).all()


@pytest.mark.parametrize("loss", [attention_score_loss, attention_relation_loss])
def test_what_cannot_be_compared_is_refused(loss):
    with pytest.raises(ValueError, match="student and teacher must have as many heads and the same tokens"):
        loss(features(1, 2, 3, 3), features(1, 4, 3, 3))
    with pytest.raises(ValueError, match="reduction must be"):
        loss(features(1, 2, 3, 3), features(1, 2, 3, 3), reduction="sum")


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", *OTHERS])
def test_scores_are_those_that_the_model_uses(family):
    """Softmax over what is no padding gives the attention that the model reports."""
    torch.manual_seed(0)
    model = (OTHERS[family]() if family in OTHERS else tiny(family)).eval()
    dataset = rows(
        "bert" if family in ("roberta", "electra") else family if family in ("bert", "distilbert") else "vit"
    )
    distiller = AttentionMaps()
    where = set_up(distiller, model, model, dataset)
    student, _, batch = outputs(where, distiller)
    model.set_attn_implementation("eager")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}
    if family in ("bert", "electra"):
        inputs["token_type_ids"] = batch["token_type_ids"]
    if family == "roberta":
        student = run_model(model, inputs, layers=distiller.student_layers)
    with torch.no_grad():
        reported = model(**inputs, output_attentions=True).attentions
    queries, keys = distiller.student_layers[::3], distiller.student_layers[1::3]
    assert len(reported) == len(queries) == 2
    for attention, query, key in zip(reported, queries, keys, strict=True):
        scores = _scores(student.features[query], student.features[key], 2)
        if "attention_mask" in batch:
            scores = scores.masked_fill(batch["attention_mask"][:, None, None] == 0, -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), attention)


def test_tinybert_sums_the_layers_of_a_uniform_map():
    distiller = AttentionMaps(weight=2.0)
    teacher = tiny_teacher("bert", hidden_size=24, num_hidden_layers=4).eval()
    where = set_up(distiller, "distilbert", teacher)
    assert [path.rpartition(".")[2] for path in distiller.student_layers] == ["q_lin", "k_lin", "v_lin"] * 2
    base = "bert.encoder.layer.{}.attention.self.{}"
    assert distiller.teacher_layers == tuple(base.format(i, n) for i in (1, 3) for n in ("query", "key", "value"))
    student, teacher, batch = outputs(where, distiller)
    expected = 0
    for i in (0, 3):
        scores = [
            _scores(side.features[layers[i]], side.features[layers[i + 1]], 2)
            for side, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers))
        ]
        expected = expected + attention_score_loss(*scores, mask=batch["attention_mask"], reduction="none")
    terms = distiller(student, teacher, batch)
    assert list(terms) == ["task", "attention"]
    torch.testing.assert_close(terms["attention"], 2 * expected)


def test_minilm_compares_attention_and_values_in_the_last_layer():
    distiller = AttentionMaps("kl")
    where = set_up(distiller, "bert", tiny_teacher("bert", hidden_size=24, num_hidden_layers=3).eval())
    assert len(distiller.student_layers) == len(distiller.teacher_layers) == 3
    assert distiller.teacher_layers[0] == "bert.encoder.layer.2.attention.self.query"
    student, teacher, batch = outputs(where, distiller)
    (q, k, v), (r, s, w) = (
        [side.features[path].unflatten(-1, (2, -1)).transpose(1, 2) for path in layers]
        for side, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers))
    )
    options = {"mask": batch["attention_mask"], "reduction": "none"}
    scores = [torch.einsum("bhld,bhmd->bhlm", a, b) / a.shape[-1] ** 0.5 for a, b in ((q, k), (r, s), (v, v), (w, w))]
    terms = distiller(student, teacher, batch)
    assert list(terms) == ["task", "attention", "value_relation"]
    torch.testing.assert_close(terms["attention"], attention_relation_loss(*scores[:2], **options))
    torch.testing.assert_close(terms["value_relation"], attention_relation_loss(*scores[2:], **options))


def test_images_have_attention_without_padding():
    distiller = AttentionMaps("kl")
    where = set_up(distiller, "vit", "vit")
    assert distiller(*outputs(where, distiller))["value_relation"].shape == (4,)


def test_layers_are_named_by_their_path():
    distiller = AttentionMaps(student_layers="bert.encoder.layer.0", teacher_layers=["bert.encoder.layer.1"])
    set_up(distiller, "bert", "bert")
    assert distiller.student_layers[0] == "bert.encoder.layer.0.attention.self.query"
    assert distiller.teacher_layers[0] == "bert.encoder.layer.1.attention.self.query"


def test_other_numbers_of_heads_are_refused():
    with pytest.raises(
        ValueError, match="the student has 2 and the teacher 4: give the student num_attention_heads=4"
    ):
        set_up(AttentionMaps(), "bert", tiny_teacher("bert", num_attention_heads=4))


def test_positions_behind_the_projections_are_refused():
    beit = BeitForImageClassification(BeitConfig(**IMAGE, use_relative_position_bias=True))
    with pytest.raises(
        ValueError, match="scores of BeitForImageClassification are more than products of queries and keys"
    ):
        set_up(AttentionMaps(), beit, "vit", rows("vit"))


def test_what_shows_no_projections_is_refused():
    with pytest.raises(
        ValueError, match="'bert.pooler' of BertForSequenceClassification has 0 projections to queries"
    ):
        set_up(AttentionMaps(student_layers="bert.pooler", teacher_layers="bert.pooler"), "bert", "bert")
    with pytest.raises(
        ValueError, match="CifarForImageClassification tells no number of attention heads: .*take Hidden"
    ):
        set_up(AttentionMaps(), network("resnet8"), network("resnet8"))


def test_tinyberts_recipe_trains(tmp_path):
    distiller = Combined({"hidden": HiddenStates(), "maps": AttentionMaps()}, task_from="hidden")
    trainer = make_trainer(
        tmp_path, tiny("distilbert"), tiny_teacher("bert"), distiller, rows("bert"), max_steps=12, learning_rate=0.005
    )
    trainer.train()
    for term in ("hidden", "maps/attention"):
        assert logged(trainer, term)[-1] < logged(trainer, term)[0]
