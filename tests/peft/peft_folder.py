"""A recorded PEFT folder to change before it is written elsewhere."""

import json

from safetensors.numpy import load_file, save_file

from tests.fixtures.recorded import PEFT

PREFIX = "base_model.model."


class Folder:
    """Attributes: `config`, the JSON; `tensors`, by names without PEFT's prefix."""

    def __init__(self, path, case):
        self.path = path / "peft"
        self.config = json.loads((PEFT / case / "adapter_config.json").read_text())
        tensors = load_file(PEFT / case / "adapter_model.safetensors")
        self.tensors = {name.removeprefix(PREFIX): x for name, x in tensors.items()}

    def write(self):
        self.path.mkdir(exist_ok=True)
        (self.path / "adapter_config.json").write_text(json.dumps(self.config))
        save_file({PREFIX + name: x for name, x in self.tensors.items()}, self.path / "adapter_model.safetensors")
        return self.path


def write(path, config, tensors):
    """A folder of a config and tensors by names without PEFT's prefix."""
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({PREFIX + name: x for name, x in tensors.items()}, path / "adapter_model.safetensors")
    return path
