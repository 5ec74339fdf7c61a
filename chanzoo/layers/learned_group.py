"""Learned group convolution and sparse feature reactivation, as masks while they learn and condensed after.

Both layers are norm, activation and 1×1 convolution. A learned group convolution (CondenseNet, CVPR 2018,
arXiv:1711.09224) lets each of G groups of outputs keep 1/C of the inputs; a sparse reactivation (CondenseNet
V2, CVPR 2021, arXiv:2104.04382) lets each of G groups of new features update 1/C of the old ones. Which ones
is learned: the weakest are dropped in C − 1 stages. Afterwards each is a small grouped convolution and an
index. Differences from the authors' code: masks are compact and of booleans, several stages can be caught up
at once, nothing is dropped in evaluation, and the condensed reactivation adds at an index instead of
multiplying by a dense matrix, so it works for any G and C.
"""

# No postponed annotations here: scripting needs the type of forward's argument, not its name.

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_act_layer, get_norm_layer
from torch import Tensor, nn

from ..errors import UsageError
from .shuffle import channel_shuffle

__all__ = ["CondensedConv2d", "CondensedReactivation", "LearnedGroupConv2d", "SparseReactivation"]

_LASSO_FLOOR = 1e-6  # sums of squares below it count as this much and have no gradient

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _AddGradient(torch.autograd.Function):
    """The identity, with something added to the gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, addition: Tensor) -> Tensor:
        ctx.save_for_backward(addition)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (addition,) = ctx.saved_tensors
        return grad + addition, None


class _LearnedConv2d(nn.Module):
    """What the two layers share: a 1×1 convolution whose connections are dropped in stages.

    ``candidates`` is what a group can lose (inputs or outputs); ``_grouped`` lays the weight out as
    ``(groups, members, candidates)``.
    """

    mask: Tensor
    stage: Tensor
    drops_outputs = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        condensation_factor: int | None = None,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
        group_lasso: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the layer.

        Args:
            in_channels: Maps that come in.
            out_channels: Maps that go out.
            groups: The paper's G.
            condensation_factor: The paper's C: each group keeps one connection of so many; G if not given.
            act_layer: Activation, by timm's name or class.
            norm_layer: Norm, by timm's name or class. Only with a batch norm can the layer be condensed.
            group_lasso: Weight of the group lasso, whose gradient is added in training, at every backward:
                where a step has several, scale it down as the loss is.
            device: Where to create parameters and buffers.
            dtype: Type of parameters.

        Raises:
            UsageError: Groups or factor do not divide the channels, or the group lasso is negative.
        """
        super().__init__()
        if not group_lasso >= 0:
            raise UsageError(f"group_lasso={group_lasso}: expected 0 or more.\n  Nothing was built.")
        factor = groups if condensation_factor is None else condensation_factor
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.condensation_factor = groups, factor
        self.candidates = out_channels if self.drops_outputs else in_channels
        grouped = "in_channels" if self.drops_outputs else "out_channels"
        _check_divides(
            ("groups", groups, grouped, in_channels if self.drops_outputs else out_channels),
            ("condensation_factor", factor, self._dropped(), self.candidates),
        )
        self.group_lasso = group_lasso
        norm: Any = get_norm_layer(norm_layer)
        self.norm = norm(in_channels, device=device, dtype=dtype)
        self.act: Any = create_act_layer(act_layer, inplace=True)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1, device=device, dtype=dtype))
        shape = (out_channels, groups) if self.drops_outputs else (groups, in_channels)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=device))
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    @torch.jit.ignore()
    def _dropped(self) -> str:
        return "out_channels" if self.drops_outputs else "in_channels"

    @torch.jit.ignore()
    def reset_parameters(self) -> None:
        """Kaiming normal with fan out; masks stay."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore()
    def extra_repr(self) -> str:
        """The sizes."""
        sizes = f"{self.in_channels}, {self.out_channels}, groups={self.groups}"
        return f"{sizes}, condensation_factor={self.condensation_factor}"

    @torch.jit.ignore()
    def _grouped(self, weight: Tensor) -> Tensor:
        """View ``(groups, members, candidates)`` of a weight ``(out, in, 1, 1)``."""
        out, inputs = self.out_channels, self.in_channels
        if self.drops_outputs:
            return weight.view(out, inputs // self.groups, self.groups).permute(2, 1, 0)
        return weight.view(out // self.groups, self.groups, inputs).transpose(0, 1)

    @torch.jit.ignore()
    def alive(self) -> Tensor:
        """Which connections each group has left.

        Shape:
            ``(groups, candidates)`` of truth values; candidates are inputs, of a reactivation outputs.
        """
        return self.mask.t() if self.drops_outputs else self.mask

    @torch.jit.ignore()
    @torch.no_grad()
    def importance(self) -> Tensor:
        """Sum of the magnitudes of each group's weights at each candidate; 0 where dropped.

        Shape:
            ``(groups, candidates)``, at least 32-bit.

        Source:
            arXiv:1711.09224, section 3.1.
        """
        weight = self.masked_weight()
        return self._grouped(weight.abs()).to(torch.promote_types(weight.dtype, torch.float32)).sum(dim=1)

    @torch.jit.ignore()
    @torch.no_grad()
    def condense_to(self, stage: int) -> None:
        """Drop each group's weakest connections until ``stage`` shares of 1/C are gone; in place.

        Several stages at once give what they give one by one with the same weights. A stage that was reached
        already changes nothing. Of equals, the one with the lower index stays.

        Args:
            stage: 0 … C − 1.

        Raises:
            UsageError: There is no such stage.
        """
        if not 0 <= stage < self.condensation_factor:
            raise UsageError(
                f"stage {stage} of a layer with condensation_factor={self.condensation_factor}: "
                f"expected 0 … {self.condensation_factor - 1}.   No connection was dropped."
            )
        if stage <= int(self.stage):
            return
        alive = self.alive()
        keep = self.candidates - stage * (self.candidates // self.condensation_factor)
        score = self.importance().masked_fill(~alive, -1)
        strongest = score.sort(dim=1, descending=True, stable=True).indices[:, :keep]
        kept = torch.zeros_like(alive).scatter_(1, strongest, True)
        self.mask.copy_(kept.t() if self.drops_outputs else kept)
        self.stage.fill_(stage)

    @torch.jit.ignore()
    def is_condensed(self) -> bool:
        """Whether the last stage has been reached."""
        return int(self.stage) >= self.condensation_factor - 1

    @torch.jit.ignore()
    def lasso_penalty(self) -> Tensor:
        """Group lasso: the sum of the norms of each group's weights at each candidate.

        Zero once the last stage has been reached; what was dropped counts as a constant. For one's own loop;
        ``group_lasso`` adds its gradient under any.

        Shape:
            Scalar.

        Source:
            arXiv:1711.09224, section 3.1, with the floor of the authors' code. They stop at stage G − 1.
        """
        sums = self._grouped(self.masked_weight()).square().sum(dim=1)
        return sums.clamp(min=_LASSO_FLOOR).sqrt().sum() * (not self.is_condensed())

    @torch.jit.ignore()
    def _with_lasso(self, weight: Tensor) -> Tensor:
        kind = weight.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise UsageError(
                "group_lasso does not go with float16 autocast: the loss is scaled there, the lasso's "
                "gradient is not.\n  Use bfloat16 (train.py: --amp-dtype bfloat16), or group_lasso=0."
            )
        with torch.no_grad():
            sums = self._grouped(weight).square().sum(dim=1, keepdim=True)
            scale = sums.rsqrt().masked_fill(sums < _LASSO_FLOOR, 0) * self.group_lasso
            scale = scale * (self.stage < self.condensation_factor - 1)  # no look at the value: no waiting
            addition = torch.empty_like(weight)
            self._grouped(addition).copy_(self._grouped(weight) * scale)
        added: Any = _AddGradient.apply(weight, addition)
        return added

    @torch.jit.ignore()
    def _runs(self) -> tuple[Tensor, Tensor]:
        """Indices of what each group kept, ascending, and of the groups' own channels.

        Shape:
            ``(groups, candidates / C)`` and ``(groups, members)``.

        Raises:
            UsageError: A group has more or fewer left.
        """
        alive = self.alive()
        expected = self.candidates // self.condensation_factor
        counts = alive.sum(dim=1).tolist()
        for group, count in enumerate(counts):
            if count != expected:
                left = f"{count} of {self.candidates} {self._dropped()}"
                raise UsageError(
                    f"group {group} of {self.groups} has {left} left.\n"
                    f"  expected  {expected} (1 of {self.condensation_factor}), after stage "
                    f"{self.condensation_factor - 1}\n  found     stage {int(self.stage)}"
                )
        kept = alive.nonzero()[:, 1].view(self.groups, expected)
        channels = self.in_channels if self.drops_outputs else self.out_channels
        own = torch.arange(channels, device=kept.device).view(-1, self.groups).t()
        return kept, own

    @torch.jit.ignore()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse a mask that is neither: averaging makes fractions, of which any would count as left."""
        mask = state_dict.get(f"{prefix}mask")
        if isinstance(mask, Tensor) and mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            error_msgs.append(f'"{prefix}mask" holds fractions: was it averaged? Expected truth values.')
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def masked_weight(self) -> Tensor:
        """The weight with zeros where connections were dropped.

        Shape:
            ``(out, in, 1, 1)``.
        """
        raise NotImplementedError

    def convolve(self, x: Tensor) -> Tensor:
        """Norm, activation, masked convolution.

        Shape:
            x ``(b, in, h, w)`` → ``(b, out, h, w)``.

        Raises:
            UsageError: Group lasso and float16 autocast are both on: the loss is scaled there, the lasso's
                gradient is not.
        """
        weight = self.masked_weight()
        if not torch.jit.is_scripting() and self.training and self.group_lasso > 0:
            weight = self._with_lasso(weight)
        return F.conv2d(self.act(self.norm(x)), weight)


