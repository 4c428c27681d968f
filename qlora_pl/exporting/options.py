"""What ``qlora-pl export`` writes, and where: the settings that all targets share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_pl.errors import ConfigurationError
from qlora_pl.merging.merge import THRESHOLD
from qlora_pl.merging.scored_rows import SCORE_TOKENS

Target = Literal["vllm", "gguf", "ollama", "hub"]
Form = Literal["merged", "adapter"]
OutType = Literal["bf16", "f16", "f32", "q8_0"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written, and where it goes."""

    to: Target | None = None
    """For which engine: vllm (a folder and the command that serves it), gguf (llama.cpp's file),
    ollama (a Modelfile beside such a file), hub (pushed to the Hugging Face Hub)."""
    output: str | None = None
    """The folder that is written; must not exist yet."""
    form: Form | None = None
    """The adapter merged into its base, or the adapter alone, over the base in 16 bits; by default
    merged, and the adapter for vllm and hub."""
    llama_cpp: str | None = None
    """The folder with llama.cpp's converters; by default the environment's LLAMA_CPP_DIR, or where
    they lie beside this project."""
    convert: bool = False
    """Run llama.cpp's converter, too, whose command is only printed otherwise."""
    outtype: OutType = "bf16"
    """What the weights of a GGUF file are kept in; smaller ones are made of it by llama.cpp's
    llama-quantize. An adapter alone is kept in f32."""
    score_tokens: int = SCORE_TOKENS
    """Held-out tokens that are scored, at most; 0: nothing is scored."""
    threshold: float = THRESHOLD
    """KL to the trained model, in nats a token, above which nothing is merged, and an adapter alone
    is advised against."""
    force: bool = False
    """Merge all the same."""
    repo: str | None = None
    """For hub: the repository, as OWNER/NAME; made if there is none."""
    private: bool = True
    """For hub: whether nobody else sees it."""
    base_repo: str | None = None
    """For hub: what the base is called there, where training read it from a folder."""
    held_out: bool = False
    """For hub: push the held-out rows as well, which are rows of your data."""
    yes: bool = False
    """For hub: push without asking."""

    def __post_init__(self) -> None:
        problems = []
        if self.to is None:
            problems.append("--to: say for which engine, one of vllm, gguf, ollama and hub.")
        if self.output is None:
            problems.append("--output: name the folder that is to be written.")
        if self.score_tokens < 0:
            problems.append(f"--score-tokens: must be 0 or more, got {self.score_tokens}.")
        if self.threshold <= 0:
            problems.append(f"--threshold: must be above 0, got {self.threshold}.")
        for_hub = {"repo": self.repo, "base-repo": self.base_repo, "yes": self.yes or None}
        for flag in [name for name, value in for_hub.items() if value and self.to != "hub"]:
            problems.append(f"--{flag}: is for --to hub; leave it out.")
        if problems:
            raise ConfigurationError(problems)
