"""Parts in a row, pooling, classifier: timm's model contract for networks that are a chain."""

# No postponed annotations here: scripting needs the type of forward's argument, not its name.

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, get_act_layer, get_device_dtype, get_norm_layer
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .._timm import feature_take_indices, update_model_args
from ..layers.condensing import check_form
from ..layers.folding import fold_pairs

__all__ = ["ConvBlock", "StagedNet"]


class ConvBlock(nn.Module):
    """Convolution with bias, norm, activation; the size of the maps stays."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the block."""
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, **dd)
        self.bn = norm_layer(out_channels, **dd)
        self.act = act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run the three in turn.

        Shape:
            x ``(b, in, h, w)`` → ``(b, out, h, w)``.
        """
        return self.act(self.bn(self.conv(x)))

    def reparameterize(self) -> None:
        """Fold the norm into the convolution; called by ``timm.utils.reparameterize_model``."""
        fold_pairs(self)


class StagedNet(nn.Module):
    """Network of parts in a row that follows timm's model contract; a subclass makes the parts.

    Attributes:
        stage1: First of up to five stages; each but the first begins with a layer that halves the maps.
            Stages that a network does not have are empty. A subclass may name other parts in ``chain``.
        pre_logits: Hidden layers between pooling and classifier, on maps of any size.
        fc: The classifier.
    """

    if TYPE_CHECKING:  # scripting would want types that it knows
        stage1: Any
        stage2: Any
        stage3: Any
        stage4: Any
        stage5: Any
    chain: tuple[str, ...] = ("stage1", "stage2", "stage3", "stage4", "stage5")
    hidden = 0  # outputs of the hidden layer; 0 for none
    learns_connections = False  # by layers that the constructor makes

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the network.

        Args:
            num_classes: Outputs; 0 for no classifier.
            in_chans: Channels of the image.
            global_pool: Pooling before the classifier; empty for none, which leaves the outputs maps.
            drop_rate: Dropout before the classifier.
            act_layer: Activation, by timm's name or class.
            norm_layer: Norm, by timm's name or class.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.
        """
        super().__init__()
        place = {"device": device, "dtype": dtype}
        act: Any = get_act_layer(act_layer)
        norm: Any = get_norm_layer(norm_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self._types = (act, norm)
        self.feature_info: list[dict[str, Any]] = []
        parts = self._parts(in_chans, act, norm, place)
        for name in self.chain:  # a loop over parts could not be scripted
            setattr(self, name, parts.get(name, nn.Sequential()))
        self.num_features: int = self.feature_info[-1]["num_chs"]
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        pooled = self.num_features * self.global_pool.feat_mult()
        self.pre_logits = self._make_hidden(pooled, self.hidden, place)
        self.head_hidden_size: int = self._hidden_sizes()[1]
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()
        self.fc = nn.Linear(self.head_hidden_size, num_classes, **place) if num_classes > 0 else nn.Identity()
        self.init_weights()
        self.register_load_state_dict_pre_hook(check_form)

    @torch.jit.ignore()
    def _parts(self, in_chans: int, act: Any, norm: Any, place: dict[str, Any]) -> dict[str, nn.Module]:
        """The parts by their names in ``chain``; fills ``feature_info``."""
        stages, channels = self._layers(in_chans, act, norm, place)
        names = self.chain[: len(stages)]
        self.feature_info += [
            dict(num_chs=n, reduction=2**i, module=name)
            for i, (n, name) in enumerate(zip(channels, names, strict=True))
        ]
        return dict(zip(names, stages, strict=True))

    @torch.jit.ignore()
    def _layers(
        self, in_chans: int, act: Any, norm: Any, place: dict[str, Any]
    ) -> tuple[list[nn.Module], list[int]]:
        """The stages, and how many channels each puts out."""
        raise NotImplementedError

    @torch.jit.ignore()
    def _make_hidden(self, pooled: int, width: int, place: dict[str, Any]) -> nn.Module:
        """What comes between pooling and classifier.

        A 1×1 convolution is a linear layer that also takes maps that were not pooled.
        """
        return ConvBlock(pooled, width, 1, *self._types, **place) if width else nn.Identity()

    @torch.jit.ignore()
    def _hidden_sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the hidden layers."""
        convs = [module for module in self.pre_logits.modules() if isinstance(module, nn.Conv2d)]
        pooled = self.num_features * self.global_pool.feat_mult()
        return (convs[0].in_channels, convs[-1].out_channels) if convs else (pooled, pooled)

    @torch.jit.ignore()
    def init_weights(self) -> None:
        """Kaiming normal with fan in for convolutions, small normal for the classifier, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that split the parameters by depth, for layer-wise learning rates."""
        return dict(stem=r"^stage1\.0", blocks=r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)")

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training."""
        self.grad_checkpointing = enable

    @torch.jit.ignore()
    def note_condensed(self) -> None:
        """Called when the layers were condensed: from now on the network is built with ``condensed=True``."""
        if self.learns_connections:  # else it got its layers by hand, and no arguments build it
            self.condensed = True
            update_model_args(self, condensed=True)
            args: Any = self._model_args
            args.pop("total_steps", None)

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    @torch.jit.ignore()
    def _layers_of(self, name: str) -> Any:
        """What a part of the chain consists of, for checkpointing."""
        part: nn.Module = getattr(self, name)
        return part if isinstance(part, nn.Sequential) else [part]

    @torch.jit.ignore()
    def _checkpointed(self, x: Tensor) -> Tensor:
        return checkpoint_seq([self._layers_of(name) for name in self.chain], x, flatten=True)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; a hidden layer stays as long as it fits the pooling.

        Args:
            num_classes: Outputs of the new one; 0 for none.
            global_pool: Pooling; the current one is kept if not given. One that gives more features than
                before (``catavgmax``) gets a fresh hidden layer.
        """
        place: Any = get_device_dtype(self)
        kind = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=kind)
        pooled = self.num_features * self.global_pool.feat_mult()
        inputs, outputs = self._hidden_sizes()
        if inputs != pooled:
            self.pre_logits = self._make_hidden(pooled, outputs, place)
        self.head_hidden_size = self._hidden_sizes()[1]
        self.flatten = nn.Flatten(1) if kind else nn.Identity()
        self.fc = nn.Linear(self.head_hidden_size, num_classes, **place) if num_classes > 0 else nn.Identity()
        for part in (self.global_pool, self.pre_logits, self.flatten, self.fc):
            part.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features together with those of the stages.

        Args:
            x: Images ``(b, in_chans, h, w)``.
            indices: Last n levels for a number, all for None, else the levels themselves.
            norm: Accepted for timm; every level ends as it is.
            stop_early: Do not compute what no level needs.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Leave out the final features.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        names = [info["module"] for info in self.feature_info]
        take, last = feature_take_indices(len(names), indices)
        wanted = {names[level] for level in take}
        self._before_forward()
        taken = []
        for name in self.chain[: self.chain.index(names[last]) + 1] if stop_early else self.chain:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(self._layers_of(name), x)
            else:
                x = getattr(self, name)(x)
            if name in wanted:
                taken.append(x)
        return taken if intermediates_only else (x, taken)

    @torch.jit.ignore()
    def _before_forward(self) -> None:
        """What a network does before each forward."""

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop every layer behind the last wanted level.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Accepted for timm; there is no final norm.
            prune_head: Drop hidden layer and classifier as well; done anyway when a stage goes.
        """
        levels = len(self.feature_info)
        take, last = feature_take_indices(levels, indices)
        end = self.chain.index(self.feature_info[last]["module"])
        for name in self.chain[end + 1 :]:
            setattr(self, name, nn.Sequential())
        if prune_head or last < levels - 1:
            self.num_features = self.feature_info[last]["num_chs"]
            self.pre_logits = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features.

        Shape:
            x ``(b, in_chans, h, w)`` → ``(b, num_features, h', w')``, halved by each stage but the first.
        """
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self._checkpointed(x)
        return self.stage5(self.stage4(self.stage3(self.stage2(self.stage1(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features, run the hidden layer if there is one, classify.

        Shape:
            x ``(b, num_features, h, w)`` → ``(b, num_classes)``, or ``(b, head_hidden_size)`` before the
            classifier.
        """
        x = self.flatten(self.pre_logits(self.global_pool(x)))
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Shape:
            x ``(b, in_chans, h, w)`` → ``(b, num_classes)``.
        """
        return self.forward_head(self.forward_features(x))
