"""Every dataset as a small folder in its original form, each with rows that can be used and some that cannot."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from insightedit.platform.config import DatasetConfig

WIDTH, HEIGHT = 48, 40
BOX = [4.0, 4.0, 30.0, 4.0, 30.0, 30.0, 4.0, 30.0]
"""A polygon inside every picture."""


@dataclass(frozen=True)
class Made:
    """What is in a folder."""

    options: dict[str, Any]
    tasks: dict[str, int]
    reasons: dict[str, int] = field(default_factory=dict)

    def config(self, name: str, root: Path) -> DatasetConfig:
        """The dataset as a preset names it."""
        return DatasetConfig(reader=name, options={"root": str(root), **self.options})


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """A picture with large soft shapes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def mask_png(values: np.ndarray[Any, Any]) -> bytes:
    """A map of numbers as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8), "L").save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes | object) -> None:
    """Write bytes, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def shapes(root: Path) -> Made:
    root.mkdir(parents=True)
    return Made({"kind": "edit", "split": "train", "count": 4, "seed": 0}, {"edit": 8})


def pairs(root: Path) -> Made:
    rows: list[dict[str, str]] = []
    for number in range(6):
        write(root / f"before/{number}.jpg", picture(number))
        write(root / f"after/{number}.png", picture(number + 50, "PNG"))
        row = {"source": f"before/{number}.jpg", "target": f"after/{number}.png", "instruction": f"edit {number}"}
        rows.append(row)
    rows[4]["instruction"] = "  "
    rows[5]["source"] = "before/lost.jpg"
    with (root / "mine.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Made({}, {"edit": 4}, {"empty_instruction": 1, "missing_file": 1})


def cc12m(root: Path) -> Made:
    root.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in range(4):
                key = f"{shard:05d}{number:04d}"
                data = picture(number + 10 * shard)
                files = {"jpg": data[:-200] if key == "000010003" else data, "txt": f"caption {key}".encode()}
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return Made({}, {"caption": 7}, {"truncated_image": 1})


def instructpix2pix(root: Path) -> Made:
    for folder in ("0000001", "0000002"):
        prompt = {"input": "a fox", "edit": f"make it a cat {folder}", "output": "a cat"}
        write(root / folder / "prompt.json", prompt)
        for seed in (11, 12):
            for half in (0, 1):
                write(root / folder / f"{seed}_{half}.jpg", picture(seed + half))
    write(root / "0000002/12_1.jpg", picture(3, size=(WIDTH, HEIGHT + 8)))
    write(root / "seeds.json", [["0000001", ["11", "12"]], ["0000002", ["11", "12"]]])
    return Made({}, {"edit": 3}, {"wrong_size": 1})


def magicbrush(root: Path) -> Made:
    mask = mask_png(np.full((HEIGHT, WIDTH), 255))
    rows = [
        {
            "img_id": str(100 + number // 2),
            "turn_index": 1 + number % 2,
            "source_img": {"bytes": picture(number), "path": "s.jpg"},
            "mask_img": {"bytes": mask, "path": "m.png"},
            "instruction": f"turn {number}",
            "target_img": {"bytes": picture(number + 20), "path": "t.jpg"},
        }
        for number in range(5)
    ]
    rows[4]["mask_img"] = {"bytes": mask_png(np.zeros((HEIGHT, WIDTH + 1))), "path": "m.png"}
    (root / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "data/train-00000-of-00001.parquet", row_group_size=2)
    return Made({}, {"edit": 4}, {"mask_size": 1})


def advancededit(root: Path) -> Made:
    for number in range(3):
        write(root / f"origin/{number}.jpg", picture(number))
        write(root / f"edited/{number}.jpg", picture(number + 30))
    pair = {
        "origin_img_path": "./origin/{0}.jpg",
        "target_img_path": "./edited/{0}.jpg",
        "instruction": ["remove the fox"],
        "task_type": "remove",
        "class_origin": "fox",
        "class_target": "",
        "reasoning_instruction1": "take away what hunts hens",
        "qwen_VIE_SC": None,
    }
    content = {
        str(number): {key: value.format(number) if isinstance(value, str) else value for key, value in pair.items()}
        for number in range(3)
    }
    content["2"]["target_img_path"] = " "
    text = json.dumps(content, indent=1)
    # The published files have trailing commas.
    write(root / "1543.json", (text[:-1] + ",}").encode())
    return Made({}, {"edit": 4}, {"missing_file": 1})


def _coco_instances(root: Path, name: str, images: str) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, 4):
        file = f"{images}_{number:012d}.jpg" if "2014" in images else f"{number:012d}.jpg"
        write(root / name / file, picture(number))
        entries.append({"id": number, "file_name": file, "height": HEIGHT, "width": WIDTH})
        annotations.append(
            {
                "id": 10 + number,
                "image_id": number,
                "category_id": 1,
                "bbox": [4, 4, 26, 26],
                "segmentation": [BOX],
                "area": 676.0,
                "iscrowd": 0,
            }
        )
    return {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]}


