"""The table of commands: what each is called, what it does, and where it begins.

Nothing is imported before its command is asked for, so that ``qlora-pl --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

TRAINER_COMMANDS = {
    "fit": "Train LoRA adapters on a 4-bit base.",
    "validate": "Loss and perplexity on the validation rows.",
    "test": "Loss and perplexity on the test rows.",
    "predict": "Answer the prompts of the validation rows, into predictions.jsonl.",
}
"""Those of Lightning's command line, which reads the words itself."""


@dataclass(frozen=True)
class Command:
    """A command that reads its own words."""

    text: str
    """What ``--help`` says of it."""
    where: str
    """``module:function`` in this package; the function takes the words and returns the exit
    code."""
    loads_torch: bool = True
    """Whether anything of it computes, so that threads must be told to wait quietly."""
    trains: bool = False
    """Whether it trains in this very process, so that memory is given out as for ``fit``."""

    def entry(self) -> Callable[[Sequence[str]], int]:
        """The function, imported now."""
        module, _, function = self.where.partition(":")
        entry: Callable[[Sequence[str]], int] = getattr(
            import_module(f"qlora_pl.{module}"), function
        )
        return entry


OTHER_COMMANDS = {
    "plan": Command(
        "Say what a run takes of a GPU's memory, how long and at what price, without a GPU.",
        "planning.command:plan_command",
    ),
    "smoke": Command(
        "Try a run, shrunken, on the CPU: what would fail later fails now.",
        "smoke.command:smoke",
    ),
    "ablate": Command(
        "Train a grid of runs, and say what differs and what does not.",
        "ablation.command:ablate_command",
    ),
    "inspect": Command(
        "Look at a run's rows (data), a base (model) or an adapter before using it.",
        "inspection.command:inspect",
    ),
    "generate": Command(
        "Answer prompts with an adapter folder, or with a model alone.",
        "inference.generate:generate_command",
    ),
    "chat": Command(
        "Talk to an adapter, or to a model alone, in the terminal or on a page.",
        "chat.command:chat_command",
    ),
    "serve": Command(
        "Answer HTTP requests in OpenAI's format with an adapter, or a model alone.",
        "serving.command:serve_command",
    ),
    "merge": Command(
        "Put an adapter into its base, and measure what that changes.",
        "merging.merge:merge_command",
    ),
    "export": Command(
        "Write an adapter or a model for vLLM, llama.cpp, Ollama or the Hub.",
        "exporting.command:export_command",
    ),
    "bench": Command(
        "Measure speed, memory and time by part, of a run or of a known shape.",
        "benching.command:bench_command",
        trains=True,
    ),
    "doctor": Command(
        "Look at this machine as a run would, and say what that means for training.",
        "doctor.command:doctor",
        loads_torch=False,
    ),
    "explain": Command(
        "explain KEY: what a key of a run means, where it acts, what it goes with.",
        "explaining.command:explain",
    ),
    "prove-resume": Command(
        "Kill and resume a few steps of a run, and compare every byte with the whole.",
        "proof.command:prove_resume",
    ),
}
COMMANDS = TRAINER_COMMANDS | {name: command.text for name, command in OTHER_COMMANDS.items()}
"""All of them, in the order of ``--help``."""
