"""Two processes do what one does: results of real launches against the same scenario in this process."""

import pytest
import torch
import two_processes as scenarios
from helpers import Weighted, assert_identical, freeze_batch_norm, largest_difference, tiny, weights


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The result of a scenario in this process, which is all there is."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = scenarios.SCENARIOS[name](tmp_path_factory.mktemp(name))
        return done[name]

    return run


LEARNABLE = [("learnable_find_unused", True), ("learnable_all_used", False)]


@pytest.mark.parametrize(("name", "find_unused"), LEARNABLE)
def test_two_processes_of_four_equal_one_of_eight(two_processes, one_process, name, find_unused):
    ranks = two_processes[name]
    for result in ranks:
        assert (result["processes"], result["type"], result["is_ddp"]) == (2, "MULTI_CPU", True)
        assert result["find_unused"] is find_unused
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    assert largest_difference(ranks[0]["weights"], one_process(name)["weights"]) <= 1e-6


def test_the_equivalence_has_something_to_compare(one_process):
    trained = one_process("learnable_all_used")["weights"]
    start = weights(freeze_batch_norm(tiny("resnet")), Weighted())
    assert (trained["0.classifier.1.bias"] - start["0.classifier.1.bias"]).abs().max() > 1e-2
    assert (trained["1.log_factor"] - start["1.log_factor"]).abs().max() > 1e-3


@pytest.mark.parametrize("find_unused", ["True", "False"])
def test_frozen_and_unused_parameters_equal_one_process(two_processes, one_process, find_unused):
    ranks = [result[find_unused] for result in two_processes["idle"]]
    assert_identical(ranks[0], ranks[1])
    assert largest_difference(ranks[0], one_process("idle")[find_unused]) <= 1e-9


@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-9), ("bf16", 2e-3)])
def test_adapted_students_equal_one_process(two_processes, one_process, precision, tolerance):
    ranks = [result[precision] for result in two_processes["adapted"]]
    assert_identical(ranks[0], ranks[1])
    assert largest_difference(ranks[0], one_process("adapted")[precision]) <= tolerance


def test_student_alone_with_accumulation_equals_one_process(two_processes, one_process):
    ranks = two_processes["student_alone"]
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    assert largest_difference(ranks[0]["weights"], one_process("student_alone")["weights"]) <= 1e-6


def test_the_data_set_hears_of_each_epoch(two_processes):
    """Accelerate's loaders tell a sampler, and then leave the data set out: its augmentation would never change."""
    for result in two_processes["student_alone"]:
        assert sorted(set(result["epochs"])) == [0, 1]


def test_all_take_the_buffers_of_the_first_process(two_processes):
    for result in two_processes["aligned"]:
        assert result["buffers"]
        assert all((buffer == 3).all() for buffer in result["buffers"].values())


def test_influence_weights_are_alike_and_equal_one_process(two_processes, one_process):
    """Each process measures its share, of 7 held-out samples 4 and 3."""
    ranks, expected = two_processes["influence"], one_process("influence")
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], expected["weights"], rtol=1e-6, atol=1e-6)
    assert ranks[0]["tables"] == expected["tables"] == ["epoch-000.parquet", "epoch-001.parquet"]
    assert (expected["weights"]["1.weights"] - 1).abs().max() > 0.1


def test_memories_of_embeddings_are_alike_and_equal_one_process(two_processes, one_process):
    """The same negatives too, whatever process a sample is on."""
    ranks, expected = two_processes["contrastive"], one_process("contrastive")
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    assert largest_difference(ranks[0]["weights"], expected["weights"]) <= 1e-6
    assert ranks[0]["crd"] == pytest.approx(expected["crd"], rel=1e-5)


@pytest.mark.parametrize("mode", ["offline", "online", "teacher_free"])
def test_banks_of_neighbours_are_alike_and_equal_one_process(two_processes, one_process, mode):
    ranks, expected = ([result[mode] for result in two_processes["in_context"]], one_process("in_context")[mode])
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=0, atol=1e-6, msg=name)
    assert ranks[0]["picd"] == pytest.approx(expected["picd"], rel=1e-5)
    assert expected["picd"][-1] > 1e-3


