"""One process of several that run a tiny study together: `study_member.py INDEX COUNT PORT OUT`."""

import json
import sys


def main(index, count, port, out):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, count, index, coordinator_bind_address=address)

    import lorax_kit as lk
    from tests import tiny

    mesh = lk.study_mesh(trials=2, data=jax.device_count() // 2)
    results = lk.run(tiny.study(steps=24, eval_every=6), tiny.problem(), out=out, mesh=mesh, progress=False)
    print("ROWS", json.dumps(results.rows), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
