"""From tasks to tensors: prompts, encoded examples and episodes."""

from bayes_lora.episodes.encoder import Encoder
from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.episodes.sampler import EpisodeSampler
from bayes_lora.episodes.templates import TEMPLATES, PromptTemplate

__all__ = ["TEMPLATES", "EncodedExample", "Encoder", "Episode", "EpisodeSampler", "PromptTemplate", "collate"]
