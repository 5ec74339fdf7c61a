"""The networks of the HRank papers: a base at the widths that a list of compress rates leaves.

Lin et al., "HRank: Filter Pruning using High-Rank Feature Map" (CVPR 2020, arXiv:2002.10179). A compress rate
is the fraction of filters that is removed from a layer. The published lists, which come with the authors'
later one-shot code, are accepted as they are written there: ``[0.]+[0.1]*3+[0.35]*16``. What is left of a
layer is counted as they count it, errors of floats included.

Every network takes ``compress_rate`` (see :func:`read_rates`) or ``widths`` (a table, the object that a file
holds, or the path of a file, see :func:`chanzoo.models.narrow.read_table`; the outputs of convolutions alone
will do). With neither it is its base. A saved one brings along what it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs, model_entrypoint, register_model
from torch import Tensor, nn

from ..errors import UsageError
from ..layers.masking import hold_masks
from ..layers.narrow import fill_widths
from ..store import parse_tensors
from ._build import arch_cfgs, build, cifar_cfg, imagenet_cfg
from .narrow import features_of, narrowed, read_table, record_args, refuse_path, without_memory

__all__ = ["HRANK_NAMES", "full_network", "keep_count", "read_rates", "short_widths", "widths_of_rates"]

_PAPER = "arXiv:2002.10179"
_NOTHING = "No network was built."


def keep_count(channels: int, rate: float, rule: str = "plus", least: int = 0) -> int:
    """How many filters stay when a fraction of them goes.

    The error of the floats is part of the published networks: 320 filters at rate 0.9 leave 31.

    Args:
        channels: Filters of the layer.
        rate: Fraction removed.
        rule: ``"plus"`` rounds the filters that stay down, ``"v1"`` those that go.
        least: So many stay in any case, if there are; 0 for an error where none would.

    Raises:
        UsageError: ``rate`` is outside [0, 1), ``rule`` is unknown, or no filter would stay.

    Source:
        The two releases of the code of arXiv:2002.10179 that its authors published.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"rate={rate}: expected a fraction of filters to remove, at least 0 and below 1.")
    if rule not in ("plus", "v1"):
        raise UsageError(f'rule="{rule}": expected "plus" or "v1".')
    keep = int(channels * (1 - rate)) if rule == "plus" else channels - int(rate * channels)
    keep = max(keep, min(least, channels))
    if keep < 1:
        raise UsageError(f"rate={rate} leaves none of {channels} filters.")
    return keep


def read_rates(rates: str | Sequence[float]) -> list[float]:
    """Read a list of rates in the authors' notation.

    Args:
        rates: Terms joined by ``+``, each ``[x]`` or ``[x]*n``, or the numbers themselves.

    Raises:
        UsageError: It is neither, or a rate is outside [0, 1); names the term.

    Example:
        >>> read_rates("[0.]+[0.18]*3")
        [0.0, 0.18, 0.18, 0.18]
    """
    found: list[Any] = []
    if isinstance(rates, str):
        for term in rates.split("+"):
            match = re.fullmatch(r"\s*\[\s*(\d*\.?\d+|\d+\.?)\s*\]\s*(?:\*\s*(\d{1,4}))?\s*", term)
            if not match:
                raise UsageError(
                    f"compress_rate={rates[:80]!r}: cannot read {term.strip()[:80]!r}.\n"
                    f"  expected  terms joined by +, each [x] or [x]*n, such as [0.]+[0.35]*16\n  {_NOTHING}"
                )
            found += [float(match[1])] * int(match[2] or 1)
    elif isinstance(rates, Sequence):
        found = list(rates)
    else:
        raise UsageError(
            f"compress_rate={rates!r}: expected a list of numbers or a text such as [0.]+[0.35]*16.\n"
            f"  {_NOTHING}"
        )
    for place, rate in enumerate(found):
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise UsageError(
                f"compress_rate: rate {place} is {rate!r}: expected a fraction of filters to remove, at "
                f"least 0 and below 1.\n  {_NOTHING}"
            )
    return [float(rate) for rate in found]


# From rates to the channels that convolutions put out, (name, full width, rate) each.
_Cuts = list[tuple[str, int, float]]


def _vgg16(r: Sequence[float]) -> _Cuts:
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512)  # the thirteenth stays
    places = [(stage, i) for stage, n in enumerate((2, 2, 3, 3, 2)) for i in range(n)]
    names = [f"stage{stage + 1}.{i + (stage > 0)}.conv" for stage, i in places]
    return list(zip(names, widths, r, strict=True))


