"""An engine of another package: every worker runs to its end before the next one starts."""

import os
import subprocess

from vestige.jobs import Engine, Role, Work


class OneByOne(Engine):
    """Worker processes of this machine, one at a time."""

    def submit(self, work: Work) -> list[Role]:
        """Return the parts of the workers: each computes every n-th piece."""
        job, count = str(work.job.path.resolve()), work.settings.workers
        return [Role("worker", job, number, count, parent=os.getpid()) for number in range(count)]

    def wait(self, work: Work, submitted: list[Role]) -> None:
        """Run one worker after another."""
        for role in submitted:
            subprocess.run(work.command, env=os.environ | role.as_environment(), check=False)


ENGINE = OneByOne()
