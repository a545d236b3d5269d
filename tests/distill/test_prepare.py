"""The teacher's samples: their content, resuming, and refused input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from tiny_distill import PROMPTS, SIZES, build_tiny
from torch import Tensor

from lineardit import Clear, linearize_
from lineardit.distill.data import TeacherSamples
from lineardit.distill.latent_functions import latent_functions
from lineardit.distill.prepare import prepare
from lineardit.linearize.locks import folder_lock

SETTINGS: dict[str, Any] = {"sizes": SIZES, "steps": 2, "max_sequence_length": 8, "shard_size": 5}


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def test_prepare_stores_what_the_pipeline_makes(data: Path, pipe: FluxPipeline) -> None:
    samples = TeacherSamples(data)
    index = 3
    sample, batch = samples.samples[index], samples.load([index])
    assert (sample.prompt, sample.seed, sample.height, sample.width) == (PROMPTS[index], index, *SIZES[index % 2])
    assert batch.grid == (8, 6)
    call = {"height": sample.height, "width": sample.width, "num_inference_steps": 2, "max_sequence_length": 8}
    generator = torch.Generator("cpu").manual_seed(sample.seed)
    latents = pipe([sample.prompt], generator=[generator], output_type="latent", **call).images
    # the stored latents were made in a batch, in which sums may run in another order
    torch.testing.assert_close(batch.latents, latents, rtol=1e-4, atol=1e-5)
    embeds, pooled, _ = pipe.encode_prompt([sample.prompt], None, max_sequence_length=8)
    torch.testing.assert_close(batch.conditions["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.conditions["pooled_prompt_embeds"], pooled, rtol=1e-4, atol=1e-5)


def test_prepare_warns_of_a_truncated_prompt(
    pipe: FluxPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(pipe, ["a yellow cross at the bottom right on shaded sky"], tmp_path / "samples", **SETTINGS)
    assert "is truncated to 8 tokens (set by --max-sequence-length), losing 'on shaded sky'" in caplog.text


def test_decode_equals_the_pipelines_picture(data: Path, pipe: FluxPipeline) -> None:
    batch = TeacherSamples(data).load([1, 3])
    pictures = latent_functions(pipe.transformer).decode(pipe, batch.latents, batch.grid)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (1, 3)]
    again = pipe(
        prompt_embeds=batch.conditions["prompt_embeds"],
        pooled_prompt_embeds=batch.conditions["pooled_prompt_embeds"],
        height=32,
        width=24,
        num_inference_steps=2,
        generator=generators,
        output_type="np",
    ).images
    for picture, expected in zip(pictures, again, strict=True):
        assert picture.size == (24, 32)
        decoded = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(32, 24, 3)
        assert (decoded / 255 - torch.from_numpy(expected)).abs().max() < 0.01


def test_prepare_resumes_after_the_last_whole_shard(data: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    last = folder / "shard-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-10])
    first = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is missing or truncated; run `lineardit prepare`"):
        TeacherSamples(folder)
    prepare(pipe, PROMPTS, folder, **SETTINGS)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == first
    expected = _tensors(data)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in _tensors(folder).items())
    assert json.loads((folder / "index.json").read_text()) == json.loads((data / "index.json").read_text())


def test_parts_make_the_same_samples_as_one_call(
    data: Path, pipe: FluxPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lineardit")
    folder = tmp_path / "data"
    prepare(pipe, PROMPTS, folder, part=(2, 2), **SETTINGS)
    assert sorted(path.name for path in folder.iterdir()) == ["index-2-of-2.json", "shard-00001.safetensors"]
    with pytest.raises(ValueError, match=r"holds 5 of 12 samples; run `lineardit prepare` again, for every part"):
        TeacherSamples(folder)
    prepare(pipe, PROMPTS, folder, part=(1, 2), **SETTINGS)
    messages = [record.getMessage() for record in caplog.records]  # each part has its own count
    assert f"part 2 of 2: its 5 samples are in {folder}" in messages
    assert f"part 1 of 2: its 7 samples are in {folder}, which now holds all 12" in messages
    together, alone = TeacherSamples(folder), TeacherSamples(data)
    assert together.fingerprint == alone.fingerprint
    expected = _tensors(data)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in _tensors(folder).items())


def test_call_without_parts_completes_unfinished_parts(pipe: FluxPipeline, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare(pipe, PROMPTS, folder, part=(2, 2), **SETTINGS)
    second = (folder / "shard-00001.safetensors").stat().st_mtime_ns
    prepare(pipe, PROMPTS, folder, **SETTINGS)
    assert (folder / "shard-00001.safetensors").stat().st_mtime_ns == second
    assert TeacherSamples(folder).fingerprint == TeacherSamples(data).fingerprint


def test_parts_of_different_settings_are_refused(pipe: FluxPipeline, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(pipe, PROMPTS, one, part=(1, 2), **SETTINGS)
    prepare(pipe, PROMPTS, two, part=(2, 2), **SETTINGS | {"seed": 7})
    for file in two.iterdir():
        shutil.copy(file, one)
    with pytest.raises(ValueError, match=r"index-2-of-2.json and index-1-of-2.json were made with different settings"):
        TeacherSamples(one)


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_prepare_refuses_a_part_out_of_range(pipe: FluxPipeline, tmp_path: Path, part: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"part must be \(i, n\) with 1 <= i <= n"):
        prepare(pipe, PROMPTS, tmp_path / "data", part=part, **SETTINGS)


def test_prepare_refuses_latents_that_are_not_finite(pipe: FluxPipeline, tmp_path: Path) -> None:
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"latents for 'a red circle' with seed 0 are not finite in torch.float32"):
        prepare(pipe, PROMPTS, tmp_path / "data", **SETTINGS)
    assert not (tmp_path / "data").exists()


def test_prepare_refuses_guidance_that_is_not_finite(pipe: FluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="guidance must be finite, got nan"):
        prepare(pipe, PROMPTS, tmp_path / "data", **SETTINGS, guidance=float("nan"))


def test_prepare_refuses_a_part_locked_by_another_process(pipe: FluxPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with folder_lock(folder, name=".index-1-of-2.json.lock"):
        with pytest.raises(ValueError, match=r"another process is using .*data \(process \d+ on .*\): wait for it"):
            prepare(pipe, PROMPTS, folder, **SETTINGS, part=(1, 2))
        prepare(pipe, PROMPTS, folder, **SETTINGS, part=(2, 2))
    prepare(pipe, PROMPTS, folder, **SETTINGS)
    assert len(TeacherSamples(folder)) == len(PROMPTS)
    assert not list(folder.glob(".*"))


def test_interrupted_prepare_leaves_no_partial_shard(pipe: FluxPipeline, tmp_path: Path) -> None:
    calls = []

    def stop_in_second_shard(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(stop_in_second_shard)
    settings = SETTINGS | {"sizes": SIZES[:1], "steps": 1, "batch_size": 5}
    with pytest.raises(KeyboardInterrupt):
        prepare(pipe, PROMPTS[:4] * 3, tmp_path / "data", **settings)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "index.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    with pytest.raises(ValueError, match="holds 10 of 12 samples; run `lineardit prepare` again"):
        TeacherSamples(tmp_path / "data")
    handle.remove()
    assert len(TeacherSamples(prepare(pipe, PROMPTS[:4] * 3, tmp_path / "data", **settings))) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "steps was 2, now 3"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"sizes": SIZES[:1]}, "sizes was"),
        ({"prompts": ["a red circle"] * 12}, "prompts was"),
        ({"pipe": "other"}, "teacher was"),
    ],
)
def test_prepare_refuses_other_settings(data: Path, pipe: FluxPipeline, change: dict[str, Any], message: str) -> None:
    if change.pop("pipe", None):
        pipe.transformer.proj_out.weight.data.add_(1)
    prompts = change.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match=f"was made with other settings: {message}.*: use those"):
        prepare(pipe, prompts, data, **SETTINGS | change)


def test_prepare_refuses_a_converted_pipeline_and_bad_sizes(pipe: FluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4 pixels for this model, got 32x30; nearest"):
        prepare(pipe, PROMPTS, tmp_path / "data", sizes=[(30, 32)])
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        prepare(pipe, PROMPTS, tmp_path / "data", steps=0)
    linearize_(pipe, Clear(radius=2))
    with pytest.raises(ValueError, match="must be the original pipeline"):
        prepare(pipe, PROMPTS, tmp_path / "data", sizes=SIZES)
    assert not (tmp_path / "data").exists()


def test_prepare_refuses_a_folder_of_other_files(pipe: FluxPipeline, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no index\.json"):
        prepare(pipe, PROMPTS, tmp_path, **SETTINGS)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_inputs_equal_the_pipelines(guidance_embeds: bool) -> None:
    pipe = build_tiny(guidance_embeds=guidance_embeds)
    seen: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    family = latent_functions(pipe.transformer)
    conditions = family.encode(pipe, ["a red circle", "a blue square"], 8)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)]
    call = {"height": 24, "width": 32, "steps": 2, "guidance": 3.0}
    family.generate(pipe, conditions, **call, generators=generators)
    handle.remove()
    sigma = family.shift(pipe.scheduler, torch.tensor([0.5, 0.5]), (6, 8))  # noise level of the second of two steps
    given = family.inputs(pipe.transformer, seen[1]["hidden_states"], sigma, conditions, grid=(6, 8), guidance=3.0)
    for name in given.keys() - {"return_dict", "guidance"}:
        torch.testing.assert_close(given[name], seen[1][name], rtol=1e-6, atol=0)
    assert (given["guidance"] is None) == (not guidance_embeds)
    if guidance_embeds:
        assert torch.equal(given["guidance"], seen[1]["guidance"])
