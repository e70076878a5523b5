"""Tiny real reward models and vLLM's real server for them, for the tests of the model-based rewards."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
from tiny_models import _BASE, _OWN, _randomise, make_tiny, tiny_tokenizer

LOCAL = {"device": "cpu", "dtype": "float32"}
TEMPLATE = "Instruction: {forbidden_prompt}\n\nResponse: {response}\n\n### Answer: "
SERVE = Path(__file__).parents[2] / "slurm" / "serve.py"
START_SECONDS = 300  # for a server, on a busy machine


def make_judge(path: Path, seed: int = 0, **config) -> str:
    """Return a causal LM, whose tokenizer puts <bos> before a text as Gemma's does."""
    from tokenizers.processors import TemplateProcessing

    make_tiny(path, "llama", layers=2, seed=seed, **config)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    tokenizer.save_pretrained(path)
    return str(path)


def make_classifier(path: Path, labels: list[str], *, seed: int = 0, **config) -> str:
    """Return a Llama with a classification head."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    names = dict(enumerate(labels))
    settings = {**_BASE, **_OWN["llama"], "id2label": names, "label2id": {v: k for k, v in names.items()}, **config}
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", vocab_size=131, num_hidden_layers=2, **settings)
    )
    _randomise(model, seed)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


class Server:
    """vLLM's server for one model, as slurm/serve.py starts it and starts it again, on 127.0.0.1."""

    def __init__(self, model: str, directory: Path, *options: str):
        self.model, self.options = model, ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", *options)
        self.log, self.url_file = directory / "server.log", directory / "server.url"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Begin starting the server."""
        command = [sys.executable, str(SERVE), "127.0.0.1", str(self.url_file), self.model, *self.options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def up(self) -> Server:
        """Wait until it answers; start it if it was ended."""
        if self.process is None:
            self.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.url_file.exists():
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the server does not start:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)
        return self

    @property
    def url(self) -> str:
        return self.url_file.read_text().strip()

    @property
    def processes(self) -> list[psutil.Process]:
        """vLLM's: the one that listens, then those that compute."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def answered(self, path: str) -> int:
        """Return the number of requests so far, by the server's own log."""
        return self.log.read_text().count(f'"POST {path} HTTP/1.1" 200')

    def end(self) -> None:
        """End the server as scancel does."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None
