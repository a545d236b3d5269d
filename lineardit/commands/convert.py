"""`lineardit convert`: convert a pretrained model to linear attention; write an adapter or a merged pipeline."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from .completion import dtypes, methods
from .options import Offline, Revision
from .prompts import parse_size

PROFILE = "Layer by layer, within a budget"
WEIGHTS = "With weights"

FromProfile = Annotated[
    Path | None,
    typer.Option(
        "--from-profile", rich_help_panel=PROFILE, metavar="FILE", help="Profile written by `lineardit profile`."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PROFILE,
        metavar="SHARE|radius:R",
        help="Share of full attention's operations, or the cost of radius R in every layer.",
    ),
]
BudgetSize = Annotated[
    str,
    typer.Option(rich_help_panel=PROFILE, metavar="WIDTHxHEIGHT", help="Picture size at which operations are counted."),
]
Choices = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PROFILE,
        metavar="R,...,METHOD,...,full",
        help="Choices for each layer; default: all profiled windows, and full.",
    ),
]


def convert(
    ctx: typer.Context,
    base: Annotated[
        str,
        typer.Argument(metavar="ADAPTER_OR_BASE", help="Pipeline in diffusers' format, or an adapter to rewrite."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write, or one file if it ends in .safetensors.")
    ],
    method: Annotated[
        str | None, typer.Option(help="Method, with its settings below; default: a hybrid.", autocompletion=methods)
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Convert only modules whose name matches this pattern.")] = None,
    min_tokens: Annotated[
        int, typer.Option(help="Keep full attention in UNet levels with fewer image tokens at the native size.")
    ] = 0,
    dense_below: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Run the original attention in calls with fewer image tokens, while nothing is trained.",
        ),
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")] = False,
    from_profile: FromProfile = None,
    budget: Budget = None,
    budget_size: BudgetSize = "4096x4096",
    choices: Choices = None,
    importer: Annotated[
        str | None,
        typer.Option(
            "--import",
            rich_help_panel=WEIGHTS,
            metavar="KIND:PATH",
            help="Import published weights: clear:FILE or linfusion:DIR.",
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", rich_help_panel=WEIGHTS, help="Write the whole pipeline with trained weights merged."),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            rich_help_panel=WEIGHTS,
            autocompletion=dtypes,
            help="Dtype of the weights that --merge writes; auto: that in which each part of the base is stored.",
        ),
    ] = "auto",
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Convert a model to an adapter, from its configs. Also rewrites or merges an adapter."""
    from ..linearize.adapters.adapter import find_adapter
    from ..linearize.adapters.conversion import convert_and_merge, convert_base, refuse_choices, repack_adapter
    from ..linearize.adapters.opening import named_dtype
    from ..linearize.methods import RECOMMENDED
    from .quiet import quiet_libraries

    quiet_libraries()
    config = _config(method, ctx.obj)
    if from_profile is not None or budget is not None or choices is not None:
        if (config, importer, layers, min_tokens) != (None, None, None, 0):
            raise ValueError("--from-profile chooses method and layers: leave --method, --import and --layers out")
        config = _from_profile(from_profile, base, budget, budget_size, choices, revision=revision, offline=offline)
    output_options: dict[str, Any] = {
        "output": output,
        "revision": revision,
        "offline": offline,
        "overwrite": overwrite,
    }
    conversion: dict[str, Any] = {
        "layers": layers,
        "min_tokens": min_tokens,
        "dense_below": dense_below,
        "importer": importer,
    }
    if config is None and importer is None and find_adapter(base, revision=revision, offline=offline) is None:
        config = RECOMMENDED
    if merge:
        convert_and_merge(
            base, config, dtype="auto" if dtype == "auto" else named_dtype(dtype), **conversion, **output_options
        )
        print(f"Wrote {output}; generate with: lineardit generate {quote(str(output))} PROMPT")
        return
    if config is None and importer is None:
        refuse_choices(layers, min_tokens, dense_below)
        repack_adapter(base, **output_options)
    else:
        convert_base(base, config, **conversion, **output_options)
    print(f"Wrote {output}; see what it does with: lineardit inspect {quote(str(output))}")


def _config(method: str | None, entries: dict[str, Any]) -> Any:
    """The method's config; None without a method."""
    from ..linearize.methods import config_from_dict

    if method is not None:
        return config_from_dict({"method": method, **entries})
    if entries:
        raise ValueError(f"{', '.join(entries)} is a setting of a method: name the method with --method")
    return None


def _from_profile(
    file: Path | None,
    base: str,
    budget: str | None,
    size: str,
    choices: str | None,
    *,
    revision: str | None,
    offline: bool,
) -> dict[str, Any]:
    """Configs by glob, within the budget."""
    from ..linearize.adapters.base import read_base
    from ..linearize.measures.attention_profile import read_profile
    from ..linearize.measures.budget import check_profile, parse_budget, parse_choices, propose

    if file is None or budget is None:
        raise ValueError("--from-profile FILE and --budget go together, for example --budget 0.25 or radius:8")
    profile = read_profile(file)
    check_profile(profile, read_base(base, revision=revision, offline=offline))
    proposal = propose(
        profile,
        parse_budget(budget),
        size=parse_size(size),
        choices=None if choices is None else parse_choices(profile, choices),
    )
    print(proposal)
    return dict(proposal.configs)
