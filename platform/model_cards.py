"""Model cards: a page for each model version, out of its lineage and its evaluation, which the hub understands.

It is kept as the version's description in MLflow's registry, where people see it, and written into exported folders as
`README.md`. It is no part of what a version's manifest covers: an evaluation comes after the version, and changes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData
from mlflow.exceptions import MlflowException

from insightedit.platform.metrics import METRICS
from insightedit.platform.registry import ModelVersion, Registry

CARD_NAME: Final = "README.md"
TASK: Final = "image-to-image"
_LONGEST: Final = 5000
"""Characters that MLflow keeps of a description."""
_WORDINGS: Final = {"all": "all instructions", "simple": "simple instructions", "advanced": "advanced instructions"}
_CONTROLS: Final = {"copy_baseline": "the source unchanged", "shuffled": "instructions of other scenes"}
_FIGURES: Final = {"viescore": "VIEScore", "instruction": "S_i", "non_overedit": "S_n"}
_OUR_PARTS: Final = "package:"
"""How sources begin that come with the package and have its licence."""
_PIPELINE: Final = "InsightEditPipeline"
_MARK: Final = "insightedit"
"""The hub's tag of every card that is written here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What is known of a version beside its tags."""

    params: Mapping[str, str]
    """Of the training's run; empty where that is gone, or the version was imported."""
    figures: Mapping[str, float]
    """Of the evaluation's run, by dotted name."""
    decisions: Sequence[str]
    """What was decided about it, a sentence each."""


def model_card(registry: Registry, version: ModelVersion) -> str:
    """The card of a version: the hub's metadata as YAML, and a page in Markdown."""
    known = _known(registry, version)
    yaml = _metadata(version, known).to_yaml()
    return f"---\n{yaml}\n---\n\n{_page(version, known)}"


def keep_card(registry: Registry, version: ModelVersion) -> None:
    """Keep the page, as it is now, as the version's description in the registry.

    Without what was decided about the version: that goes on, and the registry shows its aliases anyway.
    """
    page = _page(version, replace(_known(registry, version), decisions=()))
    registry.client.update_model_version(version.name, version.version, page[:_LONGEST])


def write_card(registry: Registry, version: ModelVersion, folder: Path) -> Path:
    """Write the card into a folder with a version's files, in place of any that they brought along."""
    path = folder / CARD_NAME
    path.write_text(model_card(registry, version), encoding="utf-8")
    return path


def _known(registry: Registry, version: ModelVersion) -> Known:
    entries = registry.audit.entries()
    return Known(
        params=_run(registry, version.run_id).params,
        figures=_run(registry, version.tags.get("evaluation.run")).metrics,
        decisions=[
            f"{entry.when[:10]}: {entry.action} {entry.from_version or 'nothing'} to {entry.to_version}"
            for entry in entries
            if version.version in (entry.from_version, entry.to_version)
        ],
    )


@dataclass(frozen=True, slots=True)
class _Run:
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def _run(registry: Registry, run_id: str | None) -> _Run:
    """A run's params and metrics; none where there is no such run any more."""
    if run_id is None:
        return _Run({}, {})
    try:
        data: Any = registry.client.get_run(run_id).data
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return _Run({}, {})
    return _Run(dict(data.params), dict(data.metrics))


# -- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(version: ModelVersion, known: Known) -> ModelCardData:
    bases = _bases(known.params)
    licence = _licence(version, known.params)
    return ModelCardData(
        language="en",
        license=licence,
        license_name="of-the-base-models" if licence == "other" else None,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=[_MARK, "image-editing", "instruction-following", f"diffusers:{_class_of(version)}"],
        base_model=bases or None,
        datasets=_hub_names(known.params) or None,
        model_name=f"{version.name} {version.version}",
        eval_results=_results(version, known.figures) or None,
    )


