"""time_limit.py: code that takes too long is stopped."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_tuner.system.time_limit import TookTooLong, time_limit


def loop_for_ever():
    with time_limit(0.05):
        while True:
            try:
                time.sleep(0.001)
            except Exception:
                continue


def test_a_block_that_does_not_end_is_stopped_in_whichever_thread_it_runs():
    with pytest.raises(TookTooLong):
        loop_for_ever()
    with ThreadPoolExecutor() as pool, pytest.raises(TookTooLong):
        pool.submit(loop_for_ever).result(timeout=60)


def test_a_block_that_ends_in_time_is_not_interrupted_later():
    before = threading.active_count()
    with time_limit(0.05):
        pass
    time.sleep(0.2)
    assert threading.active_count() == before
