"""RECIPES: how to train; RUNS: every weight the zoo wants, in the order of the training queue."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RECIPES", "RUNS", "Recipe", "Run"]


@dataclass(frozen=True)
class Recipe:
    """A YAML file for timm's train script.

    Attributes:
        name: Of ``recipes/data/<name>.yaml``.
        dataset: Key of ``chanzoo.weights.DATASETS``.
        title: One line: what and for how long.
    """

    name: str
    dataset: str
    title: str


@dataclass(frozen=True)
class Run:
    """One training run that makes one weight.

    Attributes:
        weight: ``arch.tag`` of the weight; wanted as long as it has no row.
        recipe: Key of :data:`RECIPES`.
        seed: Of the run.
        cost_hours: Estimated wall-clock hours: of one CPU core for ``cpu``, of one H100 for ``gpu``.
        device: Where the run is meant to happen.
        paper: Of the method or backbone.
        options: More options of the train script.
    """

    weight: str
    recipe: str
    seed: int
    cost_hours: float
    device: str
    paper: str
    options: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The architecture to train."""
        return self.weight.partition(".")[0]


_RESNET, _CE, _MBV2 = "arXiv:1512.03385", "arXiv:2003.00214", "arXiv:1801.04381"

RECIPES = {
    row.name: row
    for row in (
        Recipe("c10j_pad4_40e", "c10j", "CIFAR-10 (JPEG, padded), 40 epochs of SGD, cosine to zero, CPU"),
        Recipe("tin_100e", "tin", "Tiny ImageNet at 64×64, 100 epochs of SGD with a cosine to zero, GPU"),
    )
}

RUNS = (
    Run("cifar_resnet20.c10j", "c10j_pad4_40e", 0, 1.1, "cpu", _RESNET),
    Run("ce_cifar_resnet20.c10j", "c10j_pad4_40e", 0, 1.5, "cpu", _CE),
    Run("cifar_resnet20.s1_c10j", "c10j_pad4_40e", 1, 1.1, "cpu", _RESNET),
    Run("ce_cifar_resnet20.s1_c10j", "c10j_pad4_40e", 1, 1.5, "cpu", _CE),
    Run("cifar_resnet56.c10j", "c10j_pad4_40e", 0, 3.5, "cpu", _RESNET),
    Run("ce_cifar_resnet56.c10j", "c10j_pad4_40e", 0, 4.5, "cpu", _CE),
    Run("ce_resnet50.tin", "tin_100e", 0, 0.4, "gpu", _CE),
    Run("resnet50.tin", "tin_100e", 0, 0.3, "gpu", _RESNET),
    Run("ce_mobilenetv2.tin", "tin_100e", 0, 0.3, "gpu", _CE),
    Run("mobilenetv2_100.tin", "tin_100e", 0, 0.3, "gpu", _MBV2),
)
