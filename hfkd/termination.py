"""SIGTERM: the run is asked to end, as a cluster does before it takes the machine away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed


def outlive(start: Callable[[int], None] | None, number: int) -> None:
    """Start a loader's worker that ends on its parent's SIGTERM alone.

    The signal often goes to all processes of a job alike, and a worker that died of it would have the run end before
    the checkpoint is written. The parent's own is how Python ends workers when it exits, and then waits for them. A
    worker whose parent is gone ends by itself.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()
    if start is not None:
        start(number)


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Termination:
    """Notes SIGTERM while training goes on, so that a checkpoint can be written first.

    Only where nobody else handles the signal (such as transformers' ``enable_jit_checkpoint``), and in the main
    thread. transformers' own is not used, since what it saves between a batch's backward pass and its update does not
    resume to the same run, since its processes may stop at different steps, and since it returns from ``train()`` as
    if all were done, for the script to push a student that is not.
    """

    exit_status = 128 + signal.SIGTERM

    def __init__(self):
        self._asked = False
        self._group = None
        self._vote = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While open, the signal is noted."""
        self._asked, self._vote = False, None
        is_ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )
        if is_ours:
            signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            if is_ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _note(self, *signal_and_frame) -> None:
        self._asked = True

    def is_due(self) -> bool:
        """Whether to stop now: on all processes alike, which must all ask, and as often.

        They see the signal at different steps. So each asks the others without waiting, by way of the CPU, and has
        their answer when it comes here again.
        """
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return self._asked
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        earlier = self._counted()
        ballot = torch.tensor([float(self._asked)])
        work = torch.distributed.all_reduce(ballot, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._vote = ballot, work
        return earlier

    def came_too_late(self) -> bool:
        """Whether the signal came when there was no further step to stop at."""
        return self._counted() or self._asked

    def _counted(self) -> bool:
        if self._vote is None:
            return False
        ballot, work = self._vote
        work.wait()
        self._vote = None
        return bool(ballot.item())
