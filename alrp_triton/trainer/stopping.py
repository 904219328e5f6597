"""Ctrl-C and SIGTERM end a run after its step, on all processes after the same one."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer


class Stop(Callback):
    """Takes SIGINT and SIGTERM while a run trains; a second Ctrl-C ends it at once.

    Never within a step, which a resumed run takes again: what it has changed already would be changed twice. One
    process stops in an evaluation, too. Several have to agree, where all of them come by: after a step, and after an
    evaluation, which need not have the same number of batches on each. Lightning asks the others from within the
    handler of the signal, wherever each of them is, and waits there for good.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}
        self._heard: int | None = None  # the end of a pipe to which each signal is written at once

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._asked = False
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, _: FrameType | None) -> None:
            self._asked = True
            if trainer.world_size == 1:
                _tell(trainer)
            if number == signal.SIGINT:
                if trainer.world_size == 1:
                    signal.signal(number, signal.default_int_handler)
                if trainer.is_global_zero:  # not by a stream, in which the signal may have interrupted a call
                    os.write(2, b"\nstopping after this step; a second Ctrl-C stops at once\n")

        self._before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        if trainer.world_size > 1:
            told, self._heard = os.pipe()
            os.set_blocking(self._heard, False)
            signal.set_wakeup_fd(self._heard, warn_on_full_buffer=False)
            threading.Thread(target=_end_at_second, args=(told,), daemon=True).start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._agree(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.world_size > 1:
            if trainer.state.fn == "fit":
                _tell(trainer, False)  # it is run to its end
            elif threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to keep

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._agree(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._heard is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._heard)
            self._heard = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _agree(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._asked = True
            _tell(trainer)


def _end_at_second(told: int) -> None:
    """No handler of Python's, nor an exception, reaches a process that waits for another; a thread goes on."""
    interrupts = 0
    while numbers := os.read(told, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            os._exit(128 + signal.SIGINT)
    os.close(told)


def _tell(trainer: Trainer, stop: bool = True) -> None:
    """What Lightning looks at after each step, and after each batch that is evaluated."""
    connector: Any = trainer._signal_connector  # pyright: ignore[reportPrivateUsage]
    connector.received_sigterm = stop
