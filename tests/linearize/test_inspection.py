"""Converting and inspecting from config files alone."""

import json
from pathlib import Path

import pytest
from tiny_pipelines import flux_pipeline, saved_flux_pipeline

from lineardit import Clear, Hybrid, ProxyTokens, from_pretrained, linearize_, load_adapter_
from lineardit.kernels.window import implementations
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.linearize.errors import UnsupportedModelError
from lineardit.linearize.measures.inspection import inspect_base
from lineardit.linearize.methods import METHODS
from tiny_models import build

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_flux_pipeline(tmp_path / "base")


def test_convert_base_writes_an_adapter_that_loads(base: Path, tmp_path: Path) -> None:
    (base / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "weights")
    report = convert_base(base, Clear(radius=2, pool_size=4), output=tmp_path / "adapter")
    assert len(report.swapped) == 2
    (tmp_path / "weights").rename(base / "transformer" / "diffusion_pytorch_model.safetensors")
    entries = json.loads((tmp_path / "adapter" / "lineardit.json").read_text())
    assert (entries["base"], entries["base_license"], entries["trained"]) == (str(base), "tiny-license", [])
    kernel = from_pretrained(tmp_path / "adapter").transformer.transformer_blocks[0].attn.linear_kernel
    assert kernel.pool_weight.tolist() == [[1 / 16] * 4] * 4


def test_convert_base_takes_a_selection_of_layers(base: Path, tmp_path: Path) -> None:
    report = convert_base(base, Clear(radius=2), output=tmp_path / "adapter", layers="single_*")
    assert list(report.swapped) == ["single_transformer_blocks.0.attn"]
    assert list(load_adapter_(build("flux"), tmp_path / "adapter").swapped) == list(report.swapped)


def test_convert_base_overwrites_only_when_asked(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    convert_base(base, Clear(radius=2), output=output)
    before = (output / "lineardit.json").read_text()
    with pytest.raises(ValueError, match="overwrite"):
        convert_base(base, Clear(radius=3), output=output)
    assert (output / "lineardit.json").read_text() == before
    convert_base(base, Clear(radius=3), output=output, overwrite=True)
    assert (output / "lineardit.json").read_text() != before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"config": Clear(radius=2), "layers": "blocks.*"}, "matches no self-attention module; near names: "),
        ({"config": {}}, "nothing to convert: the mapping of patterns"),
        ({"config": Clear(radius=2), "importer": "claer:x"}, r"importer .* be clear:FILE.*did you mean clear"),
        ({"config": Clear(radius=2), "importer": "clear:"}, r"importer .* must be clear:FILE"),
        ({"config": Clear(radius=2), "importer": "clear:nothing.safetensors"}, "nothing.safetensors does not exist"),
        ({"config": Clear(radius=2, pool_tokens=9), "importer": "clear:x"}, "need method clear with its radius"),
        ({"config": Clear(radius=2), "importer": "clear:x", "layers": "*"}, "converts every layer it names"),
    ],
)
def test_convert_base_that_fails_writes_nothing(base: Path, tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        convert_base(base, options.pop("config"), output=tmp_path / "adapter", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_convert_base_error_lists_the_supported_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UnsupportedModelError, match=r"cannot convert a AutoencoderKL; supported: Flux.*, SD3"):
        convert_base(tmp_path, Clear(radius=2), output=tmp_path / "adapter")


def test_inspect_base_shows_every_attention_module(tmp_path: Path) -> None:
    build("unet").save_pretrained(tmp_path / "base")
    convert_base(tmp_path / "base", Clear(radius=2), output=tmp_path / "adapter", layers="down_blocks.*")
    inspection = inspect_base(tmp_path / "adapter")
    modules = [name for name, module in build("unet").named_modules() if hasattr(module, "get_processor")]
    assert [row.module for row in inspection.rows] == modules
    for row in inspection.rows:
        if row.module.endswith("attn2"):
            assert (row.swapped, row.reason, row.method) == (False, "cross-attention", "")
        elif row.module.startswith("down_blocks"):
            assert (row.swapped, row.method, row.settings) == (True, "clear", {"radius": 2})
            assert row.impl.split()[0] in implementations()
        else:
            assert (row.swapped, row.reason) == (False, "not converted")
    assert inspection.num_swapped == sum(row.swapped for row in inspection.rows)
    assert inspection.num_swappable == sum(row.reason != "cross-attention" for row in inspection.rows)
    assert [step.size for step in inspection.flops] == ["1K", "2K", "4K", "8K"]
    assert all(step.after < step.before for step in inspection.flops)


def test_inspect_base_of_an_unconverted_base_reports_equal_flops(base: Path) -> None:
    inspection = inspect_base(base)
    assert not any(row.swapped for row in inspection.rows) and len(inspection.rows) == 2
    assert all(step.after == step.before for step in inspection.flops)
    assert [step.grid for step in inspection.flops] == [(256, 256), (512, 512), (1024, 1024), (2048, 2048)]


def test_inspect_base_of_a_saved_pipeline_shows_its_conversion(tmp_path: Path) -> None:
    pipe = flux_pipeline()
    linearize_(pipe, Clear(radius=2))
    pipe.save_pretrained(tmp_path / "saved")
    assert all(row.swapped for row in inspect_base(tmp_path / "saved").rows)


def test_inspect_base_reports_forced_and_refuses_unknown_implementations(base: Path, tmp_path: Path) -> None:
    convert_base(base, Clear(radius=2), output=tmp_path / "adapter")
    assert {row.impl for row in inspect_base(tmp_path / "adapter", impl="reference").rows} == {"reference"}
    with pytest.raises(ValueError, match=r"got 'tield' \(did you mean tiled"):
        inspect_base(tmp_path / "adapter", impl="tield")


def test_inspect_base_reports_the_focus_implementation(base: Path, tmp_path: Path) -> None:
    proxies = ProxyTokens(num_proxies=16)
    method = Hybrid(local=Clear(radius=2), global_=proxies, gate=1.0, focus_tokens=4096)
    convert_base(base, method, output=tmp_path / "adapter")
    row = inspect_base(tmp_path / "adapter").rows[0]
    assert row.impl == "tiled (focus: plain) at 1K, tiled at 2K 4K 8K"  # from 2K on, a cell has more than 4,096 tokens


def test_inspect_base_names_the_implementation_by_size_where_it_differs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_base(base, Clear(radius=2), output=tmp_path / "adapter")
    monkeypatch.setattr(
        METHODS[Clear],
        "auto_impl",
        staticmethod(lambda config, query, grid, text_len: "reference" if grid[0] < 1000 else "tiled"),
    )
    assert inspect_base(tmp_path / "adapter").rows[0].impl == "reference at 1K 2K, tiled at 4K 8K"
