"""A study over 1 to 8 devices and 1 to 4 processes, trials by data: equal rows, one compilation, few bytes exchanged.

Command:   python experiments/devices.py
Hardware:  2 CPU cores, virtual devices and real processes of them
Time:      90 s
Result:    losses within 1.2e-8 of those of one device (of about 0.02; at rates ten times as high, which shake, within
           5e-4), one compilation each

    processes  devices  trials x data  bytes exchanged in a step  factors of a device  base
    1          1        1 x 1          0                          212,992              328,704
    1          2        2 x 1          64                         106,496
    1          2        1 x 2          213,120                    212,992
    1          4        2 x 2          106,624                    106,496
    1          8        8 x 1          64                         26,624
    1          8        2 x 4          106,624                    106,496
    2          4        2 x 2          106,624                    106,496
    4          8        2 x 4          106,624                    106,496

           What is exchanged is the factors' gradients and the trials' losses, never the base's.
Writes:    runs/devices/{PROCESSES}x{DEVICES}_{TRIALS}x{DATA}/ (a study each), runs/devices/table.csv

Eight trials of two ranks of a small network. Devices along "trial" train other trials and exchange nothing; those along
"data" have other examples of each batch and add up the gradients of the factors: their bytes are counted in the
compiled step, beside the bytes of the factors that a device trains and those of the base.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

OUT = Path("runs/devices")
# (processes, devices of each, along trials, along data)
LAYOUTS = [
    (1, 1, 1, 1),
    (1, 2, 2, 1),
    (1, 2, 1, 2),
    (1, 4, 2, 2),
    (1, 8, 8, 1),
    (1, 8, 2, 4),
    (2, 2, 2, 2),
    (4, 2, 2, 4),
]
WIDTH, HIDDEN, BATCH = 64, 256, 64


def problem():
    """A network of three layers that learns another's outputs."""
    import jax.numpy as jnp
    import numpy as np

    import lorax_kit as lk

    rng = np.random.default_rng(0)
    sizes = [(WIDTH, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]
    base = {f"layer_{i}": jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32) for i, s in enumerate(sizes)}
    target = {name: x + 0.3 * jnp.asarray(rng.normal(size=x.shape) / x.shape[0] ** 0.5) for name, x in base.items()}

    def apply(params, batch):
        hidden = jnp.tanh(jnp.tanh(batch["x"] @ params["layer_0"]) @ params["layer_1"])
        return (hidden @ params["layer_2"])[:, 0]

    def batch(seed):
        x = np.random.default_rng(seed).normal(size=(BATCH, WIDTH)).astype(np.float32)
        return {"x": x, "y": np.asarray(apply(target, {"x": x}))}

    def loss(outputs, batch):
        errors = (outputs - batch["y"]) ** 2
        return lk.Weighted(jnp.sum(errors), jnp.float32(errors.size))

    return lk.Problem(
        name="imitation",
        params=lambda key: base,
        apply=apply,
        loss=loss,
        train=lambda seed, start: (batch((seed, step)) for step in itertools.count(start)),
        val=[batch((10_001, 0))],
        test=[batch((10_002, 0))],
    )


def one(process: int, processes: int, trials: int, data: int, port: int, out: str) -> None:
    """Run the study in this process, alone or as one of several."""
    import jax

    if processes > 1:
        address = f"127.0.0.1:{port}"
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, processes, process, coordinator_bind_address=address)
    import lorax_kit as lk

    study = lk.Study(rank=(2, 8), lr=(1e-3, 3e-3), seed=(0, 1), targets={"inner": ["layer_{0,1}"]}, steps=40, warmup=4)
    mesh = lk.study_mesh(trials=trials, data=data) if trials * data > 1 else None
    lk.run(study, problem(), out=out, mesh=mesh, overwrite=True, progress=False)


def main() -> None:
    from tables import write

    OUT.mkdir(parents=True, exist_ok=True)
    table, alone = [], None
    for processes, devices, trials, data in LAYOUTS:
        out = OUT / f"{processes}x{devices}_{trials}x{data}"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        argv = [str(x) for x in (processes, trials, data, port, out)]
        running = [subprocess.Popen([sys.executable, __file__, str(i), *argv], env=env) for i in range(processes)]
        if sum(process.wait() != 0 for process in running):
            sys.exit(f"the study of {out} failed")
        rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
        found = {row["trial"]: [row[name] for name in ("train_loss", "val_loss", "test_loss")] for row in rows}
        alone = alone or found
        info = json.loads((out / "study.json").read_text())
        factors = 4 * max(row["params"] for row in rows) * len(rows) // trials
        table.append(
            {
                "processes": processes,
                "devices": processes * devices,
                "trials": trials,
                "data": data,
                "largest_difference": max(
                    abs(x - y) for name in found for x, y in zip(found[name], alone[name], strict=True)
                ),
                "compilations": info["compiles"],
                "collective_bytes": info["groups"][0]["collective_bytes"],
                "factor_bytes": factors,
                "base_bytes": 4 * (WIDTH * HIDDEN + HIDDEN * HIDDEN + HIDDEN),
            }
        )
    write(OUT / "table.csv", table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        *numbers, folder = sys.argv[1:]
        one(*map(int, numbers), folder)
    else:
        main()
