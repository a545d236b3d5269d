"""The command line and Python API with a local Hub server: downloads, uploads, and error messages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from lineardit import Clear, linearize_
from lineardit.examples.tiny_flux import path
from tests.hub_server import COMMIT, HubServer, serve

# Runs in its own process: the client reads the Hub's address when it is imported. `adapter`: a path to write to.
SCRIPT = """
import os, sys
from pathlib import Path

import diffusers
import lineardit
from lineardit.cli import run

adapter = sys.argv[1]
assert run(["convert", "me/model", "--method", "clear", "--radius", "4", "-o", adapter]) == 0
assert run(["generate", adapter, "a red circle", "--size", "512x512", "--plan"]) == 0
for refused in (["me/gated"], ["me/missing"], ["me/model", "--revision", "other"]):
    assert run(["convert", *refused, "-o", f"{adapter} of none"]) == 2
assert not [*Path(os.environ["HF_HOME"]).rglob("*.safetensors")]

pipe = diffusers.FluxPipeline.from_pretrained("me/model")
lineardit.linearize_(pipe, lineardit.Clear(radius=4))
assert lineardit.push_to_hub(pipe, "me/student") == "https://huggingface.co/me/student"
weights = lineardit.from_pretrained("me/student").transformer.state_dict()
assert all(tensor.equal(weights[name]) for name, tensor in pipe.transformer.state_dict().items())

bare = lineardit.from_pretrained("me/denoiser")
kernels = [one for name, one in bare.named_parameters() if "linear_kernel" in name]
assert kernels and all((one == 0.5).all() for one in kernels)

load = lineardit.HighResolutionPipeline.from_pretrained
load("me/variant")
load("me/variant", offline=True)
for name, options in (("pickles", {}), ("configs", {}), ("configs", {"offline": True})):
    try:
        load(f"me/{name}", **options)
    except ValueError as error:
        print(error, file=sys.stderr)
    else:
        raise AssertionError(name)
"""


def test_hub_downloads_uploads_and_error_messages(tmp_path: Path) -> None:
    with serve(tmp_path / "hub") as hub:
        fill(hub)
        output = output_of_script(hub, tmp_path / "adapter")
    for sentence in (
        "me/gated is gated: accept its terms",
        "me/missing is neither a local folder nor a public Hub repository",
        "me/model has no revision 'other'",
        "me/pickles/transformer contains pickles",
        "me/configs/transformer has a config but no weights",
        "the weights of me/configs/transformer are not in the local cache",
    ):
        assert sentence in output
    assert "license: mit" in (hub.root / "me" / "student" / "README.md").read_text()
    manifest = json.loads((tmp_path / "adapter" / "lineardit.json").read_text())
    assert (manifest["base"], manifest["base_revision"], manifest["base_license"]) == ("me/model", COMMIT, "mit")


def fill(hub: HubServer) -> None:
    """A licensed model; copies gated, in one variant, with pickles, without weights; and a saved conversion."""
    model = hub.root / "me" / "model"
    shutil.copytree(path(), model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("gated", "variant", "pickles", "configs"):
        shutil.copytree(model, model.with_name(name))
    hub.gated.add("me/gated")
    for file in model.with_name("variant").rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    for file in model.with_name("pickles").rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    for file in model.with_name("configs").rglob("*.safetensors"):
        file.unlink()
    denoiser = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
    linearize_(denoiser, Clear(radius=4, pool_size=2))
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "linear_kernel" in name:
                parameter.fill_(0.5)
    denoiser.save_pretrained(model.with_name("denoiser"))


def output_of_script(hub: HubServer, adapter: Path) -> str:
    """The stderr of the script with this Hub; the cache is next to `adapter`."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(adapter.parent / "cache"), "HF_TOKEN": "hf_of_a_test"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", SCRIPT, str(adapter)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr
