"""Metrics against formulas written down anew and the libraries' own forward passes; what is missing is said."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from tiny_models import make_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from insightedit.platform.config import MetricsConfig
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.lpips import Lpips, load_lpips
from insightedit.platform.metrics import METRICS, Comparison, Mean, Meter, means

SIDE = 40
NEED_WEIGHTS = {"lpips", "clip_score", "clip_i", "dino"}


def _comparison(seed: int = 0) -> Comparison:
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 256, (SIDE, SIDE + 8, 3), dtype=np.uint8)
    noise = rng.integers(-40, 40, source.shape)
    edit, target = (np.clip(source + noise // part, 0, 255).astype(np.uint8) for part in (1, 3))
    region = np.zeros(source.shape[:2], bool)
    region[5:20, 8:30] = True
    return Comparison(source=source, edit=edit, target=target, region=region, caption="the red circle")


def _measured(config: MetricsConfig, one: Comparison) -> dict[str, float]:
    return Meter(config).measure([one])[0]


# -- pixels -----------------------------------------------------------------------------------------------------------


def test_errors_are_means_over_what_lies_outside_the_region() -> None:
    one = _comparison()
    assert one.region is not None
    assert one.target is not None
    outside = [
        (int(one.source[y, x, c]) - int(one.edit[y, x, c])) / 255
        for y in range(SIDE)
        for x in range(SIDE + 8)
        for c in range(3)
        if not one.region[y, x]
    ]
    mse = math.fsum(error * error for error in outside) / len(outside)
    found = _measured(MetricsConfig(), one)
    assert found["mse"] == pytest.approx(mse, rel=1e-12)
    assert found["psnr"] == pytest.approx(10 * math.log10(1 / mse), rel=1e-12)
    to_target = (one.edit.astype(float) - one.target.astype(float)).ravel() / 255
    assert found["l1"] == pytest.approx(float(np.abs(to_target).mean()))
    assert found["l2"] == pytest.approx(float((to_target**2).mean()))
    # As SmartEdit's tables have it: the region counts as a part without error.
    blackened = _measured(MetricsConfig(outside="blackened"), one)
    assert blackened["mse"] == pytest.approx(mse * float((~one.region).mean()), rel=1e-12)


def test_what_is_done_inside_the_region_counts_for_nothing_outside() -> None:
    one = _comparison()
    assert one.region is not None
    painted = replace(one, edit=np.where(one.region[..., None], np.uint8(7), one.source))
    found = _measured(MetricsConfig(), painted)
    assert (found["mse"], found["psnr"], found["ssim"]) == (0.0, 100.0, pytest.approx(1.0, abs=1e-12))
    elsewhere = painted.edit.copy()
    elsewhere[30, 40] ^= 128
    worse = _measured(MetricsConfig(), replace(painted, edit=elsewhere))
    assert worse["mse"] > 0
    assert worse["psnr"] < 100
    assert worse["ssim"] < 1


def _reference_ssim(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wang et al.'s formula at every place, with weighted moments about the window's own means."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    places = [sliding_window_view(picture, (11, 11), axis=(0, 1)) for picture in (one, other)]
    mean_x, mean_y = ((place * window).sum(axis=(-1, -2), keepdims=True) for place in places)
    off_x, off_y = places[0] - mean_x, places[1] - mean_y
    var_x, var_y, cov = (
        (a * b * window).sum(axis=(-1, -2)) for a, b in ((off_x, off_x), (off_y, off_y), (off_x, off_y))
    )
    mx, my = mean_x[..., 0, 0], mean_y[..., 0, 0]
    c1, c2 = 0.0001, 0.0009
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (var_x + var_y + c2))).mean(axis=-1)


def test_ssim_is_that_of_its_authors() -> None:
    one = _comparison()
    assert one.region is not None
    outside = ~one.region
    source, edit = (np.where(outside[..., None], picture / 255, 0) for picture in (one.source, one.edit))
    reference, inner = _reference_ssim(source, edit), outside[5:-5, 5:-5]
    assert _measured(MetricsConfig(), one)["ssim"] == pytest.approx(float(reference[inner].mean()), abs=1e-10)
    whole = _measured(MetricsConfig(outside="blackened"), one)["ssim"]
    assert whole == pytest.approx(float(reference.mean()), abs=1e-10)


def test_pictures_are_brought_to_one_size() -> None:
    one = _comparison()
    assert one.target is not None
    larger = np.asarray(Image.fromarray(one.target).resize((96, 80), Image.Resampling.BICUBIC))
    found = _measured(MetricsConfig(), replace(one, target=larger))
    assert found["l1"] == pytest.approx(_measured(MetricsConfig(), one)["l1"], abs=0.1)
    square = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BICUBIC)) for p in (one.edit, one.target)]
    small = _measured(MetricsConfig(side=16), one)
    assert small["l1"] == pytest.approx(float(np.abs(square[0] / 255 - square[1] / 255).mean()))


# -- what is missing --------------------------------------------------------------------------------------------------


def test_without_weights_a_metric_is_missing_and_says_what_to_set() -> None:
    meter = Meter(MetricsConfig())
    rows = meter.measure([_comparison()])
    missing = meter.missing(rows)
    assert set(rows[0]) == METRICS.keys() - NEED_WEIGHTS
    assert missing.keys() == NEED_WEIGHTS
    assert missing["lpips"] == "No weights: set evaluation.metrics.lpips to their folder."
    assert missing["clip_i"] == "No weights: set evaluation.metrics.clip to their folder."


def test_without_mask_or_target_what_needs_them_is_missing() -> None:
    one = _comparison()
    meter = Meter(MetricsConfig())
    rows = meter.measure([replace(one, region=None), replace(one, target=None)])
    assert [set(row) for row in rows] == [{"l1", "l2"}, {"psnr", "ssim", "mse"}]
    assert means(rows)["psnr"] == Mean(mean=rows[1]["psnr"], edits=1)
    assert not meter.missing(rows).keys() & {"psnr", "l1"}, "some edits have them"
    unknown = meter.measure([replace(one, region=None, target=None)])
    assert unknown == [{}]
    assert means(unknown) == {}
    assert meter.missing(unknown)["psnr"] == "No edit has a mask of the region that it belongs to."
    assert meter.missing(unknown)["l1"] == "No edit has a target picture."
    whole = replace(one, region=np.ones_like(one.region, dtype=bool))
    assert "mse" not in meter.measure([whole])[0]
    tiny = replace(one, source=one.source[:8, :8], edit=one.edit[:8, :8], region=np.zeros((8, 8), bool), target=None)
    assert set(meter.measure([tiny])[0]) == {"psnr", "mse"}


# -- LPIPS ------------------------------------------------------------------------------------------------------------

CHANNELS = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
PARAMETERS = {"alex": 2_469_696, "vgg": 14_714_688, "squeeze": 722_496}
"""Of torchvision's feature layers."""


