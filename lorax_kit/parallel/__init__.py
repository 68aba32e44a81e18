"""The same step over several devices: a data mesh, a pmap entrance, sharded trials, and several processes."""

from lorax_kit.parallel.distributed import join, quiet_stdout
from lorax_kit.parallel.mesh import device_mesh, replicate, shard, sharded_step, study_mesh
from lorax_kit.parallel.pmap import pmap_step

__all__ = ["device_mesh", "join", "pmap_step", "quiet_stdout", "replicate", "shard", "sharded_step", "study_mesh"]
