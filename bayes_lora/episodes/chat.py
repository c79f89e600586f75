"""The texts around prompts and answers of a chat model, from its tokenizer's chat template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from bayes_lora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Frame", "chat_frame", "end_of_reply"]

# Texts that no template contains or changes.
PROMPTS = ("<<first-prompt>>", "<<second-prompt>>", "<<third-prompt>>")
REPLIES = ("<<first-reply>>", "<<second-reply>>")


class Frame(NamedTuple):
    """The texts around prompts ``x`` and answers ``y``: ``first x shown lead y between x cue lead y``.

    Attributes:
        first: before the first prompt: the beginning of the text, a system message if the template has a default one,
            and the header of the user's message.
        cue: after the last prompt: the end of the user's message and the header of the assistant's, with an empty
            thought if the template puts one before a reply.
        shown: in place of ``cue`` after the prompt of a demonstration.
        lead: spaces before an answer.
        between: after the answer of a demonstration, up to the next prompt.
    """

    first: str = ""
    cue: str = ""
    shown: str = ""
    lead: str = ""
    between: str = ""


def chat_frame(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> Frame:
    """Extract the frame of a chat template by rendering conversations of placeholder messages.

    Args:
        tokenizer: a tokenizer with a chat template.
        arguments: arguments of the template, passed to ``apply_chat_template``.

    Raises:
        ConfigError: the tokenizer has no chat template, the template has no such argument, or it does more than put
            text around messages.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"template.chat: the tokenizer of {name} has no chat template. Set template.chat=false.")
    _check_arguments(tokenizer, arguments, name)

    def render(messages: Sequence[str], reply: bool = True) -> str:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply, **arguments)
        return str(text)

    from jinja2 import TemplateError

    try:
        return _frame(render, name)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            f"template.chat: the chat template of {name} cannot render a conversation ({error}). "
            "Set template.chat=false, and put its text into template.prompt."
        ) from error


def _check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], name: str) -> None:
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of which is the default
        raise ConfigError(f"template.chat: the tokenizer of {name} has no default chat template ({error}).") from error
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for argument in arguments:
        if argument in taken or not re.search(rf"\b{re.escape(argument)}\b", source):
            raise ConfigError(f"template.chat_arguments: the chat template of {name} has no argument {argument!r}.")


def end_of_reply(frame: Frame, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that ends a reply: up to the end of the first special token, or else its first whitespace."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added}
    found = [(frame.between.find(token), token) for token in tokens if token in frame.between]
    if found:
        return frame.between[: min(found)[0]] + min(found)[1]
    return frame.between[: len(frame.between) - len(frame.between.lstrip())]


def _frame(render: Any, name: str) -> Frame:
    (one, two, three), (first_reply, second_reply) = PROMPTS, REPLIES
    alone, whole = render([one]), render([one, first_reply], reply=False)
    turns = [one, first_reply, two, second_reply, three]
    try:
        first, cue = alone.split(one)
        begin, rest = whole.split(first_reply)[0], render(turns)
        shown, rest = _between(rest, one, first_reply), rest.partition(first_reply)[2]
        between = rest[: rest.index(two)]
    except ValueError:
        raise _unusable(name) from None
    if not begin.startswith(first + one):
        raise _unusable(name)
    if not begin.startswith(alone):
        opened = alone[len(commonprefix([begin, alone])) :]
        raise ConfigError(
            f"template.chat: the chat template of {name} begins a reply with {opened!r}, but puts no given reply "
            "after that, so options would be scored where no reply is, such as in a thought. Turn thoughts off in "
            "template.chat_arguments, such as {'enable_thinking': False}, or set template.chat=false."
        )
    lead = begin[len(alone) :]
    thought, lead = lead.rstrip(" "), lead[len(lead.rstrip(" ")) :]
    frame = Frame(first, cue + thought, shown.removesuffix(lead), lead, between)
    if not cue or not shown.endswith(lead) or render(turns) != _conversation(frame, turns, cue):
        raise _unusable(name)
    return frame


def _between(text: str, before: str, after: str) -> str:
    start = text.index(before) + len(before)
    return text[start : text.index(after, start)]


def _conversation(frame: Frame, turns: Sequence[str], cue: str) -> str:
    """Return the text of a conversation that ends in a prompt and the header of the reply."""
    text = frame.first
    for prompt, reply in zip(turns[::2], turns[1::2], strict=False):
        text += prompt + frame.shown + frame.lead + reply + frame.between
    return text + turns[-1] + cue


def _unusable(name: str) -> ConfigError:
    return ConfigError(
        f"template.chat: the chat template of {name} does more than put text around each message, so a solved "
        "example would differ from a conversation. Set template.chat=false, and put its text into template.prompt."
    )