def _weights(network: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's weights as torchvision names them, and LPIPS's linear ones as its authors do."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: value.shape for name, value in Lpips(network).features.state_dict().items()}
    trunk = {
        f"features.{name}": torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) or 1)
        for name, shape in shapes.items()
    }
    linear = {
        f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for number, width in enumerate(CHANNELS[network])
    }
    return trunk, linear


def _conv(x: Tensor, trunk: Mapping[str, Tensor], name: str, **options: int) -> Tensor:
    return F.relu(F.conv2d(x, trunk[f"features.{name}.weight"], trunk[f"features.{name}.bias"], **options))


def _alex(x: Tensor, trunk: Mapping[str, Tensor]) -> list[Tensor]:
    one = _conv(x, trunk, "0", stride=4, padding=2)
    two = _conv(F.max_pool2d(one, 3, 2), trunk, "3", padding=2)
    three = _conv(F.max_pool2d(two, 3, 2), trunk, "6", padding=1)
    four = _conv(three, trunk, "8", padding=1)
    return [one, two, three, four, _conv(four, trunk, "10", padding=1)]


def _vgg(x: Tensor, trunk: Mapping[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        x = F.max_pool2d(x, 2) if found else x
        for number in block:
            x = _conv(x, trunk, str(number), padding=1)
        found.append(x)
    return found


def _squeeze(x: Tensor, trunk: Mapping[str, Tensor]) -> list[Tensor]:
    x = _conv(x, trunk, "0", stride=2)
    found = [x]
    for block in ((3, 4), (6, 7), (9,), (10,), (11,), (12,)):
        if block[0] <= 9:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for fire in block:
            narrow = _conv(x, trunk, f"{fire}.squeeze")
            wide = (_conv(narrow, trunk, f"{fire}.expand1x1"), _conv(narrow, trunk, f"{fire}.expand3x3", padding=1))
            x = torch.cat(wide, 1)
        found.append(x)
    return found


def _reference_lpips(network: str, trunk: Mapping[str, Tensor], linear: Mapping[str, Tensor], pair: Tensor) -> float:
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], dtype=torch.float64)[..., None, None]
    trunk = {name: value.double() for name, value in trunk.items()}
    features = {"alex": _alex, "vgg": _vgg, "squeeze": _squeeze}[network](
        (pair.double() * 2 - 1 - shift) / scale, trunk
    )
    total = 0.0
    for number, layer in enumerate(features):
        unit = layer / layer.norm(dim=1, keepdim=True)
        weight = linear[f"lin{number}.model.1.weight"].double()
        total += F.conv2d((unit[:1] - unit[1:]) ** 2, weight).mean().item()
    return total


