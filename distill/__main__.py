"""`accelerate launch -m lineardit.distill CONFIG.toml [--resume latest] [--set table.key=value ...]`."""

import argparse
import logging
import os
import sys

from .config_tables import load_config
from .diverged import DivergedError
from .train import distill


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after one sentence on what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="lineardit.distill", description="Distill a model into linear attention.")
    parser.add_argument("config", help="TOML file")
    parser.add_argument("--resume", choices=["latest"], help="go on after the newest whole checkpoint of the run")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="change a setting")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":  # one process speaks for all
        logging.getLogger("lineardit").setLevel(logging.INFO)
    try:
        distill(load_config(options.config, options.set), resume=options.resume is not None)
    except (ValueError, OSError, DivergedError) as error:
        sys.stderr.write(f"lineardit.distill: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("lineardit.distill: interrupted; --resume latest goes on after the newest checkpoint\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
