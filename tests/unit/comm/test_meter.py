import json
import threading
import time

import pytest

from abtrain.comm.meter import Meter


def test_payload_is_kept_by_phase_and_by_scope() -> None:
    meter = Meter()
    meter.phase = "warm-up"
    meter.count(100, "between_groups")
    meter.count(20, "within_groups")
    meter.phase = "ab"
    meter.count(3, "between_groups")
    assert meter.payload() == {
        "total": 123,
        "between_groups": 103,
        "within_groups": 20,
        "by_phase": {"warm-up": 120, "ab": 3},
        "of_group": {"warm-up": 100, "ab": 3},
    }


def test_a_new_meter_has_counted_nothing() -> None:
    meter = Meter()
    meter.count(0, "between_groups")
    assert meter.payload() == {"total": 0, "between_groups": 0, "within_groups": 0, "by_phase": {}, "of_group": {}}
    assert meter.sync_seconds == 0.0


def test_what_a_group_sends_counts_all_workers_that_send_to_counterparts() -> None:
    meter = Meter()
    meter.count(100, "between_groups")
    meter.count(10, "between_groups", senders=4)
    meter.count(1000, "within_groups", senders=4)
    assert meter.payload()["of_group"] == {"setup": 140}


def test_nested_waits_are_added_once() -> None:
    meter = Meter()
    began = time.perf_counter()
    with meter.waiting():
        time.sleep(0.05)
        with meter.waiting():
            time.sleep(0.05)
    assert 0.1 <= meter.sync_seconds <= time.perf_counter() - began


def test_a_wait_that_fails_is_added_too() -> None:
    meter = Meter()
    with pytest.raises(RuntimeError), meter.waiting():
        time.sleep(0.02)
        raise RuntimeError
    assert meter.sync_seconds >= 0.02
    before = meter.sync_seconds
    with meter.waiting():
        time.sleep(0.02)
    assert meter.sync_seconds >= before + 0.02


def test_counting_from_many_threads_loses_nothing() -> None:
    meter = Meter()

    def count() -> None:
        for _ in range(2000):
            meter.count(1, "between_groups")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.payload()["total"] == 8000


def test_a_meter_counts_on_from_its_saved_state() -> None:
    meter = Meter()
    meter.phase = "ab"
    meter.count(7, "within_groups")
    meter.sync_seconds = 0.25
    resumed = Meter()
    resumed.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert resumed.payload() == meter.payload()
    assert (resumed.phase, resumed.sync_seconds) == ("ab", 0.25)
    resumed.count(1, "between_groups")
    assert resumed.payload()["by_phase"] == {"ab": 8}
    assert meter.payload()["total"] == 7
