"""The peers of `serve.py`: servers as a team would write them around diffusers' pipeline. Runs in an environment
of its own.

Usage: `serve_peers.py litserve|bentoml FOLDER PRECISION PORT`. Both run two processes of one thread each, and answer
`POST /edit` with what `Edit.answer` gives. Bodies are `{"request": {...}}`, since BentoML names what it is given.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import bentoml
import litserve
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

PROCESSES = 2
TIMEOUT = 600
FOLDER, PRECISION = "INSIGHTEDIT_PEER_FOLDER", "INSIGHTEDIT_PEER_PRECISION"
"""Environment variables, which all their processes see."""


class Edit:
    """diffusers' pipeline, for one edit at a time: requests with other numbers of steps do not batch in it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            os.environ[FOLDER],
            torch_dtype=getattr(torch, os.environ[PRECISION]),
            safety_checker=None,
            local_files_only=True,
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def answer(self, request: dict[str, Any]) -> dict[str, str]:
        """Decode the image, edit it, encode the edit as PNG."""
        image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB")
        names = ("prompt", "num_inference_steps", "guidance_scale", "image_guidance_scale")
        settings = {name: request[name] for name in names}
        generator = torch.Generator().manual_seed(request["seed"])
        edited = self.pipeline(image=image, generator=generator, **settings).images[0]
        file = io.BytesIO()
        edited.save(file, "PNG")
        return {"image": base64.b64encode(file.getvalue()).decode()}


@bentoml.service(workers=PROCESSES, traffic={"timeout": TIMEOUT})
class Service:
    """BentoML's service; its processes import this file anew."""

    def __init__(self) -> None:
        self.edits = Edit()

    @bentoml.api(route="/edit")
    def edit(self, request: dict[str, Any]) -> dict[str, str]:
        """One edit."""
        return self.edits.answer(request)


class Api(litserve.LitAPI):
    """LitServe's service."""

    def setup(self, device: str) -> None:
        """Load the weights."""
        self.edits = Edit()

    def decode_request(self, request):  # LitServe takes an annotated argument for a query
        """What an edit is made of."""
        return request["request"]

    def predict(self, request: dict[str, Any]) -> dict[str, str]:
        """One edit."""
        return self.edits.answer(request)

    def encode_response(self, output: dict[str, str]) -> dict[str, str]:
        """An answer as it goes."""
        return output


def serve_with_litserve(port: int) -> None:
    """Serve until killed."""
    api = Api(api_path="/edit")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=PROCESSES, timeout=TIMEOUT)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


def serve_with_bentoml(port: int) -> None:
    """Become BentoML's own command, which serves until killed."""
    file = Path(__file__)
    command = [sys.executable, "-m", "bentoml", "serve", f"{file.stem}:Service", "--working-dir", str(file.parent)]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(port)])  # noqa: S606


if __name__ == "__main__":
    name, os.environ[FOLDER], os.environ[PRECISION], number = sys.argv[1:5]
    {"litserve": serve_with_litserve, "bentoml": serve_with_bentoml}[name](int(number))
