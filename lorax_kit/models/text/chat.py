"""Conversations as text, by the Jinja template that a model's folder brings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_kit.extras import need

MESSAGE = ("role", "content")


def laid_out(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    answer: bool = False,
    special: Mapping[str, str | None] | None = None,
) -> str:
    """Lay out a conversation as the text that a model was trained on.

    The template comes from a file of unknown origin: it runs in Jinja's sandbox, as in transformers, and sees nothing
    but the messages.

    Args:
      template: Jinja text, `Loaded.chat_template`.
      messages: {"role": ..., "content": ...} each, the roles mostly "system", "user" and "assistant".
      answer: end with what begins an answer (`add_generation_prompt`).
      special: "bos_token" and "eos_token" as texts.

    Raises:
      ValueError: a message of another form, or a template that is none or refuses the messages.

    Example:
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> laid_out(template + "{% if add_generation_prompt %}<assistant>{% endif %}", [
      ...     {"role": "user", "content": "Hi"}], answer=True)
      '<user>Hi<assistant>'
    """
    need("models", "jinja2")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in MESSAGE):
            raise ValueError(f"message {i} is {message!r}; it must be an object of the texts 'role' and 'content'.")
    if not messages:
        raise ValueError("there are no messages.")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    given = {"bos_token": "", "eos_token": "", **{k: v or "" for k, v in (special or {}).items()}}
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=[dict(m) for m in messages], add_generation_prompt=answer, **given)
    except (TemplateError, TypeError) as e:
        raise ValueError(f"the chat template cannot lay out these messages: {e}.") from None
