"""A training that dies in the middle, for the tests that continue it."""

import os
import signal
from pathlib import Path

import vestige
from vestige.training import Recorder


def dies(settings: dict, out: Path, at: int) -> None:
    """Train, and die by SIGKILL in the middle of the step after `at`."""
    plain = Recorder.on_pre_optimizer_step

    def deadly(self, args, state, control, **kwargs):
        if state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self)

    Recorder.on_pre_optimizer_step = deadly
    vestige.train(**settings, out=out)
