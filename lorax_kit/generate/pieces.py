"""A text as its tokens come: where it ends, and what of it can be shown already."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from lorax_kit.models import Tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")
UNFINISHED = "\ufffd"
"""What stands for bytes that are not yet a character."""


@dataclass
class Pieces:
    """The text of one row while it is written.

    Args:
      tokenizer: ids to text.
      stop: strings before which the text ends; they may lie across tokens.
      before: the last tokens of the text that this one goes on from. Tokenizers of SentencePiece leave out the space
        that a text begins with; within a text it is kept, so that prompt and text are one.

    Attributes:
      tokens, logprobs: so far.
      finished: "eos" or "stop" once the text has ended.
      shown: how many characters `piece` has given.
    """

    tokenizer: Tokenizer
    stop: tuple[str, ...] = ()
    before: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: str = ""
    shown: int = 0
    _text: str = ""
    _known: str = field(init=False)

    def __post_init__(self) -> None:
        self._known = self.tokenizer.decode(self.before)

    def add(self, token: int, logprob: float, eos: Collection[int]) -> None:
        """One more token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in eos:
            self.finished = "eos"
            return
        whole = self.tokenizer.decode([*self.before, *self.tokens])
        # Bytes that are no character can make one with those before: the text is then decoded by itself.
        goes_on = whole.startswith(self._known)
        self._text = whole[len(self._known) :] if goes_on else self.tokenizer.decode(self.tokens)
        stops = [at for at in (self._text.find(string) for string in self.stop) if at >= 0]
        if stops:
            self.finished, self._text = "stop", self._text[: min(stops)]

    def whole(self) -> str:
        """The text so far."""
        return self._text

    def piece(self) -> str:
        """What is new and cannot change: no half character, nothing that may become a stop string."""
        # Bytes of SentencePiece are decoded together: one more that is no character's makes all of them none.
        if self.tokens and not self.finished and BYTE.fullmatch(self.tokenizer.text_of(self.tokens[-1]) or ""):
            return ""
        end = len(self._text)
        while end and self._text[end - 1] == UNFINISHED and not self.finished:
            end -= 1
        if not self.finished:
            end -= max((_overlap(self._text[:end], string) for string in self.stop), default=0)
        return self._upto(end)

    def rest(self) -> str:
        """What `piece` has held back, once the text has ended."""
        return self._upto(len(self._text))

    def _upto(self, end: int) -> str:
        new, self.shown = self._text[self.shown : end], max(self.shown, end)
        return new


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text begin the string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
