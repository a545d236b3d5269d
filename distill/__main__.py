"""`accelerate launch -m lineardit.distill CONFIG.toml [--resume latest|STEP] [--set table.key=value ...]`."""

import argparse
import logging
import os
import sys
import time
from contextlib import suppress
from typing import NoReturn

from .launch import QUIET_ENVIRONMENT, exit_with_launcher

MEMORY_ADVICE = (
    "raise run.gradient_accumulation or set run.gradient_checkpointing = true, and continue with --resume latest; a "
    "new run in another folder also needs less with base.dtype = 'bfloat16'"
)
REPORT_WAIT = 10  # seconds to wait for the process that reports why the run ended


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.format_usage().strip()}")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or after a one-sentence message 1 (out of memory), 2 (`USER_ERRORS`) or 130 (interrupted)."""
    for name, value in QUIET_ENVIRONMENT.items():  # before importing the libraries, some of which log on import
        os.environ.setdefault(name, value)
    from ..linearize.errors import error_text, is_out_of_memory
    from .config_tables import load_config
    from .processes import USER_ERRORS
    from .train import distill

    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":  # only one process logs
        logging.getLogger("lineardit").setLevel(logging.INFO)
    try:
        options = _parse_arguments(arguments)
        if options.launcher:
            exit_with_launcher(options.launcher)
        distill(load_config(options.config, options.set), resume=options.resume)
    except USER_ERRORS as error:
        _report(error_text(error), reported_elsewhere=_is_reported_elsewhere(error))
        return 2
    except RuntimeError as error:
        if _other_process_failed(error):
            time.sleep(REPORT_WAIT)  # that process reports why it ended, and the launcher ends this one
        if not is_out_of_memory(error):
            raise
        message = f"out of memory: {' '.join(str(error).split())}; {MEMORY_ADVICE}"
        _report(message, reported_elsewhere=not _is_first_out_of_memory())
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _report("interrupted; --resume latest continues after the newest checkpoint")
        return 130
    return 0


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; raises ValueError if it is invalid."""
    parser = _Parser(prog="lineardit.distill", description="Distill a model into linear attention.")
    parser.add_argument("config", help="TOML file")
    parser.add_argument(
        "--resume",
        type=_resume,
        metavar="latest|STEP",
        help="continue from the newest complete checkpoint, or from that of a step",
    )
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="change a setting")
    elastic = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # started by torchrun or accelerate
    parser.add_argument("--launcher", type=int, default=elastic, help=argparse.SUPPRESS)  # to end with the parent
    return parser.parse_args(arguments)


def _resume(text: str) -> str | int:
    if text == "latest" or text.isdecimal():
        return text if text == "latest" else int(text)
    raise argparse.ArgumentTypeError(f"must be latest or the step of a checkpoint, got {text!r}")


def _report(message: str, *, reported_elsewhere: bool = False) -> None:
    """Print why the run ended; if `reported_elsewhere`, wait: another process prints it, and the launcher ends both."""
    if reported_elsewhere:
        with suppress(KeyboardInterrupt):
            time.sleep(REPORT_WAIT)
    else:
        sys.stderr.write(f"lineardit.distill: {message}\n")


def _other_process_failed(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process of the launch has ended."""
    from torch import distributed

    connection_lost = any(word in str(error) for word in ("closed by peer", "reset by peer"))  # gloo's messages
    return _in_process_group() and (connection_lost or isinstance(error, distributed.DistError))


def _in_process_group() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def _is_reported_elsewhere(error: Exception) -> bool:
    """Whether another process reports it: rank 0 if all raise it; local rank 0 before the process group exists."""
    from torch import distributed

    from .processes import RAISED_BY_ALL

    if not _in_process_group():
        return os.environ.get("LOCAL_RANK", "0") != "0"
    return RAISED_BY_ALL in getattr(error, "__notes__", ()) and distributed.get_rank() != 0


def _is_first_out_of_memory() -> bool:
    """Whether this process is the first of the launch to run out of memory, counted in the group's store."""
    from torch import distributed

    if not _in_process_group():
        return True
    try:
        return distributed.distributed_c10d._get_default_store().add("out of memory", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return True


if __name__ == "__main__":
    sys.exit(main())