def _cifar_resnet(blocks: int, r: Sequence[float]) -> _Cuts:
    inner = iter(r[3:])
    cuts: _Cuts = [("conv1", 16, r[0])]
    for stage, (width, rate) in enumerate(zip((16, 32, 64), (r[1], r[2], 0.0), strict=True), start=1):
        for block in range(blocks):
            cuts.append((f"layer{stage}.{block}.conv1", width, next(inner)))
            cuts.append((f"layer{stage}.{block}.conv2", width, rate))
    return cuts


def _densenet40(r: Sequence[float]) -> _Cuts:
    cuts: _Cuts = []
    width = 24
    for stage in range(3):
        if stage:  # a transition keeps a part of what is left of its inputs
            cuts.append((f"stage{stage + 1}.0.conv", width, r[13 * stage]))
            width = keep_count(width, r[13 * stage], least=1)
        for layer in range(1, 13):
            rate = r[13 * stage + layer]
            cuts.append((f"stage{stage + 1}.{layer}.conv", 12, rate))
            width += keep_count(12, rate, least=1)
    return cuts


def _googlenet(r: Sequence[float]) -> _Cuts:
    threes = (128, 192, 208, 224, 256, 288, 320, 320, 384)
    fives = (32, 96, 48, 64, 64, 64, 128, 128, 128)
    places = [(stage, i) for stage, n in enumerate((2, 5, 2)) for i in range(1, n + 1)]
    cuts: _Cuts = []
    for module, ((stage, i), three, five) in enumerate(zip(places, threes, fives, strict=True)):
        rate, is_last = r[module + 1], module == len(places) - 1
        path = f"stage{stage + 1}.{i}"
        cuts.append((f"{path}.branch3.1.conv", three, 0.0 if is_last else rate))
        cuts.append((f"{path}.branch5.1.conv", five, rate))
        cuts.append((f"{path}.branch5.2.conv", five, 0.0 if is_last else rate))
    return cuts


