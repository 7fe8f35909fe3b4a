"""A loss that is NaN or infinite ends the run before it reaches the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FiniteLosses:
    """Looks at the loss of every batch, and names what is wrong with it.

    On the CPU at once. On an accelerator :meth:`check`, before the optimizer's step, waits for the end of the forward
    pass alone: the backward pass lies behind it in the queue, so that the device does not run dry.

    Args:
        device: Where the losses are.
    """

    def __init__(self, device: torch.device):
        self.is_at_hand = device.type == "cpu"
        self._waiting = []

    def watch(self, loss: Tensor, parts: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> None:
        """Take note of a loss.

        Args:
            loss: Of a micro-batch.
            parts: What it is made of, by name: (B, …) where it has rows for the samples.
            batch: Whose ``index``, if there is one, tells the samples.
            step: The number of the optimizer's step.

        Raises:
            FloatingPointError: If the loss is not finite; on an accelerator, if the one before was not.
        """
        is_finite = loss.detach().isfinite()
        if self.is_at_hand:
            if not is_finite:
                raise self._error(parts, batch, step)
            return
        self.check()  # of the micro-batch before, whose parts would else be kept as long as the accumulation takes
        known = {"index": batch["index"]} if "index" in batch else {}
        self._waiting.append((*self._to_host(is_finite), parts, known, step))

    def check(self) -> None:
        """Wait for the losses that were noted.

        Raises:
            FloatingPointError: If one is not finite.
        """
        waiting, self._waiting = self._waiting, []
        for is_finite, done, *rest in waiting:
            done.synchronize()
            if not is_finite:
                raise self._error(*rest)

    def forget(self) -> None:
        """Drop what a run that failed has left."""
        self._waiting = []

    @staticmethod
    def _to_host(flag: Tensor) -> tuple[Tensor, torch.Event]:
        """A copy that is there when the event has come."""
        return flag.to("cpu", non_blocking=True), torch.accelerator.current_stream().record_event()

    @staticmethod
    def _error(parts: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> FloatingPointError:
        lines = [f"the loss of step {step} is not finite, and the step was not taken:"]
        for name, part in parts.items():
            wrong = ~part.isfinite()
            if not wrong.any():
                continue
            what = " and ".join(["NaN"] * bool(part.isnan().any()) + ["infinite"] * bool(part.isinf().any()))
            if part.ndim == 0:
                lines.append(f"{name}: {what} for the whole batch")
                continue
            rows = wrong.flatten(1).any(1) if part.ndim > 1 else wrong
            has_index = len(batch.get("index", ())) == len(rows)  # features may have other rows than samples
            which = batch["index"][rows] if has_index else rows.nonzero().squeeze(1)
            some = ", ".join(map(str, which[:8].tolist())) + (", …" if len(which) > 8 else "")
            if has_index:
                lines.append(f"{name}: {what} for {len(which)} of {len(rows)} samples (index {some})")
            else:
                lines.append(f"{name}: {what} for {len(which)} of {len(rows)} rows (number {some})")
        if any(line.startswith("the teacher") for line in lines):
            remedy = 'look at these samples and at the teacher (in half precision: teacher_dtype="float32")'
        elif any(line.startswith("the student") for line in lines):
            remedy = "the student has diverged: resume from an earlier checkpoint with a lower learning rate"
        else:
            remedy = "look at these samples' labels and weights, or lower the weight of the term"
        return FloatingPointError("\n".join([*lines[:4], remedy]))
