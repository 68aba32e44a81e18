"""What `examine` found, a line each."""

from __future__ import annotations

from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """The findings as text: facts, devices, checks, and problems with what mends each."""
    environment = found["environment"]
    lines = [*_software(environment), *_hardware(environment)]
    lines += [_line(True, "devices", _device(row)) for row in found["devices"]]
    lines += [_line(c["ok"], c["name"], f"{c['detail']} ({c['seconds']:.1f} s)") for c in found["checks"]]
    for problem in found["problems"]:
        lines += ["", f"{'wrong' if problem['fatal'] else 'note'}: {problem['what']}", f"  {problem['mend']}"]
    return "\n".join([*lines, "", "ready" if found["ok"] else "not ready: mend what is wrong"])


def _line(ok: bool, name: str, detail: str) -> str:
    return f"{'ok' if ok else 'wrong':5}  {name}: {detail}"


def _software(environment: dict[str, Any]) -> list[str]:
    python, packages = environment["python"], environment["packages"]
    good = [f"{name} {fact['version']}" for name, fact in packages.items() if fact["ok"] and fact["version"]]
    lines = [_line(python["ok"], "Python", f"{python['version']} ({python['supported']})")]
    lines.append(_line(True, "packages", ", ".join([f"lorax_kit {environment['lorax_kit']}", *good])))
    for name, fact in packages.items():
        if not fact["ok"]:
            lines.append(_line(False, name, f"{fact['version'] or 'not installed'} ({fact['supported']})"))
    for name, extra in environment["extras"].items():
        if not extra["installed"]:
            lines.append(f"       without lorax_kit[{name}], for {extra['gives']}: no {', '.join(extra['missing'])}")
    return lines


def _hardware(environment: dict[str, Any]) -> list[str]:
    memory, runs, temp = environment["memory_bytes"], environment["run_folder"], environment["temp_folder"]
    of = f"{_gib(memory['available'])} of {_gib(memory['total'])} of memory available"
    works = runs["writable"] and runs["locks"]
    return [
        _line(True, "machine", f"{environment['platform']}, {environment['cores']} cores, {of}"),
        _line(works, "run folder", f"{runs['path']}, {_gib(runs['free_bytes'])} free"),
        _line(temp["writable"], "temporary files", f"{temp['path']}, {_gib(temp['free_bytes'])} free"),
    ]


def _device(row: dict[str, Any]) -> str:
    memory = "" if row["memory_bytes"] is None else f", {_gib(row['memory_bytes'])} each"
    return f"{row['count']} x {row['kind']} ({row['platform']}){memory}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
