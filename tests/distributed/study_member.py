"""One process of several that run a tiny study together: `study_member.py INDEX COUNT PORT OUT [STEPS IT LIVES]`."""

import json
import os
import sys


def main(index, count, port, out, dies):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, count, index, coordinator_bind_address=address)

    import lorax_kit as lk
    from lorax_kit.study.programs import engine
    from tests import tiny

    engine.SAVE_SECONDS = 0.0
    taken = []

    def stream(seed, start):
        for batch in tiny.stream(seed, start):
            taken.append(1)
            if dies and index == count - 1 and len(taken) == dies:
                os._exit(9)
            yield batch

    problem = tiny.problem(train=stream)
    taken.clear()
    mesh = lk.study_mesh(trials=2, data=jax.device_count() // 2)
    results = lk.run(tiny.study(steps=24, eval_every=6), problem, out=out, mesh=mesh, progress=False)
    print("ROWS", json.dumps(results.rows), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int((sys.argv[5:] or ["0"])[0]))