def test_a_trained_teacher_equals_one_process(two_processes, one_process):
    ranks = two_processes["mutual"]
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    assert largest_difference(ranks[0]["weights"], one_process("mutual")["weights"]) <= 1e-6


def test_a_second_train_equals_one_process(two_processes, one_process):
    ranks = two_processes["second_train"]
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    assert largest_difference(ranks[0]["weights"], one_process("second_train")["weights"]) <= 1e-6


def test_resume_in_mid_epoch_is_exact_on_two_processes(two_processes):
    ranks = two_processes["resume"]
    if "upstream" in ranks[0]:
        pytest.skip(ranks[0]["upstream"])
    assert [result["difference"] for result in ranks] == [0.0, 0.0]
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])


def test_sigterm_to_one_process_stops_both_at_one_step(two_processes):
    """Behind the next step, and what was saved goes on as if nobody had asked."""
    ranks = two_processes["terminated"]
    if "upstream" in ranks[0]:
        pytest.skip(ranks[0]["upstream"])
    assert ranks[0] == ranks[1]
    assert (ranks[0]["status"], ranks[0]["step"], ranks[0]["difference"]) == (143, 2, 0.0)
    assert ranks[0]["checkpoint"].endswith("checkpoint-2")


def test_processes_fill_and_read_one_cache(two_processes, one_process):
    """Of 16 samples each process asks for those it meets first, and in the second run nobody asks."""
    ranks, expected = two_processes["cached"], one_process("cached")
    assert (expected["first"]["misses"], expected["first"]["hits"]) == (16, 16)
    for run in ("first", "second"):
        assert_identical(ranks[0][run]["weights"], ranks[1][run]["weights"])
        assert largest_difference(ranks[0][run]["weights"], expected[run]["weights"]) <= 1e-6
    assert sum(rank["first"]["misses"] for rank in ranks) == 16
    assert [(rank["second"]["hits"], rank["second"]["misses"]) for rank in ranks] == [(16, 0), (16, 0)]
    assert [rank["second"]["filled"] for rank in ranks] == [16, 16]
    for run, hits, misses in (("first", 16, 16), ("second", 32, 0)):  # of both together, and so said by both
        metrics = [rank[run]["metrics"] for rank in ranks]
        assert metrics[0] == metrics[1]
        assert (metrics[0]["teacher_cache_hits"], metrics[0]["teacher_cache_misses"]) == (hits, misses)
        assert metrics[0].keys() == expected[run]["metrics"].keys()
    assert [rank["warm"] for rank in ranks] == [(13, 7, 13), (13, 6, 13)]


def test_terms_are_averaged_over_processes(two_processes, one_process):
    expected = one_process("term_logs")
    for result in two_processes["term_logs"]:
        assert result.keys() == expected.keys()
        for name, values in expected.items():
            assert result[name] == pytest.approx(values, rel=1e-5)


def test_evaluation_counts_every_labelled_sample_once(two_processes, one_process):
    expected = one_process("evaluation")
    for result in two_processes["evaluation"]:
        assert result["teacher_accuracy"] == pytest.approx(expected["teacher_accuracy"])
        assert result["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        torch.testing.assert_close(result["predictions"], expected["predictions"])


def test_compiled_two_processes_equal_one_that_is_not(two_processes, one_process):
    """Compiled inside DDP, as a whole: one graph of the step and one of the teacher."""
    ranks = two_processes["compiled"]
    assert [(rank["graphs"], rank["breaks"], rank["is_ddp"]) for rank in ranks] == [(2, 0, True)] * 2
    assert one_process("compiled")["graphs"] == 0
    assert_identical(ranks[0]["weights"], ranks[1]["weights"])
    assert largest_difference(ranks[0]["weights"], one_process("compiled")["weights"]) <= 1e-9
