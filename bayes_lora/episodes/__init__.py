"""From tasks to tensors: prompts, encoded examples and episodes.

The names below are imported when they are first used: prompt templates are read without torch.
"""

from typing import TYPE_CHECKING

from bayes_lora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from bayes_lora.episodes.encoder import Encoder
    from bayes_lora.episodes.episode import Episode, collate
    from bayes_lora.episodes.packing import EncodedExample
    from bayes_lora.episodes.sampler import EpisodeSampler
    from bayes_lora.episodes.templates import TEMPLATES, PromptTemplate

__all__ = ["TEMPLATES", "EncodedExample", "Encoder", "Episode", "EpisodeSampler", "PromptTemplate", "collate"]

_MODULES = {
    "EncodedExample": "packing",
    "Encoder": "encoder",
    "Episode": "episode",
    "EpisodeSampler": "sampler",
    "PromptTemplate": "templates",
    "TEMPLATES": "templates",
    "collate": "episode",
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
