"""The CPU time of a rank's steps: in total, of its gradients, and of its exchanges.

Where ranks share cores, the time of a step says little about the work of a rank, but its CPU time does. The CPU time
varies, too: whenever a rank is interrupted, others empty the caches, and a rank that waits for others polls. The lower
quartile over steps is about the CPU time of a rank with a core of its own.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

RECENT_STEPS = 1000


class StepCPU:
    """The CPU time of a rank's steps.

    Attributes:
        seconds: The CPU time of all threads.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._of_gradients: deque[float] = deque(maxlen=RECENT_STEPS)
        self._of_exchanges: deque[float] = deque(maxlen=RECENT_STEPS)
        self._before = 0.0, 0.0, 0.0, 0

    def begin(self, exchange_seconds: float, n_exchanges: int) -> None:
        """Note that a step begins. Local.

        Args:
            exchange_seconds: The CPU time of all exchanges so far.
            n_exchanges: Their number.
        """
        self._before = time.process_time(), time.thread_time(), exchange_seconds, n_exchanges

    def end(self, exchange_seconds: float, n_exchanges: int) -> None:
        """Note that a step has ended. Local. The arguments are as in ``begin``."""
        process, thread, exchange, n_before = self._before
        self.seconds += time.process_time() - process
        of_step, of_exchange, n = time.thread_time() - thread, exchange_seconds - exchange, n_exchanges - n_before
        self._of_gradients.append(of_step - of_exchange * (n > 0))
        if n > 0:
            self._of_exchanges.append(of_exchange / n)

    def undisturbed(self) -> tuple[float, float]:
        """Return the lower quartiles of the CPU seconds of recent gradients and exchanges; 0 if there were none."""
        gradient, exchange = (
            float(np.quantile(times, 0.25)) if times else 0.0 for times in (self._of_gradients, self._of_exchanges)
        )
        return gradient, exchange
