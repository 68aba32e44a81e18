"""One process of several that train together: `member.py SETTINGS`, a JSON object."""

import json
import os
import sys
import time


def main(
    process, count, port, mesh, out, factors="replicated", dies=None, saved=None, every=None, lost_after=100, late=0
):
    import jax

    import lorax_kit as lk
    from lorax_kit.parallel import join
    from lorax_kit.processes import gathered, is_writer

    if count > 1:
        join(f"127.0.0.1:{port}", count, process, lost_after=lost_after)
    from tests.distributed.training import fitted, flat, placed, prepared

    if every is not None:
        sys.modules["lorax_kit.training.fit"].SAVE_SECONDS = every  # the package has a function of that name
    loss, tx, base, start, plan = prepared()
    grid = lk.training_mesh(**mesh)
    init, step = lk.sharded_step(loss, tx, grid, factors=factors)
    there = placed(base, grid)

    def counted(state, base, batch):
        if dies is not None and process == count - 1 and int(state.step) == dies:
            os._exit(9)
        return step(state, base, batch)

    fitting = fitted(init, counted, there, start, saved=saved)
    if process == count - 1:
        time.sleep(late)
    lk.save_adapter(f"{out}/adapter", plan, fitting.state.factors, base=there, overwrite=not late)
    found = flat(gathered(fitting.state.factors))
    assert lk.load_adapter(f"{out}/adapter", base=there).plan == plan
    if is_writer():
        print("FACTORS", json.dumps([float(x) for x in found]), flush=True)
    print("DEVICES", jax.device_count(), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
