"""Logit standardisation: z-scores on both sides of the wrapped method, raw logits for the labels."""

import math

import pytest
import torch
import torch.nn.functional as F
from references import STUDENT, TARGET, TEACHER, batch

from hfkd.distillers import DKD, DML, KD, ModelOutputs, StandardizedLogits
from hfkd.functional import dkd_loss, kd_loss, standardize_logits


def test_standardize_logits_is_its_definition():
    logits, _, _ = batch()
    for z, scores in zip(logits.tolist(), standardize_logits(logits).tolist(), strict=True):
        mean = math.fsum(z) / 5
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in z) / 4)  # over C - 1, as in the authors' code
        assert scores == pytest.approx([(v - mean) / (deviation + 1e-7) for v in z], rel=1e-12)


def test_golden():
    """Mean 0.25, squares 0.5625 + 0.0625 + 0.5625 + 0.0625 = 1.25 over 3."""
    deviation = math.sqrt(1.25 / 3)
    expected = [z / deviation for z in (0.75, 0.25, -0.75, -0.25)]
    assert standardize_logits(STUDENT)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_shift_and_scale_change_nothing_and_equal_logits_stay_finite():
    logits, _, _ = batch()
    torch.testing.assert_close(standardize_logits(3.0 * logits - 7.0), standardize_logits(logits), rtol=1e-6, atol=0)
    even = torch.full((1, 4), 2.0, requires_grad=True)
    assert standardize_logits(even).tolist() == [[0.0] * 4]


def test_gradcheck():
    logits, _, _ = batch(3, 4)
    assert torch.autograd.gradcheck(standardize_logits, logits.requires_grad_())


@pytest.mark.parametrize("base", [KD(alpha=0.5, temperature=2.0), DKD(warm_up=0.0, temperature=2.0)])
def test_the_wrapped_term_sees_z_scores_and_the_labels_raw_logits(base):
    student, teacher, labels = batch()
    terms = StandardizedLogits(base)(ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels})
    z, t = standardize_logits(student), standardize_logits(teacher)
    if isinstance(base, KD):
        expected, share = 0.5 * kd_loss(z, t, temperature=2.0, reduction="none"), 0.5
    else:
        expected, share = dkd_loss(z, t, labels, temperature=2.0, reduction="none"), 1.0
    torch.testing.assert_close(terms["task"], share * F.cross_entropy(student, labels, reduction="none"))
    torch.testing.assert_close(terms[list(terms)[1]], expected)
    # However large the student's logits grow, the term does not change: only their relations count.
    larger = StandardizedLogits(base)(ModelOutputs(5 * student, student), ModelOutputs(teacher), {"labels": labels})
    torch.testing.assert_close(larger[list(terms)[1]], expected, rtol=1e-6, atol=0)


def test_the_default_is_the_papers_kd():
    """The whole cross-entropy and 9 times KD at temperature 2."""
    terms = StandardizedLogits()(ModelOutputs(STUDENT, STUDENT), ModelOutputs(TEACHER), {"labels": TARGET})
    assert terms["task"].item() == pytest.approx(0.7873386717, abs=1e-9)
    z, t = standardize_logits(STUDENT), standardize_logits(TEACHER)
    assert terms["kd/kd"].item() == pytest.approx(9 * kd_loss(z, t, temperature=2.0).item())
    assert len(terms) == 2


def test_a_trained_teacher_matches_z_scores_too_and_learns_from_raw_logits():
    student, teacher, labels = batch()
    terms = StandardizedLogits(DML()).teacher_terms(
        ModelOutputs(teacher, teacher), ModelOutputs(student, student), {"labels": labels}
    )
    torch.testing.assert_close(terms["peer_task"], F.cross_entropy(teacher, labels, reduction="none"))
    expected = kd_loss(standardize_logits(teacher), standardize_logits(student), temperature=1.0, reduction="none")
    torch.testing.assert_close(terms["peer_dml"], expected)
