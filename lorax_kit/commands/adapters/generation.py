"""`generate`: texts from a pretrained model, with or without a saved adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorax_kit.checkpoint.adapter import Adapter, load_adapter, read_meta
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import flatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import AdapterError, LoraxError
from lorax_kit.generate import Sampling, Writer, adapted, beam_search, decoder_of
from lorax_kit.models import Loaded, load_model
from lorax_kit.problem.base import based
from lorax_kit.problems import settings_of
from lorax_kit.problems.chat import Chat, conversation_text, template_of
from lorax_kit.problems.packaged.sentiment import adapter_folder
from lorax_kit.problems.translate import Translate


@dataclass(frozen=True)
class Author:
    """A model that writes, as `generate` uses it.

    Args:
      loaded: the pretrained model and its tokenizer.
      writer: its decoder.
      params: as the decoder takes them.
      asking: settings of the task that an adapter was trained on, by which prompts are laid out; None: as they are.
    """

    loaded: Loaded
    writer: Writer
    params: Any
    asking: Any = None

    def prompt(self, text: str, *, chat: bool, system: str | None) -> str | list[int]:
        """What the model reads of a prompt: the text, or the tokens of a conversation that ends where it answers."""
        laid, alone = self.laid(text, chat=chat, system=system)
        return self.loaded.tokenizer.encode_spans([laid])[0][0] if alone else laid

    def laid(self, text: str, *, chat: bool, system: str | None) -> tuple[str, bool]:
        """The text that the model reads of a prompt, and whether that is all: no special tokens are added to it.

        Raises:
          LoraxError: a system's message, or the wish for a conversation, that the model does not read.
          ValueError: as `conversation_text`.
        """
        asking = self.asking
        if isinstance(asking, Translate):
            text = asking.prompt.replace("{source}", text)
        if self.loaded.kind == "encoder-decoder" and (chat or system is not None):
            raise LoraxError(
                f"{self.loaded.source!r} reads the prompt alone: it goes without a conversation and a system."
            )
        if self.loaded.kind == "encoder-decoder" or not (chat or isinstance(asking, Chat | Translate)):
            if system is not None:
                raise LoraxError(
                    "a prompt that is no conversation has no system: lay it out as one, --chat (chat=True)."
                )
            return text, False
        template = template_of(self.loaded, getattr(asking, "template", None))
        user = [{"role": "user", "content": text}]
        given = getattr(asking, "system", None) if system is None else system
        if given is None:
            return conversation_text(self.loaded, template, user), True
        laid = conversation_text(self.loaded, template, [{"role": "system", "content": given}, *user])
        if system is not None and laid == conversation_text(self.loaded, template, user):
            raise LoraxError(f"the chat template of {self.loaded.source!r} leaves out the system's message.")
        return laid, True


class Origin(NamedTuple):
    """Where a model that writes comes from.

    Attributes:
      loaded: the pretrained model.
      base: its params, in the form in which an adapter was trained on them.
      adapter: None of a model as it is.
      asking: settings of the task that the adapter was trained on; None without.
    """

    loaded: Loaded
    base: Any
    adapter: Adapter | None
    asking: Any


def author_of(source: str | Path, quantise: str | None = None) -> Author:
    """The model that writes.

    Args:
      source: a folder of `lorax-kit train` or of a study, whose adapter is merged into its base, or stays factored
        where the base is quantised; else what `load_model` takes.
      quantise: the kernels of a model without an adapter, as `load_model` does.

    Raises:
      AdapterError, LoraxError, FileNotFoundError, ValueError: as `origin_of`.
    """
    loaded, base, adapter, asking = origin_of(source, quantise)
    decoder = decoder_of(loaded)
    if adapter is None:
        return Author(loaded, Writer(decoder, loaded.tokenizer), base)
    if any(isinstance(x, Quantised) for x in flatten(base)[0].values()):
        return Author(loaded, Writer(adapted(decoder, adapter.plan), loaded.tokenizer), (base, adapter.factors), asking)
    return Author(loaded, Writer(decoder, loaded.tokenizer), merge(base, adapter.factors, adapter.plan), asking)


def origin_of(source: str | Path, quantise: str | None = None) -> Origin:
    """The model that writes, its adapter apart.

    Args:
      source: a folder of `lorax-kit train` or of a study; else what `load_model` takes.
      quantise: as of `author_of`.

    Raises:
      AdapterError: an adapter of a problem of one's own, whose model is not known by a name, or of a task that writes
        nothing.
      LoraxError: a model that writes nothing.
      FileNotFoundError, ValueError: what the loaders raise.
    """
    path = adapter_folder(source)
    if not (path / "spec").is_dir():
        loaded = load_model(source, quantise=quantise)
        decoder_of(loaded)  # an encoder is refused
        return Origin(loaded, loaded.params, None, None)
    asking: Any = settings_of(path)
    meta = read_meta(path)
    if not asking.writes:
        raise AdapterError(
            f"the adapter at {str(path)!r} is of {meta['problem']!r}: it writes nothing.\n"
            f"  its answers: lorax-kit predict {source}; its metrics: lorax-kit evaluate {source}"
        )
    loaded = load_model(asking.model, quantise=getattr(asking, "quantise", None))
    form = meta.get("base_form") or {}
    base = based(loaded.params, form.get("dtype"), form.get("quantise"), tuple(form.get("paths", ())))
    return Origin(loaded, base, load_adapter(path, base=base), asking)


def generate(
    author: Author,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    chat: bool = False,
    system: str | None = None,
    beams: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Write after each prompt.

    Args:
      chat, system: lay a prompt out as a conversation; see `Author.prompt`.
      beams: above 1, beam search.
      options: of `Writer`: max_new_tokens, stop, samples, seed.

    Returns:
      {"texts": [{"prompt", "text", "tokens", "finished", "logprob"}, ...], "seconds", "tokens_per_second"}, compilation
      included.

    Raises:
      LoraxError: what cannot be written; an option that nothing reads, such as a seed of temperature 0.
    """
    _check_read(sampling or Sampling(), beams, options)
    asked = [author.prompt(text, chat=chat, system=system) for text in prompts]
    began = time.perf_counter()
    if beams > 1:
        own = {name: options[name] for name in ("max_new_tokens", "stop") if name in options}
        generated = beam_search(author.writer, author.params, asked, beams=beams, **own)
    else:
        generated = author.writer(author.params, asked, sampling=sampling, **options)
    seconds = time.perf_counter() - began
    each = options.get("samples", 1)
    texts = [
        {
            "prompt": prompts[i // each],
            "text": one.text,
            "tokens": list(one.tokens),
            "finished": one.finished,
            "logprob": one.logprob,
        }
        for i, one in enumerate(generated)
    ]
    count = sum(len(one.tokens) for one in generated)
    return {"texts": texts, "seconds": seconds, "tokens_per_second": count / seconds}


def _check_read(sampling: Sampling, beams: int, options: Mapping[str, Any]) -> None:
    """Raise `LoraxError` where an option is given that nothing reads."""
    many = options.get("samples", 1) > 1
    if beams > 1 and (sampling != Sampling() or many or "seed" in options):
        raise LoraxError("beams take the likeliest texts: they go without temperature, penalty, samples and seed.")
    if sampling.temperature == 0 and (many or "seed" in options):
        what = "samples would be one text many times" if many else "no seed is read"
        raise LoraxError(f"temperature 0 takes the likeliest token: {what}.\n  give a temperature above 0")


def streamed(
    author: Author, prompt: str, *, chat: bool, system: str | None, sampling: Sampling | None = None, **options: Any
) -> Iterator[str]:
    """The text after one prompt, piece by piece; see `Writer.stream`.

    Raises:
      LoraxError: as `generate`.
    """
    _check_read(sampling or Sampling(), 1, options)
    options["sampling"] = sampling
    return author.writer.stream(author.params, author.prompt(prompt, chat=chat, system=system), **options)