def _results(version: ModelVersion, figures: Mapping[str, float]) -> list[EvalResult]:
    """The evaluation as the hub has it: each wording's VIEScore and its two parts, and the metrics beside."""
    found = {
        f"{title}, {words}": (name, figures[f"{group}.{name}"])
        for group, words in _WORDINGS.items()
        for name, title in _FIGURES.items()
        if f"{group}.{name}" in figures
    }
    found |= {
        metric.title: (name, figures[f"metric.{name}"])
        for name, metric in METRICS.items()
        if f"metric.{name}" in figures
    }
    dataset = _judged_on(version)
    return [
        EvalResult(
            task_type=TASK,
            task_name="Instruction-based image editing",
            dataset_type=dataset,
            dataset_name=f"{dataset}, {version.tags.get('evaluation.scenes', 'some')} scenes",
            metric_type=name,
            metric_name=title,
            metric_value=round(value, 6),
            metric_config=f"judge: {version.tags.get('evaluation.judge', 'unknown')}",
        )
        for title, (name, value) in found.items()
    ]


def _judged_on(version: ModelVersion) -> str:
    return version.tags.get("evaluation.benchmark", version.tags.get("evaluation.judge", "held-out scenes"))


def _bases(params: Mapping[str, str]) -> list[str]:
    """Models of the hub that it was made of, as OWNER/NAME."""
    sources = [value for name, value in params.items() if name.startswith("model.sources.")]
    return sorted({one for one in sources if re.fullmatch(r"[\w.-]+/[\w.-]+", one) and not Path(one).exists()})


def _hub_names(params: Mapping[str, str]) -> list[str]:
    """What the hub calls the datasets that it has."""
    readers = {value for name, value in params.items() if re.fullmatch(r"data\.datasets\.[^.]+\.reader", name)}
    return sorted(_ON_THE_HUB[reader] for reader in readers & _ON_THE_HUB.keys())


_ON_THE_HUB: Final = {"magicbrush": "osunlp/MagicBrush", "instructpix2pix": "timbrooks/instructpix2pix-clip-filtered"}


def _licence(version: ModelVersion, params: Mapping[str, str]) -> str:
    """Ours where every part comes with the package; else what an imported card says; else that of its base models."""
    sources = [value for name, value in params.items() if name.startswith("model.sources.") and value != "None"]
    if sources and all(source.startswith(_OUR_PARTS) for source in sources):
        return "apache-2.0"
    return version.tags.get("licence") or ("other" if sources else "unknown")


def stated_licence(card: Path) -> str | None:
    """The licence that a card's metadata names; None where there is no card, or it names none."""
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", _head(card), re.MULTILINE)
    return found[1] if found else None


def is_own_card(card: Path) -> bool:
    """Whether a file is a card that was written here."""
    return f"- {_MARK}\n" in _head(card)


