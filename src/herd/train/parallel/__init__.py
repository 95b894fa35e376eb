"""Training on many ranks, one file an axis.

    mesh.py      which ranks work together            shard.py     FSDP, HSDP: weights, gradients, optimiser
    tensor.py    matrices and the sequence            context.py   the sequence in attention; ring.py the second form
    pipeline.py  layers; schedules.py their order     expert.py    routed experts
    gradients.py the norm over everything             whole.py     whole weights again, for an export

The loop sees none of it: `world.MeshWorld` splits the model and the batches, and the losses and sums stay those of one
process. That they are equal is tested for every axis and every pair of axes (docs/parallel.md).
"""

from herd.train.parallel.config import ParallelConfig

__all__ = ["ParallelConfig"]
