"""Whether the end of an answer is scored with options: accuracy and NLL of the pretrained model on CrossFit tasks.

python benchmarks/option_ends.py DATA/crossfit --output benchmarks/results/option_ends.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bayes_lora import load_language_model
from bayes_lora.episodes import collate
from bayes_lora.episodes.answers import AnswerTokens
from bayes_lora.tasks import load_tasks

TASKS = "circa superglue-multirc qasc ai2_arc openbookqa glue-sst2 trec emotion race-middle glue-rte"


class Never(AnswerTokens):
    """Scores the beginning of the text, even where one option begins with another."""

    def __call__(self, example: Any, texts: Any) -> Any:
        """Return the tokens of each option."""
        return [self.ids(text) for text in texts], False


class Always(AnswerTokens):
    """Scores the end of every option."""

    def __call__(self, example: Any, texts: Any) -> Any:
        """Return the tokens of each option and its end."""
        return [self.ids(text + self.end) for text in texts], False


@torch.no_grad()
def measure(lm: Any, answers: type[AnswerTokens], examples: list[Any]) -> list[tuple[float, float, int]]:
    """Return whether the best option is gold, the negative log-likelihood in nats, and the number of tokens."""
    known = lm.encoder.answers
    lm.encoder.answers = answers(known.text, known.before, known.end, known.longest)
    lm.encoder.forget()
    zero = {site: value[None, None] for site, value in lm.sites.initial().items()}
    found = []
    for start in range(0, len(examples), 8):
        episode = collate([lm.encoder(examples[start : start + 8])])
        log_probs = lm(zero, episode).log_softmax(-1)[0]
        gold = episode.answer[0]
        tokens = [len(example) for example in episode.examples[0] if example is not None]
        nll = -log_probs.gather(-1, gold[:, None])[:, 0]
        found += zip((log_probs.argmax(-1) == gold).tolist(), nll.tolist(), tokens, strict=True)
    lm.encoder.answers = known
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("crossfit", type=Path)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lm = load_language_model(max_length=384, dtype=torch.float32, cache_folder=None)
    rows: dict[str, Any] = {}
    for name in options.tasks.split():
        [task] = load_tasks(options.crossfit / name).values()
        examples = [*task.query, *task.support][: options.examples]
        begins = [lm.encoder.answers(e, lm.encoder.template.render(e)[1])[0] for e in examples]
        plain = [[lm.encoder.answers.ids(text) for text in lm.encoder.template.render(e)[1]] for e in examples]
        rows[name] = {"ended": sum(one != other for one, other in zip(begins, plain, strict=True))}
        for kind in (Never, AnswerTokens, Always):
            accuracy, nll, tokens = torch.tensor(measure(lm, kind, examples)).double().mean(0).tolist()
            rows[name][kind.__name__] = {"accuracy": accuracy, "nll": nll, "tokens": tokens}
        print(name, json.dumps(rows[name]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
