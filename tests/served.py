"""What a server and its client do with an exported folder: transformers, peft and JSON alone, without this package."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn

VLLM_READS = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "init_lora_weights"}
"""The settings of plain LoRA that vLLM reads, in every version since 0.6."""
HARMLESS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "layers_to_transform", "fan_in_fan_out"),
}
"""Settings that vLLM leaves aside, and that the names of the tensors, or the base, say as well."""
NAME = re.compile(r"base_model\.model\.(?P<module>[A-Za-z_]\w*(?:\.\w+)*)\.lora_(?P<factor>[AB])\.weight")
LARGEST_RANK = 512


def check_vllm_rules(folder: Path, base: nn.Module) -> dict[str, Any]:
    """Check an adapter's folder by the rules of vLLM's loader and of PEFT's format; return its configuration."""
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert config.keys() <= VLLM_READS | HARMLESS and {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["bias"] == "none" and config["modules_to_save"] is None and config["init_lora_weights"] is True
    rank, alpha, targets = (config[name] for name in ("r", "lora_alpha", "target_modules"))
    assert type(rank) is int and 1 <= rank <= LARGEST_RANK and type(alpha) is int and alpha == rank
    assert isinstance(targets, list) and all(re.fullmatch(r"\w+(\.\w+)*", name) for name in targets)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        match = NAME.fullmatch(name)
        assert match is not None, name
        modules.setdefault(match["module"], {})[match["factor"]] = value
    for name, factors in modules.items():
        assert factors.keys() == {"A", "B"}, name
        assert any(f".{name}".endswith(f".{target}") for target in targets), name
        module = base.get_submodule(name)
        sizes = tuple(module.weight.shape)  # type: ignore[arg-type]
        out, into = sizes if isinstance(module, nn.Linear) else sizes[::-1]  # Conv1D holds the transpose
        assert (factors["A"].shape, factors["B"].shape) == ((rank, into), (out, rank)), name
    return config


def token_log_probs(model: Any, tokens: Sequence[int]) -> list[float | None]:
    """Log-probability of each token given those before it, nats; None for the first."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([list(tokens)])).logits[0].log_softmax(-1)
    return [None, *log_probs[:-1].gather(1, torch.tensor([*tokens[1:]])[:, None])[:, 0].tolist()]


def adapters_of(folder: Path, base: Callable[[], Any]) -> dict[str, Any]:
    """Load each adapter of an exported folder with PEFT, into a base of its own."""
    names = json.loads((folder / "scores.json").read_text())["adapters"]
    load = peft.PeftModel.from_pretrained
    return {name: load(base(), folder / name, autocast_adapter_dtype=False).eval() for name in names}


def log_probs_by_hand(folder: Path, models: dict[str, Any], tokenizer: Any, question: str) -> dict[str, list[float]]:
    """Log-probabilities of the options of a question, of each adapter and of the average, as ``scores.json`` says."""
    facts = json.loads((folder / "scores.json").read_text())
    text = facts["prompt"].replace("{input}", question)
    prompt = facts["prefix"] + tokenizer(text, add_special_tokens=False)["input_ids"]
    found = {}
    for name, head in facts["adapters"].items():
        scores = []
        for option in facts["option_tokens"]:
            logs = token_log_probs(models[name], prompt + option)[len(prompt) :]
            scores.append(math.fsum(logs) / (len(option) if facts["normalize"] == "mean" else 1))  # type: ignore[arg-type]
        mean = math.fsum(scores) / len(scores)
        biases = head["bias"] + [0.0] * len(scores)
        values = [head["slope"] * (one - mean) + biases[k] for k, one in enumerate(scores)]
        found[name] = _log_softmax([one / facts["temperature"] for one in values])
    draws = [found[f"draw-{k}"] for k in range(facts["num_draws"])] or [found["mean"]]
    found["average"] = [math.log(math.fsum(map(math.exp, each)) / len(draws)) for each in zip(*draws, strict=True)]
    return found


def _log_softmax(values: Sequence[float]) -> list[float]:
    most = max(values)
    total = most + math.log(math.fsum(math.exp(one - most) for one in values))
    return [one - total for one in values]


@contextmanager
def completions_server(folder: Path, base: Callable[[], Any]) -> Iterator[str]:
    """Serve an exported folder over HTTP as vLLM's ``/v1/completions`` answers ``prompt_logprobs``; yield the address.

    Adapters are read on the first request, because the folder may be written later.
    """
    models: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            models.update({} if models else adapters_of(folder, base))
            prompts = request["prompt"]
            prompts = [prompts] if isinstance(prompts[0], int) else prompts
            assert self.path == "/v1/completions" and request["max_tokens"] == 1 and request["prompt_logprobs"] == 1
            answer = {"choices": [self.choice(i, models[request["model"]], ids) for i, ids in enumerate(prompts)]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def choice(self, index: int, model: Any, tokens: list[int]) -> dict[str, Any]:
            logs = token_log_probs(model, tokens)
            named = [
                None if p is None else {str(t): {"logprob": p, "rank": 1}} for t, p in zip(tokens, logs, strict=True)
            ]
            return {"index": index, "text": "", "finish_reason": "length", "prompt_logprobs": named}

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
