"""The model card: README.md of a repository on the Hub, from the same facts for every network.

Metadata first, in the Hub's own form, then a text for people. Equal facts give equal bytes: no date, and
nothing about the commit that the card becomes part of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from ..weights import DATASETS
from .families import family_of

__all__ = ["Facts", "Listed", "Measured", "model_card"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Measured:
    """Accuracy, measured from the very file that is published.

    Attributes:
        metrics: As fractions: ``top1``, ``top5``.
        split: Of the data.
        images: Images seen.
    """

    metrics: dict[str, float]
    split: str
    images: int


class Listed(NamedTuple):
    """A file beside the card."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Facts:
    """What a card is made from.

    Attributes:
        repo_id: ``ORG/REPO``.
        title: Of the card: ``arch.tag`` of a row, the name of the repository otherwise.
        arch: Registered name of the architecture.
        is_ours: Whether chanzoo registers it, rather than timm.
        params: Parameters.
        macs: Multiply-adds of one image.
        input_size: Channels, height, width.
        num_classes: Outputs.
        licence: Of the weights, as the Hub writes it.
        files: Every file of the repository but the card.
        dataset: A key of ``DATASETS``, a data set's name on the Hub, or empty.
        measured: None if nobody measured.
        command: Whole command line that made the weights, empty if unknown.
        remark: A sentence about how they were made.
        seed: Of the run, None if unknown.
        hours: Of the run, None if unknown.
        method: What compressed it, empty if nothing did.
        base_model: What it was made from, a repository on the Hub or another name, empty if unknown.
        paper: Of the method.
        published: What a paper reports for the nearest setting.
    """

    repo_id: str
    title: str
    arch: str
    is_ours: bool
    params: int
    macs: int
    input_size: tuple[int, int, int]
    num_classes: int
    licence: str
    files: tuple[Listed, ...]
    dataset: str = ""
    measured: Measured | None = None
    command: str = ""
    remark: str = ""
    seed: int | None = None
    hours: float | None = None
    method: str = ""
    base_model: str = ""
    paper: str = ""
    published: str = ""

    @property
    def data_title(self) -> str:
        """Name of the data set, for people."""
        if self.dataset in DATASETS:
            return DATASETS[self.dataset].title
        return self.dataset or "the publisher's own images"

    @property
    def data_hub_id(self) -> str:
        """Name of the data set on the Hub, empty if it has none."""
        if self.dataset in DATASETS:
            return DATASETS[self.dataset].hub_id
        return self.dataset if _HUB_ID.fullmatch(self.dataset) else ""


