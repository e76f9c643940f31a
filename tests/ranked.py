"""The same few steps by one rank or several: run it as each of several processes."""

import json
import sys
from itertools import count
from pathlib import Path

import mlx.core as mx
from tiny import random_rows, tiny_model

from mlx_tuner.engine.ranks import join
from mlx_tuner.engine.trainer import Trainer, train

STEPS = [(9, 3, 25, 12, 40), (8,), (30, 31, 2, 5, 5, 17, 20)]
"""Tokens of the rows of three steps: ragged, one of fewer rows than ranks."""
HELD_OUT = [(4, 30, 12), (9,)]
OPTIONS = [{}, {"checkpointing": True}]


def trained(ranks=None, **options):
    """What is reported of the steps, the validation loss, and the adapter that they leave."""
    trainer = Trainer(
        tiny_model(dropout=0.2), micro_batch_tokens=50, max_grad_norm=0.5, ranks=ranks, **options
    )
    numbers = count()
    steps = [
        [row._replace(row=next(numbers)) for row in random_rows(own, seed=sum(own))]
        for own in STEPS
    ]
    results = list(train(trainer, steps, [1e-3] * len(steps)))
    loss = trainer.evaluate([random_rows(own, seed=1) for own in HELD_OUT])
    figures = [(r.loss, r.grad_norm, r.rows, r.tokens, r.target_tokens) for r in results]
    return figures, loss, trainer.adapter


if __name__ == "__main__":
    folder, speeds = Path(sys.argv[1]), json.loads(sys.argv[2])
    ranks = join("ring")
    ranks.speeds = speeds
    for i, options in enumerate(OPTIONS):
        figures, loss, adapter = trained(ranks, **options)
        mx.save_safetensors(str(folder / f"{i}-{ranks.rank}.safetensors"), adapter)
        (folder / f"{i}-{ranks.rank}.json").write_text(json.dumps([figures, loss]))
    assert ranks.gather(b"x" * ranks.rank) == [b"x" * i for i in range(ranks.size)]
    assert ranks.total([1e-9 * ranks.rank, 1e9])[1] == ranks.size * 1e9
    own = [mx.array([ranks.rank + 1, 2.0]), mx.array(ranks.rank + 3)]
    assert [x.tolist() for x in ranks.take_over(own)] == [[1.0, 2.0], 3]
