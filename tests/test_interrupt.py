"""interrupt.py: code that takes too long is stopped, and signals wait for the end of a block."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_tuner.system.interrupt import TookTooLong, deferred, time_limit


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


def test_signals_wait_for_the_end_of_a_block_and_do_then_what_they_did_before():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with deferred() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            while interrupt.received is None:
                time.sleep(0.001)
        assert interrupt.received == signal.SIGTERM
        assert came == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_ignored_as_under_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
