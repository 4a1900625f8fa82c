"""Two hosts: the ranks of torchrun on both share an index."""

import os
import subprocess
import sys

import pytest

from tests.indexes.synthetic import hashes
from tests.jobs import hosts
from tests.workshop import furnish, write_rows
from vestige.jobs import JobFolder


@pytest.mark.slow
def test_two_hosts_under_torchrun_make_the_bytes_of_one_process(tmp_path):
    furnish(tmp_path)
    rows = [{"id": f"e{n}", "prompt": f"What is {n}?", "completion": f"{n} is {n % 7}."} for n in range(1500)]
    write_rows(tmp_path / "train.jsonl", rows)
    program = ["-m", "vestige.cli", "index", "--model", str(tmp_path / "tiny-model"), "--compress", "tensorsketch:16"]
    program += ["--data", str(tmp_path / "train.jsonl"), "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *program, str(tmp_path / "one")], env=environment, check=True)
    expected, worked = hashes(tmp_path / "one"), set()
    with hosts.two_hosts(tmp_path) as both:
        # A host that starts late may find nothing left: the bytes are compared every time, until both had a part.
        for attempt in range(3):
            out = tmp_path / f"two-{attempt}"
            ranks = hosts.torchrun(both, [*program, str(out)])
            assert [rank.wait(180) for rank in ranks] == [0, 0]
            assert hashes(out) == expected
            worked = {entry.host.rsplit("-", 1)[0] for entry in JobFolder.of(out, "Indexing").entries()}
            if len(worked) == 2:
                break
        assert worked == {host.name for host in both}
