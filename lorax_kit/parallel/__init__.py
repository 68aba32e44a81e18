"""The same step over several devices: a data mesh, a pmap entrance, sharded trials, and several processes."""

from lorax_kit.parallel.distributed import join, quiet_stdout
from lorax_kit.parallel.layout import device_bytes, layout, onto, place
from lorax_kit.parallel.mesh import device_mesh, replicate, shard, study_mesh, training_mesh
from lorax_kit.parallel.pmap import pmap_step
from lorax_kit.parallel.sharded import sharded_step

__all__ = [
    "device_bytes",
    "device_mesh",
    "join",
    "layout",
    "onto",
    "place",
    "pmap_step",
    "quiet_stdout",
    "replicate",
    "shard",
    "sharded_step",
    "study_mesh",
    "training_mesh",
]
