"""Do the windows that a profile proposes beat one radius everywhere of the same cost? On the small model, untrained.

`python benchmarks/profile_budget.py` profiles examples/tiny_flux on a few training captions. Then, with the cost of
Clear(radius=R) in every layer as the budget, it converts the model as the knapsack proposes: by the error of each
layer's output (what `propose` uses), by the attention outside the window, and by the error with agents as a further
choice. Measured on held-out captions: the prediction's relative squared error on the teacher's own trajectory, and
latent MSE after sampling. Writes benchmarks/results/profile.json.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.files import write_json
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize import Agent, Clear, Profile, linearize_, profile_attention, propose, read_profile, restore_
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.measures.attention_profile import LayerProfile
from lineardit.linearize.measures.budget import describe_choice
from lineardit.plots import draw_profile

logger = logging.getLogger(__name__)

AGENT = Agent(num_agents=64)
RESULTS = Path(__file__).with_name("results")
Config = Clear | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The amount of work; the defaults take about five minutes on two idle cores."""

    side: int = 128  # pixels; 32 x 32 tokens
    text_tokens: int = 64
    steps: int = 8
    radii: tuple[float, ...] = (2, 3, 4, 5, 6, 8, 12)
    budgets: tuple[float, ...] = (3, 4, 6, 8)
    prompts: int = 3  # of the training captions, to profile
    captions: int = 4  # held out, to judge
    seed: int = 1000  # of the judged pictures


def _attention_lost(layer: LayerProfile) -> tuple[float, ...]:
    """Attention outside each window, mean over heads."""
    text = mean(layer.text)
    return tuple(1 - text - mean(column) for column in zip(*layer.mass, strict=True))


VALUES: dict[str, Callable[[LayerProfile], tuple[float, ...]]] = {
    "output error": lambda layer: layer.output_error,
    "attention lost": _attention_lost,
}


def replace_error(profile: Profile, value: Callable[[LayerProfile], tuple[float, ...]]) -> Profile:
    """The profile with another figure in place of the error by which `propose` spends the budget."""
    return replace(profile, layers=tuple(replace(layer, output_error=value(layer)) for layer in profile.layers))


class Judge:
    """The teacher's trajectories, and how far a converted model is from them."""

    def __init__(self, pipe: Any, plan: Plan) -> None:
        self.pipe, self.plan = pipe, plan
        self.captions = [scenes.sample(index, split="held_out").caption for index in range(plan.captions)]
        self.calls: list[tuple[dict[str, Any], Tensor]] = []
        handle = pipe.transformer.register_forward_hook(self._keep, with_kwargs=True)
        self.latents = self._sample()
        handle.remove()

    def _keep(self, _model: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((kwargs, output[0]))

    def _sample(self) -> Tensor:
        plan = self.plan
        return self.pipe(
            self.captions,
            height=plan.side,
            width=plan.side,
            num_inference_steps=plan.steps,
            max_sequence_length=plan.text_tokens,
            generator=[torch.Generator().manual_seed(plan.seed + index) for index in range(plan.captions)],
            output_type="latent",
        ).images

    def judge(self, config: Config) -> dict[str, float]:
        """Errors of the model with this conversion; the base is restored afterwards."""
        linearize_(self.pipe, config)
        latents = self._sample()
        errors = []
        for kwargs, target in self.calls[::2]:
            with torch.no_grad():
                prediction = self.pipe.transformer(**kwargs)[0]
            errors.append(float((prediction - target).square().sum() / target.square().sum()))
        restore_(self.pipe)
        per_picture = (latents - self.latents).square().mean((1, 2))
        return {
            "prediction_error": mean(errors),
            "latent_mse": float(per_picture.mean()),
            "latent_mse_by_picture": [round(one, 5) for one in per_picture.tolist()],
        }


def run(pipe: Any, profile: Profile, plan: Plan) -> list[dict[str, Any]]:
    """A row for each budget and way to spend it."""
    judge = Judge(pipe, plan)
    rows = []
    for radius in plan.budgets:
        proposals = {
            name: propose(replace_error(profile, value), Clear(radius=radius)) for name, value in VALUES.items()
        }
        uniform = proposals["output error"].budget
        proposals["windows and agents"] = propose(profile, Clear(radius=radius), choices=[*profile.windows, AGENT])
        conversions: dict[str, tuple[Config, int, Any]] = {
            "uniform": (Clear(radius=radius), uniform, f"radius {radius:g}")
        }
        conversions |= {name: (one.configs, one.flops, layer_methods(one.chosen)) for name, one in proposals.items()}
        for name, (config, flops, chosen) in conversions.items():
            row = {"budget": f"radius:{radius:g}", "spent by": name, **judge.judge(config)}
            rows.append(
                row | {"flops": flops, "share": flops / proposals["output error"].dense_flops, "chosen": chosen}
            )
            if name in proposals:
                rows[-1]["error_of_layers"] = sum(layer_errors(profile, proposals[name].chosen))
            logger.info("%s", as_line(row))
    return rows


def layer_methods(chosen: Mapping[str, Any]) -> dict[str, str]:
    """The method of each layer, in words."""
    return {module: describe_choice(one) for module, one in chosen.items()}


def layer_errors(profile: Profile, chosen: Mapping[str, Any]) -> list[float]:
    """The profiled error of each layer's output; 0 for full attention."""
    candidates = profile.candidates
    pairs = ((layer, chosen[layer.module]) for layer in profile.layers)
    return [0.0 if one is None else layer.output_error[candidates.index(one)] for layer, one in pairs]


def as_line(row: Mapping[str, Any]) -> str:
    figures = f"prediction error {row['prediction_error']:.4f}  latent MSE {row['latent_mse']:.4f}"
    return f"{row['budget']:9}  {row['spent by']:18}  {figures}"


def load_or_profile(pipe: Any, plan: Plan, file: Path) -> Profile:
    """The profile that an earlier call of this version left in `file`, or a new one."""
    with suppress(ValueError):  # none, or another version's
        stored = read_profile(file)
        if (stored.radii, stored.methods) == (plan.radii, (AGENT,)):
            return stored
    captions = [scenes.sample(index).caption for index in range(plan.prompts)]
    drawing = {"steps": plan.steps, "max_sequence_length": plan.text_tokens}
    side = (plan.side, plan.side)
    profile = profile_attention(pipe, captions, size=side, radii=plan.radii, methods=(AGENT,), **drawing)
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.write(file)
    draw_profile(profile, file.with_suffix(".png"))
    return profile


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path("runs/profile"), help="where the profile is kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--base", type=Path, default=path())
    options = parser.parse_args(arguments)
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lineardit").setLevel(logging.WARNING)
    plan = Plan()
    pipe = open_pipeline(options.base)
    pipe.set_progress_bar_config(disable=True)
    profile = load_or_profile(pipe, plan, options.directory / "profile.json")
    rows = run(pipe, profile, plan)
    write_json(options.results / "profile.json", {"plan": asdict(plan), "rows": rows})


if __name__ == "__main__":
    main()
