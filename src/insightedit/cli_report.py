"""The command `insightedit data report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from insightedit.console import Command, config_option, emit, json_option, open_workdir
from insightedit.platform.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from insightedit.jobs.report import DatasetReport
    from insightedit.platform.config import DatasetConfig, RunConfig

_GUESSED = ("instructpix2pix", "magicbrush", "pairs", "advancededit")
"""Readers of edits, in the order in which a folder is tried; the last one takes any JSON files."""


@click.command("report", cls=Command)
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the page and the figures.")
@click.option("--rows", type=click.IntRange(min=1), default=2000, show_default=True, help="Records of each, about.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which records.")
@click.option("--examples", type=click.IntRange(1, 6), default=3, show_default=True, help="Pairs of each kind shown.")
@click.option("--judge", "judging", is_flag=True, help="Have the judge of CONFIG score pairs that have no scores.")
@click.option("--tasks", type=click.IntRange(min=1), default=2, show_default=True, help="Tasks that read at a time.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="DATASET.OPTION=VALUE",
    help="Give a dataset's reader an option; repeatable.",
)
@config_option
@json_option
def data_report(
    datasets: Sequence[str],
    out: Path,
    rows: int,
    seed: int,
    examples: int,
    judging: bool,
    tasks: int,
    settings: Sequence[str],
    config: str,
    as_json: bool,
) -> None:
    """Draw what is in datasets: keywords, examples, figures side by side, scores.

    A DATASET is READER=FOLDER (see `data list`), a folder whose reader is found out, or a dataset's name in CONFIG.
    """
    from insightedit.display import Display
    from insightedit.jobs.report import report
    from insightedit.platform.config import load_preset
    from insightedit.platform.judges.choosing import build_judge

    run_config = load_preset(config)
    named = named_datasets(datasets, run_config, settings)
    judge = build_judge(run_config.evaluation.judge, open_workdir()) if judging else None
    with Display() as display:
        found = report(
            named,
            out,
            rows=rows,
            seed=seed,
            examples=examples,
            judge=judge,
            tasks=tasks,
            progress=lambda name, done, total: display.at(f"Read {name}", min(done, total), total),
        )
    emit(found, as_json, lambda: _show(found))


def named_datasets(given: Sequence[str], config: RunConfig, settings: Sequence[str]) -> dict[str, DatasetConfig]:
    """The datasets that the command line names, by the names that figures say.

    Raises:
        UsageError: a reader or a setting is unknown, or no reader is found for a folder.
        NotFoundError: there is neither a folder nor a dataset of a name.
    """
    from insightedit.platform.config import DatasetConfig, parse_setting

    found = [_dataset(one, config) for one in given]
    names = _names([name for name, _ in found], given)
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        path, value = parse_setting(setting)
        name, _, option = path.rpartition(".")
        if name not in chosen:
            raise UsageError(f"--set {setting}: there is no dataset {name!r}; there are {', '.join(chosen)}.")
        chosen[name][option] = value
    return {
        name: DatasetConfig(reader=one.reader, options={**one.options, **chosen[name]})
        for name, (_, one) in zip(names, found, strict=True)
    }


def _names(names: Sequence[str], given: Sequence[str]) -> list[str]:
    """The names, with what was given in brackets where two are the same.

    Raises:
        UsageError: something is given twice.
    """
    counts = Counter(names)
    told = [name if counts[name] == 1 else f"{name} ({one})" for name, one in zip(names, given, strict=True)]
    if len(set(told)) < len(told):
        raise UsageError(f"{Counter(told).most_common(1)[0][0]} is given twice; name each dataset once.")
    return told


def _dataset(given: str, config: RunConfig) -> tuple[str, DatasetConfig]:
    """The name and the config of one dataset."""
    from insightedit.platform.config import DatasetConfig
    from insightedit.platform.datasets import READERS

    reader, equals, folder = given.partition("=")
    if equals and reader in READERS:
        return reader, DatasetConfig(reader=reader, options={"root": folder})
    if given in config.data.datasets:
        return given, config.data.datasets[given]
    root = Path(given).expanduser().absolute()
    if not root.is_dir():
        known = ", ".join(config.data.datasets)
        raise NotFoundError(f"{given} is no folder, and {config.name} has no such dataset; its datasets are {known}.")
    return root.name, DatasetConfig(reader=_guess(root), options={"root": str(root)})


def _guess(root: Path) -> str:
    """The first reader of edits that finds its files in a folder.

    Raises:
        UsageError: none does.
    """
    from insightedit.platform.datasets import READERS

    for name in _GUESSED:
        try:
            if READERS[name].entries({"root": str(root)}):
                return name
        except (UsageError, NotFoundError):
            continue
    raise UsageError(f"No reader of edits finds its files in {root}; say which it is: READER={root}.")


def _show(found: DatasetReport) -> Iterable[str]:
    for one in found.datasets:
        kinds = ", ".join(f"{count} {kind}" for kind, count in one.kinds.items()) or "no edits"
        yield f"{one.name}: {one.records} records read, {one.bad} cannot be used; {kinds}"
        outside = f", {one.outside['psnr'].mean:.1f} dB outside the mask" if "psnr" in one.outside else ""
        yield (
            f"  {one.resolution[0]} x {one.resolution[1]} pixels, {one.instruction_words:.1f} words an instruction,"
            f" {one.vocabulary} different ones in {one.vocabulary_of}, {one.reasoning:.0%} with reasoning{outside}"
        )
    yield from (f"figure {name}: {file}" for name, file in found.figures.items())
    yield f"page: {found.page}"
