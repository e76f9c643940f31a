"""What sharing a step with other machines saves and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_tuner.engine.ranks import shares
from mlx_tuner.system import cache


@dataclass(frozen=True)
class Link:
    """A cable between two machines, as MLX's ring uses it."""

    bytes_per_second: float
    """In either direction."""
    seconds: float
    """Of one message that is almost empty, there and back."""
    by: str
    """How that is known."""

    def sum_seconds(self, size: int, machines: int) -> float:
        """Seconds of a ring's sum of ``size`` bytes over some machines.

        Each sends and receives 2 · (N - 1) / N of them in 2 · (N - 1) messages. (Patarasuk & Yuan
        2009, doi:10.1016/j.jpdc.2008.09.002.)
        """
        messages = 2 * (machines - 1)
        return messages * (size / machines / self.bytes_per_second + self.seconds / 2)


LINKS = {
    # 16.4 Gbit/s of TCP by one Thunderbolt 4 cable:
    # https://www.jiribrejcha.net/tag/intel-nuc/
    # 0.38 to 0.95 ms there and back while models run, https://github.com/exo-explore/exo/issues/2295
    "thunderbolt": Link(16.4e9 / 8, 0.6e-3, "16.4 Gbit/s, not measured here"),
    # 1460 bytes of TCP in 1538 on the wire (IEEE 802.3, frames of 1500 bytes)
    "ethernet": Link(1e9 / 8 * 1460 / 1538, 0.6e-3, "1 Gbit/s, not measured here"),
}
"""By name; `measured` goes first."""


def measured(name: str) -> Link:
    """The link of that name as `mlx-tune bench --ranks` has found it, else as `LINKS` has it."""
    for file, found in cache.results("links-*.json"):
        try:
            if found["benchmark"] == "links" and found["link"]["name"] == name:
                speed, seconds = found["link"]["bytes_per_second"], found["link"]["seconds"]
                return Link(float(speed), float(seconds), f"by `mlx-tune bench`, {file}")
        except (ValueError, KeyError, TypeError):
            continue
    return LINKS[name]


def largest_share(steps: Sequence[Sequence[int]], machines: int) -> float:
    """The part of all steps' time that the machine with most of each step takes.

    Args:
        steps: tokens of each row of each step; at least one.
    """
    waited = sum(
        max(sum(step[i] for i in own) for own in shares(step, [1.0] * machines)) for step in steps
    )
    return waited / sum(map(sum, steps))
