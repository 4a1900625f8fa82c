"""Shares of a command as jobs of a submitit executor; its local one stands for SLURM."""

import hashlib
import pickle
import threading
import time
from pathlib import Path

import pytest

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.errors import PieceFailed, UserError
from vestige.jobs import shares

submitit = pytest.importorskip("submitit")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and 48 examples."""
    folder = furnish(tmp_path_factory.mktemp("submitit"))
    rows = [
        {"prompt": prompt, "completion": f"{completion} {turn}"} for turn in range(4) for prompt, completion, _ in PAIRS
    ]
    write_rows(folder / "train.jsonl", rows)
    return folder


def command(place: Path, out: str) -> str:
    model, data = place / "tiny-model", place / "train.jsonl"
    return f"vestige index --model {model} --data {data} --out {place / out} --token-budget 60"


def shards(index: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((index / "shards").glob("*.safetensors"))
    }


@pytest.mark.slow
def test_shares_of_an_executor_make_the_index_of_one_process(place, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=5)
    jobs = [executor.submit(share) for share in shares(command(place, "shared"), 2)]
    said = [job.result() for job in jobs]
    assert len(said) == 2
    vestige.index(
        model=str(place / "tiny-model"), data=str(place / "train.jsonl"), out=place / "alone", token_budget=60
    )
    assert shards(place / "shared") == shards(place / "alone")
    assert len(shards(place / "shared")) > 4
    assert vestige.Index.open(place / "shared").rows == 48


@pytest.mark.slow
def test_a_share_that_is_asked_to_stop_ends_its_process_and_continues_when_submitted_again(place):
    share = shares(command(place, "stopped"), 1)[0]
    ended = []

    def run() -> None:
        try:
            ended.append(share())
        except PieceFailed as error:
            ended.append(error)

    worker = threading.Thread(target=run)
    worker.start()
    while not (place / "stopped" / "launch").exists() and worker.is_alive():
        time.sleep(0.01)
    again = share.checkpoint()
    worker.join()
    assert isinstance(ended[0], PieceFailed), "it was asked to stop before it was done"
    assert "complete" not in str(ended[0])
    pickle.loads(pickle.dumps(again.function))()
    assert vestige.Index.open(place / "stopped").rows == 48


@pytest.mark.slow
def test_a_share_that_fails_says_what_the_command_said(place):
    with pytest.raises(PieceFailed, match="no such file"):
        shares(f"index --model {place / 'tiny-model'} --data nowhere.jsonl --out {place / 'failed'}", 1)[0]()


@pytest.mark.parametrize("words", ["index --shard 1/2", "index --workers=3", "index --engine slurm"])
def test_where_shares_run_is_for_the_executor_to_say(words):
    with pytest.raises(UserError, match="executor decides"):
        shares(words, 2)
    with pytest.raises(UserError, match="above 0"):
        shares("index", 0)
