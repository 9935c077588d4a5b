"""Editing on the same weights: our engine beside diffusers in one process, our server beside LitServe and BentoML.

`serve_engine.py` and `serve_load.py` say what is done. Without `--peers` the servers are left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from figures import report
from serve_engine import engine_figures
from serve_load import load_figures
from serve_weights import FOUNDATION, save_full_size, save_instruct_pix2pix


def main() -> None:
    """Do both halves, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=FOUNDATION, help="A pipeline's folder instead of nano's foundation."
    )
    parser.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's size, random weights, bfloat16.")
    parser.add_argument("--size", type=int, help="Side of the edited images in pixels; 32, or 256 with --sd15.")
    parser.add_argument("--edits", type=int, default=16, help="Of one round, and of one load.")
    parser.add_argument(
        "--steps", type=int, default=20, help="Of an edit; loads have half and one and a half as many, too."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="The Python of the environment with LitServe and BentoML.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    size = options.size or (256 if options.sd15 else 32)
    precision = "bfloat16" if options.sd15 else "float32"
    amount = (options.edits, options.steps, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        if options.sd15:
            save_full_size(weights)
        else:
            save_instruct_pix2pix(options.model, weights)
        # InsightEdit's own conditions make a fast edit of a trained model what users see.
        likeness = weights if options.sd15 or options.model == FOUNDATION else options.model
        rows, ratios = engine_figures(weights, likeness, precision, size, *amount)
        if options.peers:
            more, others = load_figures(options.peers, weights, precision, size, *amount, options.clients)
            rows, ratios = [*rows, *more], {**ratios, **others}
    report("serve_sd15" if options.sd15 else "serve", rows, ratios)


if __name__ == "__main__":
    main()
