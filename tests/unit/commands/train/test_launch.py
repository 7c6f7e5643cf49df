import json
import os
import signal
import time
from pathlib import Path
from typing import Any, TextIO

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from abtrain import errors
from abtrain.commands.train import launch, launcher, worker
from abtrain.commands.train.config import TrainConfig, resolve


def failure(folder: Path, rank: int, code: int, message: str | None = None, when: int = 100) -> ProcessFailure:
    file = folder / f"{rank}.json"
    if message is not None:
        extra = {"py_callstack": f"Traceback\n{message}", "timestamp": str(when)}
        file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(file))


def test_the_error_is_that_of_the_first_worker(tmp_path: Path) -> None:
    error = launcher._first_error(
        [
            failure(tmp_path, 0, errors.PeerLostError.exit_code, "PeerLostError: a peer is gone", when=90),
            failure(tmp_path, 1, errors.NonFiniteError.exit_code, "NonFiniteError: the loss is nan: lower it"),
            failure(tmp_path, 2, -signal.SIGTERM),
        ]
    )
    assert type(error) is errors.NonFiniteError and str(error) == "the loss is nan: lower it"


def test_a_configuration_error_keeps_its_problems(tmp_path: Path) -> None:
    error = launcher._first_error([failure(tmp_path, 0, 2, "ConfigurationError: one\ntwo")])
    assert isinstance(error, errors.ConfigurationError) and error.problems == ("one", "two")


def test_a_worker_that_was_killed(tmp_path: Path) -> None:
    error = launcher._first_error(
        [failure(tmp_path, 1, -signal.SIGKILL), failure(tmp_path, 0, 6, "PeerLostError: x", int(time.time()))]
    )
    assert type(error) is errors.PeerLostError and "worker 1 was killed by SIGKILL" in str(error)


def test_a_worker_that_was_frozen(tmp_path: Path) -> None:
    frozen = failure(tmp_path, 1, -signal.SIGKILL)  # found dead now, long after the other one failed
    error = launcher._first_error([frozen, failure(tmp_path, 0, 6, "PeerLostError: rank 0 lost a peer", when=100)])
    assert type(error) is errors.PeerLostError
    assert str(error).startswith(
        "rank 0 lost a peer. The launcher killed worker 1, which was frozen: for 30 s it did not"
    )


def test_a_worker_that_aborted_while_it_ended(tmp_path: Path) -> None:
    aborted = failure(tmp_path, 1, -signal.SIGABRT)
    error = launcher._first_error([aborted, failure(tmp_path, 0, 2, "ConfigurationError: no", int(time.time()) + 9)])
    assert type(error) is errors.ConfigurationError
    alone = launcher._first_error([aborted])
    assert type(alone) is errors.PeerLostError and str(alone) == "worker 1 was killed by SIGABRT"


def test_a_worker_that_was_stopped_before_it_trained(tmp_path: Path) -> None:
    error = launcher._first_error([failure(tmp_path, 1, -signal.SIGTERM), failure(tmp_path, 0, -signal.SIGTERM)])
    assert type(error) is errors.StoppedError and "SIGTERM at worker" in str(error)


@pytest.mark.parametrize(
    ("code", "kind", "attempts"),
    [
        (6, errors.PeerLostError, 3),
        (1, errors.AbtrainError, 3),
        (2, errors.ConfigurationError, 1),
        (4, errors.CheckpointError, 1),
        (5, errors.RanksDisagreeError, 1),
        (7, errors.NonFiniteError, 1),
        (75, errors.StoppedError, 1),
    ],
)
def test_only_what_may_go_well_the_next_time_is_started_again(
    code: int, kind: type[errors.AbtrainError], attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def elastic_launch(config: object, program: str) -> Any:
        def fail(*arguments: str) -> None:
            begun.append(os.environ["ABTRAIN_ATTEMPT"])
            raise ChildFailedError("worker", {0: failure(tmp_path, 0, code, f"{kind.__name__}: told")})

        return fail

    monkeypatch.setattr(launcher, "elastic_launch", elastic_launch)
    with pytest.raises(kind):
        launcher._start_until_done(resolve(TrainConfig(workers=2, max_restarts=2)))
    assert begun == [str(attempt) for attempt in range(attempts)]


def test_an_error_that_nobody_foresaw(tmp_path: Path) -> None:
    error = launcher._first_error([failure(tmp_path, 3, 1, "KeyError: 'x'")])
    assert error.exit_code == 1 and "worker 3 failed" in str(error) and "Traceback\nKeyError: 'x'" in str(error)
    silent = launcher._first_error([failure(tmp_path, 2, 1)])
    assert silent.exit_code == 1 and "worker 2 ended with exit code 1" in str(silent)


def test_workers_are_given_the_loopback_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with launcher._worker_environment():
        assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with launcher._worker_environment():
        assert os.environ["OMP_NUM_THREADS"] == "3"


def test_torchruns_world_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    config, said = launch._take_world_size(TrainConfig(workers=3))
    assert config.workers == 2 and said == ["--workers 3 is ignored: torchrun started 2 workers"]
    assert launch._take_world_size(TrainConfig())[1] == []


def test_the_launchers_error_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    written = []

    def seen(content: object, begun: TextIO) -> None:
        written.append(file.exists())
        begun.write(json.dumps(content))

    monkeypatch.setattr("torch.distributed.elastic.multiprocessing.errors.error_handler.json.dump", seen)
    worker.report_to_launcher(errors.PeerLostError("rank 1 is gone"))
    assert written == [False]
    assert json.loads(file.read_text())["message"]["message"] == "PeerLostError: rank 1 is gone"
    assert list(tmp_path.iterdir()) == [file]