def coco(root: Path) -> Made:
    instances = _coco_instances(root, "train2017", "train2017")
    captions = [{"image_id": 1 + number % 3, "id": number, "caption": f"a dog {number}"} for number in range(5)]
    captions.append({"image_id": 1, "id": 5, "caption": " "})
    write(root / "annotations/instances_train2017.json", instances)
    write(root / "annotations/captions_train2017.json", {"images": instances["images"], "annotations": captions})
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    chats = [{"id": f"{n:012d}", "image": f"{n:012d}.jpg", "conversations": talk} for n in (1, 2, 99)]
    write(root / "llava_instruct_150k.json", chats)
    return Made({}, {"caption": 5, "segment": 3, "chat": 2}, {"empty_instruction": 1, "missing_file": 1})


def _refs(root: Path, kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    instances = _coco_instances(root, "train2014", "COCO_train2014")
    refs: list[dict[str, Any]] = []
    for number in range(1, 4):
        sentences = [{"raw": f"Dog {n}", "sent": f"dog {n}", "sent_id": n, "tokens": ["dog", str(n)]} for n in range(2)]
        ref: dict[str, Any] = {
            "ref_id": number,
            "ann_id": 10 + number,
            "image_id": number,
            "category_id": 1,
            "split": "train",
            "file_name": f"COCO_train2014_{number:012d}_{10 + number}.jpg",
            "sent_ids": [0, 1],
            "sentences": sentences,
        }
        if kind == "grefcoco":
            nothing = number == 3
            ref |= {"ann_id": [-1 if nothing else 10 + number], "category_id": [-1 if nothing else 1]}
        refs.append(ref)
    return refs, instances


def _refcoco(name: str, split_by: str) -> Callable[[Path], Made]:
    def make(root: Path) -> Made:
        refs, instances = _refs(root, name)
        write(root / f"refs({split_by}).p", pickle.dumps(refs, 2))
        instances["annotations"][2]["segmentation"] = "not a mask"
        write(root / "instances.json", instances)
        return Made({}, {"segment": 2}, {"invalid_mask": 1})

    return make


def grefcoco(root: Path) -> Made:
    refs, instances = _refs(root, "grefcoco")
    write(root / "grefs(unc).json", refs)
    write(root / "instances.json", instances)
    return Made({}, {"segment": 3})


def cocostuff(root: Path) -> Made:
    write(root / "labels.txt", b"0: unlabeled\n1: person\n2: bicycle\n3: car\n")
    for number in range(3):
        labels = np.full((HEIGHT, WIDTH), 255)
        labels[5:20, 5:20] = number
        write(root / f"train2017/{number:012d}.jpg", picture(number))
        write(root / f"stuffthingmaps/train2017/{number:012d}.png", mask_png(labels[: HEIGHT - (number == 2)]))
    return Made({}, {"segment": 2}, {"mask_size": 1})


def reasonseg(root: Path) -> Made:
    for number in range(3):
        corners = [[4, 4], [30, 4], [30, 30], [4, 30]]
        labels = {"text": ["what barks"], "is_sentence": False, "shapes": [{"label": "target", "points": corners}]}
        write(root / f"train/{number}.jpg", picture(number))
        write(root / f"train/{number}.json", labels if number < 2 else b'{"text": [')
    return Made({}, {"segment": 2}, {"invalid_json": 1})


FOLDERS: dict[str, Callable[[Path], Made]] = {
    "shapes": shapes,
    "pairs": pairs,
    "cc12m": cc12m,
    "instructpix2pix": instructpix2pix,
    "magicbrush": magicbrush,
    "advancededit": advancededit,
    "coco": coco,
    "refcoco": _refcoco("refcoco", "unc"),
    "refcoco+": _refcoco("refcoco+", "unc"),
    "refcocog": _refcoco("refcocog", "umd"),
    "grefcoco": grefcoco,
    "cocostuff": cocostuff,
    "reasonseg": reasonseg,
}
"""What makes each reader's folder."""