@pytest.mark.parametrize("network", ["alex", "vgg", "squeeze"])
def test_lpips_is_that_of_its_authors(network: Any, tmp_path: Path) -> None:
    trunk, linear = _weights(network)
    assert sum(value.numel() for value in trunk.values()) == PARAMETERS[network]
    if network == "alex":  # as two downloads lie side by side, with what torchvision has beyond the features
        torch.save({**trunk, "classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet-owt-7be5be79.pth")
        torch.save(linear, tmp_path / "alex.pth")
    else:  # as a state dict of LPIPS's own class, whose slices keep torchvision's numbers
        whole = {f"net.slice1.{name.removeprefix('features.')}": value for name, value in trunk.items()}
        safetensors.torch.save_file(
            {**whole, **linear, "scaling_layer.shift": torch.zeros(3)}, tmp_path / "w.safetensors"
        )
    # What belongs to the other networks may lie in the same folder.
    for other in CHANNELS.keys() - {network}:
        torch.save(_weights(other)[1], tmp_path / f"a-{other}.pth")
    pair = torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(2))
    model = load_lpips(tmp_path, network)
    expected = _reference_lpips(network, trunk, linear, pair)
    assert model(pair[:1], pair[1:]).item() == pytest.approx(expected, rel=1e-4)
    assert model(pair[:1], pair[:1]).item() == 0
    assert model(pair[:1], pair[1:], torch.ones(1, 64, 72)).item() == pytest.approx(expected, rel=1e-4)


def test_lpips_outside_the_region(tmp_path: Path) -> None:
    trunk, linear = _weights("alex")
    torch.save({**trunk, **linear}, tmp_path / "alex.pth")
    one = _comparison()
    assert one.region is not None
    found = _measured(MetricsConfig(lpips=str(tmp_path), outside="blackened"), one)["lpips"]
    black = np.stack([np.where(one.region[..., None], 0, picture / 255) for picture in (one.source, one.edit)])
    pair = torch.tensor(black).permute(0, 3, 1, 2).float()
    assert found == pytest.approx(_reference_lpips("alex", trunk, linear, pair), rel=1e-4)
    alone = MetricsConfig(lpips=str(tmp_path))
    assert _measured(alone, one)["lpips"] > found, "nothing is thinned by the region"
    painted = replace(one, edit=np.where(one.region[..., None], np.uint8(9), one.source))
    assert _measured(alone, painted)["lpips"] == 0