def _resnet50(r: Sequence[float]) -> _Cuts:
    inner = iter(r[4:])
    cuts: _Cuts = [("conv1", 64, r[0])]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width, rate = 128 * 2**stage, (*r[1:4], 0.0)[stage - 1]
        for block in range(blocks):
            path, inner_rate = f"layer{stage}.{block}", next(inner)
            cuts += [(f"{path}.conv1", width // 4, inner_rate), (f"{path}.conv2", width // 4, inner_rate)]
            cuts.append((f"{path}.conv3", width, rate))
            if block == 0:
                cuts.append((f"{path}.downsample.0", width, rate))
    return cuts


def _mobilenetv1(r: Sequence[float]) -> _Cuts:
    widths = (64, 128, 128, 256, 256, *[512] * 6, 1024)
    places = [(stage, i) for stage, n in enumerate((1, 2, 2, 6, 1)) for i in range(n)]
    names = [f"blocks.{stage}.{i}.conv_pw" for stage, i in places]
    return list(zip(names, widths, r[1:], strict=True))


def _mobilenetv2(r: Sequence[float]) -> _Cuts:
    cuts: _Cuts = []
    into = 32
    for stage, (blocks, width) in enumerate(
        zip((1, 2, 3, 4, 3, 3, 1), (16, 24, 32, 64, 96, 160, 320), strict=True)
    ):
        for block in range(blocks):
            path = f"blocks.{stage}.{block}"
            if stage:
                cuts.append((f"{path}.conv_pw", 6 * into, 0.0))
            cuts.append((f"{path}.{'conv_pwl' if stage else 'conv_pw'}", width, r[stage + 1]))
            into = keep_count(width, r[stage + 1], least=1)
    return cuts


@dataclass(frozen=True)
class _Net:
    """One network.

    Attributes:
        base: Registered name of the full network.
        rates: How many rates are used.
        cuts: From rates to the outputs of convolutions.
        cfg: Of the architecture.
        stride: By which features are smaller than the image.
        takes_more: Whether more rates than that are ignored, as the authors do, or an error.
        keeps_stem: Whether the first rate has to be 0.
        base_args: Arguments of the base.
    """

    base: str
    rates: int
    cuts: Callable[[Sequence[float]], _Cuts]
    cfg: dict[str, Any]
    stride: int = 32
    takes_more: bool = True
    keeps_stem: bool = False
    base_args: dict[str, Any] = field(default_factory=dict)


_MOBILE = imagenet_cfg(first_conv="conv_stem", classifier="classifier")
_NETS = {
    "hrank_cifar_vgg16_bn": _Net(
        "cifar_vgg16_bn", 12, _vgg16, cifar_cfg(16, first_conv="stage1.0.conv"), 16, takes_more=False
    ),
    "hrank_cifar_resnet56": _Net(
        "cifar_resnet56", 30, partial(_cifar_resnet, 9), cifar_cfg(), 4, keeps_stem=True
    ),
    "hrank_cifar_resnet110": _Net(
        "cifar_resnet110", 57, partial(_cifar_resnet, 18), cifar_cfg(), 4, keeps_stem=True
    ),
    "hrank_cifar_densenet40": _Net(
        "cifar_densenet40", 39, _densenet40, cifar_cfg(first_conv="stage1.0"), 4
    ),
    "hrank_cifar_googlenet": _Net(
        "cifar_googlenet", 10, _googlenet, cifar_cfg(first_conv="stage1.0.conv"), 4
    ),
    "hrank_resnet50": _Net("resnet50", 20, _resnet50, imagenet_cfg()),
    "hrank_mobilenetv1": _Net(
        "mobilenetv1_100", 13, _mobilenetv1, _MOBILE, base_args={"act_layer": "relu"}
    ),
    "hrank_mobilenetv2": _Net("mobilenetv2_100", 8, _mobilenetv2, _MOBILE),
}  # fmt: skip

HRANK_NAMES = {net.base: name for name, net in _NETS.items() if not net.base_args}
"""Base → the name under which it is saved when it was narrowed."""


def widths_of_rates(variant: str, compress_rate: str | Sequence[float]) -> dict[str, list[int]]:
    """The table of widths that a list of compress rates leaves.

    Args:
        variant: One of the names above.
        compress_rate: As :func:`read_rates` takes it.

    Raises:
        UsageError: Too few rates or too many, one that cannot be, or a layer that would be left empty.

    Source:
        The authors' one-shot code of arXiv:2002.10179.
    """
    return {name: list(sizes) for name, sizes in _table(variant, tuple(read_rates(compress_rate))).items()}


@lru_cache(maxsize=32)
def _table(variant: str, rates: tuple[float, ...]) -> dict[str, list[int]]:
    net = _NETS[variant]
    if len(rates) < net.rates or (len(rates) > net.rates and not net.takes_more):
        raise UsageError(
            f"compress_rate has {len(rates)} rates: {variant} takes {net.rates}"
            f"{' or more' if net.takes_more else ''}.\n  {_NOTHING}"
        )
    if net.keeps_stem and rates[0]:
        raise UsageError(
            f"compress_rate: rate 0 is {rates[0]}: expected 0, as the stem of {variant} stays whole.\n"
            f"  {_NOTHING}   Begin with [0.]"
        )
    outputs = {}
    for name, width, rate in net.cuts(rates[: net.rates]):
        try:
            outputs[name] = keep_count(width, rate)
        except UsageError as error:
            raise UsageError(
                f'compress_rate: layer "{name}" would be empty: {error}\n  {_NOTHING}   Lower its rate.'
            ) from error
    return fill_widths(full_network(variant), outputs)


def full_network(variant: str) -> nn.Module:
    """The base of one of the networks above, without memory."""
    net = _NETS[variant]
    return without_memory(partial(model_entrypoint(net.base), **net.base_args))


def short_widths(variant: str, widths: dict[str, list[int]]) -> dict[str, Any]:
    """Shorten a table of widths to the outputs of convolutions alone, where the rest follows from them.

    Args:
        variant: One of the names above.
        widths: Module name → sizes.

    Returns:
        Name of a convolution → outputs, which is a table for these networks too; or the table as it came.
    """
    full = full_network(variant)
    plain = [(n, m) for n, m in full.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    convs = {name: conv.out_channels for name, conv in plain}
    outputs = {name: sizes[0] for name, sizes in widths.items() if convs.get(name, sizes[0]) != sizes[0]}
    try:
        return outputs if fill_widths(full, outputs) == widths else widths
    except UsageError:
        return widths


def _read(variant: str, widths: Any, compress_rate: Any) -> dict[str, Any]:
    """The whole table of widths, in whichever way it was given."""
    if compress_rate is not None:
        if widths is not None:
            raise UsageError(
                f"{variant} was given both widths and compress_rate: expected one of them.\n  {_NOTHING}"
            )
        return widths_of_rates(variant, compress_rate)
    named, table = read_table(widths)
    base = _NETS[variant].base
    if named is not None and named.partition(".")[0] not in (variant, base):
        raise UsageError(
            "the table of widths is of another base.\n"
            f"  expected  {base} or {variant}\n  found     {named}\n  {_NOTHING}"
        )
    if table and all(isinstance(n, int) and not isinstance(n, bool) for n in table.values()):
        try:
            return fill_widths(full_network(variant), table)
        except UsageError as error:
            raise UsageError(str(error).replace("The network is unchanged.", _NOTHING)) from error
    return table


def _network(variant: str, widths: Any = None, compress_rate: Any = None, **kwargs: Any) -> nn.Module:
    refuse_path(widths)
    net = _NETS[variant]
    make_base = partial(model_entrypoint(net.base), pretrained=False, **{**net.base_args, **kwargs})
    return narrowed(net.base, make_base, _read(variant, widths, compress_rate))


def _create(
    variant: str,
    pretrained: bool,
    widths: Any = None,
    compress_rate: Any = None,
    masks: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    saved_args = kwargs.get("pretrained_model_args") or {}
    refuse_path(saved_args.get("widths"))
    if "masks" in saved_args:
        raise UsageError(
            f"masks={masks!r}: a saved network has its zeros, and no file of masks.\n  {_NOTHING}"
        )
    given = {"widths": _read(variant, widths, compress_rate)}
    if widths is None and compress_rate is None:
        given = {}  # the full network, or the widths of a row of the table of weights
    if kwargs.get("features_only"):
        kwargs = {**features_of(_NETS[variant].base), **kwargs}
    model = build(partial(_network, variant), variant, pretrained, **given, **kwargs)
    made_from: dict[str, Any] = {"compress_rate": compress_rate} if compress_rate is not None else given
    if not given:
        made_from = dict(getattr(model, "_model_args", {}))  # of a row of the table of weights
    record_args(model, made_from, widths)
    if masks is not None:
        hold_masks(model, _read_masks(masks))
        model.register_state_dict_pre_hook(_forget_masks)
    return model


def _forget_masks(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before weights are saved: the zeros are in them, and the file of masks is this machine's."""
    args: Any = getattr(model, "_model_args", {})
    model._model_args = {k: v for k, v in args.items() if k != "masks"}  # pyright: ignore[reportArgumentType]


def _read_masks(path: str | Path) -> dict[str, Tensor]:
    try:
        return parse_tensors(Path(path).read_bytes(), Path(path))
    except OSError as error:
        raise UsageError(f'cannot read the masks "{path}": {error.strerror}.\n  {_NOTHING}') from error


default_cfgs = generate_default_cfgs(
    {
        key: cfg
        for name, net in _NETS.items()
        for key, cfg in arch_cfgs(
            [name], {**net.cfg, "license": "apache-2.0", "paper_ids": _PAPER}, stride=net.stride
        ).items()
    }
)


@register_model
def hrank_cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 for 32×32 images, by 12 compress rates: one per convolution but the last."""
    return _create("hrank_cifar_vgg16_bn", pretrained, **kwargs)


@register_model
def hrank_cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32×32 images, by 30 rates: stem (0), outputs of stages 1 and 2, inner widths."""
    return _create("hrank_cifar_resnet56", pretrained, **kwargs)


@register_model
def hrank_cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for 32×32 images, by 57 rates: as ResNet-56."""
    return _create("hrank_cifar_resnet110", pretrained, **kwargs)


@register_model
def hrank_cifar_densenet40(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-40 for 32×32 images, by 39 rates: stem (ignored), then layers and transitions in order."""
    return _create("hrank_cifar_densenet40", pretrained, **kwargs)


@register_model
def hrank_cifar_googlenet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GoogLeNet for 32×32 images, by 10 rates: stem (ignored), then one per inception module."""
    return _create("hrank_cifar_googlenet", pretrained, **kwargs)


@register_model
def hrank_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50, by 20 rates: stem, outputs of stages 1 to 3, inner width of each block."""
    return _create("hrank_resnet50", pretrained, **kwargs)


@register_model
def hrank_mobilenetv1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV1 with ReLU, by 13 rates: stem (ignored), then the pointwise convolutions but the last."""
    return _create("hrank_mobilenetv1", pretrained, **kwargs)


@register_model
def hrank_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2, by 8 rates: stem (ignored), then the outputs of the seven stages."""
    return _create("hrank_mobilenetv2", pretrained, **kwargs)
