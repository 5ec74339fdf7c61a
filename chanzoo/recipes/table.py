"""RECIPES: how to train; RUNS: every weight the zoo wants, in the order of the training queue."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CONDENSED", "RECIPES", "RUNS", "Recipe", "Run", "run_of"]

CONDENSED = "condensed_"  # before the tag of a weight that was trained in another form


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
        source: Weight that is pruned first, empty for none.
        prune: Options of ``chanzoo prune`` for that.
        condenses: Whether the network drops connections while it trains, and has to know for how long.
    """

    weight: str
    recipe: str
    seed: int
    cost_hours: float
    device: str
    paper: str
    options: tuple[str, ...] = ()
    source: str = ""
    prune: tuple[str, ...] = ()
    condenses: bool = False

    @property
    def model(self) -> str:
        """The architecture to train."""
        return self.weight.partition(".")[0]


_RESNET, _CE, _MBV2 = "arXiv:1512.03385", "arXiv:2003.00214", "arXiv:1801.04381"
_VGG, _HRANK = "arXiv:1409.1556", "arXiv:2002.10179"
_CONDENSE_V1, _CONDENSE, _SHUFFLE = "arXiv:1711.09224", "arXiv:2104.04382", "arXiv:1807.11164"

RECIPES = {
    row.name: row
    for row in (
        Recipe("c10j_pad4_40e", "c10j", "CIFAR-10 (JPEG, padded), 40 epochs of SGD, cosine to zero, CPU"),
        Recipe("c10j_pad4_24e", "c10j", "CIFAR-10 (JPEG, padded), 24 epochs: networks to prune, CPU"),
        Recipe("c10j_pad4_12e", "c10j", "CIFAR-10 (JPEG, padded), 12 epochs: dense networks, CPU"),
        Recipe("c10j_pad4_ft6e", "c10j", "CIFAR-10 (JPEG, padded), 6 epochs: after pruning, CPU"),
        Recipe("tin_24e", "tin", "Tiny ImageNet at 64×64, 24 epochs of SGD, cosine to zero, CPU"),
        Recipe("tin_ft20e", "tin", "Tiny ImageNet at 64×64, 20 epochs: after pruning, GPU"),
        Recipe("tin_100e", "tin", "Tiny ImageNet at 64×64, 100 epochs of SGD with a cosine to zero, GPU"),
    )
}


def _pruned(weight: str, source: str, share: str, recipe: str, cost: float, device: str) -> Run:
    """A run that prunes a weight and trains what is left; the tag says criterion and seed if not hrank, 0."""
    tag = weight.partition(".")[2]
    method = next((name for name in ("l1", "random") if f"{name}_" in tag), "hrank")
    options = ("--method", method, "--macs", share)
    if recipe.startswith("c10j_pad4"):
        options += ("--crop-pct", "0.8")  # of padded training images: the image itself
    return Run(weight, recipe, int("s1_" in tag), cost, device, _HRANK, source=source, prune=options)


_FT = "c10j_pad4_ft6e"
# Shares of the multiply-adds that stay, and what that is called.
_RESNET56 = [(f"{method}{seed}m63", "0.5x") for seed in ("", "s1_") for method in ("", "l1_", "random_")]
_RESNET56 += [(f"{method}m38", "0.3x") for method in ("", "l1_", "random_")]
_VGG16 = [(f"{method}m157", "0.5x") for method in ("", "l1_", "random_")]
_VGG16 += [(f"{method}m94", "0.3x") for method in ("", "l1_", "random_")]


def _condensing(weight: str, recipe: str, cost: float, device: str, *options: str) -> Run:
    """A run of a network that drops connections on its way."""
    paper = _CONDENSE_V1 if weight.startswith("condensenet_") else _CONDENSE
    seed = int(".s1_" in weight)
    return Run(weight, recipe, seed, cost, device, paper, options, condenses=True)