class LearnedGroupConv2d(_LearnedConv2d):
    """Norm, activation and 1×1 convolution that learns which inputs each group of outputs needs.

    Output ``o`` belongs to group ``o mod G``, which is a channel shuffle without one.

    Attributes:
        weight: ``(out, in, 1, 1)``, dense.
        mask: ``(G, in)`` of truth values; connections that are left.
        stage: Shares that were dropped, 0 … C − 1.

    Source:
        arXiv:1711.09224, section 3.1.
    """

    def masked_weight(self) -> Tensor:
        """The weight with zeros where connections were dropped.

        Shape:
            ``(out, in, 1, 1)``.
        """
        # A copy of the mask: the next forward may change it before this one's gradients are taken.
        mask = self.mask.to(self.weight.dtype)
        return (self.weight.view(-1, self.groups, self.in_channels) * mask).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Make new maps from old ones.

        Shape:
            x ``(b, in, h, w)`` → ``(b, out, h, w)``.
        """
        return self.convolve(x)

    @torch.jit.ignore()
    @torch.no_grad()
    def condensed(self) -> "CondensedConv2d":
        """The same function as a small grouped convolution; this layer is left as it is.

        Raises:
            UsageError: A group has not dropped all it has to, or the norm is no batch norm.
        """
        kept, own = self._runs()
        small = CondensedConv2d(
            self.in_channels, self.out_channels, self.groups, self.condensation_factor, **_place(self)
        )
        small.index.copy_(kept.flatten())
        small.norm = _gathered_norm(self.norm, small.index)
        small.act = copy.deepcopy(self.act)
        weight = self.weight.flatten(1)[own.unsqueeze(2), kept.unsqueeze(1)]  # (groups, members, kept)
        small.weight.copy_(weight.reshape(small.weight.shape))
        return _like(small, self)


class SparseReactivation(_LearnedConv2d):
    """Update of old maps by new ones, which learns which old ones each group of new ones should update.

    New map ``j`` belongs to group ``j mod G``.

    Attributes:
        weight: ``(old, new, 1, 1)``, dense.
        mask: ``(old, G)`` of truth values; connections that are left.
        stage: Shares that were dropped, 0 … C − 1.

    Source:
        arXiv:2104.04382, section 3.2.
    """

    drops_outputs = True

    def masked_weight(self) -> Tensor:
        """The weight with zeros where connections were dropped.

        Shape:
            ``(old, new, 1, 1)``.
        """
        grouped = self.weight.view(self.out_channels, -1, self.groups)
        mask = self.mask.to(self.weight.dtype)  # a copy, as in the learned group convolution
        return (grouped * mask.unsqueeze(1)).view_as(self.weight)

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        """Refresh old maps.

        Shape:
            new ``(b, in, h, w)``, old ``(b, out, h, w)`` → like old.
        """
        return old + self.convolve(new)

    @torch.jit.ignore()
    @torch.no_grad()
    def condensed(self) -> "CondensedReactivation":
        """The same function as a small grouped convolution; this layer is left as it is.

        Raises:
            UsageError: A group has not dropped all it has to.
        """
        kept, own = self._runs()
        small = CondensedReactivation(
            self.in_channels, self.out_channels, self.groups, self.condensation_factor, **_place(self)
        )
        small.index.copy_(kept.flatten())
        small.norm = copy.deepcopy(self.norm)
        small.act = copy.deepcopy(self.act)
        weight = self.weight.flatten(1)[kept.unsqueeze(2), own.unsqueeze(1)]  # (groups, kept, members)
        small.weight.copy_(weight.reshape(small.weight.shape))
        return _like(small, self)


class CondensedConv2d(nn.Module):
    """What a learned group convolution becomes: gather, norm, activation, grouped 1×1 convolution, shuffle.

    Attributes:
        index: ``(in · G / C,)``; the inputs of group 0 in ascending order, then group 1's, …
        weight: ``(out, in / C, 1, 1)``; row ``g · out / G + a`` makes output ``a · G + g``.

    Source:
        arXiv:1711.09224, section 3.2.
    """

    index: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        condensation_factor: int | None = None,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the layer; arguments as of :class:`LearnedGroupConv2d`. A fresh index spreads the inputs."""
        super().__init__()
        factor = groups if condensation_factor is None else condensation_factor
        _check_divides(
            ("groups", groups, "out_channels", out_channels),
            ("condensation_factor", factor, "in_channels", in_channels),
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.condensation_factor = groups, factor
        kept = in_channels // factor
        norm: Any = get_norm_layer(norm_layer)
        self.register_buffer("index", torch.arange(groups * kept, device=device) % in_channels)
        self.norm = norm(groups * kept, device=device, dtype=dtype)
        self.act: Any = create_act_layer(act_layer, inplace=True)
        self.weight = nn.Parameter(torch.empty(out_channels, kept, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore()
    def reset_parameters(self) -> None:
        """Kaiming normal with fan out; the index stays."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore()
    def extra_repr(self) -> str:
        """The sizes."""
        sizes = f"{self.in_channels}, {self.out_channels}, groups={self.groups}"
        return f"{sizes}, condensation_factor={self.condensation_factor}"

    def forward(self, x: Tensor) -> Tensor:
        """Make new maps from old ones.

        Shape:
            x ``(b, in, h, w)`` → ``(b, out, h, w)``.
        """
        x = self.act(self.norm(x.index_select(1, self.index)))
        return channel_shuffle(F.conv2d(x, self.weight, groups=self.groups), self.groups)


class CondensedReactivation(nn.Module):
    """What a sparse reactivation becomes: norm, activation, shuffle, grouped 1×1 convolution, indexed add.

    Attributes:
        index: ``(out · G / C,)``; the old maps that group 0 updates in ascending order, then group 1's, …
        weight: ``(out · G / C, in / G, 1, 1)``; column ``a`` of group g reads new map ``a · G + g``.

    Source:
        arXiv:2104.04382, section 3.2.
    """

    index: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        condensation_factor: int | None = None,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the layer; arguments as of :class:`SparseReactivation`. A fresh index spreads the outputs."""
        super().__init__()
        factor = groups if condensation_factor is None else condensation_factor
        _check_divides(
            ("groups", groups, "in_channels", in_channels),
            ("condensation_factor", factor, "out_channels", out_channels),
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.condensation_factor = groups, factor
        kept = out_channels // factor
        norm: Any = get_norm_layer(norm_layer)
        self.register_buffer("index", torch.arange(groups * kept, device=device) % out_channels)
        self.norm = norm(in_channels, device=device, dtype=dtype)
        self.act: Any = create_act_layer(act_layer, inplace=True)
        shape = (groups * kept, in_channels // groups, 1, 1)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore()
    def reset_parameters(self) -> None:
        """Kaiming normal with fan out; the index stays."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore()
    def extra_repr(self) -> str:
        """The sizes."""
        sizes = f"{self.in_channels}, {self.out_channels}, groups={self.groups}"
        return f"{sizes}, condensation_factor={self.condensation_factor}"

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        """Refresh old maps.

        Shape:
            new ``(b, in, h, w)``, old ``(b, out, h, w)`` → like old.
        """
        new = channel_shuffle(self.act(self.norm(new)), self.in_channels // self.groups)
        update = F.conv2d(new, self.weight, groups=self.groups)
        # Into zeros, not into the old maps: torch's ONNX export takes an index 0, 1, 2, … for an assignment.
        return old + torch.zeros_like(old, dtype=update.dtype).index_add(1, self.index, update)


def _check_divides(*rules: tuple[str, int, str, int]) -> None:
    """Raise unless each number divides its channels."""
    for name, value, of, channels in rules:
        if value < 1 or channels % value:
            usable = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
            raise UsageError(
                f"{name}={value} does not divide {of}={channels}.\n  usable: {usable}   ·   nothing was built"
            )


def _like(small: Any, layer: Any) -> Any:
    """A new layer in the mode of an old one; its norm and activation have theirs already."""
    small.training = layer.training
    small.weight.requires_grad_(layer.weight.requires_grad)
    return small


def _place(layer: Any) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


@torch.no_grad()
def _gathered_norm(norm: Any, index: Tensor) -> nn.Module:
    """A batch norm of the gathered channels.

    Raises:
        UsageError: It is another norm, whose statistics would not be those of the channels alone.
    """
    if type(norm) not in _BATCH_NORMS:  # a subclass may do more, such as timm's with an activation
        raise UsageError(
            f"its norm is a {type(norm).__name__}, whose channels cannot be taken apart.\n"
            "  expected  a batch norm"
        )
    small = nn.BatchNorm2d(
        len(index),
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    ).to(index.device)
    state = {
        key: value[index] if value.ndim == 1 else value.clone() for key, value in norm.state_dict().items()
    }
    for value in state.values():
        if value.is_floating_point():
            small.to(value.dtype)
    small.load_state_dict(state)
    for key, value in norm.named_parameters():
        small.get_parameter(key).requires_grad_(value.requires_grad)
    return small.train(norm.training)
