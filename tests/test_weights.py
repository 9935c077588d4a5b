"""Pretrained parts in the layouts that people have: every weight is found, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from insightedit.model import weights
from insightedit.model.configuration import ModelConfig, SourcesConfig
from insightedit.model.encoders import to_pixels
from insightedit.model.insightedit import build_pipeline
from insightedit.model.mllm import hidden_states
from insightedit.model.pipeline import load_pipeline
from insightedit.model.weights import load_diffusion, load_image_encoder, load_mllm
from insightedit.platform.editing import EditingTask
from insightedit.platform.encoding import load_encoders
from insightedit.platform.errors import UsageError

PROMPT_LENGTH = 256
PICTURE = Image.effect_noise((16, 16), 80).convert("RGB")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SourcesConfig:
    return tiny_models.build_sources(tmp_path_factory.mktemp("sources"))


def assert_same(loaded: nn.Module, expected: nn.Module, half: bool = False) -> None:
    """Both have the same weights, after rounding to half precision if they went through it."""
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        wanted = tensor.half().float() if half and tensor.is_floating_point() else tensor
        assert ours[name].equal(wanted), name


def tiny_config(own: SourcesConfig) -> ModelConfig:
    """A model of the tiny sources, with room for the words of a real template in letters."""
    return replace(tiny_models.tiny_config(own), prompt_length=PROMPT_LENGTH)


# -- Stable Diffusion and InstructPix2Pix -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers_folders_in_full_and_half_precision(
    sources: SourcesConfig, tmp_path: Path, variant: str | None
) -> None:
    parts = layouts.diffusion_parts(4)
    layouts.diffusers_folder(tmp_path, parts, variant)
    assert [path.name for path in (tmp_path / "unet").glob("*.safetensors")] == [
        f"diffusion_pytorch_model.{variant}.safetensors" if variant else "diffusion_pytorch_model.safetensors"
    ]
    loaded = load_diffusion(replace(sources, diffusion=str(tmp_path)))
    for name in ("unet", "vae", "text_encoder"):
        assert_same(loaded[name], parts[name], half=variant is not None)
        assert loaded[name].dtype == torch.float32
    assert type(loaded["scheduler"]).__name__ == "PNDMScheduler"
    assert loaded["tokenizer"]("a red circle").input_ids == parts["tokenizer"]("a red circle").input_ids


@pytest.mark.parametrize("channels", [4, 8])
def test_single_files_of_stable_diffusion_and_instruct_pix2pix(
    sources: SourcesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    monkeypatch.setattr(weights, "SINGLE_FILE_CONFIG", layouts.diffusion_config(tmp_path / "config"))
    parts = layouts.diffusion_parts(channels)
    layouts.single_file(tmp_path / "whole.safetensors", parts)
    layouts.whole_clip(tmp_path / "clip")
    own = replace(sources, diffusion=str(tmp_path / "whole.safetensors"), image_encoder=str(tmp_path / "clip"))
    loaded = load_diffusion(own)
    for name in ("unet", "vae", "text_encoder"):
        assert_same(loaded[name], parts[name])
    assert loaded["tokenizer"]("a red circle").input_ids == parts["tokenizer"]("a red circle").input_ids
    unet: Any = build_pipeline(tiny_config(own)).unet
    first = parts["unet"].conv_in.weight
    assert unet.conv_in.weight[:, :channels].equal(first)
    assert not unet.conv_in.weight[:, channels:].any()


def test_the_config_for_single_files_is_that_of_stable_diffusion_1() -> None:
    def size(model: nn.Module) -> tuple[int, int]:
        return sum(tensor.numel() for tensor in model.state_dict().values()), len(model.state_dict())

    folder = weights.SINGLE_FILE_CONFIG
    unet_config: Any = UNet2DConditionModel.load_config(folder, subfolder="unet")
    vae_config: Any = AutoencoderKL.load_config(folder, subfolder="vae")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(unet_config)
        vae: Any = AutoencoderKL.from_config(vae_config)
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
    # Weights and tensors of v1-5-pruned-emaonly.safetensors.
    assert size(unet) == (859_520_964, 686)
    assert size(vae) == (83_653_863, 248)
    assert size(text) == (123_060_480, 196)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_instruct_pix2pix_folders_open_as_pipelines(tmp_path: Path, variant: str | None) -> None:
    parts = layouts.diffusion_parts(8)
    layouts.diffusers_folder(tmp_path, parts, variant)
    pipeline: Any = load_pipeline(tmp_path)
    assert_same(pipeline.text_encoder, parts["text_encoder"], half=variant is not None)
    images = pipeline("a circle", PICTURE, num_inference_steps=1, output_type="pt").images
    assert images.isfinite().all()


# -- CLIP ---------------------------------------------------------------------------------------------------------


def test_the_vision_tower_out_of_a_whole_clip(sources: SourcesConfig, tmp_path: Path) -> None:
    clip = layouts.whole_clip(tmp_path)
    loaded = load_image_encoder(replace(sources, image_encoder=str(tmp_path)))
    pixels = torch.randn(2, 3, 16, 16)
    expected: Any = clip.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(loaded(pixel_values=pixels).image_embeds, expected.pooler_output)


# -- LLaVA --------------------------------------------------------------------------------------------------------


def states_of(model: Any, own: SourcesConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """States around the [MM] tokens of one edit, and what the model was given."""
    pipeline = build_pipeline(tiny_config(own))
    inputs = pipeline.prompts(["remove it"], to_pixels([PICTURE]))
    return hidden_states(model, pipeline.mm_tokens, inputs), inputs


@pytest.mark.parametrize("layout", [layouts.llava_15, layouts.llava_interleave])
def test_llava_in_transformers_layout(sources: SourcesConfig, tmp_path: Path, layout: Any) -> None:
    expected = layout(tmp_path).eval()
    own = replace(sources, mllm=str(tmp_path))
    loaded = load_mllm(own)
    assert_same(loaded, expected)
    torch.manual_seed(0)
    states, inputs = states_of(loaded, own)
    torch.manual_seed(0)
    assert states.equal(states_of(expected, own)[0])
    assert int((inputs["input_ids"] == loaded.config.image_token_id).sum()) == 16


@pytest.mark.parametrize("named_by", ["its config", "the sources"])
def test_llava_11_in_its_authors_layout(sources: SourcesConfig, tmp_path: Path, named_by: str) -> None:
    folder, tower = tmp_path / "llava", tmp_path / "tower"
    language, projector, vision = layouts.llava_11(folder, tower)
    own = replace(sources, mllm=str(folder))
    if named_by == "the sources":
        tower.rename(tmp_path / "moved")
        own = replace(own, vision_tower=str(tmp_path / "moved"))
    loaded = load_mllm(own).eval()
    torch.manual_seed(0)
    states, inputs = states_of(loaded, own)
    start = int(inputs["mm_start"][0])
    ids = inputs["input_ids"][:, : start + 4]
    assert ids[0, 0] == language.config.bos_token_id
    torch.manual_seed(0)
    tokens: Any = build_pipeline(tiny_config(own)).mm_tokens
    with torch.no_grad():
        patches = vision(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        embeddings = language.get_input_embeddings()(ids)
        embeddings[0, ids[0] == loaded.config.image_token_id] = projector(patches)[0]
        embeddings[0, start:] = tokens.input_rows.weight
        expected = language.model(inputs_embeds=embeddings).last_hidden_state[:, start - 1 :]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def llava_11(folder: Path) -> None:
    layouts.llava_11(folder, folder.with_name("tower"))


@pytest.mark.parametrize("layout", [layouts.llava_15, layouts.llava_interleave, llava_11])
def test_a_pipeline_of_any_llava_saves_loads_and_edits_in_bf16(
    sources: SourcesConfig, tmp_path: Path, layout: Any
) -> None:
    layout(tmp_path / "mllm")
    pipeline = build_pipeline(tiny_config(replace(sources, mllm=str(tmp_path / "mllm"))), torch.bfloat16)
    pipeline.save_pretrained(str(tmp_path / "pipeline"))
    loaded = load_pipeline(tmp_path / "pipeline", torch.bfloat16)
    for name in ("mllm", "unet", "vae", "text_encoder", "image_encoder", "qformer", "bim", "adapter", "mm_tokens"):
        part: Any = getattr(loaded, name)
        assert part.dtype == torch.bfloat16, name
        assert_same(part, getattr(pipeline, name))
    editors: list[Any] = [pipeline, loaded]
    generators = [torch.Generator().manual_seed(1) for _ in editors]
    edits = [
        edit("remove it", PICTURE, generator=generator, output_type="pt").images
        for edit, generator in zip(editors, generators, strict=True)
    ]
    assert edits[0].equal(edits[1])


# -- refusals -----------------------------------------------------------------------------------------------------


def change(path: Path, drop: Iterable[str] = (), add: Mapping[str, Tensor] | None = None) -> None:
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in set(drop)}
    layouts.write(path.parent, {**kept, **(add or {})}, path.name)


def test_a_lost_a_foreign_and_a_misshapen_weight_are_refused(sources: SourcesConfig, tmp_path: Path) -> None:
    layouts.diffusers_folder(tmp_path, layouts.diffusion_parts(4))
    own = replace(sources, diffusion=str(tmp_path))
    file = tmp_path / "text_encoder" / "model.safetensors"
    change(file, add={"foreign": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.sources\.diffusion is .*, and its text_encoder have foreign, which"):
        load_diffusion(own)
    change(file, drop=["foreign", "text_model.final_layer_norm.bias"])
    with pytest.raises(ValueError, match=r"text_encoder lack final_layer_norm\.bias"):
        load_diffusion(own)
    change(file, add={"text_model.final_layer_norm.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"its text_encoder cannot be loaded"):
        load_diffusion(own)
    change(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", drop=["conv_out.bias"])
    with pytest.raises(ValueError, match=r"its unet lack conv_out\.bias"):
        load_diffusion(own, parts=["unet"])


def test_a_lost_weight_of_any_part_is_refused(sources: SourcesConfig, tmp_path: Path) -> None:
    layouts.llava_15(tmp_path / "new")
    llava_11(tmp_path / "old")
    layouts.whole_clip(tmp_path / "clip")
    change(tmp_path / "new" / "model-00001-of-00002.safetensors", drop=["language_model.lm_head.weight"])
    with pytest.raises(ValueError, match=r"model\.sources\.mllm is .* lack lm_head\.weight"):
        load_mllm(replace(sources, mllm=str(tmp_path / "new")))
    change(tmp_path / "old" / "model-00002-of-00002.safetensors", drop=["model.mm_projector.bias"])
    with pytest.raises(ValueError, match=r"lack model\.multi_modal_projector\.linear_1\.bias"):
        load_mllm(replace(sources, mllm=str(tmp_path / "old")))
    change(tmp_path / "clip" / "model.safetensors", drop=["visual_projection.weight"])
    with pytest.raises(ValueError, match=r"model\.sources\.image_encoder is .* lack visual_projection\.weight"):
        load_image_encoder(replace(sources, image_encoder=str(tmp_path / "clip")))


def test_pickles_are_refused_unread(sources: SourcesConfig, tmp_path: Path) -> None:
    layouts.diffusers_folder(tmp_path / "sd", layouts.diffusion_parts(4))
    (tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "sd" / "vae" / "diffusion_pytorch_model.bin"
    )
    (tmp_path / "v1-5.ckpt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    for place in ("sd", "v1-5.ckpt"):
        own = replace(sources, diffusion=str(tmp_path / place))
        task = EditingTask(key="", model=tiny_config(own), encoders="", validation=None)
        for load in (lambda own=own: load_encoders(own), task.build_model):
            with pytest.raises(UsageError, match=r"are pickles.*convert them to safetensors as docs/weights\.md shows"):
                load()
    layouts.llava_15(tmp_path / "llava")
    for file in (tmp_path / "llava").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    (tmp_path / "llava" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"model\.sources\.mllm is .* are pickles"):
        load_mllm(replace(sources, mllm=str(tmp_path / "llava")))


def test_pickles_load_once_they_are_converted_as_the_docs_show(
    sources: SourcesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = layouts.whole_clip(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "pytorch_model.bin")
    own = replace(sources, image_encoder=str(tmp_path))
    with pytest.raises(ValueError, match="are pickles"):
        load_image_encoder(own)
    page = (Path(__file__).parents[1] / "docs/weights.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})  # noqa: S102 - a page of ours
    assert load_image_encoder(own).visual_projection.weight.equal(clip.visual_projection.weight)


def test_wrong_single_files_are_refused(
    sources: SourcesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SINGLE_FILE_CONFIG", layouts.diffusion_config(tmp_path / "config"))
    file = tmp_path / "whole.safetensors"
    layouts.single_file(file, layouts.diffusion_parts(4))
    own = replace(sources, diffusion=str(file))
    with pytest.raises(ValueError, match=r"a single file, which has no tokenizer.*put CLIP's tokenizer beside"):
        load_diffusion(own)
    lost, added = "model.diffusion_model.out.2.bias", "model.diffusion_model.control.weight"
    change(file, drop=[lost])
    with pytest.raises(ValueError, match=r"the UNet of .* lack conv_out\.bias"):
        load_diffusion(own, parts=["unet"])
    change(file, add={lost: torch.zeros(4), added: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"the UNet of .* has 1 weights that Stable Diffusion 1\.x does not know"):
        load_diffusion(own, parts=["unet"])
    change(file, add={"first_stage_model.quant_conv.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"the VAE of .* quant_conv\.bias"):
        load_diffusion(own, parts=["vae"])
    change(file, add={"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"the text encoder of .* is not Stable Diffusion 1\.x's"):
        load_diffusion(own, parts=["text_encoder"])
    change(file, drop=[name for name in load_file(file) if name.startswith("cond_stage_model.")])
    with pytest.raises(ValueError, match=r"has no cond_stage_model\.transformer\.\*; name a whole"):
        load_diffusion(own, parts=["text_encoder"])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"whole\.safetensors, which is damaged"):
        load_diffusion(own, parts=["vae"])


def test_folders_without_a_model_are_refused(sources: SourcesConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.sources\.mllm is .*, which has no config\.json; name a whole model"):
        load_mllm(replace(sources, mllm=str(tmp_path)))
    with pytest.raises(ValueError, match=r"model\.sources\.image_encoder is .* cannot be loaded"):
        load_image_encoder(replace(sources, image_encoder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"model\.sources\.diffusion is .*, and is no diffusers folder"):
        load_diffusion(replace(sources, diffusion=str(tmp_path)), parts=["scheduler"])


def test_other_llavas_of_their_authors_are_refused(sources: SourcesConfig, tmp_path: Path) -> None:
    llava_11(tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "mm_projector_type": "mlp2x_gelu"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"not v1\.1; name it in transformers' layout, such as llava-hf/llava-1\.5"):
        load_mllm(replace(sources, mllm=str(tmp_path / "llava")))
