"""`accelerate launch -m lineardit.distill CONFIG.toml [--resume latest] [--set table.key=value ...]`."""

import argparse
import logging
import os
import sys

from .launch import QUIET

LESS_MEMORY = (
    "raise run.gradient_accumulation, set run.gradient_checkpointing = true or base.dtype = 'bfloat16', and go on with "
    "--resume latest"
)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or after one sentence 2 where the input is wrong, 1 where memory runs out."""
    parser = argparse.ArgumentParser(prog="lineardit.distill", description="Distill a model into linear attention.")
    parser.add_argument("config", help="TOML file")
    parser.add_argument("--resume", choices=["latest"], help="go on after the newest whole checkpoint of the run")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="change a setting")
    options = parser.parse_args(arguments)
    for name, value in QUIET.items():  # before the libraries are imported, which some of them remark upon
        os.environ.setdefault(name, value)
    from ..linearize.errors import is_out_of_memory
    from .config_tables import load_config
    from .diverged import DivergedError
    from .train import distill

    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":  # one process speaks for all
        logging.getLogger("lineardit").setLevel(logging.INFO)
    try:
        distill(load_config(options.config, options.set), resume=options.resume is not None)
    except (ValueError, OSError, DivergedError) as error:
        sys.stderr.write(f"lineardit.distill: {error}\n")
        return 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"lineardit.distill: out of memory: {' '.join(str(error).split())}; {LESS_MEMORY}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("lineardit.distill: interrupted; --resume latest goes on after the newest checkpoint\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
