"""Every layout of the same training in one process of eight devices: a JSON line each."""

import json
import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"


def main():
    import chex
    import jax

    import lorax_kit as lk
    from tests.distributed.training import fitted, flat, placed, prepared

    loss, tx, base, factors, _ = prepared()
    alone = None
    grid = [("jit", {})]
    grid += [("pmap", {"devices": n}) for n in (1, 2, 4, 8)]
    grid += [("mesh", {axis: n}) for axis in ("data", "fsdp", "tensor") for n in (1, 2, 4, 8)]
    grid += [("mesh", sizes) for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2})]
    grid += [("mesh", {"data": 2, "fsdp": 4, "factors": "sharded"})]
    for kind, sizes in grid:
        chex.clear_trace_counter()

        def counted(base, f, b, key):
            return loss(base, f, b, key)

        counted.__name__ = f"{kind}{sizes}"
        counted = chex.assert_max_traces(counted, n=1)
        if kind == "jit":
            made, there = lk.make_step(counted, tx), base
        elif kind == "pmap":
            made, there = lk.pmap_step(counted, tx, devices=jax.devices()[: sizes["devices"]]), base
        else:
            axes = {k: v for k, v in sizes.items() if k != "factors"}
            mesh = lk.training_mesh(**axes)
            made = lk.sharded_step(counted, tx, mesh, factors=sizes.get("factors", "replicated"))
            there = placed(base, mesh)
        if kind == "pmap":  # the masks of one device that takes its parts one by one
            by_one = lk.make_step(loss, tx, accumulate=sizes["devices"])
            expected = flat(fitted(*by_one, base, factors).state.factors)
        ours = flat(fitted(*made, there, factors).state.factors)
        alone = ours if alone is None else alone
        expected = expected if kind == "pmap" else alone
        print(json.dumps({"kind": kind, **sizes, "difference": float(abs(ours - expected).max())}), flush=True)


if __name__ == "__main__":
    main()
