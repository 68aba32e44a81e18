"""The same step over several devices: a data mesh, a pmap entrance, and sharded trials."""

from lorax_kit.parallel.mesh import device_mesh, replicate, shard, sharded_step, study_mesh
from lorax_kit.parallel.pmap import pmap_step

__all__ = ["device_mesh", "pmap_step", "replicate", "shard", "sharded_step", "study_mesh"]