def model_card(facts: Facts) -> str:
    """The whole text of README.md."""
    from huggingface_hub import ModelCard

    sections = (
        f"# {facts.title}",
        _what(facts),
        _use(facts),
        _made(facts),
        _numbers(facts),
        _limits(facts),
        _files(facts),
        _licence(facts),
        _citation(facts),
    )
    return str(ModelCard(f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _metadata(facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    family = family_of(facts.arch)
    tags = ["image-classification", "timm", "chanzoo", *([family.tag] if family else [])]
    results = None
    if facts.measured:
        names = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("top_5_accuracy", "top-5 accuracy")}
        results = [
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=facts.dataset or "imagefolder",
                dataset_name=facts.data_title,
                dataset_split=facts.measured.split,
                metric_type=names[key][0],
                metric_name=names[key][1],
                metric_value=value,
            )
            for key, value in facts.measured.metrics.items()
        ]
    data = ModelCardData(
        license=facts.licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=tags,
        datasets=[facts.data_hub_id] if facts.data_hub_id else None,
        base_model=facts.base_model if _HUB_ID.fullmatch(facts.base_model) else None,
        metrics=["accuracy"] if results else None,
        model_name=facts.title if results else None,
        eval_results=results,
    )
    return data.to_yaml()


def _what(facts: Facts) -> str:
    family = family_of(facts.arch)
    if family:
        text = f"**{family.title}.** {family.text}"
    elif facts.is_ours:
        text = "A network of chanzoo, a plugin for timm."
    else:
        text = "A network of [timm](https://github.com/huggingface/pytorch-image-models), trained anew."
    size = "×".join(map(str, facts.input_size))
    return (
        f"{text}\n\n"
        f"- **Architecture**: `{facts.arch}`, with the arguments in `config.json`\n"
        f"- **Size**: {facts.params:,} parameters; {facts.macs:,} multiply-adds for one image of {size}\n"
        f"- **Outputs**: {facts.num_classes:,} classes"
    )


def _use(facts: Facts) -> str:
    if facts.is_ours:
        note = (
            "`import chanzoo` comes first: it makes the network known. Without it timm answers "
            f"`Unknown model ({facts.arch})`."
        )
    else:
        note = "The architecture is timm's own: it comes back without chanzoo too."
    return (
        "## Use\n\n"
        "```sh\npip install chanzoo\n```\n\n"
        "```python\nimport chanzoo\nimport timm\n\n"
        f'model = timm.create_model("hf-hub:{facts.repo_id}", pretrained=True).eval()\n```\n\n'
        f"{note} Size, mean, deviation and crop of the images are in the config:\n"
        "`timm.data.resolve_data_config({}, model=model)`."
    )


def _made(facts: Facts) -> str:
    parts = ["## How it was made"]
    if facts.command:
        parts.append(f"```sh\n{facts.command}\n```")
    else:
        parts.append("The command that made it is not recorded.")
    lines = [f"- **Data**: {facts.data_title}"]
    if facts.method:
        lines.append(f"- **Method**: {facts.method}")
    if facts.base_model:
        link = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
        lines.append(f"- **Made from**: {link if _HUB_ID.fullmatch(facts.base_model) else facts.base_model}")
    if facts.seed is not None:
        lines.append(f"- **Seed**: {facts.seed}")
    if facts.hours is not None:
        lines.append(f"- **Time**: {facts.hours} h")
    have = {file.path for file in facts.files}
    evidence = [f"`{name}`" for name in ("recipe.yaml", "summary.csv", "notes.md") if name in have]
    if evidence:
        lines.append(f"- **Evidence** beside this card: {', '.join(evidence)}")
    parts.append("\n".join(lines))
    if facts.remark:
        parts.append(facts.remark)
    return "\n\n".join(parts)


def _numbers(facts: Facts) -> str:
    parts = ["## Numbers", "### Ours"]
    if facts.measured:
        values = [facts.measured.metrics.get(key) for key in ("top1", "top5")]
        cells = [facts.data_title, facts.measured.split, f"{facts.measured.images:,}"]
        cells += ["" if value is None else f"{100 * value:.2f}" for value in values]
        parts.append(
            "Measured from the file in this repository.\n\n"
            "| data | split | images | top-1 % | top-5 % |\n|---|---|---|---|---|\n" + _line(cells)
        )
    else:
        parts.append("Nothing was measured: there is no accuracy to report.")
    parts.append("### Published")
    family = family_of(facts.arch)
    if facts.published:
        parts.append(f"By others, for the nearest setting: {facts.published}.")
    if family and family.published:
        parts.append(
            "By others, for the networks and data that the table names:\n\n"
            "| network | data | top-1 % | source |\n|---|---|---|---|\n"
            + "\n".join(_line(row) for row in family.published)
        )
    elif not facts.published:
        parts.append("No figure is published for this setting.")
    return "\n\n".join(parts)


def _limits(facts: Facts) -> str:
    dataset = DATASETS.get(facts.dataset)
    lines = [f"- {dataset.title}: {dataset.note}" if dataset else f"- Measured on {facts.data_title} only."]
    lines.append("- Numbers hold for the preprocessing in the config; another one gives others.")
    if facts.seed is not None:
        lines.append("- One run with one seed; other seeds give somewhat other numbers.")
    lines.append("- It tells the classes that it was trained on apart, and nothing else.")
    return "## Limits\n\n" + "\n".join(lines)


def _files(facts: Facts) -> str:
    lines = [_line([f"`{file.path}`", f"{file.size_bytes:,}", f"`{file.sha256}`"]) for file in facts.files]
    return "## Files\n\n| file | bytes | sha256 |\n|---|---|---|\n" + "\n".join(lines)


def _licence(facts: Facts) -> str:
    data = f"[{facts.data_hub_id}](https://huggingface.co/datasets/{facts.data_hub_id})"
    terms = f"its own terms apply, see {data}" if facts.data_hub_id else "its own terms apply"
    return f"## Licence\n\n- **Weights**: {facts.licence}\n- **Data** ({facts.data_title}): {terms}"


def _citation(facts: Facts) -> str:
    family = family_of(facts.arch)
    if family:
        text = f"```bibtex\n{family.citation}\n```"
    elif facts.paper:
        text = f"The paper of the network: {facts.paper}."
    else:
        text = "The paper of the network is named in timm's documentation."
    return f"## Citation\n\n{text}"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
