"""The texts around prompts and answers of a chat model, from its tokenizer's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bayes_lora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Frame", "chat_frame"]

# Texts that no template contains or changes.
FIRST, ANSWER, SECOND = "<<first-prompt>>", "<<first-answer>>", "<<second-prompt>>"


class Frame(NamedTuple):
    """The texts around prompts ``x`` and answers ``y``: ``first x cue y between x cue y between x cue``.

    Attributes:
        first: before the first prompt: the beginning of the text, a system message if the template has a default one,
            and the header of the user's message.
        cue: after a prompt: the end of the user's message and the header of the assistant's.
        between: after an answer, up to the next prompt.
    """

    first: str
    cue: str
    between: str


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Extract the frame of a chat template by rendering a conversation of placeholder messages.

    Raises:
        ConfigError: the tokenizer has no chat template, or its template does more than put text around messages.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"template.chat: the tokenizer of {name} has no chat template. Set template.chat=false.")
    user, answer = {"role": "user", "content": FIRST}, {"role": "assistant", "content": ANSWER}
    alone = _render(tokenizer, [user])
    both = _render(tokenizer, [user, answer, {"role": "user", "content": SECOND}])
    try:
        first, rest = both.split(FIRST)
        _, rest = rest.split(ANSWER)
        between, cue = rest.split(SECOND)
    except ValueError:
        first = between = cue = ""
    if not cue or alone != first + FIRST + cue:
        raise ConfigError(
            f"template.chat: the chat template of {name} does more than put text around each message, so a solved "
            "example would differ from a conversation. Set template.chat=false, and put its text into template.prompt."
        )
    return Frame(first, cue, between)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
