"""interrupt.py: signals wait for the end of a block, or go to a child."""

import os
import signal
import time

from mlx_tuner.system.interrupt import SIGNALS, Relay, deferred


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
            os.kill(os.getpid(), signal.SIGTERM)
            while interrupt.received is None:
                time.sleep(0.001)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_relay_leaves_the_signals_as_they_were():
    numbers = (*SIGNALS, signal.SIGTSTP)
    before = [signal.getsignal(number) for number in numbers]
    with Relay() as relay:
        assert not set(before) & {signal.getsignal(number) for number in numbers}
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert relay.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in numbers] == before