def _head(card: Path) -> str:
    """A card's metadata, as it is written; empty where there is none."""
    if not card.is_file():
        return ""
    head = re.match(r"---\n(.*?\n)---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return head[1] if head else ""


def _class_of(version: ModelVersion) -> str:
    """The class that opens it; a version whose files lie in a store need not be here."""
    path = version.folder / "model_index.json"
    index: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(index.get("_class_name", version.tags.get("imported_class", _PIPELINE)))


# -- page -------------------------------------------------------------------------------------------------------------


def _page(version: ModelVersion, known: Known) -> str:
    parts = [
        f"# {version.name}, version {version.version}",
        _about(version, known),
        f"## Use\n\n{_use(version)}",
        f"## How well it edits\n\n{_quality(version, known.figures)}",
        f"## Where it comes from\n\n{_table(('', ''), _origin(version, known))}",
    ]
    if known.decisions:
        parts.append("## Decisions\n\n" + "\n".join(f"- {one}" for one in known.decisions))
    return "\n\n".join(parts) + "\n"


def _about(version: ModelVersion, known: Known) -> str:
    """What it is, and for what it is of no use."""
    said = "Edits images by written instructions: a source picture and a sentence in, the edited picture out."
    side = known.params.get("model.resolution")
    if side:
        said += f" It works at {side} pixels."
    readers = {value for name, value in known.params.items() if re.fullmatch(r"data\.datasets\.[^.]+\.reader", name)}
    if readers == {"shapes"}:
        said += " It knows nothing but the small world of coloured shapes that it was trained on: no photographs."
    if "imported_from" in version.tags:
        said += f" It was imported, not trained here: {version.tags.get('imported_reason') or 'no reason was given'}."
    return said


def _use(version: ModelVersion) -> str:
    name = _class_of(version)
    module = "insightedit.model.pipeline" if name == _PIPELINE else "diffusers"
    return (
        f"```python\nfrom PIL import Image\nfrom {module} import {name}\n\n"
        f'pipeline = {name}.from_pretrained("FOLDER")\n'
        'picture = Image.open("photo.png").convert("RGB")\n'
        'edited = pipeline("remove the red circle", image=picture).images[0]\n```\n\n'
        "Arguments are those of diffusers' InstructPix2Pix pipeline."
    )


def _quality(version: ModelVersion, figures: Mapping[str, float]) -> str:
    """The scores, beside them what doing nothing scores, and the metrics."""
    groups = {name: words for name, words in (_WORDINGS | _CONTROLS).items() if f"{name}.viescore" in figures}
    if not groups:
        return f"It was not evaluated: `insightedit evaluate {version.version}`."
    rows = [
        (words, *(_shown(figures.get(f"{group}.{name}"), name) for name in _FIGURES)) for group, words in groups.items()
    ]
    tasks = [
        (name.removeprefix("task.").removesuffix(".viescore"), f"{value:.3f}")
        for name, value in sorted(figures.items())
        if re.fullmatch(r"task\..+\.viescore", name)
    ]
    measured = [
        (metric.title, f"{figures[f'metric.{name}']:.4g}")
        for name, metric in METRICS.items()
        if f"metric.{name}" in figures
    ]
    scenes, judge = (version.tags.get(f"evaluation.{name}", "unknown") for name in ("scenes", "judge"))
    said = (
        f"On {scenes} held-out scenes, judged by `{judge}`. VIEScore is from 0 to 1; S_i (instruction followed) and S_n"
        " (the rest left alone) are from 0 to 5. The last rows are controls: what doing nothing scores, and this model"
        " on the instructions of other scenes."
    )
    tables = [_table(("", *_FIGURES.values()), rows), _table(("by task", "VIEScore"), tasks)]
    return "\n\n".join([said, *(one for one in (*tables, _table(("metric", ""), measured)) if one)])


def _shown(value: float | None, name: str) -> str:
    return "-" if value is None else f"{value:.{3 if name == 'viescore' else 2}f}"


def _origin(version: ModelVersion, known: Known) -> Iterator[tuple[str, str]]:
    tags, params = version.tags, known.params
    named = {"preset": "preset", "git_commit": "commit of the code"}
    if "imported_from" in tags:
        yield "imported from", f"`{Path(tags['imported_from']).name}`"  # its path is of this machine
    yield from ((words, f"`{tags[name]}`") for name, words in named.items() if tags.get(name))
    for part in ("diffusion", "image_encoder", "mllm"):
        source = params.get(f"model.sources.{part}")
        if source:
            yield part.replace("_", " "), f"`{source}`"
    for name, run in sorted(tags.items()):
        if name.startswith("stage_run."):
            number = name.removeprefix("stage_run.")
            yield f"stage {number}", f"{_stage(number, params)}run `{run}`"
    for name, fingerprint in sorted(tags.items()):
        if name.startswith("dataset."):
            reader = params.get(f"data.datasets.{name.removeprefix('dataset.')}.reader", "")
            yield f"dataset {name.removeprefix('dataset.')}", f"{reader} `{fingerprint[:16]}`".strip()
    hashes = {
        "config": "config",
        "weights": "weights",
        "manifest": "files",
        "evaluation.cases": "cases of the evaluation",
    }
    yield from ((f"sha256 of {words}", f"`{tags[name]}`") for name, words in hashes.items() if name in tags)
    yield "made", f"{version.created:%Y-%m-%d %H:%M} UTC"


def _stage(number: str, params: Mapping[str, str]) -> str:
    steps, batch = (params.get(f"stages.{number}.{name}") for name in ("steps", "global_batch"))
    return f"{steps} steps of {batch}, " if steps and batch else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; nothing where there are no rows."""
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines]) if lines else ""
