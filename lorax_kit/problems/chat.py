"""Conversations of a user's own: a decoder learns what the assistant says, not what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lorax_kit.core.specs.setting import shown
from lorax_kit.data import Examples, Row, key_of
from lorax_kit.errors import DataError, StudyError
from lorax_kit.models import Loaded, laid_out
from lorax_kit.problem import Problem
from lorax_kit.problems.classify import text_of
from lorax_kit.problems.parts.decoded import decoder_problem
from lorax_kit.problems.parts.rows import TextSettings, batches_of, facts_of, length_of, load, read_parts
from lorax_kit.tasks import Told, told_batch

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""A template for models that bring none."""


@dataclass(frozen=True, kw_only=True)
class Chat(TextSettings):
    """Conversations for a decoder; measured by the perplexity of what the assistant says.

    Args:
      prompt, response: columns of a question and its answer, where `messages` is None.
      messages: the column of whole conversations (JSON Lines): lists of {"role": ..., "content": ...}.
      system: what a conversation begins with, where its first message is no "system"; None: what the template does.
      template: Jinja text in place of the model's own, or "plain" for models without one.
    """

    writes: ClassVar[bool] = True

    model: str = "smollm2"
    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    system: str | None = None
    template: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("messages", "system", "template"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise StudyError(f"problem {name} is {shown(getattr(self, name))}; it must be a string.")

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column."""
        if self.messages is not None:
            return {"messages": self.messages}
        return {"prompt": self.prompt, "response": self.response}

    def build(self) -> Problem:
        """Load weights and data.

        Raises:
          DataError: a conversation of another form, or in which the assistant says nothing; or as `read_parts`.
          StudyError: the model is no decoder, or brings no template and none is given.
        """
        loaded = load(self, "chat", "decoder")

        def conversation(row: Row) -> list[dict[str, str]]:
            if self.messages is None:
                pair = (("user", "prompt"), ("assistant", "response"))
                messages = [{"role": role, "content": text_of(row, name)} for role, name in pair]
            else:
                messages = _messages(row)
            begins = [] if self.system is None or messages[0]["role"] == "system" else [self.system]
            return [*({"role": "system", "content": text} for text in begins), *messages]

        return told_problem(self, "chat", loaded, conversation, template_of(loaded, self.template))


def template_of(loaded: Loaded, given: str | None) -> str:
    """The chat template to use.

    Raises:
      StudyError: the model brings none, and none is given.
    """
    template = PLAIN if given == "plain" else given or loaded.chat_template
    if template is None:
        raise StudyError(
            f"{loaded.source!r} brings no chat template.\n  give one: template='plain', or Jinja text of your own"
        )
    return template


def told_problem(
    settings: TextSettings,
    name: str,
    loaded: Loaded,
    conversation: Callable[[Row], list[dict[str, str]]],
    template: str,
) -> Problem:
    """The problem of telling what the assistant says in each row's conversation."""

    def encode(rows: Sequence[Row]) -> dict[str, Any]:
        fields: dict[str, list[Any]] = {"ids": [], "told": [], "key": []}
        for row in rows:
            said = conversation(row)
            ids, told = tokens_of(loaded, template, said)
            for field, value in zip(fields, (ids, told, key_of(*(m["content"] for m in said))), strict=True):
                fields[field].append(value)
        return fields

    data = read_parts(settings, encode)
    length = length_of(settings, data.train["ids"].lengths, loaded.positions)

    def make(part: Examples, index: np.ndarray, size: int, length: int) -> Told:
        return told_batch([part["ids"][i] for i in index], [part["told"][i] for i in index], size, length)

    batches = batches_of(data, make, settings, length)
    return decoder_problem(name, loaded, **batches, facts=facts_of(settings, data, length, name, {}))


def conversation_text(loaded: Loaded, template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation that the assistant is to go on with.

    Raises:
      ValueError: as `laid_out`.
    """
    return laid_out(template, messages, answer=True, special=_special(loaded))


def tokens_of(loaded: Loaded, template: str, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and for each whether the assistant says it, its end included.

    Raises:
      ValueError: the assistant says nothing, or speaks first, or a template that lays out the beginning of a
        conversation in another way than the whole.
    """
    special = _special(loaded)
    text = laid_out(template, messages, special=special)
    spoken: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError(
                "the assistant speaks first: there is nothing that it answers.\n  begin with a user's message"
            )
        before = laid_out(template, messages[:i], answer=True, special=special)
        until = laid_out(template, messages[: i + 1], special=special)
        if not (text.startswith(until) and until.startswith(before)):
            raise ValueError("the chat template does not begin a conversation as it lays out the whole.")
        spoken.append((len(before), len(until)))
    if not spoken:
        raise ValueError("the assistant says nothing: no message has the role 'assistant'.")
    ids, spans = loaded.tokenizer.encode_spans([text])[0]
    return ids, [int(any(a <= start < b for a, b in spoken)) for start, _ in spans]


def _special(loaded: Loaded) -> dict[str, str | None]:
    """The texts of the tokens that begin and end a text, as templates name them."""
    ends = {"bos_token": loaded.special.bos, "eos_token": next(iter(loaded.special.eos), None)}
    return {name: loaded.tokenizer.text_of(token) for name, token in ends.items()}


def _messages(row: Row) -> list[dict[str, str]]:
    value = row.cells["messages"]
    listed = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not listed or not all(isinstance(m.get(key), str) for m in value for key in ("role", "content")):
        raise DataError(
            f"{row.where}: messages must be a list of objects of the texts 'role' and 'content'; it is "
            f"{shown(value)[:100]}."
        )
    return [{key: m[key] for key in ("role", "content")} for m in value]