class _Canary:
    """Would leave a file behind if anyone unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_weights_that_are_missing_damaged_or_hostile_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"evaluation\.metrics\.lpips is .*nowhere, where there is no"):
        load_lpips(tmp_path / "nowhere", "alex")
    trunk, linear = _weights("squeeze")
    torch.save(trunk, tmp_path / "squeeze.pth")
    with pytest.raises(UsageError, match=r"lack 7 of the squeeze LPIPS's weights, such as linear\.0; add"):
        load_lpips(tmp_path, "squeeze")
    with pytest.raises(UsageError, match="of the alex LPIPS's weights, such as features"):
        load_lpips(tmp_path, "alex")
    torch.save(linear, tmp_path / "linear.pth")
    load_lpips(tmp_path, "squeeze")
    (tmp_path / "half.safetensors").write_bytes(b"\x08")
    with pytest.raises(UsageError, match=r"half\.safetensors cannot be read as weights of LPIPS"):
        load_lpips(tmp_path, "squeeze")
    (tmp_path / "half.safetensors").unlink()
    fired = tmp_path / "fired"
    with (tmp_path / "zzz.pth").open("wb") as file:
        pickle.dump({"features.0.weight": _Canary(fired)}, file, protocol=2)
    with pytest.raises(UsageError, match=r"zzz\.pth cannot be read as weights of LPIPS"):
        load_lpips(tmp_path, "squeeze")
    assert not fired.exists()


# -- models that see --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, in the layout of the hub."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    config: Any = {"text_config": text.to_dict(), "vision_config": vision.to_dict(), "projection_dim": 8}
    CLIPModel(CLIPConfig(**config)).save_pretrained(folder)
    make_tokenizer(12).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINO, which is a ViT, in the layout of the hub."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def _cosines(clip: Path, pictures: list[NDArray[np.uint8]], text: str) -> NDArray[np.float64]:
    """Of each picture and a text, out of CLIP's own forward pass."""
    model, tokenizer = CLIPModel.from_pretrained(clip), make_tokenizer(12)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(
        [Image.fromarray(one) for one in pictures], return_tensors="pt"
    )
    inputs: Any = {**pixels, **tokenizer([text], return_tensors="pt")}
    with torch.no_grad():
        output: Any = model(**inputs)
        return (output.logits_per_image[:, 0] / model.logit_scale.exp()).double().numpy()


def test_the_clip_score_is_of_the_region_and_its_caption(clip: Path) -> None:
    one = _comparison()
    found = _measured(MetricsConfig(clip=str(clip)), one)
    expected = _cosines(clip, [one.edit[5:20, 8:30]], one.caption)
    assert expected[0] > 0
    assert found["clip_score"] == pytest.approx(float(expected[0]) * 100, rel=1e-4)
    outside = one.edit.copy()
    outside[25:] = 0
    assert _measured(MetricsConfig(clip=str(clip)), replace(one, edit=outside))["clip_score"] == found["clip_score"]
    meter = Meter(MetricsConfig(clip=str(clip)))
    rows = meter.measure([replace(one, caption="")])
    assert meter.missing(rows)["clip_score"] == "No edit has a caption of what its region should show."
    assert _measured(MetricsConfig(clip=str(clip)), replace(one, caption="remove the red circle " * 40))["clip_i"]


def test_likeness_to_the_target(clip: Path, dino: Path) -> None:
    one = _comparison()
    assert one.target is not None
    found = _measured(MetricsConfig(clip=str(clip), dino=str(dino)), one)
    pictures = [Image.fromarray(one.edit), Image.fromarray(one.target)]
    with torch.no_grad():
        pixels = CLIPImageProcessorPil.from_pretrained(clip)(pictures, return_tensors="pt")
        vision: Any = CLIPModel.from_pretrained(clip)
        seen = vision.visual_projection(vision.vision_model(**pixels).pooler_output)
        tokens: Any = ViTModel.from_pretrained(dino)(
            **ViTImageProcessorPil.from_pretrained(dino)(pictures, return_tensors="pt")
        )
    for name, rows in (("clip_i", seen), ("dino", tokens.last_hidden_state[:, 0])):
        a, b = rows.double().numpy()
        assert found[name] == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), rel=1e-4), name
        assert found[name] < 1
    same = _measured(MetricsConfig(clip=str(clip), dino=str(dino)), replace(one, edit=one.target))
    assert same["clip_i"] == pytest.approx(1, abs=1e-5)
    assert same["dino"] == pytest.approx(1, abs=1e-5)


def test_models_that_are_no_such_models_are_told(clip: Path, dino: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"evaluation\.metrics\.clip is .*nowhere, and there is no"):
        Meter(MetricsConfig(clip=str(tmp_path / "nowhere")))
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((dino / name).read_bytes())
    weights = safetensors.torch.load_file(dino / "model.safetensors")
    lost = sorted(weights)[3]
    safetensors.torch.save_file(
        {k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UsageError, match=r"evaluation\.metrics\.dino is .*, whose files lack weights such as "):
        Meter(MetricsConfig(dino=str(tmp_path)))
    with pytest.raises(UsageError, match=r"evaluation\.metrics\.clip is "):
        Meter(MetricsConfig(clip=str(dino)))