RUNS = (
    Run("cifar_resnet20.c10j", "c10j_pad4_40e", 0, 1.1, "cpu", _RESNET),
    Run("ce_cifar_resnet20.c10j", "c10j_pad4_40e", 0, 1.5, "cpu", _CE),
    Run("cifar_resnet20.s1_c10j", "c10j_pad4_40e", 1, 1.1, "cpu", _RESNET),
    Run("ce_cifar_resnet20.s1_c10j", "c10j_pad4_40e", 1, 1.5, "cpu", _CE),
    Run("cifar_resnet56.c10j", "c10j_pad4_24e", 0, 1.2, "cpu", _RESNET),
    Run("cifar_vgg16_bn.c10j", "c10j_pad4_24e", 0, 2.5, "cpu", _VGG),
    *(
        _pruned(f"hrank_cifar_resnet56.{tag}_c10j", "cifar_resnet56.c10j", share, _FT, 0.3, "cpu")
        for tag, share in _RESNET56
    ),
    Run("cifar_resnet56.ft_c10j", "c10j_pad4_ft6e", 0, 0.35, "cpu", _RESNET, ("--pretrained",)),
    *(
        _pruned(f"hrank_cifar_vgg16_bn.{tag}_c10j", "cifar_vgg16_bn.c10j", share, _FT, 0.4, "cpu")
        for tag, share in _VGG16
    ),
    Run("cifar_vgg16_bn.ft_c10j", "c10j_pad4_ft6e", 0, 0.7, "cpu", _VGG, ("--pretrained",)),
    Run("ce_cifar_resnet56.c10j", "c10j_pad4_24e", 0, 2.0, "cpu", _CE),
    _condensing("condensenetv2_cifar110.c10j", "c10j_pad4_12e", 2.5, "cpu"),
    _condensing("condensenet_cifar62.c10j", "c10j_pad4_12e", 1.4, "cpu"),
    _condensing("condensenetv2_cifar110.s1_c10j", "c10j_pad4_12e", 2.5, "cpu"),
    _condensing("condensenet_cifar62.s1_c10j", "c10j_pad4_12e", 1.4, "cpu"),
    _condensing("condensenetv2_a.tin", "tin_24e", 1.3, "cpu", "--amp"),
    _condensing("sfr_shufflenetv2_x0_5.tin", "tin_24e", 0.8, "cpu"),
    Run("shufflenetv2_x0_5.tin", "tin_24e", 0, 0.7, "cpu", _SHUFFLE),
    Run("ce_resnet50.tin", "tin_100e", 0, 0.4, "gpu", _CE),
    Run("resnet50.tin", "tin_100e", 0, 0.3, "gpu", _RESNET),
    Run("ce_mobilenetv2.tin", "tin_100e", 0, 0.3, "gpu", _CE),
    Run("mobilenetv2_100.tin", "tin_100e", 0, 0.3, "gpu", _MBV2),
    _pruned("hrank_resnet50.half_tin", "resnet50.tin", "0.5x", "tin_ft20e", 0.1, "gpu"),
    _condensing("condensenetv2_c.tin", "tin_100e", 0.5, "gpu"),
    _condensing("condensenetv2_b.tin", "tin_100e", 0.4, "gpu"),
    _condensing("sfr_shufflenetv2.tin", "tin_100e", 0.3, "gpu"),
    Run("shufflenetv2_x1_0.tin", "tin_100e", 0, 0.3, "gpu", _SHUFFLE),
    _pruned("narrow_cnn.ce_resnet50_half_tin", "ce_resnet50.tin", "0.5x", "tin_ft20e", 0.1, "gpu"),
)


def run_of(weight: str) -> Run | None:
    """The run that made a weight; ``arch.condensed_tag`` comes of the run of ``arch.tag``."""
    arch, _, tag = weight.partition(".")
    return next((run for run in RUNS if run.weight == f"{arch}.{tag.removeprefix(CONDENSED)}"), None)
