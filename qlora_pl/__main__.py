"""``qlora-pl COMMAND ...``: from the words of a command line to the command.

Imports only what the command needs, so that ``qlora-pl --help`` answers at once: torch alone takes
longer to import than a person waits without wondering.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings

from qlora_pl import __version__
from qlora_pl.allocator import prefer_expandable_segments
from qlora_pl.commands import COMMANDS, OTHER_COMMANDS, TRAINER_COMMANDS
from qlora_pl.errors import QLoRAError, did_you_mean
from qlora_pl.redaction import RedactingFormatter, print_redacted_traceback, redact

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ENODEV,
)
"""What a disk answers that is full, broken, read-only or gone."""


def help_text() -> str:
    """What ``qlora-pl --help`` prints."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())
    return f"""usage: qlora-pl COMMAND [--config FILE] [--KEY VALUE ...]

QLoRA fine-tuning in PyTorch Lightning {__version__}.

commands:
{commands}

qlora-pl COMMAND --help         every key of a command, with its meaning and default
qlora-pl COMMAND --print_config the same as a file that runs
qlora-pl --version"""


def main() -> int:
    """Run the command in ``sys.argv``; a user's mistake is one sentence and exit code 2."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if command in ("-V", "--version"):
        print(f"qlora-pl {__version__}")
        return 0
    if command not in COMMANDS:
        end = did_you_mean(command, COMMANDS)
        known = "" if end != "." else f" (there are {', '.join(COMMANDS)})"
        return fail(f"no command is called '{command}'{known}{end}")
    try:
        if command in TRAINER_COMMANDS:
            return run_trainer_command()
        return run_other_command(command)
    except QLoRAError as error:
        fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:  # outside of Lightning's loops, so nothing was being trained
        fail("Stopped.")
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(disk_failed(error))
        return 1


def run_trainer_command() -> int:
    """Hand over to Lightning's command line."""
    # bitsandbytes brings a second OpenMP runtime; two pools that spin on the same cores slow every
    # step 5 to 30 times. Must be set before either is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers warn otherwise
    prefer_expandable_segments(os.environ)
    quieten()
    from qlora_pl.cli import QLoRACLI  # slow to import

    for library in ("lightning.pytorch", "lightning.fabric"):  # importing it sets these to INFO
        logging.getLogger(library).setLevel(logging.WARNING)
    QLoRACLI()  # no arguments: Lightning starts further processes with this one's
    return 0


def run_other_command(name: str) -> int:
    """Hand over to a command that is not Lightning's, with the words that follow it."""
    command = OTHER_COMMANDS[name]
    if command.loads_torch:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see run_trainer_command
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if command.trains:
        prefer_expandable_segments(os.environ)
    quieten()
    return command.entry()(sys.argv[2:])


def disk_failed(error: OSError) -> str:
    """One sentence for a disk's error that nobody on the way has put into words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full; free some space and resume with --ckpt_path last."
    where = "A file" if error.filename is None else f"'{error.filename}'"
    return (
        f"{where} could not be read or written ({error.strerror}); what was saved before is "
        "untouched: see to the disk and resume with --ckpt_path last."
    )


def quieten() -> None:
    """Let this project speak, and the libraries only when something is wrong.

    Each pattern is a message that is untrue or useless here; everything else gets through.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = print_redacted_traceback
    logging.getLogger("qlora_pl").setLevel(logging.INFO)
    for useless in (
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning under torch 2.13
        ".*does not have many workers",  # rows are encoded already; a worker would only cost memory
        "You're resuming from a checkpoint that ended before the epoch",  # the data module resumes
        ".*smaller than the logging interval",
        "Total length of `list` across ranks is zero",  # no validation rows were asked for
        ".*when logging on epoch level in distributed setting",  # the sums are exchanged already
        "The `srun` command is available on your system",
        "LightningCLI's args parameter is intended",  # a run is read for a command of another name
    ):
        warnings.filterwarnings("ignore", message=useless)


def fail(sentences: str) -> int:
    """Print what went wrong, a line a problem, and return the exit code of a user's mistake."""
    for sentence in redact(sentences).splitlines():
        print(f"qlora-pl: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
